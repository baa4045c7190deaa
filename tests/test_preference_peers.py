"""The preference losses beside TRL's and Liger's own functions, values and gradients, to 1e-6 in fp32."""

from __future__ import annotations

import collections
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


def per_token_trainer(module, name, **changes):
    """What _compute_loss reads of a TRL trainer whose reference log-probabilities are precomputed."""
    trainer = pytest.importorskip(f"trl.trainer.{module}", reason="trl is not installed")
    same = {"gather": lambda x: x, "gather_for_metrics": lambda x: x, "device": "cpu"}
    fake = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=types.SimpleNamespace(**same), aux_loss_enabled=False,
        precompute_ref_logps=True, _total_train_tokens=0, _tp_size=1,
        _metrics={"train": collections.defaultdict(list)}, **changes,
    )  # fmt: skip
    return getattr(trainer, name), fake


def fake_model(logp, mask):
    """A model whose log-probabilities of the completion are ``logp``."""
    outputs = types.SimpleNamespace(
        log_probs=torch.where(mask, logp, 0.0), entropy=torch.zeros_like(logp), mean_logits=torch.zeros_like(logp),
        is_top1=torch.zeros_like(mask),
    )  # fmt: skip
    return lambda **arguments: outputs


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust"])
def test_trl_dpo_trainer(loss_type):
    changes = {"beta": 0.3, "label_smoothing": 0.2, "loss_types": [loss_type], "loss_weights": [1.0], "ld_alpha": None}
    changes |= {"f_divergence_type": "reverse_kl", "use_weighting": False}
    trainer, fake = per_token_trainer("dpo_trainer", "DPOTrainer", **changes)
    logp = (-torch.rand(8, 11)).requires_grad_()
    ref = logp.detach() + 0.5 * torch.randn(8, 11)
    mask = torch.rand(8, 11) > 0.3
    completion = torch.cat([torch.zeros(8, 1), mask], 1).long()
    sums = torch.where(mask, ref, 0.0).sum(-1)
    inputs = {"input_ids": completion, "attention_mask": completion, "completion_mask": completion,
              "ref_chosen_logps": sums[:4], "ref_rejected_logps": sums[4:]}  # fmt: skip
    wanted = trainer._compute_loss(fake, fake_model(logp, mask), inputs, False)
    kind = {"sigmoid": "dpo"}.get(loss_type, loss_type)
    loss, metrics = rf.preference_loss(
        logp[:4], logp[4:], ref[:4], ref[4:], kind=kind, beta=0.3, mask_chosen=mask[:4], mask_rejected=mask[4:],
        average=kind == "ipo", **({"label_smoothing": 0.2} if kind == "robust" else {}),
    )  # fmt: skip
    compare(loss, wanted, [logp])
    if kind != "ipo":  # TRL's rewards are of sums
        theirs = {name: values[0] for name, values in fake._metrics["train"].items() if "rewards" in name}
        assert metrics["reward_chosen"].item() == pytest.approx(theirs["rewards/chosen"], abs=1e-6)
        assert metrics["reward_rejected"].item() == pytest.approx(theirs["rewards/rejected"], abs=1e-6)
        assert metrics["accuracy"].item() == theirs["rewards/accuracies"]
        assert metrics["margin"].item() == pytest.approx(theirs["rewards/margins"], abs=1e-6)


def test_trl_kto_trainer():
    changes = {
        "beta": 0.2,
        "loss_type": "kto",
        "calculate_KL": True,
        "desirable_weight": 1.2,
        "undesirable_weight": 0.9,
    }
    mismatched = torch.randn(6)
    trainer, fake = per_token_trainer("kto_trainer", "KTOTrainer", _compute_kl_logps=lambda *_: mismatched, **changes)
    logp = (-torch.rand(6, 11)).requires_grad_()
    ref = logp.detach() + 0.5 * torch.randn(6, 11)
    mask, desirable = torch.rand(6, 11) > 0.3, torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    completion = torch.cat([torch.zeros(6, 1), mask], 1).long()
    inputs = {"input_ids": completion, "attention_mask": completion, "completion_mask": completion, "label": desirable,
              "ref_logps": torch.where(mask, ref, 0.0).sum(-1), "ref_KL_logps": mismatched - 1.5}  # fmt: skip
    wanted = trainer._compute_loss(fake, fake_model(logp, mask), inputs, False)
    # TRL's kl has no β in it.
    loss, metrics = rf.kto_loss(
        logp, ref, desirable, beta=0.2, kl=0.2 * 1.5, lambda_d=1.2, lambda_u=0.9, mask=mask
    )  # fmt: skip
    compare(loss, wanted, [logp])
    assert metrics["reward_chosen"].item() == pytest.approx(fake._metrics["train"]["rewards/chosen"][0], abs=1e-6)
    assert metrics["reward_rejected"].item() == pytest.approx(fake._metrics["train"]["rewards/rejected"][0], abs=1e-6)


@pytest.mark.parametrize("margin", [None, 0.5])
def test_trl_reward_trainer(margin):
    args = types.SimpleNamespace(center_rewards_coefficient=None)
    trainer, fake = per_token_trainer("reward_trainer", "RewardTrainer", args=args)
    rewards = torch.randn(8, 1, requires_grad=True)
    inputs = {"attention_mask": torch.ones(8, 3)} | ({} if margin is None else {"margin": torch.full((4,), margin)})
    wanted = trainer.compute_loss(fake, lambda **arguments: types.SimpleNamespace(logits=rewards), inputs)
    chosen, rejected = rewards.squeeze(-1).chunk(2)
    compare(rf.reward_model_loss(chosen, rejected, margin=margin), wanted, [rewards])
