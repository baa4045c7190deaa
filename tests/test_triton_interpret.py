"""The Triton kernels on CPU tensors, in Triton's interpreter.

TRITON_INTERPRET=1 must be set before Triton is imported and cannot be taken back, so the tests run in a process of
their own: those of the ops themselves, with "triton" for its backend, and tests/interpret/.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# fp64 is for the CPU; out-of-range ids and temperatures raise on the CPU only; the rest would only be slow here.
LEFT_OUT = ("gradcheck", "out_of_range", "message_names", "50257", "same_bits", "trl", "compile", "golden")


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-k",
         "triton and not (" + " or ".join(LEFT_OUT) + ")", "tests/test_token_logprobs.py",
         "tests/test_token_logprobs_inplace.py",
         "tests/test_kl_divergence.py", "tests/test_properties.py", "tests/test_group_advantages.py",
         "tests/test_process_advantages.py", "tests/interpret"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) > 160, done.stdout[-2000:]
