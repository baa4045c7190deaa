"""The maths that the Triton kernels share, on a vector."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from rl4llm_fast.kernels import tl_math

SIZE = 4_096


@triton.jit
def exp_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl_math.exp(tl.load(x_ptr + i)))


@triton.jit
def capped_kernel(z_ptr, capped_ptr, slope_ptr, softcap, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    z = tl_math.capped(tl.load(z_ptr + i), softcap)
    tl.store(capped_ptr + i, z)
    tl.store(slope_ptr + i, tl_math.capped_slope(z, softcap))


def capped(z, softcap):
    out, slope = torch.empty_like(z), torch.empty_like(z)
    capped_kernel[(1,)](z, out, slope, softcap, SIZE=SIZE)
    return out, slope


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


# 44.5: at 0.9·c, where the two formulas for tanh meet, z' is just below a power of two: many ulp.
@pytest.mark.parametrize("cap", [5.0, 30.0, 44.5, 50.0])
def test_rounding_of_the_soft_cap(cap):
    z = torch.linspace(-9 * cap, 9 * cap, SIZE)
    got, slope = capped(z, cap)
    tanh = torch.tanh(z.double() / cap)
    error = (got - cap * tanh) / torch.exp2((cap * tanh).abs().log2().floor() - 23)
    assert error.abs().max() < 2  # in ulp; c times a tanh that is rounded before: 3
    assert error.square().mean().sqrt() < 0.33  # 0.29 is the rounding of z' alone
    assert (slope - (1 - tanh.square())).abs().max() < 3 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("cap", [1e-3, 0.5, 30.0, 1e20])
def test_the_soft_cap_at_its_ends(cap):
    big = torch.finfo(torch.float32).max
    ends = torch.tensor([big, 50 * cap, 0.0, -50 * cap, -big, math.inf, -math.inf, math.nan])
    got, slope = capped(torch.cat((ends, torch.zeros(SIZE - len(ends)))), cap)
    c = torch.tensor(cap).item()
    assert got[:7].tolist() == [c, c, 0.0, -c, -c, math.inf, -math.inf]
    assert slope[:5].tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert got[7].isnan()
