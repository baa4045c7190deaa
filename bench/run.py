"""``python -m bench.run``: measure a suite here, print its table, and write CSV, JSON and plots.

    python -m bench.run [--suite smoke|cpu|gpu|sweep] [--op NAME] [--peers eager,compile,...] [--base GITREF]
                        [--device cpu|cuda] [--minutes M] [--resume] [--out DIR]

smoke: the token_logprobs rows at V 49,152. cpu: every CPU row. gpu: every GPU row, on a machine that has one.
sweep: one size at a time over two decades, with the fitted exponents.
The JSON is written after each case: a run that was cut off, or that --minutes ended, goes on with --resume.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import rl4llm_fast as rf
from rl4llm_fast.machine import cpu_multiplies

from . import cases, measure, peers, report, timing
from .base import ROOT, Base
from .memory import Prober

_RECORDS = (":!bench/results", ":!docs", ":!*.md")  # what is written of a measurement changes nothing that is measured


def _git(*arguments: str) -> str:
    """What git says; nothing where there is no git, or no repository of it."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as info:
        for line in info:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpu_instructions() -> str:
    """What the vectors and the products of this CPU are made of, as torch sees it: AVX2, AVX512 with bf16."""
    return torch.backends.cpu.get_cpu_capability() + (" with bf16" if cpu_multiplies(torch.bfloat16) else "")


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
        "device": f"{_cpu_name()}, {_cpu_instructions()}, {torch.get_num_threads()} threads",
        "device_kind": device,
        "git": os.environ.get("RL4LLM_FAST_COMMIT") or _git("rev-parse", "--short", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", *_RECORDS)),
        "rl4llm_fast": rf.__version__,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
    }
    if device == "cuda":
        meta.update(device=torch.cuda.get_device_name(), driver=_gpu_driver(), cuda=torch.version.cuda)
    return meta


def run(
    suite: str,
    op: str | None,
    names: Sequence[str],
    base: Base | None = None,
    *,
    device: str | None = None,
    minutes: float | None = None,
    resumed: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """The suite's report as plain data, given to ``save`` after each case; one line of progress a case on stderr.

    ``resumed``: an earlier report, whose cases and ceilings are taken over. ``minutes``: start no case after that.
    """
    chosen = cases.select(suite, op)
    device = device or default_device(suite)
    start = time.perf_counter()
    result: dict[str, Any]
    if resumed is not None:
        result = resumed
    else:
        meta = {**environment(device), "suite": suite, "op": op, "command": command(suite, op), "seconds": 0.0}
        print(f"measuring this machine's memory and products ({meta['device']}) ...", file=sys.stderr)
        ceilings = timing.ceilings(device)
        products = timing.product_ceilings(device)
        result = {"meta": meta, "ceilings_bytes_per_s": ceilings, "ceilings_flops_per_s": products, "cases": []}
    meta, records = result["meta"], result["cases"]
    known = {record["name"] for record in records}
    before = meta["seconds"]
    prober = Prober() if device == "cpu" else None
    try:
        for number, case in enumerate(chosen, 1):
            if case.name in known:
                continue
            if minutes is not None and time.perf_counter() - start > 60 * minutes:
                break
            print(f"[{number}/{len(chosen)}] {case.name}", file=sys.stderr, flush=True)
            records.append(
                measure.run_case(
                    case,
                    names,
                    device,
                    measure.BUDGETS[suite],
                    copy_ceiling=result["ceilings_bytes_per_s"]["copy"],
                    prober=prober,
                    base=base,
                )
            )
            meta["unfinished"] = len(chosen) - number
            meta["seconds"] = round(before + time.perf_counter() - start, 1)
            save(result)
    finally:
        if prober is not None:
            prober.close()
    return result


def default_device(suite: str) -> str:
    return "cuda" if suite == "gpu" else "cpu"


def command(suite: str, op: str | None) -> str:
    return f"python -m bench.run --suite {suite}" + (f" --op {op}" if op is not None else "")


def unfinished(folder: pathlib.Path, suite: str, op: str | None, device: str) -> pathlib.Path | None:
    """The newest report of the same command that this commit left unfinished here: figures of other code do not mix."""
    wanted = {**environment(device), "command": command(suite, op)}
    keys = ("command", "device", "git", "torch", "triton")
    found = report.alike(report.recorded([folder], suite), wanted, keys)
    return next((path for path, result in found if result["meta"].get("unfinished")), None)


def stem(meta: dict[str, Any]) -> str:
    """``{suite}-{device}-{date}``, fit for a file name; the run of one op ends in its name, and is no page's table."""
    device = re.sub(r"[^a-z0-9]+", "-", meta["device"].lower()).strip("-")
    return f"{meta['suite']}-{device}-{meta['date'][:10]}" + (f"-{meta['op']}" if meta.get("op") else "")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Measure the library here.")
    parser.add_argument(
        "--suite",
        choices=cases.SUITES,
        help="smoke: token_logprobs at V 49,152; cpu, gpu: every op; sweep: time against each size "
        "(default: smoke, and with --op cpu)",
    )
    parser.add_argument("--op", help="only the cases of this op")
    parser.add_argument("--peers", help="comma-separated; default: all, in the suite sweep eager and loop")
    parser.add_argument("--base", metavar="GITREF", help="also build and measure this git ref, interleaved")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "bench" / "results", help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda for the suite gpu, else cpu")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no case after M minutes; --resume goes on")
    parser.add_argument("--resume", action="store_true", help="go on with this commit's unfinished run of the suite")
    arguments = parser.parse_args(argv)
    arguments.suite = arguments.suite or ("cpu" if arguments.op else "smoke")
    arguments.device = arguments.device or default_device(arguments.suite)
    if arguments.peers is None:
        backends = peers.BACKENDS if arguments.device == "cuda" else ()
        arguments.peers = "eager,loop" if arguments.suite == "sweep" else ",".join((*backends, *peers.RIVALS))
    arguments.peers = [name for name in arguments.peers.split(",") if name]
    unknown = sorted(set(arguments.peers) - set(peers.NAMES))
    if unknown:
        parser.error(f"--peers: wanted names among {', '.join(peers.NAMES[1:])}, got {', '.join(unknown)}")
    try:
        cases.select(arguments.suite, arguments.op)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print(f"the suite {arguments.suite} needs a GPU, and torch sees none here (torch.cuda.is_available() is False)")
        return 2
    names = [peers.OURS, *(name for name in arguments.peers if name != peers.OURS)]
    folder = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    path = None
    for known in dict.fromkeys((folder, report.RESULTS)) if arguments.resume else ():
        path = path or unfinished(known, arguments.suite, arguments.op, device)
    resumed = None if path is None else json.loads(path.read_text(encoding="utf-8"))
    if resumed is not None:
        print(f"going on with {path}: {len(resumed['cases'])} cases are there", file=sys.stderr)

    def save(result: dict[str, Any]) -> None:
        report.write_json(folder / f"{stem(result['meta'])}.json", result)

    try:
        other = Base(arguments.base, device) if arguments.base else None
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    with contextlib.ExitStack() as stack:
        base = None if other is None else stack.enter_context(other)
        options = {"device": device, "minutes": arguments.minutes, "resumed": resumed, "save": save}
        result = run(arguments.suite, arguments.op, names, base, **options)
    print(report.table(result))
    for written in report.write(result, folder, stem(result["meta"])):
        print(f"wrote {written}")
    if result["meta"].get("unfinished"):
        print(f"{result['meta']['unfinished']} cases are left: the same command with --resume goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
