"""What a machine with a GPU is asked, in order: ``python -m bench.campaign`` prints the commands and their minutes.

Each command goes on where it stopped, so that --minutes may be as few as a machine is there for. ``python -m
bench.report --gpu`` writes the table into docs/gpu.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rl4llm_fast.info import kernel_files

from . import context, end_to_end, ncu, sized, tune, verify
from .base import ROOT

_NOTHING = {"meta": {}, "steps": {}, "attempts": {}, "times": {}, "reports": {}, "variants": {}}
_TRAINERS = ("grpo", "ppo", "dpo")


@dataclass(frozen=True)
class Order:
    """A command, what it answers, and its plan when nothing of it is done."""

    command: str
    answers: str
    plan: Callable[[], str]

    @property
    def minutes(self) -> int:
        """As its plan has it; up to the next whole minute."""
        found = re.search(r"in all about (\d+) minutes", self.plan())
        assert found is not None, self.command
        return max(1, int(found[1]))


def _steps(model: str) -> str:
    layers = {t: sized.layers_that_fit(model, t, end_to_end.SIZED) for t in _TRAINERS}
    return end_to_end.plan(_TRAINERS, (), end_to_end.VARIANTS, 6, "cuda", layers)


def _context(model: str) -> str:
    layers = sized.layers_that_fit(model, "grpo", context.SIZES)
    meta = {"layers": layers, "width": sized.CONFIGS[model]["hidden_size"]}
    return context.plan({**_NOTHING, "meta": meta}, context.VARIANTS)


def orders() -> list[Order]:
    """In the order in which one answer serves the next."""
    trainers = f"--trainers {','.join(_TRAINERS)} --resume --minutes 9"
    return [
        Order(
            "python -m pytest -m gpu -n 8 --dist worksteal",
            "every op against the oracle, graphs, synchronisations, bits: what fails is mended before it is timed",
            lambda: "in all about 8 minutes",
        ),
        Order(
            "python -m bench.run --suite gpu --resume --minutes 9",
            "every op beside its peers, judged by its targets, before anything is changed",
            lambda: f"in all about {verify.SUITE_MINUTES:.0f} minutes",
        ),
        Order(
            "python -m bench.tune --only backends,chunk,launches --minutes 9",
            "Triton or CUDA C++ for each op, the workspace from hidden states, the rows of LAUNCHES",
            lambda: tune.plan(_NOTHING, ("backends", "chunk", "launches")),
        ),
        Order(
            "python -m bench.tune --minutes 9",
            "all other constants and the caps on registers; then a person writes the rows",
            lambda: tune.plan(_NOTHING, ("constants", "registers")),
        ),
        Order(
            "python -m bench.verify --minutes 9",
            "the ledger: tests, compute-sanitizer and cases of every kernel file as it is now, the largest micro-batch",
            lambda: verify.plan(kernel_files(ROOT)),
        ),
        *(
            Order(
                f"python -m bench.end_to_end --device cuda --model {model} {trainers}",
                f"whole steps of the {model.upper()} widths: time, peak memory, fused, eager and TRL",
                lambda model=model: _steps(model),  # type: ignore[misc]
            )
            for model in sized.CONFIGS
        ),
        *(
            Order(
                f"python -m bench.context --model {model} --memory 80 --minutes 9",
                f"the longest answers of a GRPO step of the {model.upper()} widths in 80 GB",
                lambda model=model: _context(model),  # type: ignore[misc]
            )
            for model in ("1b", "8b")
        ),
        Order(
            "python -m bench.ncu --minutes 9",
            "which three kernels take longest, and what ncu says of them",
            lambda: ncu.plan(_NOTHING, 3),
        ),
    ]


def markdown() -> str:
    """The orders as a table."""
    lines = ["| | command | what it answers | minutes, guessed |", "|---|---|---|---|"]
    for number, order in enumerate(orders(), 1):
        lines.append(f"| {number} | `{order.command}` | {order.answers} | {order.minutes} |")
    return "\n".join(lines)


def text() -> str:
    """The orders for a terminal."""
    return "\n".join(f"{order.command}   (about {order.minutes} min: {order.answers})" for order in orders())


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m bench.campaign", description="What to run on a GPU.").parse_args(argv)
    print(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
