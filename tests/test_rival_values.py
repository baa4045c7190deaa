"""Cases of other libraries' own tests which this library's functions answer: OpenRLHF's loss aggregation, torchtune's
GAE, PPO, DPO, RSO, SimPO and KTO. ln 2 and its like are exact arithmetic, not another library's output."""

from __future__ import annotations

import math

import pytest
import torch

import rl4llm_fast as rf


class TestLossAggregation:
    def test_every_sequence_weighs_the_same(self) -> None:
        # ρ = 1: the losses are −A, the means of the rows −2 and −1; a token's share is A/(|row|·B).
        logp = torch.full((2, 2), -math.log(2.0), requires_grad=True)
        advantages, mask = torch.tensor([[2.0, 2.0], [1.0, 0.0]]), torch.tensor([[True, True], [True, False]])
        loss, _ = rf.policy_loss(logp, logp.detach(), advantages, mask=mask, aggregation="seq_mean_token_mean")
        assert float(loss.detach()) == pytest.approx(-1.5)
        loss.backward()
        assert logp.grad is not None
        assert logp.grad.tolist() == [[-0.5, -0.5], [-0.5, 0.0]]

    def test_global_counts_make_micro_batches_add_up(self) -> None:
        losses = [torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[3.0, 4.0, 5.0], [6.0, 7.0, 0.0]])]
        masks = [losses[0] > 0, losses[1] > 0]
        parts = [
            rf.policy_loss(torch.zeros_like(l), None, -l, mask=m, kind="cpi", aggregation="token_mean", num_tokens=7)[0]
            for l, m in zip(losses, masks, strict=True)
        ]
        assert float(sum(parts)) == pytest.approx(28 / 7)


class TestGae:
    def test_by_hand(self) -> None:
        # γ = 1/2, λ = 1/2, V = (1, 2, 4), r = (1, 1, 1): δ = (1 + 1 − 1, 1 + 2 − 2, 1 − 4) = (1, 1, −3);
        # A_3 = −3, A_2 = 1 − 3/4 = 1/4, A_1 = 1 + 1/16.
        rewards, values = torch.ones(1, 3), torch.tensor([[1.0, 2.0, 4.0]])
        advantages, returns = rf.gae(rewards, values, gamma=0.5, lam=0.5)
        assert advantages.tolist() == [[1.0625, 0.25, -3.0]]
        assert returns.tolist() == [[2.0625, 2.25, 1.0]]

    def test_torchtune(self) -> None:
        # V = r = (0, 0, 0, 1), γ = 0.9, λ = 0.95: the last δ is 0, the one before it γ·1; R = γ³λ², γ²λ, γ, 1.
        values = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
        advantages, returns = rf.gae(values, values, gamma=0.9, lam=0.95)
        wanted = torch.tensor([[0.9**3 * 0.95**2, 0.9**2 * 0.95, 0.9, 1.0]])
        torch.testing.assert_close(returns, wanted)
        torch.testing.assert_close(advantages, wanted - values)
        whitened = rf.whiten(advantages)
        torch.testing.assert_close(whitened, (advantages - advantages.mean()) / advantages.std(), rtol=1e-4, atol=1e-5)


class TestPpo:
    def test_every_side_of_the_clip(self) -> None:
        # ρ = (2, 1/2, 1, 2) with A = (1, 1, −1, −1), ε = 0.2: −min(ρA, clip(ρ)A) = (−1.2, −0.5, 1, 2).
        ratio = torch.tensor([[2.0, 0.5, 1.0, 2.0]])
        advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
        loss, metrics = rf.policy_loss(ratio.log(), torch.zeros(1, 4), advantages, aggregation="none")
        torch.testing.assert_close(loss, torch.tensor([[-1.2, -0.5, 1.0, 2.0]]))
        assert float(metrics["clip_fraction"]) == 0.25

    @pytest.mark.parametrize(("log_ratio", "wanted"), [(1.0, 1.2), (-1.0, math.exp(-1.0)), (0.1, math.exp(0.1))])
    def test_torchtune(self, log_ratio: float, wanted: float) -> None:
        old = torch.tensor([[0.5, 0.8, 1.2]])
        loss, metrics = rf.policy_loss(old + log_ratio, old, torch.ones(1, 3), eps_low=0.2, eps_high=0.2)
        assert float(loss) == pytest.approx(-wanted, rel=1e-5)
        assert float(metrics["ratio_mean"]) == pytest.approx(math.exp(log_ratio), rel=1e-5)

    def test_values_near_the_returns_cost_less(self) -> None:
        returns, old = torch.ones(1, 3), torch.tensor([[0.9, 1.0, 1.1]])
        near, _ = rf.value_loss(old, returns, old_values=old, clip=0.2)
        far, _ = rf.value_loss(torch.tensor([[0.5, 1.5, 2.0]]), returns, old_values=old, clip=0.2)
        assert float(near) == pytest.approx(0.02 / 6, rel=1e-5)
        assert float(far) == pytest.approx((0.25 + 0.25 + 1.0) / 6, rel=1e-5)  # the clipped squares are smaller


class TestPairs:
    """h = (0, 10, 20) for the kinds with a reference, (−0.4, 20, 20) without one."""

    chosen, rejected = torch.tensor([-0.5, -10.0, -1.0]), torch.tensor([-0.1, -30.0, -21.0])
    ref_chosen, ref_rejected = torch.tensor([-0.5, -10.1, -0.1]), torch.tensor([-0.1, -20.1, -0.1])

    def one_by_one(self, kind: str, reference: bool, **knobs: float) -> list[float]:
        """The loss of each pair by itself."""
        pairs = [self.chosen, self.rejected, *((self.ref_chosen, self.ref_rejected) if reference else ())]
        return [float(rf.preference_loss(*(t[i : i + 1] for t in pairs), kind=kind, **knobs)[0]) for i in range(3)]

    def test_dpo(self) -> None:
        wanted = [math.log1p(math.exp(-h)) for h in (0.0, 1.0, 2.0)]
        assert self.one_by_one("dpo", True, beta=0.1) == pytest.approx(wanted, rel=1e-5)

    def test_rso_is_the_hinge(self) -> None:
        assert self.one_by_one("hinge", True, beta=0.1) == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)

    def test_simpo(self) -> None:
        wanted = [math.log1p(math.exp(-h)) for h in (-1.3, 39.5, 39.5)]
        assert self.one_by_one("simpo", False, beta=2.0, gamma=0.5) == pytest.approx(wanted, rel=1e-5, abs=1e-7)

    def test_kto(self) -> None:
        # KL = max(0, the mean of (−1.4, 0.05, 1.2)) = 0.
        logp, ref = torch.cat([self.chosen, self.rejected]), torch.cat([self.ref_chosen, self.ref_rejected])
        desirable = torch.tensor([True] * 3 + [False] * 3)
        got = [float(rf.kto_loss(logp[i : i + 1], ref[i : i + 1], desirable[i : i + 1])[0]) for i in range(6)]
        assert got == pytest.approx([0.5, 0.4975, 0.5225, 0.5, 0.2709, 0.1101], abs=1e-4)
