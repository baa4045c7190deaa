"""What this machine's CPU multiplies in, and its GPU's driver."""

from __future__ import annotations

import ctypes
import functools

import torch

# Instructions that multiply in 16 bits, as torch names them (x86, then ARM).
_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products in ``dtype``: without them one takes longer than in fp32."""
    if dtype not in _INSTRUCTIONS:
        return True
    if hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        return any(has.get(name, False) for name in _INSTRUCTIONS[dtype])
    # torch 2.10
    bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype == torch.bfloat16 and bf16


@functools.cache
def driver_too_old(built_with: str) -> str | None:
    """Why a program linked with the runtime of CUDA ``built_with`` cannot start kernels here; None: it can, or there is
    no driver to ask. Asking it does not begin to use a GPU."""
    if not built_with:
        return None
    version = ctypes.c_int(0)
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    here = version.value // 1000
    if status != 0 or here >= int(built_with.split(".")[0]):
        return None
    return (
        f"its kernels are built with CUDA {built_with}, and this machine's driver is of CUDA {here}.x: install a newer "
        f"driver, or build with a toolkit of CUDA {here}"
    )
