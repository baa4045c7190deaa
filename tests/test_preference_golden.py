"""preference_loss and ranked_reward_loss against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from test_preference import BACKENDS, INF, NAN, NO_REFERENCE

import rl4llm_fast as rf


class TestGolden:
    """Worked by hand, from the equations alone."""

    ZERO = torch.zeros(1)

    def loss(self, backend, chosen, rejected, **arguments):
        leaves = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
        if arguments.get("kind", "dpo") not in NO_REFERENCE:
            arguments |= {"ref_chosen": self.ZERO, "ref_rejected": self.ZERO}
        loss, metrics = rf.preference_loss(*leaves, backend=backend, **arguments)
        loss.backward()
        return loss.item(), leaves[0].grad.item(), leaves[1].grad.item(), {k: v.item() for k, v in metrics.items()}

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_dpo(self, backend):
        # βh = ln 3: σ = 3/4, loss ln(4/3), gradient weight β·σ(−βh) = β/4 (47)
        h = 10 * math.log(3)
        loss, up, down, metrics = self.loss(backend, h - 1.0, -1.0)
        assert loss == pytest.approx(math.log(4 / 3), abs=1e-6)
        assert (up, down) == pytest.approx((-0.1 / 4, 0.1 / 4), abs=1e-7)
        wanted = {"reward_chosen": math.log(3) - 0.1, "reward_rejected": -0.1, "accuracy": 1, "margin": math.log(3)}
        assert metrics == pytest.approx(wanted, abs=1e-6)
        # ε = 0.1: −0.9·ln(3/4) − 0.1·ln(1/4); dℓ/dh = β(−0.9·¼ + 0.1·¾)
        for arguments in ({"label_smoothing": 0.1}, {"prob": torch.tensor([0.9])}):
            loss, up, down, _ = self.loss(backend, h, 0.0, **arguments)
            assert loss == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4), abs=1e-6)
            assert (up, down) == pytest.approx((-0.015, 0.015), abs=1e-7)
        # robust: (0.9·ln(4/3) − 0.1·ln 4)/0.8, gradient β(−0.9·¼ − 0.1·¾)/0.8
        loss, up, _, _ = self.loss(backend, h, 0.0, kind="robust")
        assert loss == pytest.approx((0.9 * math.log(4 / 3) - 0.1 * math.log(4)) / 0.8, abs=1e-6)
        assert up == pytest.approx(-0.1 * 0.3 / 0.8, abs=1e-7)
        # β → 0: ln 2, and no gradient; equal answers are no success of the chosen one
        assert self.loss(backend, 5.0, -5.0, beta=0.0)[:3] == pytest.approx((math.log(2), 0, 0), abs=1e-6)
        assert self.loss(backend, -2.0, -2.0)[3]["accuracy"] == 0

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_extreme_values(self, backend):
        loss, up, down, _ = self.loss(backend, -3000.0, 0.0, beta=1.0)
        assert (loss, up, down) == (3000.0, -1.0, 1.0)
        loss, up, down, _ = self.loss(backend, 0.0, -3000.0, beta=1.0)
        assert (loss, up, down) == (0.0, 0.0, 0.0)
        assert self.loss(backend, 0.0, -INF, beta=1.0)[0] == 0.0
        assert self.loss(backend, -INF, 0.0, beta=1.0)[0] == INF
        assert math.isnan(self.loss(backend, NAN, 0.0)[0])
        assert math.isnan(self.loss(backend, NAN, 0.0, kind="hinge")[0])

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_ipo_and_hinge(self, backend):
        # (h − 1/(2·0.5))² at h = 1 is its optimum
        assert self.loss(backend, -1.0, -2.0, kind="ipo", beta=0.5)[:3] == (0.0, 0.0, 0.0)
        assert self.loss(backend, 3.0, 0.0, kind="ipo", beta=0.5)[:3] == (4.0, 4.0, -4.0)
        # p = ¾: target (2p−1)/(2τ) = ½
        assert self.loss(backend, 1.5, 0.0, kind="ipo", beta=0.5, prob=torch.tensor([0.75]))[:3] == (1.0, 2.0, -2.0)
        assert self.loss(backend, 1.0, -1.0, kind="hinge", beta=0.25)[:3] == (0.5, -0.25, 0.25)
        assert self.loss(backend, 4.0, 0.0, kind="hinge", beta=0.25)[:3] == (0.0, 0.0, 0.0)  # βh = 1
        assert self.loss(backend, 9.0, 0.0, kind="hinge", beta=0.25)[:3] == (0.0, 0.0, 0.0)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_without_reference(self, backend):
        # βh = 0.1·(−1 + 11) = 1
        soft = math.log1p(math.exp(-1.0))
        loss, up, _, metrics = self.loss(backend, -1.0, -11.0, kind="cpo", alpha=2.0)
        assert loss == pytest.approx(soft + 2.0, abs=1e-6)
        assert up == pytest.approx(-0.1 / (1 + math.e) - 2.0, abs=1e-6)
        assert metrics["reward_chosen"] == pytest.approx(-0.1)
        loss, _, down, _ = self.loss(backend, -1.0, -11.0, kind="simpo", gamma=1.0)
        assert (loss, down) == pytest.approx((math.log(2), 0.05), abs=1e-6)
        # r_w − r_l − margin = 1
        loss, _, _, metrics = self.loss(backend, 3.0, 1.5, kind="bradley_terry", margin=torch.tensor([0.5]))
        assert loss == pytest.approx(soft, abs=1e-6)
        assert metrics == {"reward_chosen": 3.0, "reward_rejected": 1.5, "accuracy": 1.0, "margin": 1.5}
        assert self.loss(backend, 3.0, 2.0, kind="bradley_terry", beta=7.0)[0] == pytest.approx(soft, abs=1e-6)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_orpo(self, backend):
        # e^a = ½ and ¼: odds 1 and 1/3, −log σ(ln 3) = ln(4/3); d log odds/da = 1/(1 − e^a) = 2 and 4/3
        loss, up, down, _ = self.loss(backend, math.log(0.5), math.log(0.25), kind="orpo", lam=1.0)
        assert loss == pytest.approx(math.log(2) + math.log(4 / 3), abs=1e-6)
        assert (up, down) == pytest.approx((-1 - 0.25 * 2, 0.25 * 4 / 3), abs=1e-6)
        # a certain answer: capped at −1e-7, log odds −ln(1e-7), no gradient through it
        loss, up, _, _ = self.loss(backend, 0.0, math.log(0.5), kind="orpo", lam=1.0)
        assert loss == pytest.approx(math.log1p(1e-7), rel=0.2)
        assert up == -1.0
        assert all(map(math.isfinite, self.loss(backend, -1e-7, -1e4, kind="orpo")[:3]))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_tokens(self, backend):
        """Two pairs of two tokens: the sums, the means and the two kinds of NLL."""
        chosen = torch.tensor([[-1.0, -2.0], [-3.0, NAN]], requires_grad=True)
        rejected = torch.tensor([[-4.0, -4.0], [NAN, NAN]], requires_grad=True)
        masks = {"mask_chosen": torch.tensor([[1, 1], [1, 0]]), "mask_rejected": torch.tensor([[1, 1], [0, 0]])}
        # β·(π_w − π_l) = 0: α·nll alone beside ln 2; per sequence (3 + 3)/2, per token 6/3
        for nll, wanted, grad in (
            ("sequence", 3.0, [-0.5, -0.5, -0.5, 0]),
            ("token", 2.0, [-1 / 3, -1 / 3, -1 / 3, 0]),
        ):
            chosen.grad = None
            how = {"kind": "cpo", "beta": 0.0, "nll": nll, "backend": backend}
            loss, _ = rf.preference_loss(chosen, rejected, **how, **masks)
            loss.backward()
            assert loss.item() == pytest.approx(math.log(2) + wanted, abs=1e-6)
            assert chosen.grad.flatten().tolist() == pytest.approx(grad, abs=1e-6)
        # simpo with γ = 0, β = 2: means −1.5 and −4 (h = 2.5), −3 and 0 (h = −3)
        chosen.grad = rejected.grad = None
        how = {"kind": "simpo", "beta": 2.0, "gamma": 0.0, "backend": backend}
        loss, metrics = rf.preference_loss(chosen, rejected, **how, **masks)
        loss.backward()
        assert loss.item() == pytest.approx((math.log1p(math.exp(-5)) + math.log1p(math.exp(6))) / 2, rel=1e-6)
        first = 2 / (1 + math.exp(5)) / 2 / 2  # β·σ(−βh)/|y|/B
        assert chosen.grad[0].tolist() == pytest.approx([-first, -first], rel=1e-5)
        assert rejected.grad[1].tolist() == [0.0, 0.0]
        wanted = {"reward_chosen": -4.5, "reward_rejected": -4.0, "accuracy": 0.5, "margin": -0.5}
        assert {k: v.item() for k, v in metrics.items()} == pytest.approx(wanted)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_2d_dpo(self, backend):
        # Segments of chosen [0,1) and [1,3) with weights 1 and 2; of rejected [0,2) and [2,3); the end is not included
        chosen = torch.tensor([[1.0, 2.0, 3.0, NAN]], requires_grad=True)
        rejected = torch.tensor([[0.0, -1.0, 9.0, 50.0]], requires_grad=True)
        zero = torch.zeros(1, 4)
        found = {
            "segments_chosen": torch.tensor([[[0, 1], [1, 3], [-1, -1]]]),
            "segments_rejected": torch.tensor([[[0, 2], [2, 3], [-1, -1]]]),
            "weights_chosen": torch.tensor([[1.0, 2.0, NAN]]),
            "mask_chosen": torch.tensor([[1, 1, 1, 0]]),
            "mask_rejected": torch.tensor([[1, 1, 1, 0]]),
        }
        loss, metrics = rf.preference_loss(
            chosen, rejected, zero, zero, kind="2d_dpo", beta=0.5, backend=backend, **found
        )
        loss.backward()
        # ½·(1 − (−1)) = 1 and ½·(10 − 9) = ½
        assert loss.item() == pytest.approx(math.log1p(math.exp(-1)) + math.log1p(math.exp(-0.5)), abs=1e-6)
        one, half = 0.5 / (1 + math.e), 0.5 / (1 + math.exp(0.5))
        assert chosen.grad[0].tolist() == pytest.approx([-one, -2 * half, -2 * half, 0], abs=1e-6)
        assert rejected.grad[0].tolist() == pytest.approx([one, one, half, 0], abs=1e-6)
        wanted = {"reward_chosen": 3.0, "reward_rejected": 4.0, "accuracy": 0.0, "margin": -1.0}
        assert {k: v.item() for k, v in metrics.items()} == wanted


class TestRankedReward:
    def test_by_hand(self):
        # prompt 7: scores 2 (best), 1, 1 (equal ranks): two pairs with a difference of 1; prompt 3: one pair, 0;
        # prompt 5 has one answer, prompt 9 only equal ranks: they do not count.
        scores = torch.tensor([1.0, 0.5, 2.0, 100.0, 1.0, 0.5, 8.0, -8.0], requires_grad=True)
        ranks = torch.tensor([4, 0, 1, 0, 4, 1, 2, 2])
        prompts = torch.tensor([7, 3, 7, 5, 7, 3, 9, 9])
        loss = rf.ranked_reward_loss(scores, ranks, prompts)
        loss.backward()
        assert loss.item() == pytest.approx((math.log1p(math.exp(-1)) + math.log(2)) / 2, abs=1e-6)
        slope = 0.5 / 2 / (1 + math.e)
        wanted = [slope, -0.25, -2 * slope, 0, slope, 0.25, 0, 0]
        assert scores.grad.tolist() == pytest.approx(wanted, abs=1e-6)

    def test_two_answers_are_bradley_terry(self):
        scores = torch.randn(6, 2, dtype=torch.float64)
        prompts = torch.arange(6).repeat_interleave(2)
        got = rf.ranked_reward_loss(scores.flatten(), torch.tensor([0, 1] * 6), prompts)
        torch.testing.assert_close(got, rf.reward_model_loss(scores[:, 0], scores[:, 1]))

    def test_nothing_to_compare(self):
        scores = torch.tensor([NAN, 1.0], requires_grad=True)
        loss = rf.ranked_reward_loss(scores, torch.tensor([0, 1]), torch.tensor([0, 1]))
        loss.backward()
        assert loss == 0
        assert scores.grad.tolist() == [0, 0]
        none = torch.zeros(0, dtype=torch.long)
        assert rf.ranked_reward_loss(torch.zeros(0), none, none) == 0

    def test_gradcheck(self):
        scores = torch.randn(7, dtype=torch.float64, requires_grad=True)
        ranks, prompts = torch.randint(3, (7,)), torch.randint(3, (7,))
        torch.autograd.gradcheck(lambda s: rf.ranked_reward_loss(s, ranks, prompts), scores)
