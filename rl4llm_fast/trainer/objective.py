"""The settings of a run as one call of rf.policy_loss."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import rl4llm_fast as rf

from .config import GRPOConfig

# Kinds whose loss and gradient are exactly 0 where the advantage is 0.
_SILENT_AT_ZERO = {"pg", "cpi", "ppo_clip", "grpo", "gspo", "cispo", "sapo"}


def objective(
    config: GRPOConfig,
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    lengths: list[int],
    num_tokens: int,
    num_sequences: int,
    *,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    sampled: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a micro-batch, packed (N,), as its share of a minibatch of ``num_tokens`` and ``num_sequences``.

    Args:
        advantages: (B,), one per answer, or (N,), one per token; ``lengths`` the answers' tokens.
        old_logp, ref_logp, entropy, sampled: (N,) each; ``sampled`` are the sampler's own log-probabilities.
    """
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=logp.device)
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
    if entropy is not None:
        options["entropy"] = entropy
        options["entropy_coef"] = config.entropy_coef
    result: tuple[Tensor, dict[str, Tensor]] = rf.policy_loss(
        logp,
        old_logp,
        advantages,
        kind=config.loss,
        cu_seqlens=cu_seqlens,
        aggregation=config.aggregation,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        max_length=config.max_new_tokens,
        **options,
    )
    return result


def check_objective(config: GRPOConfig) -> None:
    """Call the loss once on one token, so that a wrong kind, knob or aggregation is an error before any work."""
    one = torch.zeros(1)
    objective(config, one, one, one, [1], 1, 1, ref_logp=one, entropy=one, sampled=one)


def silent_at_zero(config: GRPOConfig) -> bool:
    """Whether answers of advantage 0 give neither loss nor gradient, so that they need no forward pass."""
    return config.loss in _SILENT_AT_ZERO and config.kl_coef == 0 and config.entropy_coef == 0
