"""The Triton kernels of the preference losses without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
from ahead_of_time import AMD, NVIDIA, assert_fits, compile_kernel, importorskip

from rl4llm_fast import pair_formulas

ROOT = pathlib.Path(__file__).resolve().parent.parent
REGISTERS = 128  # two programs of 256 threads an SM; the finishing program is alone anyway


@pytest.mark.slow
def test_in_the_interpreter():
    """TRITON_INTERPRET=1 must be set before Triton is imported: a process of its own runs the ops' tests."""
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", "not trl and not liger",
         "tests/test_preference.py", "tests/test_preference_golden.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) > 60, done.stdout[-2000:]


def kernel_cases():
    """(name, kernel, types, constants, warps, options for NVIDIA)"""
    importorskip()
    from rl4llm_fast.kernels import preference as k

    sides = ("chosen", "rejected")
    masks = {f"mask_{side}_ptr": "*i1" for side in sides}
    packed = {f"cu_{side}_ptr": "*i64" for side in sides}
    sizes = dict.fromkeys(("B", "T_chosen", "T_rejected"), "i32")
    tokens = dict.fromkeys([f"{n}{side}_ptr" for n in ("", "ref_") for side in sides], "*fp32")
    sums = tokens | masks | sizes | {"sums_ptr": "*fp64"}
    yield "sums", k.preference_sums_kernel, sums, {"BLOCK": k.BLOCK_T}, k.WARPS, {}
    yield "sums packed", k.preference_sums_kernel, sums | packed, {"BLOCK": k.BLOCK_T}, k.WARPS, {}
    outputs = dict.fromkeys(("loss_ptr", "slopes_ptr", "metrics_ptr", "per_pair_ptr"), "*fp32")
    numbers = ("fp32",) * (len(pair_formulas.PARAMS) + pair_formulas.MAX_KNOBS)
    finish = outputs | {"sums_ptr": "*fp64", "B": "i32"}
    for name, formula in k.PAIR.items():
        of = pair_formulas.FORMULAS[name]
        how = {"FORMULA": formula, "TOKEN_NLL": of.token_nll, "LABELLED": of.labelled, "AVERAGE": True}
        how |= {"PAIRS": not of.labelled, "TILE": k.TILE_B}
        yield name, k.preference_finish_kernel, finish | {"numbers": numbers}, how, k.FINISH_WARPS, k.FINISH_REGISTERS
    on_device = finish | {"params_ptr": "*fp64"}
    yield "on device", k.preference_finish_kernel, on_device, how, k.FINISH_WARPS, k.FINISH_REGISTERS
    grads = dict.fromkeys(("grad_ptr", "slopes_ptr", "grad_chosen_ptr", "grad_rejected_ptr"), "*fp32")
    yield "spread", k.preference_spread_kernel, grads | masks | sizes, {"BLOCK": k.BLOCK_T}, k.WARPS, {}
    yield "spread packed", k.preference_spread_kernel, grads | masks | packed | sizes, {"BLOCK": k.BLOCK_T}, k.WARPS, {}


@pytest.mark.parametrize("target", [*NVIDIA, AMD], ids=str)
def test_compiles_without_spills(target):
    for name, kernel, types, constants, warps, options in kernel_cases():
        compiled = compile_kernel(kernel, types, constants, warps, target, nvidia=options)
        assert_fits(compiled, REGISTERS, name)
