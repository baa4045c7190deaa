"""TRL's fused LM head and its drop-in, forward and backward, side by side: ``python -m bench.dropins``.

512 tokens, D = 576, V = 49,152 (SmolLM2-135M). Time: the best of interleaved rounds. Memory: peak resident size above
what was there before the call (Linux), one process for each.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from .dropin_page import Table

ROWS, D, V = 512, 576, 49152
OUTPUTS = {"GRPO": ("log_probs", "entropy"), "DPO": ("log_probs", "entropy", "mean_logits", "is_top1")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def heads() -> dict[str, type]:
    from trl.trainer import utils

    from rl4llm_fast.compat.trl import ChunkedLogProbFunction

    return {"drop-in": ChunkedLogProbFunction, "TRL": utils._ChunkedLogProbFunction}


class Step:
    """One forward and backward through a head."""

    def __init__(self, dtype: str, outputs: str) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(ROWS, D).to(DTYPES[dtype]).requires_grad_()
        self.weight = torch.randn(V, D).mul_(0.05).to(DTYPES[dtype]).requires_grad_()
        self.targets, self.upstream, self.outputs = torch.randint(V, (ROWS,)), torch.randn(ROWS), OUTPUTS[outputs]

    def __call__(self, head: type) -> None:
        self.hidden.grad = self.weight.grad = None
        arguments = (self.hidden, self.weight, None, self.targets, 1.0, 32768, None, 1.0, self.outputs)
        (head.apply(*arguments)[0] * self.upstream).sum().backward()  # type: ignore[attr-defined]


def peak_mib(dtype: str, outputs: str, head: str) -> int:
    """Run in a process of its own."""
    step, function = Step(dtype, outputs), heads()[head]

    def kib(field: str) -> int:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = kib("VmRSS")
    step(function)
    return (kib("VmHWM") - before) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.dropins", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help="put the table into docs/drop-in.md")
    parser.add_argument("--peak", nargs=3, metavar=("DTYPE", "OUTPUTS", "HEAD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak_mib(*arguments.peak))
        return
    head = ["outputs of", "dtype", "TRL", "drop-in", "ratio", "peak memory: TRL", "drop-in"]
    table = Table("dropin-head", head)
    for outputs in OUTPUTS:
        for dtype in DTYPES:
            step, best = Step(dtype, outputs), dict.fromkeys(heads(), float("inf"))
            for _ in range(arguments.rounds):
                for name, head in heads().items():
                    start = time.perf_counter()
                    step(head)
                    best[name] = min(best[name], time.perf_counter() - start)
            command = [sys.executable, "-m", "bench.dropins", "--peak", dtype, outputs]
            peaks = {name: int(subprocess.check_output([*command, name], text=True)) for name in best}
            ratio = best["TRL"] / best["drop-in"]
            times = [f"{best[name] * 1e3:.0f} ms" for name in ("TRL", "drop-in")]
            memory = [f"{peaks[name]} MiB" for name in ("TRL", "drop-in")]
            table.add([outputs, dtype, *times, f"{ratio:.1f}x", *memory])
    table.close(f"bench.dropins --rounds {arguments.rounds}", arguments.write)


if __name__ == "__main__":
    main()
