"""The Triton kernels of groups, whiten and n-step returns, compiled ahead of time: registers, spills, 16-byte loads."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: the interpreter compiles nothing", allow_module_level=True)

from rl4llm_fast.kernels import configs, groups, n_step, whiten  # noqa: E402

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
    "whiten_parts": (whiten.whiten_parts_kernel, WHITEN | {"mask_ptr": None}, configs.WHITEN_WARPS, 96, True),
    "whiten_parts masked": (whiten.whiten_parts_kernel, WHITEN, configs.WHITEN_WARPS, 96, False),
    "whiten_join": (
        whiten.whiten_join_kernel, {"BLOCK": configs.WHITEN_JOIN_BLOCK}, configs.WHITEN_WARPS, 160, False
    ),
    "whiten_apply": (whiten.whiten_apply_kernel, WHITEN | {"mask_ptr": None}, configs.WHITEN_WARPS, 96, True),
    "n_step last": (n_step.n_step_kernel, STEP | {"doubled_ptr": None}, configs.N_STEP_WARPS, 96, False),
    "n_step bit": (n_step.n_step_kernel, STEP | {"values_ptr": None}, configs.N_STEP_WARPS, 96, False),
}  # fmt: skip
TYPES = {
    "mask_ptr": "*i1", "order_ptr": "*i64", "starts_ptr": "*i64", "ends_ptr": "*i64", "stats_ptr": "*fp64",
    "partial_ptr": "*fp64", "batch_stats_ptr": "*fp64", "eps": "fp32", "gamma": "fp32",
}  # fmt: skip


def compile_kernel(name, dtype, target):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, warps, *_ = KERNELS[name]
    names = kernel.arg_names
    constants = {n: value for n, value in (constants | FLAGS | NO_DEVICE_NUMBERS).items() if n in names}
    if "BY_GROUP" in KERNELS[name][1]:
        constants |= KERNELS[name][1]
    types = TYPES | {"rewards_ptr": f"*{dtype}", "x_ptr": f"*{dtype}"}
    signature = {
        n: "constexpr" if n in constants else types.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in names
    }
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if signature[n].startswith("*") or n == "N"},
    )
    return triton.compile(source, target=GPUTarget(*target), options={"num_warps": warps, **configs.COMPILE})


def resource_usage(cubin, folder) -> tuple[int, int]:
    """(registers, stack bytes) of the one kernel in a cubin; spills show as stack."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    cuobjdump = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([cuobjdump, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return int(found[0]), int(found[1])


@pytest.mark.parametrize("name", KERNELS)
def test_nvidia(name, tmp_path):
    *_, budget, streaming = KERNELS[name]
    for arch in (80, 90, 100):
        compiled = compile_kernel(name, "fp32", ("cuda", arch, 32))
        registers, stack = resource_usage(compiled.asm["cubin"], tmp_path)
        assert stack == 0, f"{name} sm_{arch} spills {stack} bytes"
        assert registers <= budget, f"{name} sm_{arch}: {registers} registers, budget {budget}"
        if streaming:
            assert re.search(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"]), f"{name}: no 16-byte load"


@pytest.mark.parametrize("name", KERNELS)
def test_amd_compiles(name):
    compiled = compile_kernel(name, "bf16", ("hip", "gfx942", 64))
    spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
    assert spills is not None
    assert int(spills.group(1)) == 0
