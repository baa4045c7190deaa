"""Validation of what the ops from hidden states take: the factors of the logits, their dtypes, the process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .machine import cpu_multiplies
from .schemas import accumulation_dtype


def check_group(tp_group: Any) -> str:
    """The name by which ops know a process group, "" for none."""
    if tp_group is None:
        return ""
    name = getattr(tp_group, "group_name", None)
    if not isinstance(name, str):
        raise TypeError(f"tp_group: wanted a torch.distributed process group or None, got {type(tp_group).__name__}")
    return name


def check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "", sharded: bool = False
) -> torch.dtype:
    """Validate the factors of the logits; the dtype in which their product runs."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if hasattr(tensor, "to_local"):
            local = f"{name}.to_local(), with tp_group if it is sharded over the vocabulary, or "
            raise TypeError(
                f"{prefix}{name}: wanted a plain tensor, got a DTensor; pass "
                f"{'' if name == 'hidden' else local}{name}.full_tensor()"
            )
    checks.is_float(f"{prefix}hidden", hidden)
    checks.is_float(f"{prefix}weight", weight)
    if hidden.dim() == 0:
        raise ValueError(f"{prefix}hidden: wanted (..., D), got a 0-d tensor")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or (weight.shape[0] == 0 and not sharded):
        raise ValueError(
            f"{prefix}weight: wanted (V, {hidden.shape[-1]}) to match {prefix}hidden {checks.shape(hidden)}, got "
            f"{checks.shape(weight)}"
        )
    checks.same_device(f"{prefix}weight", weight, hidden, f"{prefix}hidden")
    if bias is not None:
        checks.is_float(f"{prefix}bias", bias)
        checks.has_shape(f"{prefix}bias", bias, weight.shape[:1], f"{prefix}weight without D")
        checks.same_device(f"{prefix}bias", bias, hidden, f"{prefix}hidden")
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(f"{prefix}{name}: wanted the dtype {hidden.dtype} of {prefix}hidden, got {tensor.dtype}")
    return hidden.dtype


def check_dtypes(
    compute_dtype: torch.dtype, logits_dtype: torch.dtype | None, grad_weight_dtype: torch.dtype | None
) -> None:
    """The dtypes of what a chunk's products in ``compute_dtype`` leave behind: that one, or the one they sum in."""
    wide = accumulation_dtype(compute_dtype)
    for name, dtype in (("logits_dtype", logits_dtype), ("grad_weight_dtype", grad_weight_dtype)):
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name}: wanted a torch.dtype or None, got {type(dtype).__name__}")
        if dtype not in (None, compute_dtype, wide):
            wanted = f"{compute_dtype}" if compute_dtype == wide else f"{compute_dtype} or {wide}"
            raise ValueError(f"{name}: wanted {wanted} or None for products in {compute_dtype}, got {dtype}")


# Constants, so that Dynamo folds them into a compiled graph.
_SLOW_ON_CPU = frozenset(dtype for dtype in (torch.bfloat16, torch.float16) if not cpu_multiplies(dtype))


def product_dtype(compute_dtype: torch.dtype, hidden: Tensor, *asked: torch.dtype | None) -> torch.dtype:
    """The dtype in which the products are made: fp32 on a CPU that has no instructions for those in 16 bits.

    The factors are widened a slice at a time, and nothing is rounded on the way; unless the caller ``asked`` for logits
    or an accumulation in 16 bits, or for factors rounded to 16 bits, as autocast does.
    """
    slow = hidden.device.type == "cpu" and hidden.dtype == compute_dtype and compute_dtype in _SLOW_ON_CPU
    return torch.float32 if slow and compute_dtype not in asked else compute_dtype


def check_chunk(chunk_tokens: int | None) -> int | None:
    if chunk_tokens is None:
        return None
    tokens = checks.integer("chunk_tokens", chunk_tokens)
    if tokens < 1:
        raise ValueError(f"chunk_tokens: wanted at least 1, got {tokens}")
    return tokens
