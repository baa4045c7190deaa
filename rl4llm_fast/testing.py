"""The error rule that every kernel is held to. No tolerance is picked by hand.

In the max norm, for every output and every gradient::

    |kernel - oracle| <= 2·|eager - oracle| + 4·eps(dtype)·max(1, max|oracle|)

where the oracle is the eager backend in fp64, and eager is the eager backend on the same input in the same dtype.
fp64 results are judged by twice the last term: their oracle is an fp64 computation too, rounded like them and, with
another CPU or version of PyTorch, rounded otherwise. NaN and ±inf must stand where the oracle has them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def error_bound(oracle: Tensor, eager: Tensor, dtype: torch.dtype) -> float:
    """The largest |kernel − oracle| allowed for a result of ``dtype``."""
    finite = torch.isfinite(oracle)
    scale = max(1.0, _largest(oracle.double()[finite]))
    rounding = 4 * torch.finfo(dtype).eps * scale
    if dtype == torch.float64:
        return 2 * rounding
    return 2 * _largest((eager.double() - oracle.double())[finite]) + rounding


def assert_as_good_as_eager(
    got: Tensor, oracle: Tensor, eager: Tensor, *, dtype: torch.dtype | None = None, name: str = "result"
) -> None:
    """Raise AssertionError with the figures unless ``got`` meets the error rule.

    Args:
        got: the kernel's result.
        oracle: the eager backend's on fp64 input.
        eager: the eager backend's on the same input as ``got``.
        dtype: whose eps counts; by default that of ``got``.
        name: what to call the result in the message.
    """
    dtype = dtype or got.dtype
    assert got.shape == oracle.shape, f"{name}: shape {tuple(got.shape)}, the oracle's is {tuple(oracle.shape)}"
    got64, oracle64 = got.detach().double().cpu(), oracle.detach().double().cpu()
    assert torch.equal(got64.isnan(), oracle64.isnan()), f"{name}: NaN in other places than the oracle's"
    infinite = oracle64.isinf()
    assert torch.equal(got64.isinf(), infinite), f"{name}: inf in other places than the oracle's"
    assert torch.equal(got64[infinite], oracle64[infinite]), f"{name}: inf of the other sign"
    finite = torch.isfinite(oracle64)
    error = _largest((got64 - oracle64)[finite])
    bound = error_bound(oracle64, eager.detach().double().cpu(), dtype)
    assert error <= bound, f"{name}: max error {error:.3e}, allowed {bound:.3e} ({dtype})"


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
