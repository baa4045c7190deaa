"""gspo with one advantage per sequence, beside autograd of its definition, where tokens do not weigh the same."""

from __future__ import annotations

import pytest
import torch

import rl4llm_fast as rf

BACKENDS = [b for b in rf.backends()["policy_loss"] if b in ("eager", "cpu")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {"token_weights": torch.linspace(0, 1, 21).reshape(3, 7)},
        {"rollout_correction": "mask", "rollout_level": "token", "rollout_cap": 1.1, "rollout_floor": 0.9},
        {"rollout_correction": "truncate", "rollout_level": "sequence", "aggregation": "none"},
        {"token_weights": torch.linspace(1, 0, 21).reshape(3, 7), "aggregation": "none"},
    ],
    ids=["weights", "correction", "none", "weights none"],
)
def test_gspo_whose_tokens_weigh_differently(backend, packed, how):
    """One advantage per sequence: every token's share moves the one ratio; the KL term's derivative is each its own."""
    logp = -2 * torch.rand(3, 7, dtype=torch.float64)
    old, ref, rollout = (logp + s * torch.randn(3, 7, dtype=torch.float64) for s in (0.05, 0.3, 0.3))
    mask = torch.rand(3, 7) > 0.3
    advantages, upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.rand(3, 7, dtype=torch.float64)
    how = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in how.items()}
    logp.requires_grad_()

    count = mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = (torch.where(mask, logp - old, 0.0).sum(-1, keepdim=True) / count).exp()
    a = advantages[:, None]
    each = -torch.minimum(ratio * a, ratio.clamp(0.9, 1.2) * a).expand(3, 7)
    if "rollout_correction" in how:
        log_omega = torch.where(mask, old - rollout, 0.0)
        if how["rollout_level"] == "sequence":
            each = each * log_omega.sum(-1, keepdim=True).exp().clamp(max=2.0)
        else:
            omega = log_omega.exp()
            each = each * torch.where((omega >= 0.9) & (omega <= 1.1), omega, 0.0)
        how["rollout_logp"] = rollout
    each = (each + 0.1 * ((ref - logp).exp() - (ref - logp) - 1)) * how.get("token_weights", 1.0)
    each = torch.where(mask, each, 0.0)
    none = how.get("aggregation") == "none"
    wanted = each if none else each.sum() / mask.sum()
    tokens = {"old_logp": old, "mask": mask, "ref_logp": ref, **how}
    leaf = logp
    if packed:
        tokens = {n: v.reshape(-1) if isinstance(v, torch.Tensor) else v for n, v in tokens.items()}
        leaf, tokens["cu_seqlens"] = logp.reshape(-1), torch.tensor([0, 7, 14, 21])
    tokens |= {"kl_coef": 0.1, "eps_low": 0.1, "eps_high": 0.2, "kind": "gspo", "backend": backend}
    loss, _ = rf.policy_loss(leaf, tokens.pop("old_logp"), advantages, **tokens)
    torch.testing.assert_close(loss, wanted.reshape(loss.shape), rtol=1e-12, atol=1e-12)
    found, exact = (
        torch.autograd.grad((x.reshape(3, 7) * upstream).sum() if none else x, logp, retain_graph=True)[0]
        for x in (loss, wanted)
    )
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
