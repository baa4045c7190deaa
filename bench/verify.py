"""``python -m bench.verify``: run the GPU tests and GPU cases here and write what held into the ledger.

    python -m bench.verify [--plan] [--kernel PATH ...] [--again]

The ledger (bench/results/verified.json) is written after every step, so that a run that is cut off loses one step; the
next run goes on with the kernel files that this GPU has not finished in their present state. Without a GPU it says so
and exits with 2; the ledger stays as it is. The exit status is 1 if a test failed or a result was wrong.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any

import torch

import rl4llm_fast as rf
from rl4llm_fast.info import LEDGER, kernel_files, kernel_sources, ledger_lines, read_ledger

from . import cases, measure, peers, report, run, timing

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Kernel files whose name is not that of the public op that they serve.
_OPS = {
    "token_loss": ("policy_loss", "kl_estimate"),
    "preference": ("preference_loss",),
    "groups": ("group_advantages", "process_advantages"),
    "n_step": ("n_step_returns",),
    "scan": ("gae", "vtrace"),
    "kl": ("kl_divergence",),
    "kl_fwd": ("kl_divergence",),
    "kl_bwd": ("kl_divergence",),
}
# The file of a kernel's gpu-marked tests where it is not tests/test_gpu_{name of the kernel file}.py.
_TESTS = {
    "token_logprobs": "tests/test_gpu.py",
    "token_loss": "tests/test_losses.py",
    "kl_estimate": "tests/test_kl_estimate.py",
    "preference": "tests/test_preference.py",
    "kl_fwd": "tests/test_gpu_kl.py",
    "kl_bwd": "tests/test_gpu_kl.py",
    **dict.fromkeys(("gae", "groups", "n_step", "scan", "vtrace", "whiten"), "tests/test_gpu_returns.py"),
}
_PYTEST_NO_TESTS = 5


def backend_of(kernel: str) -> str:
    return "cuda" if kernel.startswith("csrc/") else "triton"


def _stem(kernel: str) -> str:
    return pathlib.PurePosixPath(kernel).stem


def ops_of(kernel: str) -> tuple[str, ...]:
    return _OPS.get(_stem(kernel), (_stem(kernel),))


def tests_of(kernel: str) -> list[str]:
    """Arguments of pytest: the tests that name the backend, or none of the two ("cuda" stands in test names too)."""
    chosen = "triton or not cuda" if backend_of(kernel) == "triton" else "not triton"
    return [_TESTS.get(_stem(kernel), f"tests/test_gpu_{_stem(kernel)}.py"), "-m", "gpu", "-k", chosen]


def cases_of(kernel: str) -> list[cases.Case]:
    return [case for case in cases.CASES if "gpu" in case.suites and case.op in ops_of(kernel)]


def plan(kernels: Sequence[str]) -> str:
    """What would run, in order."""
    lines = []
    for kernel in kernels:
        file, *options = tests_of(kernel)
        there = "" if (ROOT / file).is_file() else "   (there is no such file: nothing covers this kernel)"
        lines.append(f"{kernel}  (backend {backend_of(kernel)})")
        lines.append(f"  tests: pytest {shlex.join([file, *options])}{there}")
        lines += [f"  case:  {case.name}" for case in cases_of(kernel)] or ["  case:  none in the suite gpu yet"]
    return "\n".join(lines or ["no GPU kernels in this tree"])


def parse_junit(path: pathlib.Path) -> dict[str, Any]:
    """Counts of passed, failed and skipped tests, with the names of those that passed and failed."""
    tests: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "names": [], "failures": []}
    for test in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{test.get('classname')}::{test.get('name')}"
        if test.find("failure") is not None or test.find("error") is not None:
            tests["failed"] += 1
            tests["failures"].append(name)
        elif test.find("skipped") is not None:
            tests["skipped"] += 1
        else:
            tests["passed"] += 1
            tests["names"].append(name)
    return tests


def run_tests(kernel: str) -> dict[str, Any]:
    """Run the kernel's tests in a process of their own: a crash of the GPU context ends those tests only."""
    nothing: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "names": [], "failures": []}
    if not (ROOT / tests_of(kernel)[0]).is_file():
        return nothing
    with tempfile.TemporaryDirectory() as folder:
        junit = pathlib.Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", "-q", *tests_of(kernel), f"--junitxml={junit}"]
        code = subprocess.run(command, cwd=ROOT).returncode
        if code == _PYTEST_NO_TESTS:
            return nothing
        if not junit.is_file():
            return {**nothing, "failed": 1, "failures": [f"pytest ended with status {code}"]}
        tests = parse_junit(junit)
        if code not in (0, 1):
            tests["failed"] += 1
            tests["failures"].append(f"pytest ended with status {code}")
        return tests


def run_figures(kernel: str, case: cases.Case, copy_ceiling: float) -> dict[str, Any]:
    """The case with the kernel's backend forced, without rivals: their figures belong to ``bench.run --suite gpu``."""
    try:
        with rf.use_backend(backend_of(kernel)):
            record = measure.run_case(case, [peers.OURS], "cuda", measure.BUDGETS["gpu"], copy_ceiling=copy_ceiling)
    except Exception as error:
        return {"case": case.name, "failed": f"{type(error).__name__}: {error}"}
    (ours,) = record["results"]
    kept = ("median_ms", "p20_ms", "p80_ms", "timed", "bytes_per_s", "extra_bytes", "correct", "status", "reason")
    figures = {key: ours[key] for key in kept if key in ours}
    return {"case": case.name, **figures, "targets": record["targets"]}


def finished(entry: dict[str, Any] | None, kernel: str, gpu: str) -> bool:
    """Whether the ledger already holds all of a kernel file, as it is now, on this GPU."""
    if not entry or not entry.get("complete") or entry["gpu"] != gpu:
        return False
    return bool(entry["sources"] == kernel_sources(kernel, ROOT))


def passed(entry: dict[str, Any]) -> bool:
    return not entry["tests"]["failed"] and all(figure.get("correct") for figure in entry["figures"])


def verify(kernels: Sequence[str], ledger_path: pathlib.Path, again: bool) -> bool:
    """Verify kernel files one by one, saving after each step. Returns whether everything held."""
    meta = run.environment("cuda")
    ledger = read_ledger(ledger_path)
    ceilings: dict[str, float] | None = None
    held = True
    for number, kernel in enumerate(kernels, 1):
        before = ledger["kernels"].get(kernel)
        if not again and finished(before, kernel, meta["device"]):
            print(f"[{number}/{len(kernels)}] {kernel}: already verified in this state on {meta['device']}")
            held &= passed(before)
            continue
        print(f"[{number}/{len(kernels)}] {kernel}", flush=True)
        versions = ("rl4llm_fast", "torch", "triton", "python", "cuda", "driver")
        entry: dict[str, Any] = {
            "sources": kernel_sources(kernel, ROOT),  # before the tests: an edit meanwhile shows as a change
            "gpu": meta["device"],
            "date": meta["date"],
            "git": meta["git"],
            "versions": {key: meta[key] for key in versions},
            "tests": run_tests(kernel),
            "figures": [],
            "complete": False,
        }
        ledger["kernels"][kernel] = entry
        report.write_json(ledger_path, ledger)
        ceilings = ceilings or timing.ceilings("cuda")
        for case in cases_of(kernel):
            print(f"  {case.name}", flush=True)
            entry["figures"].append(run_figures(kernel, case, ceilings["copy"]))
            report.write_json(ledger_path, ledger)
        entry["complete"] = True
        report.write_json(ledger_path, ledger)
        held &= passed(entry)
    return held


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.verify", description="Verify the GPU kernels here.")
    parser.add_argument("--plan", action="store_true", help="print what would run, and stop")
    parser.add_argument("--kernel", nargs="+", metavar="PATH", help="only these kernel files")
    parser.add_argument("--again", action="store_true", help="also those already verified in their present state")
    arguments = parser.parse_args(argv)
    known = kernel_files(ROOT)
    kernels = arguments.kernel or known
    unknown = sorted(set(kernels) - set(known))
    if unknown:
        parser.error(f"--kernel: wanted files among {', '.join(known)}, got {', '.join(unknown)}")
    if arguments.plan:
        print(plan(kernels))
        return 0
    if not torch.cuda.is_available():
        print(
            "verification needs a GPU, and torch sees none here; the ledger is as it was (--plan shows what would run)"
        )
        return 2
    held = verify(kernels, LEDGER, arguments.again)
    print("\n".join(ledger_lines("")))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
