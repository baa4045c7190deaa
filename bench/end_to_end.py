"""A whole training step on SmolLM2-135M, fused against plain PyTorch against TRL's trainers, on the same answers.

    python -m bench.end_to_end [--trainers sft,rm,ppo,dpo,kto,grpo] [--device cpu|cuda]
                               [--precision auto|autocast|fp32] [--rounds N] [--variants fused,eager,trl]
                               [--model FOLDER] [--out DIR]

A step is forward, loss, backward, clipping and optimizer on answers that are given: sampling is left out. Everyone has
a process of its own; they take turns. Speed-ups are printed where the gradients' norms of the first step agree. The
rows of the day's file on other trainers stay, so that they can be measured one by one.
`python -m bench.report --performance` makes a table of the JSON (bench/results/end-to-end-{device}-{date}.json).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from rl4llm_fast.trainer.devices import multiplies_bf16

from . import report, run, timing, trainer_steps
from .base import ROOT
from .trainer_steps import VARIANTS

SIZES = {
    "cpu": {"prompts": 4, "prompt": 48, "group": 8, "answer": 48},
    "cuda": {"prompts": 16, "prompt": 128, "group": 8, "answer": 256},
}
TRAINERS = tuple(trainer_steps.MADE)


def measure(
    trainer: str,
    batch: dict[str, Any],
    model: str,
    precision: str,
    device: str,
    rounds: int,
    variants: Sequence[str] = VARIANTS,
) -> list[Any]:
    """A row a variant; one that is absent or fails says why."""
    from rl4llm_fast.trainer.compare import Worker, take_turns

    known = [name for name in variants if name != "trl" or trainer in trainer_steps.TRL]
    rows = {name: {"trainer": trainer, "variant": name} for name in known}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "batch.json")
        path.write_text(json.dumps(batch), encoding="utf-8")
        command = [sys.executable, "-m", "bench.end_to_end", "--work", trainer]
        workers: dict[str, Worker] = {}
        try:
            for name in known:
                if name == "trl" and importlib.util.find_spec("trl") is None:
                    rows[name].update(status="absent", reason="not installed: trl")
                    continue
                workers[name] = Worker(name, [*command, name, str(path), model, precision, device])
                try:
                    workers[name].wait_until_ready()
                except RuntimeError as error:
                    workers.pop(name).stop()
                    rows[name].update(status="failed", reason=str(error))
            failed: dict[str, str] = {}
            for name, steps in take_turns(workers, rounds, failed).items():
                rows[name].update(cost(steps, trainer_steps.tokens_of(trainer, batch)))
            for name, reason in failed.items():
                rows[name].update(status="failed", reason=reason)
        finally:
            for worker in workers.values():
                worker.stop()
    return with_ratios(list(rows.values()), precision)


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
    import time

    from rl4llm_fast.trainer.compare import serve

    trainer, variant, path, model, precision, device = arguments
    batch = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    take = trainer_steps.make_step(trainer, variant, batch, model, precision, device)

    def step() -> dict[str, float]:
        start = time.perf_counter()
        values = take()  # they read the loss, so nothing is left on a GPU but the update
        if device == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start, **values}

    serve(step, torch.device(device))


def markdown(result: dict[str, Any]) -> str:
    """The rows as a table."""
    meta, lines = result["meta"], []
    lines += ["| step | | time | tokens/s | memory over the start | rl4llm_fast is |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        if row["status"] != "ok":
            lines.append(f"| {row['trainer']} | {row['variant']} | {row['status']}: {row['reason']} | – | – | – |")
            continue
        ratio = f"{row['speedup']:.2f}x" if "speedup" in row else "" if row["variant"] == "fused" else "other gradient"
        spread = f"{row['median_s']:.3g} s ({row['p20_s']:.3g} – {row['p80_s']:.3g})"
        lines.append(
            f"| {row['trainer']} | {row['variant']} | {spread} | {row['tokens_per_s']:,.0f} "
            f"| {row['extra_bytes'] / 2**20:,.0f} MiB | {ratio} |"
        )
    sizes, modified = meta["sizes"], ", with local changes" if meta["dirty"] else ""
    lines += [
        "",
        f"`{meta['command']}` on {meta['device']}, {meta['date']}, torch {meta['torch']}, TRL {meta['trl']}, "
        f"{meta['precision']}, commit {meta['git']}{modified}. {sizes['prompts']} prompts of up to {sizes['prompt']} "
        f"tokens, {sizes['group']} answers each for grpo and ppo, else 2, of up to {sizes['answer']} tokens; tokens/s "
        "counts each answer with its prompt. Sampling is not in it.",
    ]
    return "\n".join(lines)


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
    parser.add_argument("--model", help="a folder that from_pretrained takes; default: SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "bench" / "results", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    chosen = [name for name in arguments.trainers.split(",") if name]
    unknown = sorted(set(chosen) - set(TRAINERS))
    if unknown or not chosen:
        parser.error(f"--trainers: wanted names among {', '.join(TRAINERS)}, got {arguments.trainers!r}")
    variants = [name for name in VARIANTS if name in arguments.variants.split(",")]
    if "fused" not in variants or len(variants) < len(arguments.variants.split(",")):
        parser.error(f"--variants: wanted fused and others among {', '.join(VARIANTS)}, got {arguments.variants!r}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a GPU, and torch sees none here (torch.cuda.is_available() is False)")
        return 2
    if arguments.precision == "auto":
        arguments.precision = "autocast" if multiplies_bf16(torch.device(arguments.device)) else "fp32"
    model = arguments.model or _smollm2()
    sizes = SIZES[arguments.device]
    meta = {
        **run.environment(arguments.device),
        "suite": "end-to-end",
        "command": f"python -m bench.end_to_end --device {arguments.device} --precision {arguments.precision}",
        "precision": arguments.precision,
        "sizes": sizes,
        "trl": _trl_version(),
    }
    result: dict[str, Any] = {"meta": meta, "rows": []}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{run.stem(meta)}.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        same = all(before["meta"].get(key) == meta[key] for key in ("precision", "sizes", "torch", "device"))
        result["rows"] = [row for row in before["rows"] if same and row["trainer"] not in chosen]
    for trainer in chosen:
        print(f"{trainer}: {', '.join(variants)}, {arguments.rounds} steps each ...", file=sys.stderr, flush=True)
        batch = trainer_steps.make_batch(trainer, sizes, _vocabulary(model))
        result["rows"] += measure(
            trainer, batch, model, arguments.precision, arguments.device, arguments.rounds, variants
        )
        report.write_json(path, result)
    print(markdown(result))
    print(f"wrote {path}")
    return 0


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
