"""What NVIDIA's ncu says of the three slowest kernels: ``python -m bench.ncu [--plan] [--kernels N] [--minutes M]``.

The kernels of every case of the suite gpu are timed by torch's profiler; of the slowest, one launch is replayed under
``ncu --set full``. Its report goes into bench/results/ncu-{kernel}-{device}-{date}.txt, the ranking with what stands in
the reports' first lines into ncu-{device}-{date}.json, written after every step; the same command goes on where it
stopped. Where ncu is absent or may not read the counters it says so, and the ranking stays.
Exit status: 0 done; 2 there is no GPU; 3 kernels are left.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rl4llm_fast.info import kernel_files

from . import cases, measure, ops, peers, report, run, sanitizer
from .base import ROOT
from .verify import HELD, NO_GPU, UNFINISHED, Clock

LIMIT_S = 150.0
# For --plan: guesses at seconds of a case under torch's profiler, and of a kernel under ncu.
_CASE_S, _KERNEL_S = 4.0, 60.0
_DEFINED = re.compile(r"^def (\w+_kernel)\(|__global__[^;{]*?\b(\w+_kernel)\s*\(", re.MULTILINE)
_FIGURES = (
    *("Duration", "Memory Throughput", "DRAM Throughput", "L2 Hit Rate", "Registers Per Thread"),
    *("Theoretical Occupancy", "Achieved Occupancy", "Compute (SM) Throughput"),
)
# What it says where it will say nothing of any kernel: counters kept to administrators, a machine without its library.
_UNUSABLE = ("ERR_NVGPUCTRPERM", "Failed to initialize the profiler")


def our_kernels(root: pathlib.Path = ROOT) -> set[str]:
    """The names of the kernels that the sources define."""
    texts = [(root / path).read_text(encoding="utf-8") for path in kernel_files(root)]
    return {name for text in texts for pair in _DEFINED.findall(text) for name in pair if name}


def ranking(times: dict[str, dict[str, float]], ours: set[str]) -> list[dict[str, Any]]:
    """Our kernels, slowest first, each with the case in which a launch of it takes longest.

    times: {case: {kernel as the profiler calls it: microseconds of a launch}}.
    """
    slowest: dict[str, dict[str, Any]] = {}
    for case, launches in times.items():
        for event, us in launches.items():
            name = next((word for word in re.findall(r"\w+", event) if word in ours), None)
            if name and us > slowest.get(name, {"us": 0.0})["us"]:
                slowest[name] = {"kernel": name, "case": case, "us": us}
    return sorted(slowest.values(), key=lambda row: -row["us"])


def profiled(case: cases.Case) -> dict[str, float]:
    """Microseconds of a launch of each kernel in one call of the case, after a first one."""
    torch._dynamo.reset()
    made = _step(case)
    made.run(made.prepare())
    state = made.prepare()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        made.run(state)
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / max(event.count, 1) for event in profile.key_averages()}


def _step(case: cases.Case) -> Any:
    function = peers.build(peers.OURS, case, "cuda")
    return ops.step(case, function, ops.make_inputs(case, "cuda"), ops.overwrites(case, peers.OURS))


def command(ncu: str, kernel: str, case: str) -> list[str]:
    """The second launch of the kernel, as the first call compiles and allocates; the GPU's clocks stay as they are."""
    options = ["--set", "full", "--page", "details", "--clock-control", "none", "--kernel-name-base", "function"]
    options += ["--kernel-name", kernel, "--launch-skip", "1", "--launch-count", "1"]
    return [ncu, *options, sys.executable, "-m", "bench.ncu", "--run", case]


def figures(text: str) -> dict[str, str]:
    """The report's main figures, with their units."""
    found = {}
    for line in text.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) in (2, 3) and cells[0] in _FIGURES and cells[0] not in found:
            found[cells[0]] = " ".join(reversed(cells[1:]))
    return found


def report_of(kernel: str, case: str, path: pathlib.Path) -> dict[str, Any]:
    """{"status": "ok"|"absent"|"unusable"|"failed", ...}; the text of ncu goes to ``path``."""
    ncu = sanitizer.program("ncu")
    if ncu is None:
        return {"status": "absent", "detail": "no ncu in PATH, CUDA_HOME or /usr/local/cuda"}
    try:
        done = subprocess.run(command(ncu, kernel, case), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "detail": f"did not end within {LIMIT_S:.0f} s"}
    said = (done.stdout + done.stderr).splitlines()
    refusal = next((re.sub(r"^=+\w+=+ *", "", line) for line in said if any(word in line for word in _UNUSABLE)), None)
    if refusal is not None:
        return {"status": "unusable", "detail": refusal}
    found = figures(done.stdout)
    if done.returncode or not found:
        tail = "\n".join(said[-10:])
        return {"status": "failed", "detail": f"status {done.returncode}: {tail}"}
    path.write_text(done.stdout, encoding="utf-8")
    return {"status": "ok", "report": path.name, "figures": found}


def profile(
    result: dict[str, Any],
    path: pathlib.Path,
    count: int,
    clock: Clock,
    time_case: Callable[[cases.Case], dict[str, float]] = profiled,
    look: Callable[[str, str, pathlib.Path], dict[str, Any]] = report_of,
) -> int:
    """Rank the kernels and look at the slowest, writing the result after each step. The command's exit status."""
    chosen = cases.select("gpu")
    for number, case in enumerate(chosen, 1):
        if case.name in result["times"]:
            continue
        if clock.over:
            return UNFINISHED
        print(f"[{number}/{len(chosen)}] {case.name}", file=sys.stderr, flush=True)
        try:
            result["times"][case.name] = time_case(case)
        except Exception as error:  # the others are worth their places without it
            result["times"][case.name] = {}
            print(f"  {measure.one_line(error)}", file=sys.stderr)
        report.write_json(path, result)
    result["ranking"] = ranking(result["times"], our_kernels())
    for row in result["ranking"][:count]:
        if result["reports"].get(row["kernel"], {}).get("status") == "ok":
            continue
        if clock.over:
            return UNFINISHED
        print(f"ncu: {row['kernel']} in {row['case']}", file=sys.stderr, flush=True)
        beside = path.with_name(path.stem.replace("ncu-", f"ncu-{row['kernel']}-", 1) + ".txt")
        result["reports"][row["kernel"]] = look(row["kernel"], row["case"], beside)
        report.write_json(path, result)
        if result["reports"][row["kernel"]]["status"] in ("absent", "unusable"):
            break  # as it would be of the others
    report.write_json(path, result)
    return HELD


def text(result: dict[str, Any], count: int) -> str:
    """The slowest kernels, and what ncu says of each."""
    meta = result["meta"]
    lines = [f"slowest kernels of the suite gpu on {meta['device']}, {meta['date']}, commit {meta['git']}"]
    for row in result.get("ranking", [])[:count]:
        lines.append(f"{row['kernel']}: {row['us']:,.1f} µs a launch in {row['case']}")
        found = result["reports"].get(row["kernel"])
        if found is None:
            continue
        if found["status"] == "ok":
            lines += [f"  {name}: {value}" for name, value in found["figures"].items()]
            lines.append(f"  report: {found['report']}")
        else:
            lines.append(f"  ncu: {found['status']}: {found['detail']}")
    return "\n".join(lines)


def plan(result: dict[str, Any], count: int) -> str:
    """What would run, and for about how long."""
    left = [case for case in cases.select("gpu") if case.name not in result["times"]]
    seen = sum(found["status"] == "ok" for found in result["reports"].values())
    seconds = len(left) * _CASE_S + max(count - seen, 0) * _KERNEL_S
    tool = sanitizer.program("ncu") or "ncu (not found here: the ranking alone)"
    return (
        f"torch's profiler on {len(left)} cases of the suite gpu\n{tool}, --set full, on the {count} slowest kernels\n"
        f"in all about {seconds / 60:.0f} minutes (guessed)"
    )


def load(folders: Sequence[pathlib.Path], meta: dict[str, Any]) -> tuple[pathlib.Path | None, dict[str, Any]]:
    """The newest result of this commit on this GPU, with its path, or an empty one."""
    found = report.alike(report.recorded(folders, "ncu"), meta, ("device", "git", "torch", "triton"))
    return next(found, (None, {"meta": meta, "times": {}, "reports": {}}))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ncu", description="Look at the slowest kernels with ncu.")
    parser.add_argument("--plan", action="store_true", help="print what would run and for how long, and stop")
    parser.add_argument("--kernels", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no step after M minutes; run again to go on")
    parser.add_argument("--run", metavar="CASE", help="make two calls of a case: what ncu watches")
    parser.add_argument("--out", type=pathlib.Path, default=report.RESULTS, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    meta = {**run.environment("cuda" if gpu else "cpu"), "suite": "ncu"}
    known, result = load((arguments.out, report.RESULTS), meta)
    if arguments.plan:
        print(plan(result, arguments.kernels))
        return HELD
    if not gpu:
        print("profiling needs a GPU, and torch sees none here (--plan shows what would run)")
        return NO_GPU
    if arguments.run:
        made = _step(next(case for case in cases.select("gpu") if case.name == arguments.run))
        for _ in range(2):
            made.run(made.prepare())
        torch.cuda.synchronize()
        return HELD
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / (f"{run.stem(meta)}.json" if known is None else known.name)
    status = profile(result, path, arguments.kernels, Clock(arguments.minutes))
    print(text(result, arguments.kernels))
    print(f"wrote {path}")
    if status == UNFINISHED:
        print("steps are left: the same command goes on")
    return status


if __name__ == "__main__":
    sys.exit(main())
