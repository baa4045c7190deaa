"""``python -m bench.verify``: run the GPU tests and GPU cases here and write what held into the ledger.

    python -m bench.verify [--plan] [--kernel PATH ...] [--minutes M] [--again]

For each kernel file: its gpu-marked tests; for CUDA C++ also compute-sanitizer's memcheck and racecheck; its cases of
the suite gpu. Then the whole suite gpu beside its peers, and the largest micro-batch that fits. The ledger
(bench/results/verified.json) is written after every step: a run that is cut off, or that --minutes ended, loses one
step, and the same command goes on where it stopped. No step takes longer than eight minutes. --plan says what would run
and for how long.

The exit status: 0 all held; 1 a test failed, a tool found something or a result was wrong; 2 there is no GPU, and the
ledger stays as it is; 3 --minutes are over, and steps are left.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any

import torch

import rl4llm_fast as rf
from rl4llm_fast.info import LEDGER, kernel_files, kernel_sources, ledger_lines, read_ledger

from . import capacity, cases, measure, peers, report, run, sanitizer, timing

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Kernel files whose name is not that of the public op that they serve.
_OPS = {
    "token_logprobs": ("token_logprobs", "linear_token_logprobs"),
    "token_loss": ("policy_loss", "value_loss", "kl_estimate", "linear_policy_loss"),
    "token_loss_sequences": ("policy_loss_gspo",),
    "preference": ("preference_loss", "kto_loss"),
    "groups": ("group_advantages", "process_advantages"),
    "n_step": ("n_step_returns",),
    "scale": ("linear_policy_loss",),
    "scan": ("gae", "vtrace"),
    "kl": ("kl_divergence",),
    "kl_fwd": ("kl_divergence",),
    "kl_bwd": ("kl_divergence",),
}
# The file of a kernel's gpu-marked tests where it is not tests/test_gpu_{name of the kernel file}.py.
_TESTS = {
    "token_logprobs": "tests/test_gpu.py",
    **dict.fromkeys(("token_loss", "token_loss_sequences"), "tests/test_losses.py"),
    "kl_estimate": "tests/test_kl_estimate.py",
    "scale": "tests/test_gpu_linear.py",
    "preference": "tests/test_preference.py",
    "kl_fwd": "tests/test_gpu_kl.py",
    "kl_bwd": "tests/test_gpu_kl.py",
    **dict.fromkeys(("gae", "groups", "n_step", "scan", "vtrace", "whiten"), "tests/test_gpu_returns.py"),
}
_PYTEST_NO_TESTS = 5
_TESTS_LIMIT_S = 450.0
SUITE_MINUTES = 7.0
# For --plan, where the ledger has not measured a step yet: guesses at seconds, on the long side.
_GUESS_S = {
    "tests": 90.0,
    "memcheck": 180.0,
    "racecheck": 180.0,
    "case": 8.0,
    "capacity": 60.0,
    "suite": 60 * SUITE_MINUTES,
}

HELD, FAILED, NO_GPU, UNFINISHED = 0, 1, 2, 3


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
    served = ops_of(kernel)
    return [case for case in cases.CASES if "gpu" in case.suites and (case.op in served or case.call in served)]


def steps_of(kernel: str) -> list[str]:
    """In order: tests, the sanitizer's tools for CUDA C++, the names of its cases."""
    tools = sanitizer.TOOLS if backend_of(kernel) == "cuda" else ()
    return ["tests", *tools, *(case.name for case in cases_of(kernel))]


def plan(kernels: Sequence[str], ledger: dict[str, Any] | None = None) -> str:
    """What would run, in order, and for how long: by the ledger's own seconds where it has them, else by a guess."""
    known = (ledger or {"kernels": {}})["kernels"]
    lines, total, guessed = [], 0.0, False
    for kernel in kernels:
        entry = known.get(kernel) or {}
        current = bool(entry) and entry.get("sources") == kernel_sources(kernel, ROOT)
        done = entry.get("seconds", {}) if current else {}
        file, *options = tests_of(kernel)
        there = "" if (ROOT / file).is_file() else "   (there is no such file: nothing covers this kernel)"
        left, seconds = [step for step in steps_of(kernel) if step not in done], 0.0
        for step in left:
            measured = entry.get("seconds", {}).get(step)
            guessed |= measured is None
            seconds += measured or _GUESS_S.get(step, _GUESS_S["case"])
        total += seconds
        state = f"about {seconds / 60:.1f} min" if left else f"already verified on {entry['gpu']}"
        lines.append(f"{kernel}  (backend {backend_of(kernel)}, {state})")
        lines.append(f"  tests: pytest {shlex.join([file, *options])}{there}")
        if backend_of(kernel) == "cuda":
            tool = sanitizer.program() or "compute-sanitizer (not found here)"
            lines += [f"  {name}: {tool}, {sanitizer.TESTS} of these tests" for name in sanitizer.TOOLS]
        lines += [f"  case:  {case.name}" for case in cases_of(kernel)] or ["  case:  none in the suite gpu yet"]
    if not lines:
        return "no GPU kernels in this tree"
    lines.append(f"suite gpu beside its peers: {shlex.join(suite_command())}")
    lines.append("the largest micro-batch that fits, eager and fused: python -m bench.capacity")
    total += _GUESS_S["suite"] + _GUESS_S["capacity"]
    how = " (guessed where the ledger has no figure)" if guessed else ""
    lines.append(f"in all about {total / 60:.0f} minutes{how}; each kernel file's sha256 goes into {LEDGER.name}")
    return "\n".join(lines)


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
    if not (ROOT / tests_of(kernel)[0]).is_file():
        return {"passed": 0, "failed": 0, "skipped": 0, "names": [], "failures": []}
    return _run_pytest(*tests_of(kernel))


def side_by_side() -> list[str]:
    """Test processes on one GPU: they wait for compilers and for oracles on the CPU, each with 16 GiB of the GPU."""
    if importlib.util.find_spec("xdist") is None:
        return []
    room = torch.cuda.get_device_properties(0).total_memory // 2**34 if torch.cuda.is_available() else 1
    processes = min(8, (os.cpu_count() or 1) // 2, room)
    return ["-n", str(processes), "--dist", "worksteal"] if processes > 1 else []


@functools.cache  # kernel files that share their tests share a run of them
def _run_pytest(*arguments: str) -> dict[str, Any]:
    nothing: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "names": [], "failures": []}
    with tempfile.TemporaryDirectory() as folder:
        junit = pathlib.Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", "-q", *side_by_side(), *arguments, f"--junitxml={junit}"]
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=_TESTS_LIMIT_S).returncode
        except subprocess.TimeoutExpired:
            return {**nothing, "failed": 1, "failures": [f"pytest did not end within {_TESTS_LIMIT_S:.0f} s"]}
        if code == _PYTEST_NO_TESTS:
            return nothing
        if not junit.is_file():
            return {**nothing, "failed": 1, "failures": [f"pytest ended with status {code}"]}
        tests = parse_junit(junit)
        if code not in (0, 1):
            tests["failed"] += 1
            tests["failures"].append(f"pytest ended with status {code}")
        return tests


@functools.cache
def sanitize(tool: str, *arguments: str) -> dict[str, Any]:
    return sanitizer.check(tool, arguments)


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
    return begun(entry, kernel, gpu) and bool(entry and entry.get("complete"))


def begun(entry: dict[str, Any] | None, kernel: str, gpu: str) -> bool:
    """Whether the ledger's entry, finished or not, is of this file as it is now, on this GPU."""
    return bool(entry and entry["gpu"] == gpu and entry["sources"] == kernel_sources(kernel, ROOT))


def passed(entry: dict[str, Any]) -> bool:
    clean = all(found["status"] in ("clean", "absent") for found in entry.get("sanitizer", {}).values())
    return clean and not entry["tests"]["failed"] and all(figure.get("correct") for figure in entry["figures"])


def suite_command(minutes: float = SUITE_MINUTES) -> list[str]:
    return ["python", "-m", "bench.run", "--suite", "gpu", "--resume", "--minutes", f"{minutes:g}"]


def run_suite(minutes: float, folder: pathlib.Path) -> bool:
    """The suite gpu beside its peers, in a process of its own. Whether nothing of it is left."""
    command = [sys.executable, *suite_command(minutes)[1:], "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return run.unfinished(folder, "gpu", None, "cuda") is None


class Clock:
    """Says when no further step may start."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def minutes_left(self) -> float:
        return float("inf") if self._end is None else (self._end - time.monotonic()) / 60

    @property
    def over(self) -> bool:
        return self.minutes_left <= 0


def verify_kernel(kernel: str, ledger: dict[str, Any], ledger_path: pathlib.Path, clock: Clock) -> bool:
    """Run the steps of a kernel file that the ledger lacks, saving after each. Whether none is left."""
    meta = run.environment("cuda")
    entry = ledger["kernels"].get(kernel)
    if not begun(entry, kernel, meta["device"]):
        versions = ("rl4llm_fast", "torch", "triton", "python", "cuda", "driver")
        entry = {
            "sources": kernel_sources(kernel, ROOT),  # before the tests: an edit meanwhile shows as a change
            "gpu": meta["device"],
            "date": meta["date"],
            "git": meta["git"],
            "versions": {key: meta[key] for key in versions},
            "tests": None,
            "sanitizer": {},
            "figures": [],
            "seconds": {},
            "complete": False,
        }
    by_name = {case.name: case for case in cases_of(kernel)}
    for step in steps_of(kernel):
        if step in entry["seconds"]:
            continue
        if clock.over:
            return False
        print(f"  {step}", flush=True)
        start = time.monotonic()
        if step == "tests":
            entry["tests"] = run_tests(kernel)
        elif step in sanitizer.TOOLS:
            entry["sanitizer"][step] = sanitize(step, *tests_of(kernel))
        else:
            if "ceilings" not in ledger or ledger["ceilings"]["gpu"] != meta["device"]:
                ledger["ceilings"] = {"gpu": meta["device"], "bytes_per_s": timing.ceilings("cuda")}
            copy = ledger["ceilings"]["bytes_per_s"]["copy"]
            entry["figures"].append(run_figures(kernel, by_name[step], copy))
        entry["seconds"][step] = round(time.monotonic() - start, 1)
        ledger["kernels"][kernel] = entry
        report.write_json(ledger_path, ledger)
    entry["complete"] = True
    report.write_json(ledger_path, ledger)
    return True


def verify(kernels: Sequence[str], ledger_path: pathlib.Path, again: bool, minutes: float | None = None) -> int:
    """Verify kernel files one by one, then the suite beside its peers. Returns the command's exit status."""
    clock = Clock(minutes)
    gpu = run.environment("cuda")["device"]
    ledger = read_ledger(ledger_path)
    if again:  # said once, so that a run that is cut off goes on without it
        ledger["kernels"] = {name: entry for name, entry in ledger["kernels"].items() if name not in kernels}
        ledger.pop("suite", None)
        ledger.pop("capacity", None)
        report.write_json(ledger_path, ledger)
    held = True
    for number, kernel in enumerate(kernels, 1):
        before = ledger["kernels"].get(kernel)
        if finished(before, kernel, gpu):
            print(f"[{number}/{len(kernels)}] {kernel}: already verified in this state on {gpu}")
        else:
            print(f"[{number}/{len(kernels)}] {kernel}", flush=True)
            if not verify_kernel(kernel, ledger, ledger_path, clock):
                return UNFINISHED
        held &= passed(ledger["kernels"][kernel])
    meta = run.environment("cuda")
    now = {"gpu": gpu, "git": meta["git"], "rl4llm_fast": meta["rl4llm_fast"]}
    if ledger.get("suite") != now:
        if clock.over or not run_suite(min(SUITE_MINUTES, clock.minutes_left), ledger_path.parent):
            return UNFINISHED
        ledger["suite"] = now
        report.write_json(ledger_path, ledger)
    if {key: ledger.get("capacity", {}).get(key) for key in now} != now:
        if clock.over:
            return UNFINISHED
        found = capacity.measure()
        ledger["capacity"] = {**now, **{key: found[key] for key in ("tokens", "ratio", "target", "reached")}}
        report.write_json(ledger_path, ledger)
        print(capacity.text(found))
    return HELD if held else FAILED


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.verify", description="Verify the GPU kernels here.")
    parser.add_argument("--plan", action="store_true", help="print what would run and for how long, and stop")
    parser.add_argument("--kernel", nargs="+", metavar="PATH", help="only these kernel files")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no step after M minutes; run again to go on")
    parser.add_argument("--again", action="store_true", help="forget what the ledger knows of them, and start over")
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="DIR", help="keep ledger and results there, not in bench/results"
    )
    arguments = parser.parse_args(argv)
    known = kernel_files(ROOT)
    kernels = arguments.kernel or known
    unknown = sorted(set(kernels) - set(known))
    if unknown:
        parser.error(f"--kernel: wanted files among {', '.join(known)}, got {', '.join(unknown)}")
    if arguments.plan:
        from . import campaign  # which plans this command too

        print(plan(kernels, read_ledger(LEDGER)))
        print(f"\nwith what stands before and after it on a GPU:\n{campaign.text()}")
        return HELD
    if not torch.cuda.is_available():
        print(
            "verification needs a GPU, and torch sees none here; the ledger is as it was (--plan shows what would run)"
        )
        return NO_GPU
    ledger = LEDGER
    if arguments.out:
        ledger = arguments.out.resolve() / LEDGER.name
        ledger.parent.mkdir(parents=True, exist_ok=True)
        if not ledger.exists() and LEDGER.exists():
            shutil.copy(LEDGER, ledger)
    status = verify(kernels, ledger, arguments.again, arguments.minutes)
    print("\n".join(ledger_lines("", ledger)))
    if status == UNFINISHED:
        print("steps are left: the same command (without --again) goes on")
    return status


if __name__ == "__main__":
    sys.exit(main())
