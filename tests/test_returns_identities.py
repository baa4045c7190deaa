"""What returns must equal: Monte-Carlo, TD errors, deleted tokens, separate calls, any layout of the same tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rl4llm_fast as rf
from tests.returns_cases import KERNELS, MODES, OPS, each_backend, each_op, inputs_of, random_mask


class TestIdentities:
    @each_backend
    def test_lambda_1_is_monte_carlo_less_the_value(self, backend):
        x, last = inputs_of(3, 40), torch.randn(3)
        given = {"mask": random_mask(3, 40), "bootstrap_value": last, "backend": backend}
        advantages, returns = rf.gae(x["rewards"], x["values"], gamma=0.9, lam=1.0, **given)
        monte_carlo = rf.discounted_returns(x["rewards"], gamma=0.9, **given)
        torch.testing.assert_close(returns, monte_carlo)
        torch.testing.assert_close(advantages, (monte_carlo - x["values"]) * given["mask"])

    @each_backend
    def test_lambda_0_is_the_td_error(self, backend):
        x = inputs_of(3, 40)
        advantages, _ = rf.gae(x["rewards"], x["values"], gamma=0.9, lam=0.0, backend=backend)
        following = torch.nn.functional.pad(x["values"], (0, 1))[:, 1:]
        torch.testing.assert_close(advantages, x["rewards"] + 0.9 * following - x["values"])
        one_step = rf.n_step_returns(x["rewards"], x["values"], 1, gamma=0.9, backend=backend)
        torch.testing.assert_close(advantages, one_step - x["values"])

    @each_backend
    def test_gamma_0(self, backend):
        x, mask = inputs_of(4, 33), random_mask(4, 33)
        advantages, _ = rf.gae(x["rewards"], x["values"], gamma=0.0, mask=mask, backend=backend)
        torch.testing.assert_close(advantages, (x["rewards"] - x["values"]) * mask)

    @each_backend
    def test_on_policy_vtrace_is_the_lambda_return(self, backend):
        x, last = inputs_of(4, 33), torch.randn(4)
        common = {"gamma": 0.9, "lam": 0.8, "mask": random_mask(4, 33), "bootstrap_value": last, "backend": backend}
        _, targets = rf.vtrace(x["logp"], x["logp"], x["rewards"], x["values"], **common)
        torch.testing.assert_close(targets, rf.lambda_returns(x["rewards"], x["values"], **common))

    @each_backend
    def test_more_steps_than_tokens_is_monte_carlo(self, backend):
        x, last, mask = inputs_of(4, 33), torch.randn(4), random_mask(4, 33)
        common = {"gamma": 0.9, "mask": mask, "bootstrap_value": last, "backend": backend}
        torch.testing.assert_close(
            rf.n_step_returns(x["rewards"], x["values"], 33, **common),
            rf.discounted_returns(x["rewards"], **common),
        )

    @each_backend
    @each_op
    def test_skip_is_the_same_as_deleting(self, op, backend):
        x, mask, last = inputs_of(6, 150), random_mask(6, 150), torch.randn(6)
        got = op(x, mask=mask, bootstrap_value=last, backend=backend)
        for row in range(6):
            kept = {name: tensor[row, mask[row]][None] for name, tensor in x.items()}
            alone = op(kept, bootstrap_value=last[row : row + 1], backend=backend)
            for a, b in zip(got, alone, strict=True):
                torch.testing.assert_close(a[row, mask[row]][None], b, rtol=1e-5, atol=1e-5)
                assert (a[row, ~mask[row]] == 0).all()

    @each_backend
    @each_op
    def test_zero_is_the_plain_recurrence_over_zeros(self, op, backend):
        x, mask = inputs_of(6, 150), random_mask(6, 150)
        zeroed = {name: tensor * mask for name, tensor in x.items()}
        got = op(x, mask=mask, mask_mode="zero", backend=backend)
        plain = op(zeroed, backend=backend)
        for a, b in zip(got, plain, strict=True):
            torch.testing.assert_close(a, b * mask, rtol=1e-5, atol=1e-5)

    @each_backend
    @each_op
    def test_packed_is_the_same_as_separate_calls(self, op, backend):
        lengths = [3, 0, 70, 1, 0, 129]
        offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        x, last = inputs_of(sum(lengths)), torch.randn(len(lengths))
        mask = random_mask(sum(lengths))
        for mode, live in itertools.product(MODES, [None, mask]):
            got = op(x, cu_seqlens=offsets, bootstrap_value=last, mask=live, mask_mode=mode, backend=backend)
            for i, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
                part = {name: tensor[None, start:end] for name, tensor in x.items()}
                live_part = None if live is None else live[None, start:end]
                alone = op(part, mask=live_part, bootstrap_value=last[i : i + 1], mask_mode=mode, backend=backend)
                for a, b in zip(got, alone, strict=True):
                    assert torch.equal(a[None, start:end], b)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=6),
    seed=st.integers(0, 2**30),
    live=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    mode=st.sampled_from(MODES),
    name=st.sampled_from(sorted(OPS)),
)
@pytest.mark.skipif(not KERNELS, reason="no kernel to compare")
def test_any_layout(lengths, seed, live, mode, name):
    """Packed, right-padded and left-padded: the same numbers, those of the oracle."""
    torch.manual_seed(seed)
    op, backend = OPS[name], KERNELS[0]
    x = inputs_of(sum(lengths), dtype=torch.float64)
    mask, last = torch.rand(sum(lengths)) < live, torch.randn(len(lengths), dtype=torch.float64)
    offsets = [0, *itertools.accumulate(lengths)]
    oracle = op(x, cu_seqlens=torch.tensor(offsets), mask=mask, mask_mode=mode, bootstrap_value=last, backend="eager")
    got = op(
        x,
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        mask=mask,
        mask_mode=mode,
        bootstrap_value=last,
        backend=backend,
    )
    width = max(lengths) + 3
    for left in (False, True):
        padded = {key: torch.full((len(lengths), width), math.nan, dtype=torch.float64) for key in x}
        padded_mask = torch.zeros(len(lengths), width, dtype=torch.bool)
        places = []
        for i, (start, end) in enumerate(itertools.pairwise(offsets)):
            place = (i, slice(width - (end - start), width) if left else slice(0, end - start))
            places.append(place)
            padded_mask[place] = mask[start:end]
            for key, tensor in x.items():
                padded[key][place] = tensor[start:end]
        there = op(padded, mask=padded_mask, mask_mode=mode, bootstrap_value=last, backend=backend)
        for result, exact, packed in zip(there, oracle, got, strict=True):
            flat = torch.cat([result[place] for place in places])
            torch.testing.assert_close(flat, exact, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(packed, exact, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=7).filter(lambda x: sum(x) != len(x)),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_packed_rewards_are_shaped_as_a_loop_does(lengths, masked, seed):
    """Empty sequences anywhere; with as many tokens as sequences the scores would be those of tokens."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    offsets = [0, *itertools.accumulate(lengths)]
    scores, kl, values = (torch.randn(n, generator=generator) for n in (len(lengths), count, count))
    mask = torch.rand(count, generator=generator) < 0.6 if masked else None
    wanted = [0.0] * count
    for score, start, end in zip(scores.tolist(), offsets, offsets[1:], strict=False):
        live = [t for t in range(start, end) if mask is None or mask[t]]
        for t in live:
            wanted[t] = -0.3 * kl[t].item() + (score if t == live[-1] else 0.0)
    packed = {"mask": mask, "cu_seqlens": torch.tensor(offsets)}
    shaped = rf.shape_rewards(scores, kl, beta=0.3, **packed)
    torch.testing.assert_close(shaped, torch.tensor(wanted))
    for backend in ("eager", *KERNELS):
        inside = rf.gae(scores, values, kl=kl, beta=0.3, backend=backend, **packed)
        torch.testing.assert_close(inside, rf.gae(shaped, values, backend=backend, **packed))
