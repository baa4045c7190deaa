"""The longest answers of a whole GRPO step before memory runs out, fused, eager, TRL: ``python -m bench.context``.

    python -m bench.context [--model 1b|3b|8b] [--layers N] [--memory GB] [--variants fused,eager,trl]
                            [--plan] [--minutes M] [--again] [--out DIR]

The batch is one prompt with eight answers, all equally long; the model is made of a config (bench.sized), its layers
are computed again in the backward pass, and weights, gradients and Adam's moments lie beside the step. --memory holds
a GPU of more to that many GB. As in bench.capacity the length doubles until the allocator refuses, then the gap is
halved down to a sixteenth. The longest is then taken twice more, and the second of these is timed: the search's own
steps pay for kernels and fresh memory. Each variant has a process of its own.
bench/results/context-{model}-{device}-{date}.json is written after every step that was tried, and the same command goes
on where it stopped. Exit status: 0 done; 2 there is no GPU; 3 steps are left.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import capacity, plots, report, run, sized, timing, trainer_steps
from .base import ROOT
from .end_to_end import UNFINISHED, VARIANTS
from .verify import NO_GPU, Clock

FIRST = 512  # tokens of an answer
SIZES = {"prompts": 1, "prompt": 128, "group": 8, "answer": FIRST}
# For --plan: guesses at seconds of a process's start, and of all the steps that one variant tries.
_START_S, _SEARCH_S = 30.0, 120.0


class OutOfTime(Exception):
    """No further step may start."""


def batch_of(answer: int, vocabulary: int) -> dict[str, Any]:
    """One prompt, and answers of ``answer`` tokens each."""
    generator = torch.Generator().manual_seed(answer)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    prompts = [tokens(SIZES["prompt"]) for _ in range(SIZES["prompts"])]
    answers = [tokens(answer) for _ in prompts for _ in range(SIZES["group"])]
    advantages = torch.linspace(-1, 1, len(answers)).tolist()
    return {"prompts": prompts, "group_size": SIZES["group"], "answers": answers, "advantages": advantages}


def longest(
    found: dict[str, Any], probe: Callable[[int], dict[str, Any]], most: int, save: Callable[[], object], clock: Clock
) -> int:
    """The longest answers that fit, to a sixteenth, by ``probe`` and what ``found["probes"]`` knows already.

    Raises:
        OutOfTime: the clock is over, and a length is left to be tried.
    """

    def fits(answer: int) -> bool:
        if answer > most:  # positions that the model does not have
            return False
        known = next((tried for tried in found["probes"] if tried["answer"] == answer), None)
        if known is None:
            if clock.over:
                raise OutOfTime
            known = {"answer": answer, **probe(answer)}
            found["probes"].append(known)
            save()
        return bool(known["fits"])

    return capacity.largest(fits, FIRST)


def warm(probe: Callable[[int], dict[str, Any]], answer: int) -> float | None:
    """Seconds of a step at that length, behind one that pays for kernels and memory; None if they do not fit again."""
    first, second = probe(answer), probe(answer)
    return float(second["seconds"]) if first["fits"] and second["fits"] else None


def prober(
    variant: str, model: str, precision: str, device: str, vocabulary: int
) -> Callable[[int], dict[str, Any]]:  # fmt: skip
    """A function that takes a step at a length and says whether it found its memory, how much, and in what time."""
    take, forget = trainer_steps.make_grpo(variant, batch_of(1, vocabulary), model, precision, device, True)

    def probe(answer: int) -> dict[str, Any]:
        batch = batch_of(answer, vocabulary)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            take(batch)
            if device == "cuda":
                torch.cuda.synchronize()  # the update of the weights is still on its way
            fits = True
        except RuntimeError as error:
            if not timing.out_of_memory(error):
                raise
            fits = False
        seconds = round(time.perf_counter() - start, 2)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        if not fits:
            forget()
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
        return {"fits": fits, "seconds": seconds, "peak_bytes": peak}

    return probe


def work(arguments: Sequence[str]) -> int:
    """One variant's process: search, writing the result after each step that was tried."""
    variant, file, model, minutes = arguments
    path = pathlib.Path(file)
    result = json.loads(path.read_text(encoding="utf-8"))
    meta, clock = result["meta"], Clock(float(minutes))
    found = result["variants"].setdefault(variant, {"probes": []})
    found["status"] = "begun"
    if meta["device_kind"] == "cuda":  # a larger GPU is held to what a smaller one has
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, meta["memory_bytes"] / total))
    probe = prober(variant, model, meta["precision"], meta["device_kind"], meta["vocabulary"])

    def save() -> None:
        report.write_json(path, result)

    try:
        found["longest"] = longest(found, probe, meta["most"], save, clock)
        if found["longest"]:
            if clock.over:
                return UNFINISHED
            found["seconds"] = warm(probe, found["longest"])
        found["status"] = "ok"
    except OutOfTime:
        return UNFINISHED
    finally:
        save()
    return 0


def measure(result: dict[str, Any], path: pathlib.Path, model: str, variants: Sequence[str], clock: Clock) -> int:
    """A process a variant that has no answer yet. Returns the command's exit status."""
    for variant in variants:
        found = result["variants"].get(variant, {})
        if found.get("status") in ("ok", "absent"):
            continue
        if variant == "trl" and importlib.util.find_spec("trl") is None:
            result["variants"][variant] = {"status": "absent", "reason": "not installed: trl", "probes": []}
            report.write_json(path, result)
            continue
        if clock.over:
            return UNFINISHED
        print(f"{variant} ...", file=sys.stderr, flush=True)
        report.write_json(path, result)
        command = [sys.executable, "-m", "bench.context", "--work", variant, str(path), model, str(clock.minutes_left)]
        # Lengths change from step to step: with segments that grow, what one left does not stand in another's way.
        environment = {**os.environ, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        code = subprocess.run(command, env=environment, cwd=ROOT).returncode
        result.update(json.loads(path.read_text(encoding="utf-8")))
        if code == UNFINISHED:
            return UNFINISHED
        if code:
            reason = f"its process ended with status {code}"
            result["variants"].setdefault(variant, {"probes": []}).update(status="failed", reason=reason)
            report.write_json(path, result)
    return 0


def markdown(result: dict[str, Any]) -> str:
    """A row a variant."""
    meta, variants = result["meta"], result["variants"]
    fused = variants.get("fused", {}).get("longest")
    lines = [
        "| | longest answers | tokens of the step | its time | peak memory | fused takes |",
        "|---|---|---|---|---|---|",
    ]
    for name, of in variants.items():
        if of["status"] != "ok":
            lines.append(
                f"| {name} | {of['status']}" + (f": {of['reason']}" if "reason" in of else "") + " | – | – | – | – |"
            )
            continue
        last = next((probe for probe in of["probes"] if probe["answer"] == of["longest"]), None)
        if last is None:
            lines.append(f"| {name} | fewer than {FIRST:,} | – | – | – | – |")
            continue
        tokens = SIZES["group"] * (SIZES["prompt"] + of["longest"])
        seconds = "–" if of.get("seconds") is None else f"{of['seconds']:.3g} s"
        times = "" if name == "fused" or not fused else f"{fused / of['longest']:.1f}x as many"
        lines.append(
            f"| {name} | {of['longest']:,} | {tokens:,} | {seconds} | {last['peak_bytes'] / 2**30:.1f} GiB | {times} |"
        )
    modified = ", with local changes" if meta["dirty"] else ""
    lines += [
        "",
        f"`{meta['command']}` on {meta['device']}, of whose memory {meta['memory_bytes'] / 2**30:.0f} GiB are used, "
        f"{meta['date']}, torch {meta['torch']}, {meta['precision']}, commit {meta['git']}{modified}: a GRPO step of "
        f"{SIZES['prompts']} prompt of {SIZES['prompt']} tokens with {SIZES['group']} answers, a model of random "
        f"weights, width {meta['width']:,}, {meta['layers']} layers and a vocabulary of {meta['vocabulary']:,}, its "
        "layers computed again in the backward pass; Adam in fp32. Its time is that of the second step of that length.",
    ]
    return "\n".join(lines)


def plan(result: dict[str, Any], variants: Sequence[str]) -> str:
    """What would run, and for about how long."""
    lines, total = [], 0.0
    for variant in variants:
        found = result["variants"].get(variant, {"probes": []})
        done = found.get("status") in ("ok", "absent")
        seconds = 0.0 if done else _START_S + _SEARCH_S
        total += seconds
        tried = f", {len(found['probes'])} lengths are known" if found["probes"] else ""
        lines.append(f"{variant}: {'done' if done else f'about {seconds / 60:.1f} min'}{tried}")
    meta = result["meta"]
    lines.append(f"{meta['layers']} layers of width {meta['width']:,}; in all about {total / 60:.0f} minutes (guessed)")
    return "\n".join(lines)


def load(folders: Sequence[pathlib.Path], meta: dict[str, Any]) -> tuple[pathlib.Path | None, dict[str, Any]]:
    """The newest result of the same command, commit and machine, with its path, or an empty one."""
    same = ("command", "device", "git", "torch", "layers", "precision")
    found = report.alike(report.recorded(folders, meta["suite"]), meta, same)
    return next(found, (None, {"meta": meta, "variants": {}}))


def main(argv: Sequence[str] | None = None) -> int:
    if argv is None and sys.argv[1:2] == ["--work"]:
        return work(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m bench.context", description="The longest answers that fit.")
    parser.add_argument("--model", choices=tuple(sized.CONFIGS), default="1b", help="default: %(default)s")
    parser.add_argument(
        "--layers", type=int, metavar="N", help="default: those with which eager's first step fits 80 GB"
    )
    parser.add_argument("--memory", type=float, metavar="GB", help="use that much of the GPU's; default: all of it")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated; default: %(default)s")
    parser.add_argument("--plan", action="store_true", help="print what would run and for how long, and stop")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no step after M minutes; run again to go on")
    parser.add_argument("--again", action="store_true", help="forget what is known, and start over")
    parser.add_argument("--out", type=pathlib.Path, default=report.RESULTS, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    variants = [name for name in VARIANTS if name in arguments.variants.split(",")]
    if len(variants) < len(arguments.variants.split(",")):
        parser.error(f"--variants: wanted names among {', '.join(VARIANTS)}, got {arguments.variants!r}")
    gpu = torch.cuda.is_available()
    if not gpu and not arguments.plan:
        print("this needs a GPU, and torch sees none here (--plan shows what would run)")
        return NO_GPU
    config = sized.CONFIGS[arguments.model]
    total = torch.cuda.get_device_properties(0).total_memory if gpu else 0
    layers = arguments.layers or sized.layers_that_fit(arguments.model, "grpo", SIZES)
    meta = {
        **run.environment("cuda" if gpu else "cpu"),
        "suite": f"context-{arguments.model}",
        "command": f"python -m bench.context --model {arguments.model}"
        + (f" --memory {arguments.memory:g}" if arguments.memory else ""),
        "precision": "autocast",
        "width": config["hidden_size"],
        "vocabulary": config["vocab_size"],
        "layers": layers,
        "most": config["max_position_embeddings"] - SIZES["prompt"],
        "memory_bytes": int(min(total, 1e9 * (arguments.memory or float("inf")))),
    }
    known, result = load((arguments.out, report.RESULTS), meta)
    if arguments.again:
        known, result = None, {"meta": meta, "variants": {}}
    if arguments.plan:
        print(plan(result, variants))
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / (f"{run.stem(meta)}.json" if known is None else known.name)
    with tempfile.TemporaryDirectory() as folder:
        model = sized.save(pathlib.Path(folder), arguments.model, layers)
        status = measure(result, path, model, variants, Clock(arguments.minutes))
    print(markdown(result))
    print("\n".join(f"wrote {written}" for written in (path, *plots.draw(result, path.parent, path.stem))))
    if status == UNFINISHED:
        print("steps are left: the same command (without --again) goes on")
    return status


if __name__ == "__main__":
    sys.exit(main())
