"""Whole training steps, fused against plain PyTorch against TRL's trainers, on the same answers.

    python -m bench.end_to_end [--trainers sft,rm,ppo,dpo,kto,grpo] [--device cpu|cuda]
                               [--precision auto|autocast|fp32] [--rounds N] [--variants fused,eager,trl]
                               [--model FOLDER|1b|3b|8b] [--layers N] [--memory GB]
                               [--plan] [--minutes M] [--resume] [--out DIR]

A step is forward, loss, backward, clipping and optimizer on answers that are given: sampling is left out. Everyone has
a process of its own; they take turns. Speed-ups are printed where the gradients' norms of the first step agree. The
model is SmolLM2-135M, one in a folder, or one made of a config (bench.sized: the widths of Llama 3, random weights,
layers computed again in the backward pass), with as many layers as let eager's step fit --memory; such models run one
after the other, for two of them would not fit.

The JSON (bench/results/end-to-end-{device}-{date}.json, end-to-end-1b-... for a model by its size) is written after
every trainer. The rows of the day's file on other trainers stay, so that they can be measured one by one; with --resume
those of this commit are not measured again. `python -m bench.report --performance` makes a table of it, of the models
by size `--gpu`, and `--plots` their plots. Exit status: 0 done; 2 there is no GPU; 3 trainers are left.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch

from rl4llm_fast.trainer.devices import multiplies_bf16

from . import plots, report, run, sized, timing, trainer_steps
from .base import ROOT
from .trainer_steps import VARIANTS

SIZES = {
    "cpu": {"prompts": 4, "prompt": 48, "group": 8, "answer": 48},
    "cuda": {"prompts": 16, "prompt": 128, "group": 8, "answer": 256},
}
# Of a model by its size: 8,192 tokens a step, as a micro-batch of such a model has.
SIZED = {"prompts": 2, "pairs": 8, "prompt": 256, "group": 8, "answer": 256}
TRAINERS = tuple(trainer_steps.MADE)
UNFINISHED = 3
_OUT_OF_MEMORY = 77  # the exit status of a process whose step found none
# For --plan: guesses at seconds of a process's start, imports and a model made, and of a step.
_START_S, _STEP_S = {"cpu": 40.0, "cuda": 30.0}, {"cpu": 8.0, "cuda": 3.0}


def measure(
    trainer: str,
    batch: dict[str, Any],
    model: str,
    precision: str,
    device: str,
    rounds: int,
    variants: Sequence[str] = VARIANTS,
    *,
    large: bool = False,
) -> list[Any]:
    """A row a variant; one that is absent or fails says why.

    large: layers are computed again in the backward pass, and one variant runs after the other.
    """
    known = variants_of(trainer, variants)
    rows = {name: {"trainer": trainer, "variant": name} for name in known}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "batch.json")
        path.write_text(json.dumps(batch), encoding="utf-8")
        command = [sys.executable, "-m", "bench.end_to_end", "--work", trainer]
        options = [str(path), model, precision, device, "recompute" if large else "keep"]
        for names in [[name] for name in known] if large else [known]:
            _take_turns({name: [*command, name, *options] for name in names}, rows, rounds, trainer, batch)
    return with_ratios(list(rows.values()), precision)


def variants_of(trainer: str, variants: Sequence[str]) -> list[str]:
    return [name for name in variants if name != "trl" or trainer in trainer_steps.TRL]


def _take_turns(
    commands: dict[str, list[str]], rows: dict[str, dict[str, Any]], rounds: int, trainer: str, batch: dict[str, Any]
) -> None:
    """Fill the rows of the variants whose processes these commands are."""
    from rl4llm_fast.trainer.compare import Worker, take_turns

    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    try:
        for name, command in commands.items():
            if name == "trl" and importlib.util.find_spec("trl") is None:
                rows[name].update(status="absent", reason="not installed: trl")
                continue
            workers[name] = Worker(name, command)
            try:
                workers[name].wait_until_ready()
            except RuntimeError as error:
                workers.pop(name).stop()
                failed[name] = str(error)
        for name, steps in take_turns(workers, rounds, failed).items():
            rows[name].update(cost(steps, trainer_steps.tokens_of(trainer, batch)))
        for name, reason in failed.items():
            out = reason.endswith(f"status {_OUT_OF_MEMORY}")
            rows[name].update(status="failed", reason="out of memory" if out else reason)
    finally:
        for worker in workers.values():
            worker.stop()


def cost(steps: Sequence[dict[str, float]], tokens: int) -> dict[str, Any]:
    """The first step of a process pays for its memory, and is the one whose gradient is compared."""
    seconds = [step["seconds"] for step in steps[1:] or steps]
    found = {f"{name}_s": timing.percentile(seconds, q) for name, q in (("median", 50), ("p20", 20), ("p80", 80))}
    return {
        "status": "ok",
        **found,
        "rounds": len(seconds),
        "tokens_per_s": tokens / found["median_s"],
        "extra_bytes": int(timing.percentile([step["peak"] - step["before"] for step in steps[1:] or steps], 50)),
        "peak_bytes": int(max(step["peak"] for step in steps)),
        "loss": steps[0]["loss"],
        "grad_norm": steps[0]["grad_norm"],
    }


def with_ratios(rows: list[dict[str, Any]], precision: str) -> list[dict[str, Any]]:
    """``speedup`` of fused over each row whose first gradient has the norm of fused's."""
    fused = next(row for row in rows if row["variant"] == "fused")
    for row in rows:
        if row is fused or "median_s" not in row or "median_s" not in fused:
            continue
        row["agrees"] = trainer_steps.agrees(row["grad_norm"], fused["grad_norm"], precision)
        if row["agrees"]:
            row["speedup"] = row["median_s"] / fused["median_s"]
    return rows


def work(arguments: Sequence[str]) -> None:
    """The other end of :func:`measure`: a process that takes steps."""
    from rl4llm_fast.trainer.compare import serve

    trainer, variant, path, model, precision, device, layers = arguments
    batch = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    if variant == "eager":
        trainer_steps.take_plain_logprobs()
    try:
        take = trainer_steps.make_step(trainer, variant, batch, model, precision, device, layers == "recompute")
    except torch.OutOfMemoryError:
        sys.exit(_OUT_OF_MEMORY)

    def step() -> dict[str, float]:
        start = time.perf_counter()
        try:
            values = take()  # they read the loss, so nothing is left on a GPU but the update
        except torch.OutOfMemoryError:
            sys.exit(_OUT_OF_MEMORY)
        if device == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start, **values}

    serve(step, torch.device(device))


def markdown(result: dict[str, Any]) -> str:
    """The rows as a table."""
    meta, lines = result["meta"], []
    lines += ["| step | | time | tokens/s | memory over the start | rl4llm_fast is |", "|---|---|---|---|---|---|"]
    if "model" in meta:  # weights and optimizer's state are most of it
        lines[0] = lines[0].replace("over the start", "at the peak")
    for row in result["rows"]:
        name = row["trainer"] + (f", {row['layers']} layers" if "layers" in row else "")
        if row["status"] != "ok":
            lines.append(f"| {name} | {row['variant']} | {row['status']}: {row['reason']} | – | – | – |")
            continue
        ratio = f"{row['speedup']:.2f}x" if "speedup" in row else "" if row["variant"] == "fused" else "other gradient"
        spread = f"{row['median_s']:.3g} s ({row['p20_s']:.3g} – {row['p80_s']:.3g})"
        memory = row["peak_bytes" if "model" in meta else "extra_bytes"]
        lines.append(
            f"| {name} | {row['variant']} | {spread} | {row['tokens_per_s']:,.0f} "
            f"| {memory / 2**20:,.0f} MiB | {ratio} |"
        )
    sizes, modified = meta["sizes"], ", with local changes" if meta["dirty"] else ""
    pairs = f"; {sizes['pairs']} prompts with 2 answers else" if "pairs" in sizes else ", else 2,"
    lines += [
        "",
        f"`{meta['command']}` on {meta['device']}, {meta['date']}, torch {meta['torch']}, TRL {meta['trl']}, "
        f"{meta['precision']}, commit {meta['git']}{modified}. {sizes['prompts']} prompts of up to {sizes['prompt']} "
        f"tokens, {sizes['group']} answers each for grpo and ppo{pairs} of up to {sizes['answer']} tokens; tokens/s "
        "counts each answer with its prompt. Sampling is not in it."
        + (f" {meta['model']}." if "model" in meta else ""),
    ]
    return "\n".join(lines)


def plan(
    chosen: Sequence[str], done: Sequence[str], variants: Sequence[str], rounds: int, device: str,
    layers: dict[str, int],
) -> str:  # fmt: skip
    """What would run, and for about how long: guesses, until a machine has said."""
    lines, total = [], 0.0
    for trainer in chosen:
        names = variants_of(trainer, variants)
        seconds = 0.0 if trainer in done else len(names) * (_START_S[device] + rounds * _STEP_S[device])
        total += seconds
        state = "done" if trainer in done else f"about {seconds / 60:.1f} min"
        how = f", {layers[trainer]} layers" if trainer in layers else ""
        lines.append(f"{trainer}{how}: {', '.join(names)}, {rounds} steps each, {state}")
    return "\n".join([*lines, f"in all about {total / 60:.0f} minutes (guessed)"])


def main(argv: Sequence[str] | None = None) -> int:
    if argv is None and sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(prog="python -m bench.end_to_end", description="Whole training steps, measured.")
    parser.add_argument("--trainers", default=",".join(TRAINERS), help="comma-separated; default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--precision",
        choices=("auto", "autocast", "fp32"),
        default="auto",
        help="of everyone's forward; auto: bf16 autocast where the device has instructions for it, else fp32",
    )
    parser.add_argument("--rounds", type=int, default=6, help="steps of each, the first not counted")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated; default: %(default)s")
    parser.add_argument(
        "--model", help=f"a folder that from_pretrained takes, or {', '.join(sized.CONFIGS)}; default: SmolLM2-135M"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="of a model by its size; default: what --memory holds")
    parser.add_argument("--memory", type=float, default=sized.MEMORY / 1e9, metavar="GB", help="default: %(default)g")
    parser.add_argument("--plan", action="store_true", help="print what would run and for how long, and stop")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no trainer after M minutes")
    parser.add_argument("--resume", action="store_true", help="keep this commit's rows of an earlier run")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "bench" / "results", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    chosen = [name for name in arguments.trainers.split(",") if name]
    unknown = sorted(set(chosen) - set(TRAINERS))
    if unknown or not chosen:
        parser.error(f"--trainers: wanted names among {', '.join(TRAINERS)}, got {arguments.trainers!r}")
    variants = [name for name in VARIANTS if name in arguments.variants.split(",")]
    if "fused" not in variants or len(variants) < len(arguments.variants.split(",")):
        parser.error(f"--variants: wanted fused and others among {', '.join(VARIANTS)}, got {arguments.variants!r}")
    if arguments.device == "cuda" and not torch.cuda.is_available() and not arguments.plan:
        print("--device cuda needs a GPU, and torch sees none here (torch.cuda.is_available() is False)")
        return 2
    if arguments.precision == "auto":
        arguments.precision = "autocast" if multiplies_bf16(torch.device(arguments.device)) else "fp32"
    try:
        layers = layers_of(arguments, chosen)
    except ValueError as error:
        parser.error(str(error))
    meta = _meta(arguments)
    path = arguments.out / f"{run.stem(meta)}.json"
    rows, same_commit = _earlier(path, meta, layers, arguments.resume)
    done = _done(rows, variants) if arguments.resume and same_commit else []
    if arguments.plan:
        print(plan(chosen, done, variants, arguments.rounds, arguments.device, layers))
        return 0
    result: dict[str, Any] = {"meta": meta, "rows": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    status, end = 0, time.monotonic() + 60 * (arguments.minutes or float("inf"))
    with tempfile.TemporaryDirectory() as folder:
        for trainer in (name for name in chosen if name not in done):
            if time.monotonic() >= end:
                status = UNFINISHED
                break
            print(f"{trainer}: {', '.join(variants)}, {arguments.rounds} steps each ...", file=sys.stderr, flush=True)
            result["rows"] = [row for row in result["rows"] if row["trainer"] != trainer]
            result["rows"] += _measure(trainer, arguments, variants, layers, pathlib.Path(folder))
            report.write_json(path, result)
    print(markdown(result))
    print(f"wrote {path}")
    if layers:
        print("\n".join(f"wrote {plot}" for plot in plots.draw(result, path.parent, path.stem)))
    if status == UNFINISHED:
        print("trainers are left: the same command with --resume goes on")
    return status


def layers_of(arguments: argparse.Namespace, chosen: Sequence[str]) -> dict[str, int]:
    """{trainer: layers} of a model by its size; {} of one in a folder. Raises ValueError where none fits."""
    if arguments.model not in sized.CONFIGS:
        return {}
    memory = arguments.memory * 1e9
    return {t: arguments.layers or sized.layers_that_fit(arguments.model, t, SIZED, memory) for t in chosen}


def _measure(
    trainer: str, arguments: argparse.Namespace, variants: list[str], layers: dict[str, int], folder: pathlib.Path
) -> list[dict[str, Any]]:
    """The rows of one trainer."""
    if layers:
        model = sized.save(folder / trainer, arguments.model, layers[trainer])
    else:
        model = arguments.model or _smollm2()
    batch = trainer_steps.make_batch(trainer, SIZED if layers else SIZES[arguments.device], _vocabulary(model))
    options = (model, arguments.precision, arguments.device, arguments.rounds, variants)
    rows: list[dict[str, Any]] = measure(trainer, batch, *options, large=bool(layers))
    return [row | {"layers": layers[trainer]} if layers else row for row in rows]


def _meta(arguments: argparse.Namespace) -> dict[str, Any]:
    command = f"python -m bench.end_to_end --device {arguments.device} --precision {arguments.precision}"
    by_size = arguments.model in sized.CONFIGS
    meta = {
        **run.environment(arguments.device if torch.cuda.is_available() else "cpu"),
        "suite": f"end-to-end-{arguments.model}" if by_size else "end-to-end",
        "command": command + (f" --model {arguments.model}" if by_size else ""),
        "precision": arguments.precision,
        "sizes": SIZED if by_size else SIZES[arguments.device],
        "trl": _trl_version(),
    }
    if by_size:
        config = sized.CONFIGS[arguments.model]
        meta["model"] = (
            f"The model: random weights, width {config['hidden_size']:,}, vocabulary {config['vocab_size']:,}, of "
            f"{config['num_hidden_layers']} layers as many as the table says, computed again in the backward pass"
        )
    return meta


def _earlier(
    path: pathlib.Path, meta: dict[str, Any], layers: dict[str, int], resume: bool
) -> tuple[list[dict[str, Any]], bool]:
    """The rows of the day's file, or to go on with of the newest one, as far as they are comparable; whether its commit
    is this one."""
    sources = [path] if path.is_file() else []
    if resume and not sources:
        sources = report.recorded(dict.fromkeys((path.parent, report.RESULTS)), meta["suite"])
    for _, before in report.alike(sources, meta, ("suite", "precision", "sizes", "torch", "device")):
        rows = [r for r in before["rows"] if r.get("layers") == layers.get(r["trainer"], r.get("layers"))]
        return rows, before["meta"]["git"] == meta["git"]
    return [], False


def _done(rows: Sequence[dict[str, Any]], variants: Sequence[str]) -> list[str]:
    """The trainers that have a row of each variant."""
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row["trainer"], set()).add(row["variant"])
    return [trainer for trainer, names in found.items() if names >= set(variants_of(trainer, variants))]


def _smollm2() -> str:
    from rl4llm_fast.trainer.smollm2 import model_folder

    return str(model_folder())


def _vocabulary(model: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).vocab_size)


def _trl_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("trl")
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
