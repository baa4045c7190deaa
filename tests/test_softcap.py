"""The CPU kernels' soft cap: how z' = c·tanh(z/c) is rounded, and rows in which a few ulp of it are too many."""

from __future__ import annotations

import instruction_sets
import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast import dispatch
from rl4llm_fast.testing import assert_as_good_as_eager

compiled = "cpu" in rf.backends()["kl_divergence"]
pytestmark = pytest.mark.skipif(not compiled, reason="no compiled backend here")


@pytest.fixture(params=instruction_sets.usable())
def isa(request):
    dispatch.extension.force_cpu_isa(request.param)
    yield request.param
    dispatch.extension.force_cpu_isa(None)


def capped(z, cap):
    """z' of logits z, each in a row beside a 0, whose log p is −z' but for e^−z', nothing where z' >= 19."""
    rows = torch.stack((z, torch.zeros_like(z)), -1)
    return -rf.token_logprobs(rows, torch.ones(len(z), dtype=torch.long), softcap=cap, backend="cpu")


# 44.5: at 0.9·c, where the two formulas for tanh meet, z' is just below a power of two: many ulp.
@pytest.mark.parametrize("cap", [30.0, 44.5, 50.0])
def test_rounding_of_the_capped_logits(isa, cap):
    z = torch.linspace(20.0, 8 * cap, 20_000)
    exact = cap * torch.tanh(z.double() / cap)
    error = (capped(z, cap) - exact) / torch.exp2(exact.log2().floor() - 23)
    assert error.abs().max() < 2  # in ulp; with a tanh that is rounded before it is multiplied: 3
    assert error.square().mean().sqrt() < 0.35  # 0.29 is the rounding of z' alone


@pytest.mark.parametrize("cap", [1e-3, 0.5, 30.0])
def test_the_cap_of_far_away_logits(isa, cap):
    """Finite ones reach ±c however far away they are, −inf stays a token that cannot be drawn."""
    big = torch.finfo(torch.float32).max
    z = torch.tensor([[big, 50 * cap, 0.0, -0.0, -50 * cap, -big, -torch.inf]])
    got = rf.token_logprobs(z.expand(7, 7), torch.arange(7), softcap=cap, backend="cpu")
    oracle = rf.token_logprobs(z.double().expand(7, 7), torch.arange(7), softcap=cap, backend="eager")
    eager = rf.token_logprobs(z.expand(7, 7), torch.arange(7), softcap=cap, backend="eager")
    assert_as_good_as_eager(got, oracle, eager)


# Where few tokens hold all of p, their own rounding is not averaged out. (what, seed, c, σ, V, dtype): the worst of
# 30,720 comparisons.
ROWS = [
    ("entropy", 10, 50.0, 30.0, 513, torch.float32),
    ("entropy", 5, 50.0, 30.0, 513, torch.float32),
    ("entropy", 8, 30.0, 10.0, 513, torch.bfloat16),
    ("entropy", 9, 30.0, 10.0, 4099, torch.bfloat16),
    ("reverse", 10, 50.0, 30.0, 513, torch.float32),
    ("reverse", 7, 30.0, 100.0, 33, torch.float32),
    ("reverse", 1, 50.0, 100.0, 33, torch.float32),
    ("reverse", 0, 50.0, 100.0, 33, torch.bfloat16),
    ("forward", 2, 50.0, 30.0, 513, torch.float32),
    ("forward", 16, 30.0, 100.0, 33, torch.bfloat16),
    ("forward", 4, 30.0, 30.0, 33, torch.float32),
]


def results(what, z, ref, cap, backend):
    leaf = z.clone().requires_grad_()
    if what == "entropy":
        out = rf.token_entropy(leaf, softcap=cap, backend=backend)
    else:
        out = rf.kl_divergence(leaf, ref, direction=what, softcap=cap, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    return out.detach(), grad


@pytest.mark.parametrize(("what", "seed", "cap", "deviation", "vocabulary", "dtype"), ROWS)
def test_peaked_rows(isa, what, seed, cap, deviation, vocabulary, dtype):
    generator = torch.Generator().manual_seed(seed)
    z = (deviation * torch.randn(3, vocabulary, generator=generator)).to(dtype)
    ref = (deviation * torch.randn(3, vocabulary, generator=generator)).to(dtype)
    got = results(what, z, ref, cap, "cpu")
    oracle = results(what, z.double(), ref.double(), cap, "eager")
    eager = results(what, z, ref, cap, "eager")
    for name, g, o, e in zip((what, "dlogits"), got, oracle, eager, strict=True):
        assert_as_good_as_eager(g, o, e, name=name)
