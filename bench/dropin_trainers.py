"""TRL's trainers on SmolLM2-135M, patched by ``rl4llm_fast.compat.trl.patch()`` and not, side by side.

    python -m bench.dropin_trainers [--trainers grpo,dpo,kto] [--steps 4] [--rounds 1] [--rows FOLDER] [--model FOLDER]

The trainers are TRL's own, in fp32 on a CPU, on the rows of examples/film_reviews.py: 8 answers of 16 tokens a step for
GRPO, each batch of them sampled once and used twice, 8 pairs for DPO, 8 answers for KTO. Every run has a process of its
own. The first step, which makes the optimizer's state, does not count. Time: the fastest step (for GRPO one that does
not sample). Memory: the largest peak of a step (Linux's resident size) above what was there when it began.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .dropin_page import Table

TRAINERS = ("grpo", "dpo", "kto")


def kib(field: str) -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))


def start_of_peak() -> int:
    """The resident size in KiB, from where VmHWM starts again."""
    Path("/proc/self/clear_refs").write_text("5")
    return kib("VmRSS")


def rows(folder: Path, name: str, columns: dict[str, str]) -> Any:
    """The first rows of a file, its columns under TRL's names."""
    from datasets import Dataset

    with open(folder / f"{name}.jsonl", encoding="utf-8") as file:
        read = [json.loads(line) for line, _ in zip(file, range(64), strict=False)]
    return Dataset.from_list([{theirs: row[ours] for ours, theirs in columns.items()} for row in read])


def length_reward(completions: list[Any], **_: Any) -> list[float]:
    """Any reward with a spread does: this one counts characters."""
    return [len(answer[0]["content"]) / 100 for answer in completions]


def make(name: str, model: str, data: Path, steps: int, output: str, callbacks: list[Any]) -> Any:
    import trl

    common: dict[str, Any] = {
        "output_dir": output, "max_steps": steps, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False,
        "learning_rate": 1e-6, "save_strategy": "no", "seed": 1, "disable_tqdm": True, "gradient_checkpointing": False,
        "per_device_train_batch_size": 8, "model_init_kwargs": {"dtype": "float32"},
    }  # fmt: skip
    if name == "grpo":
        return trl.GRPOTrainer(
            model,
            reward_funcs=length_reward,
            args=trl.GRPOConfig(**common, num_generations=4, max_completion_length=16, num_iterations=2),
            train_dataset=rows(data, "prompts", {"prompt": "prompt"}),
            callbacks=callbacks,
        )
    if name == "dpo":
        pairs = rows(data, "pairs", {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"})
        return trl.DPOTrainer(model, args=trl.DPOConfig(**common), train_dataset=pairs, callbacks=callbacks)
    answers = rows(data, "labelled", {"prompt": "prompt", "answer": "completion", "desirable": "label"})
    return trl.KTOTrainer(model, args=trl.KTOConfig(**common), train_dataset=answers, callbacks=callbacks)


def work(name: str, patched: bool, model: str, data: Path, steps: int) -> dict[str, Any]:
    """One run, in a process of its own."""
    from transformers import TrainerCallback

    from rl4llm_fast.compat import trl as compat_trl

    class Watch(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.peaks: list[int] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.before, self.start = start_of_peak(), time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)
            self.peaks.append(kib("VmHWM") - self.before)

    if patched:
        compat_trl.patch()
    watch = Watch()
    with tempfile.TemporaryDirectory() as output:
        trainer = make(name, model, data, steps, output, [watch])
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {
        "losses": losses,
        "seconds": min(watch.seconds[1:]),
        "mib": max(watch.peaks[1:]) // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.dropin_trainers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trainers", default=",".join(TRAINERS), help="of grpo, dpo, kto")
    parser.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each, in turns")
    parser.add_argument("--rows", type=Path, default=Path("data/film_reviews"), help="made by examples/film_reviews.py")
    parser.add_argument("--model", help="a folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--write", action="store_true", help="put the table into docs/drop-in.md")
    parser.add_argument("--verbose", action="store_true", help="show what the trainers write")
    parser.add_argument("--work", nargs=2, metavar=("TRAINER", "VARIANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.trainers.split(",")) - set(TRAINERS):
        parser.error(f"--trainers: wanted names among {', '.join(TRAINERS)}, got {', '.join(sorted(unknown))}")
    if arguments.model is None:
        from rl4llm_fast.trainer import smollm2

        arguments.model = str(smollm2.model_folder())
    if arguments.work:
        name, variant = arguments.work
        print(json.dumps(work(name, variant == "patched", arguments.model, arguments.rows, arguments.steps)))
        return
    head = ["trainer", "losses differ by", "a step: TRL", "patched", "ratio", "a step's memory: TRL", "patched"]
    table = Table("dropin-trainers", head)
    for name in arguments.trainers.split(","):
        command = [sys.executable, "-m", "bench.dropin_trainers", "--steps", str(arguments.steps)]
        command += ["--rows", str(arguments.rows), "--model", arguments.model, "--work", name]
        log = None if arguments.verbose else subprocess.DEVNULL
        runs: dict[str, list[dict[str, Any]]] = {"plain": [], "patched": []}
        for _ in range(arguments.rounds):  # in turns, since a shared machine's speed drifts
            for variant, done in runs.items():
                output = subprocess.check_output([*command, variant], text=True, stderr=log)
                done.append(json.loads(output.splitlines()[-1]))
        plain, patched = runs.values()
        losses = [run["losses"] for run in (*plain, *patched)]
        assert all(len(one) == arguments.steps for one in losses)
        differ = max(abs(a - b) for one in losses for a, b in zip(one, losses[0], strict=True))
        seconds = [min(run["seconds"] for run in done) for done in runs.values()]
        mib = [max(run["mib"] for run in done) for done in runs.values()]
        times = [f"{one:.2f} s" for one in seconds]
        ratio = f"{seconds[0] / seconds[1]:.2f}x"
        table.add([name.upper(), f"{differ:.1e}", *times, ratio, *(f"{one} MiB" for one in mib)])
    asked = f"--trainers {arguments.trainers} --steps {arguments.steps} --rounds {arguments.rounds}"
    table.close(f"bench.dropin_trainers {asked}", arguments.write)


if __name__ == "__main__":
    main()
