"""The Triton kernels, compiled ahead of time for GPUs that are not here: registers, spills, 16-byte loads."""

from __future__ import annotations

import ahead_of_time
import pytest
import torch
from ahead_of_time import AMD, NVIDIA, assert_fits, wide

from bench import knobs, static

triton = ahead_of_time.importorskip()

from rl4llm_fast.kernels import configs, kl, kl_bwd, rows, token_logprobs  # noqa: E402

V = 151_936
POINTERS = {
    "token_ids_ptr": "*i64",
    "mask_ptr": "*i1",
    "inner_ptr": "*fp64",
    **dict.fromkeys(
        ["temperature_ptr", "softcap_ptr", "partial_ptr", "logp_ptr", "entropy_ptr", "row_max_ptr", "log_sum_ptr",
         "grad_logp_ptr", "grad_entropy_ptr", "kl_ptr", "other_row_max_ptr", "other_log_sum_ptr",
         "ref_row_max_ptr", "ref_log_sum_ptr", "beta_ptr", "grad_ptr"], "*fp32"
    ),
}  # fmt: skip
# What the launcher passes at V = 151,936 and contiguous logits: integers that are multiples of 16, and others.
SIDES = ("", "other_", "ref_", "dlogits_")
DIVISIBLE = {"V": "i32", "part_columns": "i32", **{f"{side}stride_b": "i64" for side in SIDES},
             **{f"{side}stride_t": "i32" for side in SIDES}}  # fmt: skip
INTEGERS = {"T": "i32", "temperature_stride": "i32", "ignore_index": "i32", "parts": "i32"}
CASES = {
    "plain": {"mask_ptr": None, "temperature_ptr": None, "softcap_ptr": None, "softcap": None},
    "softcap": {"temperature_ptr": None, "softcap_ptr": None},
}


def compile_kernel(kernel, dtype, constants, target, warps, ref_dtype=None, nvidia=None):
    types = POINTERS | DIVISIBLE | INTEGERS | {"temperature": "fp32", "softcap": "fp32", "beta": "fp32"}
    types |= {"logits_ptr": f"*{dtype}", "dlogits_ptr": f"*{dtype}"}
    types |= dict.fromkeys(("ref_logits_ptr", "other_logits_ptr"), f"*{ref_dtype}")
    assert not set(kernel.arg_names) - types.keys() - constants.keys()
    return ahead_of_time.compile_kernel(kernel, types, constants, warps, target, DIVISIBLE, nvidia)


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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["token_logprobs_fwd", "token_logprobs_merge", "token_logprobs_bwd"])
def test_nvidia(name, dtype, case):
    if dtype == "fp16" and case != "plain":
        pytest.skip("fp16 differs from bf16 in the conversion only")
    kernel, constants, warps, budget = kernel_case(name, dtype, case)
    for target in NVIDIA:
        compiled = compile_kernel(kernel, dtype, constants, target, warps)
        assert_fits(compiled, budget, f"{dtype} {case}")
        loads, stores = wide(compiled, "ld"), wide(compiled, "st")
        # 16 bytes a load: as many as the columns that a thread holds at once need, and no narrower ones beside them.
        if name != "token_logprobs_merge":
            assert loads == constants["BLOCK_V"] // (32 * warps) // configs.vector(4 if dtype == "fp32" else 2)
        if name == "token_logprobs_bwd":
            assert stores == loads


SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
KL_KERNELS = ["fwd", "merge", "jsd", "jsd_merge", "bwd reverse", "bwd forward", "bwd jsd"]


def kl_case(name, dtype, ref_dtype, case):
    """(kernel, constants, warps, budget) as the launcher would start it."""
    name, *direction = name.split()
    constants = CASES[case] | {"beta_ptr": None, "ANCHORED": True}
    if name in ("fwd", "merge") or (direction and direction != ["jsd"]):
        constants |= {"beta": None}
    kernel = getattr(kl_bwd if direction else kl, f"kl_divergence_{name}_kernel")
    if "merge" in name:
        parts = triton.cdiv(V, configs.part_columns(V))
        return kernel, constants | {"BLOCK_PARTS": triton.next_power_of_2(parts)}, 1, 64
    narrow, wide = sorted((SIZES[dtype], SIZES[ref_dtype]))
    launch = "kl_divergence_bwd" if direction else "kl_divergence_fwd"
    block, warps = configs.row_launch(launch, wide, configs.part_columns(V))
    constants |= {"BLOCK_V": block}
    if not direction:
        constants |= {"VEC": configs.vector(narrow)}
    else:
        constants |= {"DIRECTION": direction[0]}
    return kernel, constants, warps, configs.LAUNCHES[launch, wide].registers


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "fp16")], ids=str)
@pytest.mark.parametrize("name", KL_KERNELS)
def test_nvidia_kl(name, dtypes, case):
    if case == "softcap" and (dtypes[0] != dtypes[1] or "merge" in name):
        pytest.skip("mixed dtypes differ in the loads only, and a merge knows no softcap")
    kernel, constants, warps, budget = kl_case(name, *dtypes, case)
    for target in NVIDIA:
        compiled = compile_kernel(kernel, dtypes[0], constants, target, warps, dtypes[1])
        assert_fits(compiled, budget, " ".join((*name.split()[1:], *dtypes, case)))
        if "merge" not in name:
            each = constants["BLOCK_V"] // (32 * warps)  # columns of each side that a thread holds
            assert wide(compiled, "ld") == sum(each // configs.vector(SIZES[dtype]) for dtype in dtypes)
        if "bwd" in name:
            assert wide(compiled, "st") == each // configs.vector(SIZES[dtypes[0]])


def test_one_row_is_laid_out_like_many():
    """The order of summation follows from the divisors of the strides: a row alone must not bring others."""
    for vocabulary in (50_257, 151_936):
        batch = torch.empty(1, 300, vocabulary, device="meta")
        for alone in (batch[:, :1], torch.empty(1, 1, vocabulary, device="meta"), batch.transpose(0, 1)):
            strides = {stride % 16 for stride in rows.row_strides(alone)}
            assert strides == {stride % 16 for stride in rows.row_strides(batch)} == {vocabulary % 16}


@pytest.mark.parametrize("name", KL_KERNELS)
def test_amd_compiles_kl(name):
    kernel, constants, warps, _ = kl_case(name, "bf16", "fp32", "softcap")
    compiled = compile_kernel(kernel, "bf16", constants, AMD, warps, "fp32")
    assert_fits(compiled, None, name)


@pytest.mark.parametrize("name", ["token_logprobs_fwd", "token_logprobs_merge", "token_logprobs_bwd"])
def test_amd_compiles(name):
    kernel, constants, warps, _ = kernel_case(name, "bf16", "softcap")
    compiled = compile_kernel(kernel, "bf16", constants, AMD, warps)
    assert_fits(compiled, None, name)


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


def instructions(compiled):
    """The code alone: Triton's cache serves every checkout, and what it kept names the files of the first."""
    code = compiled.asm["ptx"].partition("\t.section")[0]
    return [line for line in code.splitlines() if not line.lstrip().startswith((".file", ".loc"))]


@pytest.mark.parametrize("name", ["token_logprobs_fwd", "token_logprobs_bwd"])
def test_candidates_of_the_tuner_compile(name):
    """The smallest and the largest block of bench.tune; a cap on registers is kept to; stages change no instruction."""
    kernel, constants, warps, _ = kernel_case(name, "bf16", "plain")
    (knob,) = [knob for knob in knobs.knobs() if knob.name == f"LAUNCHES {name} 2"]
    for block, its_warps in (min(knob.candidates), max(knob.candidates)):
        compiled = compile_kernel(kernel, "bf16", constants | {"BLOCK_V": block}, NVIDIA[1], its_warps)
        assert compiled.metadata.shared <= 227 * 1024
    plain, capped, *staged = (
        compile_kernel(kernel, "bf16", constants, NVIDIA[1], warps, nvidia=options)
        for options in ({}, {"maxnreg": 48}, {"num_stages": 1}, {"num_stages": 4})
    )
    assert all(instructions(other) == instructions(plain) for other in staged)
    assert instructions(capped) != instructions(plain)
    figures = static.read(capped.asm["cubin"], 90, capped.metadata.shared)[capped.metadata.name]
    assert figures.registers <= 48
