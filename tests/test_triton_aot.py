"""The Triton kernels, compiled ahead of time for GPUs that are not here: registers, spills, 16-byte loads."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: the interpreter compiles nothing", allow_module_level=True)

from rl4llm_fast.kernels import configs, token_logprobs  # noqa: E402

NVIDIA = [80, 90, 100]
V = 151_936
POINTERS = {
    "token_ids_ptr": "*i64",
    "mask_ptr": "*i1",
    **dict.fromkeys(
        ["temperature_ptr", "softcap_ptr", "partial_ptr", "logp_ptr", "entropy_ptr", "row_max_ptr", "log_sum_ptr",
         "grad_logp_ptr", "grad_entropy_ptr"], "*fp32"
    ),
}  # fmt: skip
# What the launcher passes at V = 151,936 and contiguous logits: integers that are multiples of 16, and others.
DIVISIBLE = {"V": "i32", "stride_b": "i64", "stride_t": "i32", "dlogits_stride_b": "i64", "dlogits_stride_t": "i32",
             "part_columns": "i32"}  # fmt: skip
INTEGERS = {"T": "i32", "temperature_stride": "i32", "ignore_index": "i32", "parts": "i32"}
CASES = {
    "plain": {"mask_ptr": None, "temperature_ptr": None, "softcap_ptr": None, "softcap": None},
    "softcap": {"temperature_ptr": None, "softcap_ptr": None},
}


def compile_kernel(kernel, dtype, constants, target, warps):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = POINTERS | DIVISIBLE | INTEGERS | {"temperature": "fp32", "softcap": "fp32"}
    types |= {"logits_ptr": f"*{dtype}", "dlogits_ptr": f"*{dtype}"}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or (n in DIVISIBLE and n not in constants)]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(n),): value for n, value in constants.items() if n in names},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    return triton.compile(source, target=GPUTarget(*target), options={"num_warps": warps})


def kernel_case(name, dtype, case):
    """(kernel, constants, warps, budget) as the launcher would start it."""
    size = 4 if dtype == "fp32" else 2
    constants = CASES[case] | {"ID_PER_ROW": True, "K": 1}
    if name == "token_logprobs_merge":
        parts = triton.cdiv(V, configs.part_columns(V))
        constants |= {"BLOCK_K": configs.IDS_BLOCK, "BLOCK_PARTS": triton.next_power_of_2(parts)}
        return token_logprobs.token_logprobs_merge_kernel, constants, 1, 64
    block, warps = configs.row_launch(name, size, configs.part_columns(V))
    constants |= {"BLOCK_V": block}
    if name == "token_logprobs_fwd":
        constants |= {"ENTROPY": True, "BLOCK_K": configs.IDS_BLOCK, "VEC": configs.vector(size)}
    return getattr(token_logprobs, f"{name}_kernel"), constants, warps, configs.LAUNCHES[name, size].registers


def resource_usage(cubin, folder) -> tuple[int, int]:
    """(registers, stack bytes) of the one kernel in a cubin; spills show as stack."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    cuobjdump = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([cuobjdump, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return int(found[0]), int(found[1])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["token_logprobs_fwd", "token_logprobs_merge", "token_logprobs_bwd"])
def test_nvidia(name, dtype, case, tmp_path):
    if dtype == "fp16" and case != "plain":
        pytest.skip("fp16 differs from bf16 in the conversion only")
    kernel, constants, warps, budget = kernel_case(name, dtype, case)
    for arch in NVIDIA:
        compiled = compile_kernel(kernel, dtype, constants, ("cuda", arch, 32), warps)
        registers, stack = resource_usage(compiled.asm["cubin"], tmp_path)
        assert stack == 0, f"{name} {dtype} {case} sm_{arch} spills {stack} bytes"
        assert registers <= budget, f"{name} {dtype} {case} sm_{arch}: {registers} registers, budget {budget}"
        loads = len(re.findall(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"]))
        stores = len(re.findall(r"st\.global\S*\.v4\.b32", compiled.asm["ptx"]))
        # 16 bytes a load: as many as the columns that a thread holds at once need, and no narrower ones beside them.
        if name != "token_logprobs_merge":
            assert loads == constants["BLOCK_V"] // (32 * warps) // configs.vector(4 if dtype == "fp32" else 2)
        if name == "token_logprobs_bwd":
            assert stores == loads


@pytest.mark.parametrize("name", ["token_logprobs_fwd", "token_logprobs_merge", "token_logprobs_bwd"])
def test_amd_compiles(name):
    kernel, constants, warps, _ = kernel_case(name, "bf16", "softcap")
    compiled = compile_kernel(kernel, "bf16", constants, ("hip", "gfx942", 64), warps)
    assert len(compiled.asm["hsaco"]) > 0
    spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
    assert spills is not None
    assert int(spills.group(1)) == 0


def test_how_a_row_is_cut():
    """By V alone; parts start on 16 bytes, cover the row once, and none is empty."""
    for vocabulary in (1, 127, 1_024, 32_768, 32_769, 49_152, 50_257, 128_256, 151_936, 262_144, 2**20 + 1):
        columns = configs.part_columns(vocabulary)
        parts = -(-vocabulary // columns)
        assert columns % configs.PART_STEP == 0
        assert columns <= configs.MAX_PART
        assert (parts - 1) * columns < vocabulary <= parts * columns
        assert vocabulary > configs.MAX_PART or parts == 1


def test_every_launch_says_why():
    for launch in configs.LAUNCHES.values():
        assert launch.why
        assert launch.block % (launch.warps * configs.WARP) == 0
