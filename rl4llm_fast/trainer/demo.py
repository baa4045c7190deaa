"""The demo: a real language model learns arithmetic through the fused ops; then one step, fused and in plain PyTorch.

    rl4llm-fast demo        or        python -m rl4llm_fast.trainer.demo

SmolLM2-135M-Instruct, sums and differences of two one-digit numbers. 64 of the 200 questions are held out: training
never sees them. Cut off, it goes on from its last checkpoint; finished, it starts anew.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import checkpoint
from .batch import Batch, joined
from .compare import Cost, compare, write_batch
from .config import GRPOConfig
from .extras import require
from .grpo import GRPOTrainer
from .smollm2 import model_folder

_DONE, _BEFORE, _BATCH = "demo.json", "before.json", "compare.json"
_TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def demo_config(folder: Path, device: torch.device, steps: int = 0) -> GRPOConfig:
    """The settings of the demo; a GPU has room for larger batches."""
    gpu = device.type == "cuda"
    return GRPOConfig(
        task="chain_sum",
        task_options=_TASK,
        prompts_per_step=32 if gpu else 4,
        group_size=16 if gpu else 8,
        max_new_tokens=12,
        steps=steps or 60,
        learning_rate=1e-5,
        device=str(device),
        output_dir=str(folder),
        checkpoint_every=10,
        save_model=False,
        eval_prompts=64,
    )


def run_demo(folder: Path, *, steps: int = 0, rounds: int = 7) -> dict[str, float]:
    """Train, evaluate before and after, compare; prints as it goes and returns the figures it printed."""
    require("transformers", "reasoning_gym", "tqdm", "matplotlib", extra="demo")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    config = demo_config(folder, device, steps)
    resuming = _prepare(folder, config)
    _title("The model and the task")
    print(f"  SmolLM2-135M-Instruct on {where}; reasoning-gym's chain_sum, two terms of one digit")
    model_folder()
    trainer = GRPOTrainer(config)
    example = trainer.task.heldout[0]
    print(f"  {len(trainer.task.heldout)} questions held out, none of them ever trained on. The first:")
    print(f"    {example['prompt']}  (wanted: {example['entry']['answer']})")

    before = _before(trainer, folder, reuse=resuming)

    _title(f"GRPO: {config.steps} steps of {config.prompts_per_step} questions × {config.group_size} answers")
    if resuming:
        print("  going on from the checkpoint of a run that was cut off")
    start = time.perf_counter()
    result = trainer.run()
    trained = time.perf_counter() - start
    seconds = sum(row["seconds"] for row in result.history)
    rewards = [row["reward_mean"] for row in result.history]
    print(
        f"  {trained:.0f} s; mean reward {_mean(rewards[:5]):.2f} in the first 5 steps, "
        f"{_mean(rewards[-5:]):.2f} in the last 5"
    )

    after = trainer.evaluate()
    _title("Held-out questions, greedy answers")
    print(f"  before training   {before['accuracy']:.2f}    e.g. {_short(before['answer'])}")
    print(f"  after training    {after.accuracy:.2f}    e.g. {_short(after.completions[0])}")
    print(f"  change           {after.accuracy - before['accuracy']:+.2f}")

    count = 2 * config.prompts_per_step * config.group_size
    _title(f"One training step on the same {count} answers: fused against plain PyTorch")
    trainer.optimizer.close()
    del trainer, result
    if device.type == "cuda":
        torch.cuda.empty_cache()
    print(f"  two processes taking turns, {rounds} steps each ...", flush=True)
    costs = compare(folder / _BATCH, rounds=rounds)
    _print_costs(costs)
    plot = folder / "rewards.png"
    print(f"\n  The reward curve: {plot.resolve()}")
    print(f"  Every step's metrics: {(folder / 'metrics.jsonl').resolve()}")
    figures = {
        "accuracy_before": before["accuracy"],
        "accuracy_after": after.accuracy,
        "train_seconds": seconds,
        "reward_first": _mean(rewards[:5]),
        "reward_last": _mean(rewards[-5:]),
        **{f"{name}_{key}": value for name, cost in costs.items() for key, value in vars(cost).items()},
    }
    (folder / _DONE).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "checkpoint.pt").unlink(missing_ok=True)  # 1.6 GB that a finished demo needs no more
    return figures


def _prepare(folder: Path, config: GRPOConfig) -> bool:
    """Whether there is a run to go on with; clears away one that ended, or that this code cannot go on with."""
    path = folder / "checkpoint.pt"
    if path.is_file() and not (folder / _DONE).is_file() and (folder / _BEFORE).is_file():
        try:
            checkpoint.load(path, config)
            return True
        except ValueError as error:
            print(f"  {error}\n  starting over", flush=True)
    for name in (_DONE, _BEFORE, _BATCH, "checkpoint.pt", "metrics.jsonl", "rewards.png"):
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return False


def _before(trainer: GRPOTrainer, folder: Path, *, reuse: bool) -> dict[str, Any]:
    """Accuracy before training, and the batch to compare on; in files, so that a demo that goes on still has them."""
    path = folder / _BEFORE
    if not reuse:
        print("  answering them before any training ...", flush=True)
        evaluation = trainer.evaluate()
        batch = _comparison_batch(trainer)
        write_batch(folder / _BATCH, trainer.config, batch)
        found = {"accuracy": evaluation.accuracy, "answer": evaluation.completions[0]}
        path.write_text(json.dumps(found), encoding="utf-8")
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return kept


def _comparison_batch(trainer: GRPOTrainer) -> Batch:
    """The answers of two steps; every one takes part, whatever it scored: all the work that a step can have."""
    one, two = trainer.collect(1).rollout, trainer.collect(2).rollout
    trainer.generator.manual_seed(trainer.config.seed)  # training draws as if this had not been
    rollout = joined(one, two)
    count = len(rollout.answers)
    return Batch(rollout, [0.0] * count, torch.linspace(-1, 1, count))


def _print_costs(costs: dict[str, Cost]) -> None:
    fused, eager = costs["fused"], costs["eager"]
    print(f"\n  {'':<42}{'fused':>10}{'PyTorch':>10}{'ratio':>9}")
    rows = [
        ("step (forward, loss, backward, update), s", fused.step_seconds, eager.step_seconds, "{:.2f}"),
        ("  of it the loss (fused: with the head), ms", fused.loss_seconds * 1e3, eager.loss_seconds * 1e3, "{:.1f}"),
        ("peak memory, MiB", fused.peak_bytes / 2**20, eager.peak_bytes / 2**20, "{:.0f}"),
        ("  of it over the start of the step, MiB", fused.extra_bytes / 2**20, eager.extra_bytes / 2**20, "{:.0f}"),
    ]
    for name, a, b, form in rows:
        print(f"  {name:<42}{form.format(a):>10}{form.format(b):>10}{b / a if a > 0 else float('nan'):>8.2f}×")
    print(f"  {'loss (the same to rounding)':<42}{fused.loss:>10.5f}{eager.loss:>10.5f}")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def _short(answer: object) -> str:
    text = " ".join(str(answer).split())
    return text if len(text) <= 48 else text[:45] + "..."


def _title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if os.isatty(1) else f"\n{text}\n{'-' * len(text)}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry; returns the exit status."""
    parser = argparse.ArgumentParser(prog="rl4llm-fast demo", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", default="runs/demo", help="folder for metrics, plot and checkpoint")
    parser.add_argument("--steps", type=int, default=0, help="training steps (0: as many as suit the device)")
    arguments = parser.parse_args(argv)
    try:
        run_demo(Path(arguments.output), steps=arguments.steps)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from the last checkpoint.", flush=True)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
