"""Where a run computes, and whether that multiplies in bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from ..machine import cpu_multiplies


def choose_device(name: str) -> torch.device:
    """``auto``: the GPU where there is one."""
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"config: device: {name!r} is no device: {str(error).splitlines()[0]}") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for products in bf16: without them one takes longer than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or cpu_multiplies(torch.bfloat16)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` there. From the CPU to a GPU by pinned memory: the copy then stands in line, and nobody waits for it.

    A copy from pageable memory would wait until the GPU has done all that it was told before.
    """
    if device.type != "cuda" or tensor.is_cuda or not tensor.numel():
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
