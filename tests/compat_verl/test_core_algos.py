"""Drop-ins for verl's core algorithms: advantages, aggregation, KL and policy losses, in all their modes."""

from __future__ import annotations

import math
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rl4llm_fast.compat import verl as ours
from rl4llm_fast.compat.verl_losses import POLICY_LOSSES

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def batch(rows: int = 6, length: int = 9, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Two matrices and a mask with holes, leading and trailing, and one row without a live token."""
    mask = (torch.rand(rows, length) > 0.35).long()
    mask[1], mask[2, :3], mask[3, 4:] = 0, 0, 0
    return torch.randn(rows, length).to(dtype), torch.randn(rows, length).to(dtype), mask


class TestAdvantages:
    @pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.7, 0.0)])
    @pytest.mark.parametrize("mask_dtype", [torch.long, torch.float32])
    def test_gae(self, core: Any, gamma: float, lam: float, mask_dtype: torch.dtype) -> None:
        rewards, values, mask = batch()
        got = ours.compute_gae_advantage_return(rewards, values, mask.to(mask_dtype), gamma, lam)
        wanted = core.compute_gae_advantage_return(rewards, values, mask.to(mask_dtype), gamma, lam)
        for mine, theirs in zip(got, wanted, strict=True):  # at masked tokens too
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)

    def test_gae_ignores_what_masked_tokens_hold(self) -> None:
        rewards, values, mask = batch()
        wanted = ours.compute_gae_advantage_return(rewards, values, mask, 0.9, 0.8)
        poison = torch.where(mask == 0, float("nan"), 0.0)
        got = ours.compute_gae_advantage_return(rewards + poison, values + poison, mask, 0.9, 0.8)
        torch.testing.assert_close(got[0], wanted[0])
        assert torch.equal(got[1][mask == 1], wanted[1][mask == 1])

    def test_gae_golden(self) -> None:
        # γ = λ = 1, V = 0: the advantages are the returns-to-go 3, 2 (carried: 2), mean 2.5, variance 0.5.
        rewards, mask = torch.tensor([[1.0, 9.0, 2.0, 0.0]]), torch.tensor([[1, 0, 1, 0]])
        advantages, returns = ours.compute_gae_advantage_return(rewards, torch.zeros(1, 4), mask, 1.0, 1.0)
        assert returns.tolist() == [[3.0, 2.0, 2.0, 0.0]]
        expected = torch.tensor([[0.5, -0.5, -0.5, -2.5]]) / math.sqrt(0.5)
        torch.testing.assert_close(advantages, expected)

    def test_gae_needs_two_tokens(self) -> None:
        with pytest.raises(ValueError, match="response_mask"):
            ours.compute_gae_advantage_return(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[1, 0]]), 1.0, 1.0)

    @pytest.mark.parametrize("norm", [True, False])
    def test_grpo(self, core: Any, norm: bool) -> None:
        rewards, _, mask = batch(rows=7)
        index = np.array(["a", "b", "a", "c", "b", "a", "b"], dtype=object)  # c is alone
        got = ours.compute_grpo_outcome_advantage(rewards, mask, index, 1e-6, norm)
        wanted = core.compute_grpo_outcome_advantage(rewards, mask, index, 1e-6, norm)
        assert got[0] is got[1]
        torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-5)
        alone = rewards[3].sum() / (1 + 1e-6 if norm else 1)
        torch.testing.assert_close(got[0][3], alone * mask[3])

    def test_grpo_of_rewards_close_together(self, core: Any) -> None:
        """verl's own case: what is left of 1e-5 in fp32 over its standard deviation and ε."""
        rewards = torch.tensor([[1.0], [1.00001], [2.0], [2.00001]])
        index = np.array(["a", "a", "b", "b"], dtype=object)
        got, _ = ours.compute_grpo_outcome_advantage(rewards, torch.ones(4, 1), index)
        wanted, _ = core.compute_grpo_outcome_advantage(rewards, torch.ones(4, 1), index)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)

    def test_gae_never_sees_observations(self) -> None:
        """verl's own case: other values at masked tokens leave every bit, those of masked tokens included."""
        mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0]], dtype=torch.float32)
        rewards = torch.tensor([[0.0, 0.0, 0.1, 0.1, 0.1, 0.0, 0.0, 0.1, 1.0, 0.0, 0.0]])
        values = torch.tensor([[0.0, 0.0, 4.0, 5.0, 6.0, 0.0, 0.0, 7.0, 9.0, 0.0, 0.0]])
        wanted, wanted_returns = ours.compute_gae_advantage_return(rewards, values, mask, 0.7, 0.9)
        noise = 100 * torch.randn(1, 11) * (1 - mask) * (torch.arange(11) < 9)
        got, returns = ours.compute_gae_advantage_return(rewards, values + noise, mask, 0.7, 0.9)
        assert torch.equal(got, wanted)
        assert torch.equal(returns * mask, wanted_returns * mask)

    def test_grpo_wants_an_index_for_every_answer(self) -> None:
        with pytest.raises(ValueError, match="index"):
            ours.compute_grpo_outcome_advantage(torch.ones(2, 3), torch.ones(2, 3), np.array(["a"]))


class TestAggregation:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        "info", [{}, {"dp_size": 4, "batch_num_tokens": 77, "global_batch_size": 24, "loss_scale_factor": 50}]
    )
    @pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long, torch.float32])
    def test_equals_verl_with_gradient(
        self, core: Any, mode: str, info: dict[str, int], mask_dtype: torch.dtype
    ) -> None:
        losses, _, mask = batch()
        results = []
        for function in (ours.agg_loss, core.agg_loss):
            leaf = losses.clone().requires_grad_()
            value = function(leaf, mask.to(mask_dtype), mode, **info)
            (value * 1.5).backward()
            results.append((value.detach(), leaf.grad))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)

    def test_nan_at_masked_tokens(self) -> None:
        losses, _, mask = batch()
        for mode in MODES:
            clean = ours.agg_loss(losses, mask, mode)
            assert torch.equal(ours.agg_loss(losses.masked_fill(mask == 0, float("nan")), mask, mode), clean)

    def test_errors(self) -> None:
        losses, _, mask = batch()
        with pytest.raises(ValueError, match="Invalid loss_agg_mode: mean"):
            ours.agg_loss(losses, mask, "mean")
        with pytest.raises(ValueError, match="batch_num_tokens"):
            ours.agg_loss(losses, mask, "token-mean", dp_size=2)
        with pytest.raises(ValueError, match="global_batch_size"):
            ours.agg_loss(losses, mask, "seq-mean-token-mean", dp_size=2)


class TestValueLoss:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        "info", [{}, {"dp_size": 4, "batch_num_tokens": 77, "global_batch_size": 24, "loss_scale_factor": 50}]
    )
    @pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
    def test_equals_verl_with_gradient(
        self, core: Any, mode: str, info: dict[str, int], mask_dtype: torch.dtype
    ) -> None:
        values, returns, mask = batch()
        vpreds = values + 0.4 * torch.randn_like(values)
        results = []
        for function in (ours.compute_value_loss, core.compute_value_loss):
            leaf = vpreds.clone().requires_grad_()
            loss, clipped = function(
                vpreds=leaf, returns=returns, values=values, response_mask=mask.to(mask_dtype), cliprange_value=0.3,
                loss_agg_mode=mode, **info,
            )  # fmt: skip
            (loss * 1.5).backward()
            assert loss.shape == clipped.shape == ()
            results.append((loss.detach(), clipped, leaf.grad))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        assert 0 < float(results[0][1]) < 1

    def test_golden_and_dtype(self) -> None:
        # V = (1, 3, NaN), V_old = (0, 3), R = (0, 1), ε = 1/2: the squares (1, 4), clipped (1/4, 4); half their mean.
        vpreds, returns = torch.tensor([[1.0, 3.0, float("nan")]]), torch.tensor([[0.0, 1.0, 0.0]])
        values, mask = torch.tensor([[0.0, 3.0, 0.0]]), torch.tensor([[1, 1, 0]])
        loss, clipped = ours.compute_value_loss(vpreds, returns, values, mask, 0.5)
        assert (float(loss), float(clipped)) == (1.25, 0.0)
        far = values.index_fill(1, torch.tensor([0]), 2.0)  # clip(1, 3/2, 5/2) = 3/2, whose square is the larger one
        loss, clipped = ours.compute_value_loss(vpreds, returns, far, mask, 0.5)
        assert (float(loss), float(clipped)) == (1.5625, 0.5)
        half = torch.zeros(1, 3, dtype=torch.bfloat16)
        assert ours.compute_value_loss(half, half, half, mask, 0.5)[0].dtype == torch.bfloat16
        with pytest.raises(ValueError, match="Invalid loss_agg_mode: mean"):
            ours.compute_value_loss(vpreds, returns, values, mask, 0.5, "mean")
        with pytest.raises(ValueError, match="batch_num_tokens"):
            ours.compute_value_loss(vpreds, returns, values, mask, 0.5, dp_size=2)


class TestKl:
    @pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "k2+", "k3+", "abs+"])
    def test_equals_verl_with_gradient(self, core: Any, name: str) -> None:
        logprob, ref, _ = batch()
        logprob[0, 0], logprob[0, 1] = 40.0, -40.0  # beyond every clamp
        results = []
        for function in (ours.kl_penalty, core.kl_penalty):
            leaf = logprob.clone().requires_grad_()
            value = function(leaf, ref, name)
            value.backward(torch.ones_like(value))
            results.append((value.detach(), leaf.grad))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", ["k1", "kl", "abs", "k3", "low_var_kl"])
    def test_a_plus_changes_the_gradient_only(self, name: str) -> None:
        logprob, ref, _ = batch()
        plain, plus, k2 = logprob.clone(), logprob.clone().requires_grad_(), logprob.clone().requires_grad_()
        value = ours.kl_penalty(plus, ref, name + "+")
        assert torch.equal(value, ours.kl_penalty(plain, ref, name))
        value.sum().backward()
        ours.kl_penalty(k2, ref, "k2").sum().backward()
        torch.testing.assert_close(plus.grad, k2.grad)

    def test_dtype_and_names(self) -> None:
        half = torch.zeros(2, 3, dtype=torch.bfloat16)
        assert ours.kl_penalty(half, half, "k3").dtype == torch.bfloat16
        with pytest.raises(NotImplementedError, match="'full'"):
            ours.kl_penalty(half, half, "full")


class TestPolicyLosses:
    @pytest.mark.parametrize("kind", list(POLICY_LOSSES))
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("info", [{}, {"dp_size": 2, "batch_num_tokens": 99, "global_batch_size": 16}])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_equals_verl(
        self, core: Any, config: Any, kind: str, mode: str, info: dict[str, int], weighted: bool
    ) -> None:
        old, advantages, mask = batch(8, 12)
        now = old + 0.6 * torch.randn_like(old)
        weights = torch.rand_like(old) if weighted else None
        results = []
        for function in (POLICY_LOSSES[kind], core.POLICY_LOSS_REGISTRY[kind]):
            leaf = now.clone().requires_grad_()
            loss, metrics = function(
                old_log_prob=old, log_prob=leaf, advantages=advantages, response_mask=mask.bool(),
                loss_agg_mode=mode, config=config(**info), rollout_is_weights=weights,
            )  # fmt: skip
            loss -= 0.01 * leaf.sum() * 0  # as verl's worker does with its entropy bonus
            loss.backward()
            results.append((loss.detach(), leaf.grad, metrics))
        (loss, grad, metrics), (wanted, wanted_grad, wanted_metrics) = results
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-4, atol=1e-6)
        assert metrics == pytest.approx(wanted_metrics, rel=1e-5, abs=1e-6)

    def test_needs_a_config(self) -> None:
        tokens = torch.zeros(1, 2)
        for loss in POLICY_LOSSES.values():
            with pytest.raises(ValueError, match="config"):
                loss(tokens, tokens, tokens, tokens)

    def test_register(self, core: Any) -> None:
        names = ours.register()
        assert names == [f"rl4llm_fast_{kind}" for kind in POLICY_LOSSES]
        for name, loss in zip(names, POLICY_LOSSES.values(), strict=True):
            assert core.POLICY_LOSS_REGISTRY[name] is loss


def test_policy_losses_can_be_imported_beside_the_rest() -> None:
    for name, loss in POLICY_LOSSES.items():
        assert getattr(ours, f"compute_policy_loss_{name}") is loss


def test_lists_are_refused_by_name() -> None:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.long)
    config = types.SimpleNamespace(global_batch_info={})
    calls: list[tuple[str, Any]] = [
        ("logits", lambda: ours.logprobs_from_logits([x], mask)),
        ("labels", lambda: ours.logprobs_from_logits(x, [0])),
        ("logits", lambda: ours.entropy_from_logits([x])),
        ("weight", lambda: ours.linear_cross_entropy(x, [x], mask)),
        ("values", lambda: ours.compute_gae_advantage_return(x, [0.0], mask, 1.0, 1.0)),
        ("response_mask", lambda: ours.compute_grpo_outcome_advantage(x, [1], [0, 0])),
        ("loss_mat", lambda: ours.agg_loss([0.0], mask, "token-mean")),
        ("ref_logprob", lambda: ours.kl_penalty(x, [0.0], "kl")),
        ("vpreds", lambda: ours.compute_value_loss([0.0], x, x, mask, 0.2)),
        ("old_log_prob", lambda: ours.compute_policy_loss_gpg([0.0], x, x, mask, config=config)),
        ("rollout_is_weights", lambda: ours.compute_policy_loss_gpg(x, x, x, mask, "token-mean", config, [1.0])),
    ]
    for name, call in calls:
        with pytest.raises(TypeError, match=f"^{name}: wanted a torch.Tensor, got list"):
            call()
