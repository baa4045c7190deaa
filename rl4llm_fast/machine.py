"""What this machine's CPU multiplies in."""

from __future__ import annotations

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
