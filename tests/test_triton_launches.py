"""What Triton does with the arguments of each launch, which neither its interpreter nor a compilation shows."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_every_kernel_binds_and_compiles_as_it_is_launched():
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "triton_launches.py")],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    kernels = set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
    assert len(kernels) > 25
    assert {line.split()[0] for line in done.stdout.splitlines()} == kernels
