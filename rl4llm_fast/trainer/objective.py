"""The settings of a run as one call of rf.policy_loss or rf.linear_policy_loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import rl4llm_fast as rf

from ..fused import linear_policy_loss_and_logprobs
from .config import GRPOConfig
from .layout import starts_of
from .preflight import check_loss


class Head(NamedTuple):
    """Where log-probabilities come from: hidden (N, D), weight (V, D), bias (V,) or None, token_ids (N,)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    token_ids: Tensor
    softcap: float | None


def objective(
    config: GRPOConfig,
    logp: Tensor | Head,
    old_logp: Tensor | None,
    advantages: Tensor,
    lengths: list[int],
    num_tokens: int,
    num_sequences: int,
    *,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    sampled: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss of a micro-batch, packed (N,), as its share of a minibatch of ``num_tokens`` and ``num_sequences``.

    With its metrics, and the log-probabilities (N,) without gradient.

    Args:
        logp: the answers' log-probabilities (N,), or what makes them: then no logits exist, and entropy is made too.
        advantages: (B,), one per answer, or (N,), one per token; ``lengths`` the answers' tokens.
        old_logp, ref_logp, entropy, sampled: (N,) each; ``sampled`` are the sampler's own log-probabilities.
    """
    options: dict[str, Any] = dict(config.loss_options)
    if config.rollout_correction != "none" and sampled is not None:
        options["rollout_logp"] = sampled
        options["rollout_correction"] = config.rollout_correction
        options["rollout_cap"] = config.rollout_cap
        options["rollout_floor"] = config.rollout_floor
        options.setdefault("rollout_level", config.rollout_level)
    if ref_logp is not None:
        options["ref_logp"] = ref_logp
        options["kl_coef"] = config.kl_coef
        options["kl_estimator"] = config.kl_estimator
        options["kl_gradient"] = config.kl_gradient
    options |= {
        "kind": config.loss,
        "cu_seqlens": starts_of(lengths, advantages.device),
        "aggregation": config.aggregation,
        "num_tokens": num_tokens,
        "num_sequences": num_sequences,
        "max_length": config.max_new_tokens,
        "entropy_coef": config.entropy_coef,
    }
    if isinstance(logp, Head):
        hidden, weight, bias, token_ids, softcap = logp
        options |= {"temperature": config.temperature, "softcap": softcap}
        return linear_policy_loss_and_logprobs(hidden, weight, token_ids, old_logp, advantages, bias, **options)
    return *rf.policy_loss(logp, old_logp, advantages, entropy=entropy, **options), logp.detach()


def check_objective(config: GRPOConfig) -> None:
    """Call the loss once on one token; see ``check_loss``."""
    one = torch.zeros(1)
    check_loss(config, lambda: objective(config, one, one, one, [1], 1, 1, ref_logp=one, entropy=one, sampled=one))
