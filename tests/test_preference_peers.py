"""The preference losses beside TRL's and Liger's own functions, values and gradients, to 1e-6 in fp32."""

from __future__ import annotations

import types

import pytest
import torch

import rl4llm_fast as rf

TARGET = torch.zeros(12, 1)  # what Liger counts pairs with: both answers of six


def answers(scale=1.0):
    """(chosen, rejected) as leaves and their references, (B,)."""
    leaves = [(-scale * (torch.rand(6) + 0.05)).requires_grad_() for _ in range(2)]
    return leaves, [leaf.detach() + 2 * torch.randn(6) * scale / 5 for leaf in leaves]


def compare(ours, theirs, leaves):
    gradients = [torch.autograd.grad(loss, leaves) for loss in (ours, theirs)]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def liger(name):
    module = pytest.importorskip(f"liger_kernel.chunked_loss.{name}_loss", reason="liger-kernel is not installed")
    return getattr(module, f"LigerFusedLinear{name.upper() if name != 'simpo' else 'SimPO'}Function").preference_loss_fn


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [("dpo", "sigmoid"), ("hinge", "hinge"), ("robust", "robust")],
)
def test_liger_dpo(kind, theirs):
    leaves, refs = answers(10.0)
    knobs = {"label_smoothing": 0.2} if kind == "robust" else {}
    loss, metrics = rf.preference_loss(*leaves, *refs, kind=kind, beta=0.3, **knobs)
    other, chosen, rejected = liger("dpo")(*leaves, TARGET, *refs, beta=0.3, loss_type=theirs, **knobs)[:3]
    compare(loss, other, leaves)
    torch.testing.assert_close(metrics["reward_chosen"], chosen.mean().detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics["margin"], (chosen - rejected).mean().detach(), rtol=1e-6, atol=1e-6)


def test_liger_cpo_and_simpo():
    leaves, _ = answers(10.0)
    compare(
        rf.preference_loss(*leaves, kind="cpo", alpha=0.0, beta=0.2)[0],
        liger("cpo")(*leaves, TARGET, beta=0.2)[0],
        leaves,
    )
    compare(
        rf.preference_loss(*leaves, kind="simpo", beta=2.0, gamma=0.7)[0],
        liger("simpo")(*leaves, TARGET, beta=2.0, gamma=0.7)[0],
        leaves,
    )


def test_liger_orpo():
    leaves, _ = answers()
    nll = -leaves[0].mean()  # Liger adds it elsewhere
    ours = rf.preference_loss(*leaves, kind="orpo", lam=0.3)[0]
    compare(ours, liger("orpo")(*leaves, TARGET, beta=0.3)[0] + nll, leaves)


def test_liger_kto():
    leaves, refs = answers(10.0)
    desirable = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    # Liger's kl has no β in it.
    ours, metrics = rf.kto_loss(leaves[0], refs[0], desirable, beta=0.2, kl=0.2 * 1.5)
    theirs = liger("kto")(leaves[0], desirable, TARGET[:6], refs[0], beta=0.2, kl=torch.tensor(1.5))
    compare(ours, theirs[0], leaves[:1])
    torch.testing.assert_close(metrics["reward_chosen"], theirs[1].detach() / 3, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics["reward_rejected"], theirs[2].detach() / 3, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["cpo", "dpo", "hinge", "ipo", "simpo"])
def test_trl_cpo_trainer(kind):
    """TRL's CPO trainer holds every kind that needs no reference; a reference of 0 makes ours the same."""
    module = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason="trl is not installed")
    leaves, _ = answers(10.0)
    smoothing = 0.1 if kind == "dpo" else 0.0
    trainer = types.SimpleNamespace(
        alpha=0.0,
        beta=0.4,
        label_smoothing=smoothing,
        simpo_gamma=0.3,
        loss_type={"cpo": "sigmoid", "dpo": "sigmoid"}.get(kind, kind),
        accelerator=types.SimpleNamespace(device="cpu"),
    )
    losses, chosen, _ = module.CPOTrainer.cpo_loss(trainer, *leaves)
    refs = [torch.zeros(6)] * 2 if kind in ("dpo", "hinge", "ipo") else []
    knobs = {"cpo": {"alpha": 0.0}, "simpo": {"gamma": 0.3}, "dpo": {"label_smoothing": smoothing}}.get(kind, {})
    loss, metrics = rf.preference_loss(*leaves, *refs, kind=kind, beta=0.4, **knobs)
    compare(loss, losses.mean(), leaves)
    torch.testing.assert_close(metrics["reward_chosen"], chosen.mean().detach(), rtol=1e-6, atol=1e-6)


def test_trl_orpo_trainer():
    module = pytest.importorskip("trl.experimental.orpo.orpo_trainer", reason="trl is not installed")
    leaves, _ = answers()
    trainer = types.SimpleNamespace(beta=0.3, accelerator=types.SimpleNamespace(device="cpu"))
    gains = module.ORPOTrainer.odds_ratio_loss(trainer, *leaves)[0]
    compare(rf.preference_loss(*leaves, kind="orpo", lam=0.3)[0], -leaves[0].mean() - gains.mean(), leaves)
