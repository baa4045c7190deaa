"""group_advantages: oracle, golden values, exact zeros, ragged groups in any order, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast.testing import assert_as_good_as_eager

BACKENDS = rf.backends()["group_advantages"]
MODES = [
    {},
    {"unbiased": False},
    {"scale": "batch"},
    {"scale": None},
    {"baseline": "leave_one_out"},
    {"eps": 1e-4},
    {"eps": torch.tensor(1e-4)},
]


def ragged_ids(count: int, groups: int) -> torch.Tensor:
    return torch.randint(groups, (count,)) * 7919 - 10**12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("grouping", ["size", "ids"])
def test_agrees_with_the_oracle(backend, dtype, mode, grouping):
    if dtype == torch.float64 and backend not in ("eager", "cpu"):
        pytest.skip("fp64 runs on the eager and CPU backends")
    rewards = torch.randn(120).to(dtype)
    by = {"group_size": 8} if grouping == "size" else {"group_ids": ragged_ids(120, 23)}
    got = rf.group_advantages(rewards, **by, **mode, backend=backend)
    oracle = rf.group_advantages(rewards.double(), **by, **mode, backend="eager")
    eager = rf.group_advantages(rewards, **by, **mode, backend="eager")
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_good_as_eager(got, oracle, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_values(backend):
    """Rewards 1, 2, 6: mean 3, deviations -2, -1, 3, variance 14/2 (Bessel) or 14/3."""
    rewards = torch.tensor([1.0, 2.0, 6.0])

    def advantages(**mode):
        return rf.group_advantages(rewards, group_size=3, eps=0.0, backend=backend, **mode).tolist()

    assert advantages() == pytest.approx([-2 / math.sqrt(7), -1 / math.sqrt(7), 3 / math.sqrt(7)], rel=1e-6)
    biased = math.sqrt(14 / 3)
    assert advantages(unbiased=False) == pytest.approx([-2 / biased, -1 / biased, 3 / biased], rel=1e-6)
    assert advantages(scale=None) == [-2, -1, 3]
    # 1 − mean(2, 6) = −3;  2 − mean(1, 6) = −1.5;  6 − mean(1, 2) = 4.5
    assert advantages(baseline="leave_one_out") == pytest.approx([-3, -1.5, 4.5], rel=1e-6)
    assert advantages(baseline="leave_one_out", scale="batch") == pytest.approx([-3, -1.5, 4.5], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_equal_rewards_and_groups_of_one_give_exactly_zero(backend, mode):
    rewards = torch.tensor([0.1] * 7 + [5.0] + [0.1, 0.2])  # the mean of seven 0.1 is not 0.1
    ids = torch.tensor([3] * 7 + [9] + [4, 4])
    got = rf.group_advantages(rewards, group_ids=ids, backend=backend, **mode)
    assert (got[:8] == 0).all()
    assert (got[8:] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_ids_does_not_matter(backend):
    rewards = torch.randn(60)
    by_size = rf.group_advantages(rewards, group_size=6, backend=backend)
    shuffle = torch.randperm(60)
    ids = (torch.arange(60) // 6)[shuffle]
    shuffled = rf.group_advantages(rewards[shuffle], group_ids=ids, backend=backend)
    torch.testing.assert_close(shuffled, by_size[shuffle], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_harms_its_own_group_only(backend):
    rewards = torch.tensor([math.nan, 1.0, 2.0, 3.0])
    got = rf.group_advantages(rewards, group_size=2, backend=backend)
    assert got.isnan().tolist() == [True, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    for by in ({"group_size": 4}, {"group_ids": torch.zeros(0, dtype=torch.long)}):
        assert rf.group_advantages(torch.zeros(0), **by, backend=backend).shape == (0,)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (ValueError, "group_size", {"group_size": 3}),
        (ValueError, "group_size", {"group_size": 0}),
        (TypeError, "group_size: wanted an int, got float", {"group_size": 2.0}),
        (TypeError, "group_size: wanted an int, got str", {"group_size": "2"}),
        (TypeError, "group_size: wanted an int, got bool", {"group_size": True}),
        (ValueError, "group_ids", {}),
        (ValueError, "group_ids", {"group_size": 2, "group_ids": torch.zeros(4, dtype=torch.long)}),
        (ValueError, "group_ids", {"group_ids": torch.zeros(5, dtype=torch.long)}),
        (TypeError, "group_ids", {"group_ids": torch.zeros(4)}),
        (ValueError, "scale", {"group_size": 2, "scale": "std"}),
        (ValueError, "baseline", {"group_size": 2, "baseline": "median"}),
        (TypeError, "rewards", {"rewards": torch.zeros(4, dtype=torch.long), "group_size": 2}),
        (ValueError, "rewards", {"rewards": torch.zeros(2, 2), "group_size": 2}),
        (TypeError, "eps", {"group_size": 2, "eps": None}),
        (ValueError, "eps: wanted a number >= 0, got -1.0", {"group_size": 2, "eps": -1.0}),
        (TypeError, "unbiased: wanted a bool, got str", {"group_size": 2, "unbiased": "no"}),
    ],
)
def test_bad_input(error, name, arguments):
    with pytest.raises(error, match=name):
        rf.group_advantages(**{"rewards": torch.randn(4), **arguments})


def test_numbers_of_numpy():
    rewards = torch.randn(4)
    got = rf.group_advantages(rewards, group_size=np.int64(2), eps=np.float64(1e-6))
    assert torch.equal(got, rf.group_advantages(rewards, group_size=2, eps=1e-6))
