"""The obvious whole-tensor formula in PyTorch: what one writes without a library."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import small
from ..cases import Case
from . import pick


def version() -> str:
    return torch.__version__


def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def token_logprobs_entropy(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def kl_divergence(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(logits.float(), -1), torch.log_softmax(ref_logits.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def linear_token_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    return token_logprobs(hidden @ weight.t(), token_ids)


def grpo_from(logprobs: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """GRPO with k3 to the reference, on-policy, over log-probabilities from hidden states: anyone's."""

    def linear_policy_loss(
        hidden: Tensor, weight: Tensor, token_ids: Tensor, ref_logp: Tensor, advantages: Tensor
    ) -> Tensor:
        logp = logprobs(hidden, weight, token_ids)
        ratio, to_ref = (logp - logp.detach()).exp(), ref_logp - logp
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return (0.04 * (to_ref.exp() - to_ref - 1) - surrogate).mean()

    return linear_policy_loss


def group_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    _, group, size = torch.unique(group_ids, return_inverse=True, return_counts=True)
    mean = torch.zeros(size.numel(), device=rewards.device).index_add_(0, group, rewards) / size
    centred = rewards - mean[group]
    square = torch.zeros_like(mean).index_add_(0, group, centred * centred)
    return centred / ((square / (size - 1).clamp(min=1)).sqrt()[group] + 1e-6)


def policy_loss(
    logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor, mask: Tensor, *, of_sequence: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO, or GSPO with the ratio of the sequence, with k3 to the reference, token mean, and a trainer's metrics."""
    advantage = advantages.unsqueeze(-1)
    log_ratio = logp - old_logp
    kl_ref = (to_ref := ref_logp - logp).exp() - to_ref - 1
    count = mask.sum().clamp(min=1)
    lower, upper = 0.8, 1.2
    clipped_ratio = log_ratio
    if of_sequence:
        lower, upper = 1 - 3e-4, 1 + 4e-4
        clipped_ratio = torch.where(mask, log_ratio, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    ratio = clipped_ratio.exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(lower, upper) * advantage) + 0.04 * kl_ref

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum() / count

    with torch.no_grad():
        low = mean(((ratio < lower) & (advantage < 0)).float())
        high = mean(((ratio > upper) & (advantage > 0)).float())
        token_ratio = log_ratio.exp() if of_sequence else ratio
        metrics = {
            "clip_fraction": low + high,
            "clip_fraction_low": low,
            "clip_fraction_high": high,
            "ratio_mean": mean(ratio),
            "ratio_min": torch.where(mask, ratio, torch.inf).amin(),
            "ratio_max": torch.where(mask, ratio, -torch.inf).amax(),
            "kl_old_k1": mean(-log_ratio),
            "kl_old_k3": mean(token_ratio - 1 - log_ratio),
            "kl_ref": mean(kl_ref),
        }
    return mean(loss), metrics


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    mask_chosen: Tensor,
    mask_rejected: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO on the sums over live tokens, and the metrics that a trainer logs."""
    won = torch.where(mask_chosen, chosen - ref_chosen, 0.0).sum(-1)
    lost = torch.where(mask_rejected, rejected - ref_rejected, 0.0).sum(-1)
    loss = -torch.nn.functional.logsigmoid(0.1 * (won - lost)).mean()
    with torch.no_grad():
        better, worse = 0.1 * won, 0.1 * lost
        metrics = {
            "reward_chosen": better.mean(),
            "reward_rejected": worse.mean(),
            "accuracy": (better > worse).float().mean(),
            "margin": (better - worse).mean(),
        }
    return loss, metrics


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "token_logprobs": token_logprobs,
    "token_logprobs_entropy": token_logprobs_entropy,
    "kl_divergence": kl_divergence,
    "group_advantages": group_advantages,
    "policy_loss": policy_loss,
    "policy_loss_gspo": functools.partial(policy_loss, of_sequence=True),
    "preference_loss": preference_loss,
    "linear_token_logprobs": linear_token_logprobs,
    "linear_policy_loss": grpo_from(linear_token_logprobs),
    **{name: op.eager for name, op in small.OPS.items()},
}


def build(case: Case, device: str) -> Callable[..., Any]:
    return pick(FUNCTIONS, case)
