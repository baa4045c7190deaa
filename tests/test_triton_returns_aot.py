"""The Triton scans, compiled ahead of time for GPUs that are not here: registers, spills, 16-byte loads."""

from __future__ import annotations

import ahead_of_time
import pytest
import torch
from ahead_of_time import AMD, NVIDIA, assert_fits, wide

ahead_of_time.importorskip()

from rl4llm_fast.kernels import configs, gae, scan, vtrace  # noqa: E402

KERNELS = {"gae_fwd": gae.gae_fwd_kernel, "gae_bwd": gae.gae_bwd_kernel, "vtrace": vtrace.vtrace_kernel}
CASES = {
    "rows": {"mask_ptr": None, "offsets_ptr": None, "WRITE": True, "BLOCK": configs.SCAN_ROWS[0]},
    "masked packed parts": {"WRITE": True, "BLOCK": configs.SCAN_PACKED[0]},
    "masked packed summary": {"WRITE": False, "BLOCK": configs.SCAN_PACKED[0]},
}
WARPS = {configs.SCAN_ROWS[0]: configs.SCAN_ROWS[1], configs.SCAN_PACKED[0]: configs.SCAN_PACKED[1]}
NUMBERS = ("gamma", "lam", "beta", "rho_max", "c_max")
INPUTS = ("rewards_ptr", "values_ptr", "kl_ptr", "logp_ptr", "rollout_logp_ptr")


def compile_kernel(kernel, dtype, case, target):
    constants = {"SKIP": True, "PART": configs.SCAN_PART, **CASES[case]}
    if case == "rows":
        constants |= {"partial_ptr": None, "kl_ptr": None, "scores_ptr": None, "bootstrap_ptr": None}
    constants |= dict.fromkeys(f"{n}_ptr" for n in NUMBERS)
    types = {n: "*fp32" if n.endswith("_ptr") else "fp32" if n in NUMBERS else "i32" for n in kernel.arg_names}
    types |= {"mask_ptr": "*i1", "offsets_ptr": "*i64"} | dict.fromkeys(INPUTS, f"*{dtype}")
    divisible = [n for n in kernel.arg_names if n.endswith("_stride") or (n == "T" and case == "rows")]
    return ahead_of_time.compile_kernel(kernel, types, constants, WARPS[constants["BLOCK"]], target, divisible)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", KERNELS)
def test_nvidia(name, case):
    for target in NVIDIA:
        compiled = compile_kernel(KERNELS[name], "fp32", case, target)
        assert_fits(compiled, configs.SCAN_REGISTERS, case)
        if case == "rows":
            assert wide(compiled, "ld"), f"{name}: no 16-byte load"


@pytest.mark.parametrize("name", KERNELS)
def test_amd_compiles(name):
    assert_fits(compile_kernel(KERNELS[name], "bf16", "masked packed parts", AMD), None, name)


def test_how_rows_are_cut():
    """By their length alone; a block never exceeds a part."""
    for length in (1, 64, 65, 1_000, 4_096, 2**20):
        block, warps = configs.scan_block(length)
        assert configs.SCAN_PART % block == 0
        assert block % (warps * configs.WARP) == 0


@pytest.mark.parametrize("packed", [False, True])
def test_places_that_int32_does_not_hold_are_refused(packed):
    tokens = torch.empty((2**31 - 9,) if packed else (1, 2**31 - 9), device="meta")
    offsets = torch.empty(2, dtype=torch.int32, device="meta") if packed else None
    with pytest.raises(ValueError, match="gae: wanted rows, or a pack, of fewer than"):
        scan.Cut("gae", tokens, offsets)
