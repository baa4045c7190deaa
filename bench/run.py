"""``python -m bench.run``: measure a suite here, print its table, and write CSV, JSON and plots.

    python -m bench.run [--suite smoke|cpu|gpu] [--op NAME] [--peers eager,compile,...] [--base GITREF] [--out DIR]

smoke: the token_logprobs rows at V 49,152. cpu: every CPU row. gpu: every GPU row, on a machine that has one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import pathlib
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

import rl4llm_fast as rf

from . import cases, measure, peers, report, timing
from .base import ROOT, Base
from .memory import Prober


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as info:
        for line in info:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu_driver() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"


def environment(device: str) -> dict[str, Any]:
    """Where and with what the figures were made."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    meta = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "device_kind": device,
        "git": _git("rev-parse", "--short", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "rl4llm_fast": rf.__version__,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
    }
    if device == "cuda":
        meta.update(device=torch.cuda.get_device_name(), driver=_gpu_driver(), cuda=torch.version.cuda)
    return meta


def run(suite: str, op: str | None, names: Sequence[str], base: Base | None = None) -> dict[str, Any]:
    """The suite's report as plain data; one line of progress a case on stderr."""
    chosen = cases.select(suite, op)
    device = "cuda" if suite == "gpu" else "cpu"
    start = time.perf_counter()
    meta = {**environment(device), "suite": suite, "command": f"python -m bench.run --suite {suite}"}
    if op is not None:
        meta["command"] += f" --op {op}"
    print(f"measuring this machine's memory ({meta['device']}) ...", file=sys.stderr)
    ceilings = timing.ceilings(device)
    prober = Prober() if device == "cpu" else None
    records = []
    try:
        for number, case in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {case.name}", file=sys.stderr, flush=True)
            records.append(
                measure.run_case(
                    case,
                    names,
                    device,
                    measure.BUDGETS[suite],
                    copy_ceiling=ceilings["copy"],
                    prober=prober,
                    base=base,
                )
            )
    finally:
        if prober is not None:
            prober.close()
    meta["seconds"] = round(time.perf_counter() - start, 1)
    return {"meta": meta, "ceilings_bytes_per_s": ceilings, "cases": records}


def stem(meta: dict[str, Any]) -> str:
    """``{suite}-{device}-{date}``, fit for a file name."""
    device = re.sub(r"[^a-z0-9]+", "-", meta["device"].lower()).strip("-")
    return f"{meta['suite']}-{device}-{meta['date'][:10]}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Measure the library here.")
    parser.add_argument("--suite", choices=cases.SUITES, default="smoke")
    parser.add_argument("--op", help="only the cases of this op")
    parser.add_argument("--peers", default=",".join(peers.RIVALS), help="comma-separated; default: %(default)s")
    parser.add_argument("--base", metavar="GITREF", help="also build and measure this git ref, interleaved")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "bench" / "results", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    arguments.peers = [name for name in arguments.peers.split(",") if name]
    unknown = sorted(set(arguments.peers) - set(peers.NAMES))
    if unknown:
        parser.error(f"--peers: wanted names among {', '.join(peers.RIVALS)}, got {', '.join(unknown)}")
    try:
        cases.select(arguments.suite, arguments.op)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.suite == "gpu" and not torch.cuda.is_available():
        print("the suite gpu needs a GPU, and torch sees none here (torch.cuda.is_available() is False)")
        return 2
    names = [peers.OURS, *(name for name in arguments.peers if name != peers.OURS)]
    with contextlib.ExitStack() as stack:
        base = (
            stack.enter_context(Base(arguments.base, "cuda" if arguments.suite == "gpu" else "cpu"))
            if arguments.base
            else None
        )
        result = run(arguments.suite, arguments.op, names, base)
    print(report.table(result))
    for path in report.write(result, arguments.out, stem(result["meta"])):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
