"""What tensors hold is checked on the CPU by compiled graphs too, when they run and where a result depends on it."""

from __future__ import annotations

import pytest
import torch

import rl4llm_fast as rf

PACKED = {
    "policy_loss by sequences": lambda x, cu: rf.policy_loss(
        x, None, x.detach(), cu_seqlens=cu, aggregation="seq_mean_token_mean"
    )[0],
    "gspo": lambda x, cu: rf.policy_loss(x, x.detach(), x.detach(), cu_seqlens=cu, kind="gspo")[0],
    "sft_loss": lambda x, cu: rf.sft_loss(x, cu_seqlens=cu, aggregation="seq_mean_token_mean"),
    "preference_loss": lambda x, cu: rf.preference_loss(
        x, x * 2, kind="simpo", cu_seqlens_chosen=cu, cu_seqlens_rejected=cu
    )[0],
    "shape_rewards": lambda x, cu: rf.shape_rewards(torch.zeros(3), x, beta=0.1, cu_seqlens=cu),
    "gae": lambda x, cu: rf.gae(x, x.detach(), gamma=0.9, lam=0.9, cu_seqlens=cu)[0],
}
OFFSETS = [([0, 2, 3, 4], "from 0 to the 5 tokens, got 0 to 4"), ([0, 3, 2, 5], "never decrease, got 3, 2")]


@pytest.mark.parametrize("name", PACKED)
def test_offsets(name):
    function = PACKED[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = -torch.rand(5)
    right = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    torch.testing.assert_close(compiled(x, right), function(x, right))
    for offsets, message in OFFSETS:
        for call in (function, compiled):
            with pytest.raises(ValueError, match=f"cu_seqlens.*{message}"):
                call(x, torch.tensor(offsets, dtype=torch.int32))


def two_dimensional(x, segments):
    return rf.preference_loss(
        x, 2 * x, x.detach(), x.detach(), kind="2d_dpo", segments_chosen=segments, segments_rejected=segments
    )[0]


def test_segments():
    compiled = torch.compile(two_dimensional, fullgraph=True, backend="aot_eager")
    x, segments = -torch.rand(2, 4), torch.tensor([[[0, 2], [2, 4]], [[0, 3], [-1, -1]]])
    torch.testing.assert_close(compiled(x, segments), two_dimensional(x, segments))
    segments[1, 0, 1] = 99
    for call in (two_dimensional, compiled):
        with pytest.raises(ValueError, match=r"segments_chosen: wanted 0 <= first <= end.*position \(1, 0\)"):
            call(x, segments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_numbers_of_rows(backend):
    """A probability for each pair, a temperature for each row."""

    def step(x, prob, tau):
        logp = rf.token_logprobs(x, torch.zeros(3, dtype=torch.long), temperature=tau)
        return rf.preference_loss(logp, -logp, logp.detach(), logp.detach(), prob=prob)[0]

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    x, prob, tau = torch.randn(3, 7), torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 0.5, 2.0])
    torch.testing.assert_close(compiled(x, prob, tau), step(x, prob, tau))
    for call in (step, compiled):
        with pytest.raises(ValueError, match=r"prob: wanted probabilities in \[0, 1\], got 1.5 at position \(1,\)"):
            call(x, torch.tensor([0.0, 1.5, 1.0]), tau)
        with pytest.raises(ValueError, match=r"temperature: wanted finite values > 0, got -1 at position \(2,\)"):
            call(x, prob, torch.tensor([1.0, 0.5, -1.0]))


@pytest.mark.parametrize("options", [{}, {"kind": "cispo"}, {"aggregation": "seq_mean_token_mean"}])
def test_dynamic_shapes_without_a_reference(options):
    """Dynamo's symbolic numbers are not those that a call leaves at their defaults: kl_coef is 0, and wants no ref."""
    weight, ids = torch.randn(37, 8), torch.randint(37, (4, 6))

    def step(hidden, old):
        return rf.linear_policy_loss(hidden, weight, ids, old, torch.ones_like(old), **options)[0]

    hidden, old = torch.randn(4, 6, 8, requires_grad=True), -torch.rand(4, 6)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, old), step(hidden, old))


def test_fake_tensors_go_through_forward_and_backward():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden = torch.randn(4, 6, 8, requires_grad=True)
        weight, ids = torch.randn(37, 8, requires_grad=True), torch.zeros(4, 6, dtype=torch.long)
        rf.linear_sft_loss(hidden, weight, ids).backward()
        assert hidden.grad.shape == hidden.shape
        logp = torch.randn(4, 6, requires_grad=True)
        rf.policy_loss(logp, logp.detach(), torch.randn(4))[0].backward()
        assert logp.grad.shape == logp.shape


def test_a_mode_that_counts_operations_skips_no_check():
    from torch.utils.flop_counter import FlopCounterMode

    x = -torch.rand(5)
    with FlopCounterMode(display=False):
        for offsets, message in OFFSETS:
            with pytest.raises(ValueError, match=f"cu_seqlens.*{message}"):
                rf.policy_loss(x, None, x, cu_seqlens=torch.tensor(offsets))
        with pytest.raises(ValueError, match="mask: wanted 0 or 1"):
            rf.policy_loss(x.view(1, 5), None, x.view(1, 5), mask=torch.tensor([[0, 1, 2, 1, 0]]))
        with pytest.raises(IndexError, match="token_ids"):
            rf.token_logprobs(torch.randn(2, 3), torch.tensor([0, 7]))
