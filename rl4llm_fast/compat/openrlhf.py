"""OpenRLHF's functions over this library's ops: import them from here, or ``patch()`` OpenRLHF."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..kl import kl_estimate
from ..logprobs import check_ids_shape, token_logprobs
from ..returns import gae
from . import patching, rounding
from .patching import Patch, Target

VERSIONS = ("0.11",)
KL_IS_WEIGHT_CLIP = 10.0  # OpenRLHF's bound of π/π_old in the unbiased gradient


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """``openrlhf.models.utils.log_probs_from_logits``: log-probabilities of the labels.

    Args:
        logits: (..., V). Divided by the temperature in place, as OpenRLHF does, if it is not 1.
        labels: integers (...). On a GPU, where OpenRLHF runs flash-attn's kernel, −100 gives 0 and no gradient.
        temperature: τ > 0.

    Returns:
        (...), in the dtype of the logits; with ``torch.log_softmax``'s bits in bf16 and fp16 on a CPU.
    """
    checks.are_tensors(logits=logits, labels=labels)
    check_ids_shape(labels, logits, "logits", "labels")  # before the logits are divided
    if not temperature > 0:
        raise ValueError(f"temperature: wanted a number > 0, got {temperature}")
    if temperature != 1.0:
        logits.div_(temperature)
    if logits.device.type == "cpu":
        return rounding.logprobs_and_entropy(logits, labels, 1.0, None, False, name="labels")[0]
    return token_logprobs(logits, labels).to(logits.dtype)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | str | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    r"""``openrlhf.models.utils.compute_approx_kl``: an estimate of the KL for every token, clamped to ±10.

    Args:
        log_probs, log_probs_base: one shape; no gradient to the latter.
        log_probs_old: of the policy that sampled, for the unbiased gradient. A string is the estimator: that was the
            third argument before OpenRLHF 0.11.
        kl_estimator: "k1", "k2" or "k3".
        unbiased_gradient: keep the value and take the gradient :math:`w\,(\log\pi - \log\pi_{base})\nabla\log\pi`, with
            :math:`w = \min(\pi/\pi_{old}, 10)`, or 1 without ``log_probs_old``.

    Returns:
        Their shape, fp32, with OpenRLHF's bits in k3 too.
    """
    if isinstance(log_probs_old, str):
        kl_estimator, log_probs_old = log_probs_old, None
    checks.are_tensors(log_probs=log_probs, log_probs_base=log_probs_base)
    if log_probs_old is not None:
        checks.is_tensor("log_probs_old", log_probs_old)
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"kl_estimator: wanted 'k1', 'k2' or 'k3', got {kl_estimator!r}")
    estimator: Any = kl_estimator
    now, base = log_probs.float(), log_probs_base.detach().float()
    kl = kl_estimate(now, base, estimator, gradient="straight_through" if unbiased_gradient else "value", clamp=True)
    if kl_estimator == "k3":
        # OpenRLHF's roundings, at which its own tests look: the kernel's k3 keeps the digits that e^−d − 1 + d loses.
        d = (now.detach() - base).clamp_(min=-10.0)
        value = d.neg().exp_().sub_(1).add_(d).clamp_(-10.0, 10.0)
        kl = rounding.with_gradient(value, kl if kl.requires_grad else None)
    if not unbiased_gradient or log_probs_old is None:
        return kl
    weight = (now - log_probs_old.float()).exp().clamp(max=KL_IS_WEIGHT_CLIP).detach()
    return kl.detach() + weight * (kl - kl.detach())


@torch.no_grad()
def get_advantages_and_returns(
    values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """OpenRLHF's ``get_advantages_and_returns``, a method of its experience maker: GAE.

    Args:
        values, rewards: (B, T). gamma, lambd: γ and λ.
        action_mask: (B, T), 0 or 1 of any dtype, or None. Rewards and values are 0 where it is 0; the recurrence runs
            over such tokens like over any other, and their results are returned.

    Returns:
        (advantages, returns), (B, T) each, in the common dtype of values, rewards and a mask of floats.
    """
    checks.are_tensors(values=values, rewards=rewards)
    if action_mask is not None:
        checks.is_tensor("action_mask", action_mask)
    dtype = torch.promote_types(values.dtype, rewards.dtype)
    if action_mask is not None and action_mask.is_floating_point():
        dtype = torch.promote_types(dtype, action_mask.dtype)  # OpenRLHF multiplies with it
    values, rewards = values.to(dtype), rewards.to(dtype)
    if action_mask is not None:
        values, rewards = torch.where(action_mask != 0, values, 0.0), torch.where(action_mask != 0, rewards, 0.0)
    advantages, returns = gae(rewards, values, gamma=gamma, lam=lambd)
    return advantages.to(dtype), returns.to(dtype)


def _get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    return get_advantages_and_returns(values, rewards, action_mask, gamma, lambd)


TARGETS = (
    Target("openrlhf.models.utils", "log_probs_from_logits", log_probs_from_logits),
    Target("openrlhf.models.utils", "compute_approx_kl", compute_approx_kl),
    Target(
        "openrlhf.trainer.ppo_utils.experience_maker",
        "RemoteExperienceMaker.get_advantages_and_returns",
        _get_advantages_and_returns,
    ),
)


def patch(force: bool = False) -> Patch:
    """Swap this module's functions inside the installed OpenRLHF; see ``compat.trl.patch``."""
    return patching.patch("openrlhf", VERSIONS, TARGETS, force=force)


def unpatch() -> None:
    """Undo :func:`patch`; without one, do nothing."""
    patching.unpatch("openrlhf")
