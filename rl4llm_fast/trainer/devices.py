"""Where a run computes, and whether that multiplies in bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..machine import cpu_multiplies


def choose_device(name: str) -> torch.device:
    """``auto``: the GPU where there is one."""
    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"config: device: {name!r} is no device: {str(error).splitlines()[0]}") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def available_device(name: str) -> torch.device:
    """``choose_device``, when it is here: a config may be written on another machine than the one it runs on.

    Raises:
        ValueError: PyTorch has no such device here.
    """
    device = choose_device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            why = "sees no GPU" if torch.backends.cuda.is_built() else f"{torch.__version__} is built without CUDA"
            raise ValueError(f"config: device: wanted one that is here, got {name!r}: PyTorch {why}")
        if device.index is not None and device.index >= count:
            raise ValueError(f"config: device: wanted one of cuda:0 to cuda:{count - 1}, got {name!r}")
        return device
    try:
        torch.ones(1, device=device).item()  # "meta" makes tensors too, and computes nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"config: device: wanted one that is here, got {name!r}: {first}") from error
    return device


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


def host_backend(op: str, configured: str) -> str:
    """For an op on a few numbers of the host: RL4LLM_FAST_BACKEND and the config name one for those of the device."""
    plain = "eager" in (configured, dispatch.named(None)) or dispatch.why_not(op, "cpu", "cpu") is not None
    return "eager" if plain else "cpu"
