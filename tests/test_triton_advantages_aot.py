"""The Triton kernels of groups, whiten, n-step returns and scaling, ahead of time: registers, spills, 16-byte loads."""

from __future__ import annotations

import ahead_of_time
import pytest
from ahead_of_time import AMD, NVIDIA, assert_fits, wide

ahead_of_time.importorskip()

from rl4llm_fast.kernels import configs, groups, n_step, scale, whiten  # noqa: E402

NO_DEVICE_NUMBERS = {"eps_ptr": None, "gamma_ptr": None}
FLAGS = {"LEAVE_ONE_OUT": False, "BY_GROUP": True, "UNBIASED": True, "SHIFT_MEAN": True}
STEP = {"BLOCK": configs.N_STEP_BLOCK}
GROUP, WHITEN = {"BLOCK": configs.GROUP_BLOCK}, {"BLOCK": configs.WHITEN_BLOCK}
# name -> (kernel, constants, warps, register budget, streaming: whether it must load 16 bytes at a time)
KERNELS = {
    "group_advantages by id": (groups.group_advantages_kernel, GROUP | {"batch_stats_ptr": None}, 1, 96, False),
    "group_advantages by size": (
        groups.group_advantages_kernel,
        GROUP | {"batch_stats_ptr": None, "order_ptr": None, "starts_ptr": None},
        1, 96, False,
    ),
    "group_advantages batch": (groups.group_advantages_kernel, GROUP | {"BY_GROUP": False}, 1, 96, False),
    "process_stats": (groups.process_stats_kernel, GROUP, 1, 128, False),
    "process_advantages": (
        groups.process_advantages_kernel,
        dict(zip(("BLOCK_K", "BLOCK_T"), configs.PROCESS_BLOCK, strict=True)),
        4, 128, False,
    ),
    "whiten_parts": (
        whiten.whiten_parts_kernel, WHITEN | {"mask_ptr": None, "minus_ptr": None}, configs.WHITEN_WARPS, 96, True
    ),
    "whiten_parts masked": (whiten.whiten_parts_kernel, WHITEN | {"minus_ptr": None}, configs.WHITEN_WARPS, 96, False),
    "whiten_parts of a difference": (whiten.whiten_parts_kernel, WHITEN, configs.WHITEN_WARPS, 96, False),
    "whiten_join": (
        whiten.whiten_join_kernel, {"BLOCK": configs.WHITEN_JOIN_BLOCK}, configs.WHITEN_WARPS, 160, False
    ),
    "whiten_apply": (whiten.whiten_apply_kernel, WHITEN | {"mask_ptr": None}, configs.WHITEN_WARPS, 96, True),
    "scale_gradient": (
        scale.scale_gradient_kernel, {"BLOCK": configs.SCALE_BLOCK}, configs.SCALE_WARPS, 128, True
    ),
    "n_step last": (n_step.n_step_kernel, STEP | {"doubled_ptr": None}, configs.N_STEP_WARPS, 96, False),
    "n_step bit": (n_step.n_step_kernel, STEP | {"values_ptr": None}, configs.N_STEP_WARPS, 96, False),
}  # fmt: skip
TYPES = {
    "mask_ptr": "*i1", "order_ptr": "*i64", "starts_ptr": "*i64", "ends_ptr": "*i64", "stats_ptr": "*fp64",
    "partial_ptr": "*fp64", "batch_stats_ptr": "*fp64", "eps": "fp32", "gamma": "fp32",
}  # fmt: skip


def compile_kernel(name, dtype, target):
    kernel, constants, warps, *_ = KERNELS[name]
    types = {n: "*fp32" if n.endswith("_ptr") else "i32" for n in kernel.arg_names}
    types |= TYPES | {"rewards_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "gradient_ptr": f"*{dtype}"}
    constants = FLAGS | NO_DEVICE_NUMBERS | constants
    return ahead_of_time.compile_kernel(kernel, types, constants, warps, target, ("N",))


@pytest.mark.parametrize("name", KERNELS)
def test_nvidia(name):
    *_, budget, streaming = KERNELS[name]
    for target in NVIDIA:
        compiled = compile_kernel(name, "fp32", target)
        assert_fits(compiled, budget, name)
        if streaming:
            assert wide(compiled, "ld"), f"{name}: no 16-byte load"


@pytest.mark.parametrize("name", KERNELS)
def test_amd_compiles(name):
    assert_fits(compile_kernel(name, "bf16", AMD), None, name)
