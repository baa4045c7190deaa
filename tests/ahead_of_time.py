"""Triton kernels compiled ahead of time for GPUs that are not here, and what the compilers say of them."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess

import pytest

NVIDIA = [("cuda", arch, 32) for arch in (80, 90, 100)]
AMD = ("hip", "gfx942", 64)


def importorskip():
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: the interpreter compiles nothing", allow_module_level=True)
    return triton


def compile_kernel(kernel, types, constants, warps, target, divisible=(), nvidia=None):
    """A kernel as a launcher would start it.

    ``types`` names arguments that are not in ``constants``, perhaps some of other kernels; an argument in neither is
    None. Pointers and the integers in ``divisible`` are multiples of 16; ``nvidia`` are options for that compiler only.
    """
    import triton
    from rl4llm_fast.kernels import configs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: types[n] if n in types and n not in constants else "constexpr" for n in names}
    aligned = [
        n for n in names if str(signature[n]).startswith("*") or (n in divisible and signature[n] != "constexpr")
    ]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(n),): constants.get(n) for n in names if signature[n] == "constexpr"},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": warps, **configs.COMPILE, **((nvidia or {}) if target[0] == "cuda" else {})}
    return triton.compile(source, target=GPUTarget(*target), options=options)


def assert_fits(compiled, folder, budget, label):
    """No spills, and no more registers than the budget. On AMD, where there is no budget: no spills."""
    if "amdgcn" in compiled.asm:
        assert len(compiled.asm["hsaco"]) > 0
        spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        assert spills is not None
        assert int(spills.group(1)) == 0, label
        return
    import triton

    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    cuobjdump = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([cuobjdump, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    assert int(stack) == 0, f"{label} spills {stack} bytes"  # spills show as stack
    assert int(registers) <= budget, f"{label}: {registers} registers, budget {budget}"


def wide(compiled, what):
    """How many 16-byte loads ("ld") or stores ("st") of global memory a kernel has."""
    return len(re.findall(rf"{what}\.global\S*\.v4\.b32", compiled.asm["ptx"]))
