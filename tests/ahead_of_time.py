"""Triton kernels compiled ahead of time for GPUs that are not here, and what the compilers say of them."""

from __future__ import annotations

import os
import re

import pytest

from bench import static

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


def assert_fits(compiled, budget, variant):
    """No spills, no more registers than the budget, nothing worse than recorded; on AMD only no spills."""
    import triton

    kernel = compiled.metadata.name
    if "amdgcn" in compiled.asm:
        assert len(compiled.asm["hsaco"]) > 0
        spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        assert spills is not None
        assert int(spills.group(1)) == 0, f"{kernel} {variant}"
        return
    arch = compiled.metadata.target.arch
    figures = static.read(compiled.asm["cubin"], arch, compiled.metadata.shared)[kernel]
    label = f"{kernel} {variant} on sm_{arch}"
    assert figures.spills == 0, f"{label} spills"
    assert figures.registers <= budget, f"{label}: {figures.registers} registers, budget {budget}"
    static.check(kernel, variant, arch, ("triton", triton.__version__), figures)


def wide(compiled, what):
    """How many 16-byte loads ("ld") or stores ("st") of global memory a kernel has."""
    return len(re.findall(rf"{what}\.global\S*\.v4\.b32", compiled.asm["ptx"]))
