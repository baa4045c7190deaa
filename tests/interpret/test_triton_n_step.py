"""n_step_returns by doubling, in Triton's interpreter: every bit pattern of n, masks, packs."""

from __future__ import annotations

import itertools

import pytest
import torch
from rl4llm_fast.kernels import configs

import rl4llm_fast as rf
from rl4llm_fast.testing import assert_as_good_as_eager


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(configs, "N_STEP_BLOCK", 64)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13, 47, 2**40])
def test_agrees_with_the_oracle(n, packed):
    if packed:
        lengths = [3, 0, 70, 1, 0, 46]
        shape, count = (120,), len(lengths)
        offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    else:
        shape, count, offsets = (3, 40), 3, None
    rewards, values, last = torch.randn(shape), torch.randn(shape), torch.randn(count)
    mask = torch.rand(shape) < 0.6
    if not packed:
        mask[1], mask[2, 10:] = False, False
    poisoned = rewards.masked_fill(~mask, torch.nan)
    for mode, live in itertools.product(["skip", "zero"], [None, mask]):
        common = {"gamma": 0.97, "mask": live, "mask_mode": mode, "cu_seqlens": offsets}
        given = rewards if live is None else poisoned
        got = rf.n_step_returns(given, values, n, bootstrap_value=last, backend="triton", **common)
        exact = (rewards.double(), values.double())
        oracle = rf.n_step_returns(*exact, n, bootstrap_value=last.double(), backend="eager", **common)
        eager = rf.n_step_returns(rewards, values, n, bootstrap_value=last, backend="eager", **common)
        assert_as_good_as_eager(got, oracle, eager)


def test_half_precision_strides_and_a_tensor_for_gamma():
    rewards, values = torch.randn(30, 8).bfloat16().t(), torch.randn(8, 60).bfloat16()[:, ::2]
    gamma = torch.tensor(0.9)
    got = rf.n_step_returns(rewards, values, 4, gamma=gamma, backend="triton")
    oracle = rf.n_step_returns(rewards.double(), values.double(), 4, gamma=gamma, backend="eager")
    assert_as_good_as_eager(got, oracle, rf.n_step_returns(rewards, values, 4, gamma=gamma, backend="eager"))


def test_a_nan_reaches_n_tokens_back_and_no_further():
    rewards, values = torch.randn(2, 40), torch.randn(2, 40)
    rewards[0, 20] = torch.nan
    got = rf.n_step_returns(rewards, values, 5, gamma=0.9, backend="triton")
    assert got.isnan().nonzero().tolist() == [[0, t] for t in range(16, 21)]
    empty = rf.n_step_returns(rewards[:, :0], values[:, :0], 5, gamma=0.9, backend="triton")
    assert empty.shape == (2, 0)
