"""The maths that the Triton kernels share, on a vector."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from rl4llm_fast.kernels import tl_math

SIZE = 4_096


@triton.jit
def exp_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl_math.exp(tl.load(x_ptr + i)))


def exp(x):
    out = torch.empty_like(x)
    exp_kernel[(1,)](x, out, SIZE=SIZE)
    return out


def test_exp_is_good_to_two_ulp():
    for low, high in ((-1e-3, 1e-3), (-1.0, 1.0), (-20.0, 20.0), (-87.0, 88.7)):
        x = torch.linspace(low, high, SIZE)
        exact = x.double().exp()
        assert ((exp(x).double() - exact).abs() / exact).max() < 2 * torch.finfo(torch.float32).eps


def test_exp_at_its_ends():
    x = torch.zeros(SIZE)
    x[:6] = torch.tensor([-math.inf, -200.0, 0.0, 100.0, math.inf, math.nan])
    assert exp(x)[:5].tolist() == [0.0, 0.0, 1.0, math.inf, math.inf]
    assert exp(x)[5].isnan()
