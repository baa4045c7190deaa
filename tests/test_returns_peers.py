"""Other libraries' recurrences on random multi-turn masks, restated token by token in plain Python from what those
libraries document (verl's masked GAE and GRPO outcome advantage, AReaL's packed GAE, torchrl's GAE over done flags);
torchrl's own function where it is installed. And the identities at the longest length that the library promises."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch

import rl4llm_fast as rf
from tests.returns_cases import BACKENDS, inputs_of

GAMMA, LAM = 0.98, 0.9
each_backend = pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("eager", "cpu")])


def turns(rows: int, length: int) -> torch.Tensor:
    """Multi-turn answers: the model's tokens and tools' outputs by turns, then padding."""
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row in mask:
        t, live, end = 0, True, int(torch.randint(length // 2, length + 1, ()))
        while t < end:
            step = int(torch.randint(1, 12, ()))
            row[t : min(t + step, end)] = live
            t, live = t + step, not live
    return mask


def masked_gae(rewards, values, mask):
    """A token that is not the model's keeps the advantage and the value of the one after it."""
    advantage = following = 0.0
    found = []
    for r, v, live in reversed(list(zip(rewards, values, mask, strict=True))):
        if live:
            advantage = r + GAMMA * following - v + GAMMA * LAM * advantage
            following = v
        found.append(advantage if live else 0.0)
    return found[::-1]


def done_gae(rewards, values, done):
    """Tokens one after the other; a flag ends a sequence, and nothing comes in from beyond it."""
    advantage = following = 0.0
    found = []
    for r, v, end in reversed(list(zip(rewards, values, done, strict=True))):
        if end:
            advantage = following = 0.0
        advantage = r + GAMMA * following - v + GAMMA * LAM * advantage
        following = v
        found.append(advantage)
    return found[::-1]


@each_backend
def test_masked_gae_over_turns(backend):
    x, mask = inputs_of(6, 80, dtype=torch.float64), turns(6, 80)
    advantages, returns = rf.gae(x["rewards"], x["values"], gamma=GAMMA, lam=LAM, mask=mask, backend=backend)
    rows = zip(x["rewards"].tolist(), x["values"].tolist(), mask.tolist(), strict=True)
    want = torch.tensor([masked_gae(*row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(advantages, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, (want + x["values"]) * mask, rtol=1e-12, atol=1e-12)
    whitened = rf.whiten(advantages, mask, backend=backend)
    live = want[mask]
    torch.testing.assert_close(whitened[mask], (live - live.mean()) / (live.var() + 1e-8).sqrt())


@each_backend
def test_packed_gae(backend):
    lengths = [3, 40, 1, 17, 60]
    x = inputs_of(sum(lengths), dtype=torch.float64)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    done = torch.zeros(sum(lengths), dtype=torch.bool).index_fill(0, offsets[1:].long() - 1, True)
    advantages, _ = rf.gae(x["rewards"], x["values"], gamma=GAMMA, lam=LAM, cu_seqlens=offsets, backend=backend)
    want = done_gae(x["rewards"].tolist(), x["values"].tolist(), done.tolist())
    torch.testing.assert_close(advantages, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_torchrl_itself():
    functional = pytest.importorskip("torchrl.objectives.value.functional", reason="torchrl is not installed")
    x, done = inputs_of(4, 50, dtype=torch.float64), torch.zeros(4, 50, 1, dtype=torch.bool)
    done[:, -1] = True
    state = x["values"].unsqueeze(-1)
    following = torch.nn.functional.pad(state, (0, 0, 0, 1))[:, 1:]
    gamma, lam = 31 / 32, 7 / 8  # numbers of fp32, to which torchrl rounds them
    want, _ = functional.generalized_advantage_estimate(
        gamma, lam, state, following, x["rewards"].unsqueeze(-1), done, done
    )
    got, _ = rf.gae(x["rewards"], x["values"], gamma=gamma, lam=lam)
    torch.testing.assert_close(got, want.squeeze(-1), rtol=1e-10, atol=1e-10)


@each_backend
def test_group_outcome_advantages(backend):
    """The sum of an answer's token rewards, less the group's mean, over its std + ε, on every live token."""
    rewards, mask = torch.randn(12, 30).double(), turns(12, 30)
    prompts = torch.tensor([5, 5, 9, 9, 9, -1, 5, 9, -1, 5, -1, 9])
    scores = (rewards * mask).sum(-1)
    got = rf.group_advantages(scores, group_ids=prompts, backend=backend)[:, None] * mask
    for i, prompt in enumerate(prompts.tolist()):
        group = scores[prompts == prompt].tolist()
        want = (scores[i].item() - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6)
        torch.testing.assert_close(got[i], want * mask[i].double(), rtol=1e-10, atol=1e-10)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built here")
def test_a_million_tokens():
    """T = 2^20: a closed form for rewards of one, and the identity of λ = 1, over 64 blocks."""
    length = 2**20
    ones = torch.ones(1, length, dtype=torch.float64)
    got = rf.discounted_returns(ones, gamma=0.9999, backend="cpu")
    steps = torch.arange(length, 0, -1, dtype=torch.float64)
    want = -torch.expm1(steps * math.log(0.9999)) / (1 - 0.9999)
    torch.testing.assert_close(got[0], want, rtol=1e-9, atol=0)
    values = torch.randn(1, length, dtype=torch.float64)
    advantages, returns = rf.gae(ones, values, gamma=0.9999, lam=1.0, backend="cpu")
    torch.testing.assert_close(returns, got, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(advantages, got - values, rtol=1e-9, atol=1e-9)
    steps = rf.n_step_returns(ones, values, 2**19, gamma=1.0, backend="cpu")
    torch.testing.assert_close(steps[0, : 2**19], 2**19 + values[0, 2**19 :], rtol=1e-12, atol=1e-9)
