"""What kernels over rows of logits (B, T, V) share: finding a row, reading hyperparameters, checking a launch."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def row_pointer(ptr, row, T, stride_b, stride_t):
    """The start of row n = b·T + t of a (B, T, V) tensor. N·V passes 2^31, N does not: int64 from the product on."""
    return ptr + (row // T).to(tl.int64) * stride_b + (row % T).to(tl.int64) * stride_t


def number_or_pointer(hyperparameter: Tensor | None) -> tuple[Tensor | None, float | None]:
    """(device tensor, None), or (None, number) of a tensor on the CPU, which is read here without a synchronisation."""
    if hyperparameter is None:
        return None, None
    if hyperparameter.device.type == "cpu" and hyperparameter.dim() == 0:
        return None, float(hyperparameter)
    return hyperparameter, None


def numbers_or_pointer(params: Tensor) -> tuple[Tensor | None, tuple[float, ...] | None]:
    """The same for a vector of them."""
    return (None, tuple(params.tolist())) if params.device.type == "cpu" else (params, None)


def row_strides(x: Tensor) -> tuple[int, int]:
    """Strides of B and T. A dimension of one, whose stride means nothing, takes the other's, or V.

    The compiler lays a row over the threads by the divisors of these numbers: with a 0 for a single row, that row would
    be summed in another order than among others.
    """
    B, T, V = x.shape
    alone = x.stride(1) if T > 1 else x.stride(0) if B > 1 else V
    return (x.stride(0) if B > 1 else alone), (x.stride(1) if T > 1 else alone)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device of the process: make it the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def check_logits(op: str, name: str, logits: Tensor) -> None:
    """What a wrong direct call would turn into an illegal address; the public functions check all the rest."""
    if logits.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be fp32, bf16 or fp16 on this backend, got {logits.dtype}")
    if logits.dim() != 3 or (logits.numel() > 0 and logits.shape[2] > 1 and logits.stride(2) != 1):
        raise ValueError(f"{op}: {name} must be (B, T, V) with a last stride of 1, got {tuple(logits.shape)}")


def check_pair(op: str, logits: Tensor, ref_logits: Tensor) -> None:
    """check_logits for two sets of logits of one shape, whose dtypes and strides may differ."""
    check_logits(op, "logits", logits)
    check_logits(op, "ref_logits", ref_logits)
    if ref_logits.shape != logits.shape:
        raise ValueError(f"{op}: ref_logits must be {tuple(logits.shape)} like logits, got {tuple(ref_logits.shape)}")


def check_grid(op: str, programs: int) -> tuple[int]:
    """A launch holds 2^31 − 1 programs: over 10^13 logits."""
    if programs >= 2**31:
        raise ValueError(f"{op}: {programs} programs are more than one launch holds (2^31 - 1); split the batch")
    return (programs,)
