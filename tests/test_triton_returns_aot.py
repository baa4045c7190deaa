"""The Triton scans, compiled ahead of time for GPUs that are not here: registers, spills, 16-byte loads."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: the interpreter compiles nothing", allow_module_level=True)

from rl4llm_fast.kernels import configs, gae, vtrace  # noqa: E402

NVIDIA = [80, 90, 100]
KERNELS = {"gae_fwd": gae.gae_fwd_kernel, "gae_bwd": gae.gae_bwd_kernel, "vtrace": vtrace.vtrace_kernel}
CASES = {
    "rows": {"mask_ptr": None, "offsets_ptr": None, "WRITE": True, "BLOCK": configs.SCAN_ROWS[0]},
    "masked packed parts": {"WRITE": True, "BLOCK": configs.SCAN_PACKED[0]},
    "masked packed summary": {"WRITE": False, "BLOCK": configs.SCAN_PACKED[0]},
}
WARPS = {configs.SCAN_ROWS[0]: configs.SCAN_ROWS[1], configs.SCAN_PACKED[0]: configs.SCAN_PACKED[1]}
INPUTS = ("rewards_ptr", "values_ptr", "kl_ptr", "logp_ptr", "rollout_logp_ptr")


def compile_kernel(kernel, dtype, case, target):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"SKIP": True, "PART": configs.SCAN_PART, **CASES[case]}
    if case == "rows":
        constants |= {"partial_ptr": None, "kl_ptr": None, "scores_ptr": None, "bootstrap_ptr": None}
    names = kernel.arg_names
    constants |= {n: None for n in names if n in ("gamma_ptr", "lam_ptr", "beta_ptr", "rho_max_ptr", "c_max_ptr")}
    constants = {n: value for n, value in constants.items() if n in names}

    def type_of(name):
        if name in constants:
            return "constexpr"
        if not name.endswith("_ptr"):
            return "fp32" if name in ("gamma", "lam", "beta", "rho_max", "c_max") else "i32"
        special = {"mask_ptr": "*i1", "offsets_ptr": "*i64"} | dict.fromkeys(INPUTS, f"*{dtype}")
        return special.get(name, "*fp32")

    signature = {n: type_of(n) for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n.endswith("_stride")]
    aligned += ["T"] if case == "rows" else []
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": WARPS[constants["BLOCK"]], **configs.COMPILE}
    return triton.compile(source, target=GPUTarget(*target), options=options)


def resource_usage(cubin, folder) -> tuple[int, int]:
    """(registers, stack bytes) of the one kernel in a cubin; spills show as stack."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    cuobjdump = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([cuobjdump, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return int(found[0]), int(found[1])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", KERNELS)
def test_nvidia(name, case, tmp_path):
    for arch in NVIDIA:
        compiled = compile_kernel(KERNELS[name], "fp32", case, ("cuda", arch, 32))
        registers, stack = resource_usage(compiled.asm["cubin"], tmp_path)
        assert stack == 0, f"{name} {case} sm_{arch} spills {stack} bytes"
        assert registers <= configs.SCAN_REGISTERS, f"{name} {case} sm_{arch}: {registers} registers"
        if case == "rows":
            assert re.search(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"]), f"{name}: no 16-byte load"


@pytest.mark.parametrize("name", KERNELS)
def test_amd_compiles(name):
    compiled = compile_kernel(KERNELS[name], "bf16", "masked packed parts", ("hip", "gfx942", 64))
    assert len(compiled.asm["hsaco"]) > 0
    spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
    assert spills is not None
    assert int(spills.group(1)) == 0


def test_how_rows_are_cut():
    """By their length alone; a block never exceeds a part."""
    for length in (1, 64, 65, 1_000, 4_096, 2**20):
        block, warps = configs.scan_block(length)
        assert configs.SCAN_PART % block == 0
        assert block % (warps * configs.WARP) == 0
