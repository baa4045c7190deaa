"""The largest micro-batch whose GRPO step fits a GPU, eager against fused: ``python -m bench.capacity``.

A step is the loss from hidden states, forward and backward (linear_policy_loss, D 4,096, V 131,072, bf16), with nothing
else in memory but its inputs. Tokens double until the allocator refuses, then the gap is halved down to a sixteenth.
Writes bench/results/capacity-{device}-{date}.json; the target is ten times as many for fused.
"""

from __future__ import annotations

import argparse
import gc
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import ops, peers, report, run, timing
from .cases import BOTH, Case

WIDTH, VOCABULARY = 4_096, 131_072
TARGET = 10.0
_FIRST = 1_024
_PARTS = 16  # how finely the largest is found


def largest(fits: Callable[[int], bool], first: int = _FIRST) -> int:
    """The largest number that fits, to a sixteenth of itself; 0 where ``first`` does not."""
    if not fits(first):
        return 0
    low = first
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > low // _PARTS:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fits(name: str, tokens: int) -> bool:
    """Whether one step of that many tokens gets its memory; nothing is left of it afterwards."""
    case = Case("linear_policy_loss", "linear_policy_loss", BOTH, torch.bfloat16, (tokens, WIDTH, VOCABULARY), ())
    try:
        made = ops.step(case, peers.build(name, case, "cuda"), ops.make_inputs(case, "cuda"))
        made.run(made.prepare())
        torch.cuda.synchronize()
        return True
    except RuntimeError as error:
        if not timing.out_of_memory(error):
            raise
        return False
    finally:
        made = None  # type: ignore[assignment]
        gc.collect()
        torch.cuda.empty_cache()


def measure() -> dict[str, Any]:
    """{"meta": ..., "tokens": {implementation: the most}, "ratio": fused over eager}"""
    tokens = {name: largest(lambda n, name=name: fits(name, n)) for name in (peers.OURS, "eager")}  # type: ignore[misc]
    ratio = tokens[peers.OURS] / max(tokens["eager"], 1)
    meta = {**run.environment("cuda"), "suite": "capacity", "width": WIDTH, "vocabulary": VOCABULARY}
    return {"meta": meta, "tokens": tokens, "ratio": ratio, "target": TARGET, "reached": ratio >= TARGET}


def text(result: dict[str, Any]) -> str:
    meta, tokens = result["meta"], result["tokens"]
    counts = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
    verdict = "reached" if result["reached"] else "MISSED"
    return (
        f"most tokens of a GRPO step from hidden states, D {meta['width']:,}, V {meta['vocabulary']:,}, bf16, on "
        f"{meta['device']}: {counts}; {result['ratio']:.1f}x, {verdict} >= {result['target']:g}x"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.capacity", description="The largest micro-batch that fits.")
    parser.add_argument("--out", type=pathlib.Path, default=report.RESULTS, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("this needs a GPU, and torch sees none here (torch.cuda.is_available() is False)")
        return 2
    result = measure()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{run.stem(result['meta'])}.json"
    report.write_json(path, result)
    print(text(result))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
