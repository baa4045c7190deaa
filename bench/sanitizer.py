"""A CUDA C++ kernel's tests under NVIDIA's compute-sanitizer, where the toolkit has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from .base import ROOT

TOOLS = ("memcheck", "racecheck")
TESTS = 10  # of a kernel's tests, evenly spread: under a tool each takes tens of times as long
LIMIT_S = 450.0
_FOUND = 86  # the exit status that we ask for where the tool found something
_OURS = "kns=rl4llm"  # kernels with our namespace in their name: torch's are not on trial


def program(name: str = "compute-sanitizer") -> str | None:
    """The path of a tool of NVIDIA's, in PATH or in a toolkit."""
    homes = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def spread(names: Sequence[str], count: int = TESTS) -> list[str]:
    """At most ``count`` of the names, evenly spread, the first and the last among them."""
    if len(names) <= count:
        return list(names)
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def collect(pytest_arguments: Sequence[str]) -> list[str]:
    """The test ids that pytest would run, but for CUDA graphs: torch captures none without its cache (``check``)."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *pytest_arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = [line.strip() for line in done.stdout.splitlines() if "::" in line and not line.startswith("ERROR")]
    return [name for name in names if "graph" not in name]


def check(tool: str, pytest_arguments: Sequence[str]) -> dict[str, Any]:
    """``{"status": "clean"|"found"|"failed"|"absent", ...}``; what was found or went wrong stands in ``detail``."""
    sanitizer = program()
    if sanitizer is None:
        return {"status": "absent", "detail": "no compute-sanitizer in PATH, CUDA_HOME or /usr/local/cuda"}
    tests = spread(collect(pytest_arguments))
    if not tests:
        return {"status": "absent", "detail": "no test covers this kernel"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(_FOUND), "--kernel-regex", _OURS]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    # Without torch's cache every tensor is an allocation of its own, so that reading past its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "tests": tests, "detail": f"did not end within {LIMIT_S:.0f} s"}
    said = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    if done.returncode == 0:
        return {"status": "clean", "tests": tests, "detail": said[-1].strip("= ") if said else ""}
    status = "found" if done.returncode == _FOUND else "failed"
    tail = said if status == "found" else (done.stdout + done.stderr).splitlines()[-20:]
    return {"status": status, "tests": tests, "detail": "\n".join(tail[:60])}
