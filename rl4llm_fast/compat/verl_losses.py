"""verl's policy and value losses over this library's: its argument order, its configuration, its metrics.

Every policy loss takes (old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
rollout_is_weights) and returns the loss and a dict of floats. ``config`` is verl's ActorConfig, or anything with its
attributes: clip_ratio, clip_ratio_low, clip_ratio_high, ``get("clip_ratio_c", 3.0)``, tau_pos, tau_neg and
global_batch_info, each where the loss has such a thing. Unlike verl's, a batch without a live token gives the loss 0
instead of NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..losses import policy_loss
from ..value import value_loss

PolicyLoss = tuple[Tensor, dict[str, Any]]

_AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-sum-norm": "seq_mean_token_sum_norm",
    "seq-mean-token-mean": "seq_mean_token_mean",
}


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> PolicyLoss:
    """ "vanilla": PPO's clipped objective with the dual clip ``clip_ratio_c`` (:func:`policy_loss`'s ``ppo_clip``)."""
    low, high = _clip(config)
    bound = config.get("clip_ratio_c", 3.0)
    loss, metrics, live = _policy_loss(
        "ppo_clip",
        (old_log_prob, log_prob, advantages, response_mask),
        loss_agg_mode,
        config,
        rollout_is_weights,
        eps_low=low,
        eps_high=high,
        dual_clip=bound,
    )
    with torch.no_grad():
        # The dual clip acts where the clipped loss −A·max(ρ, …) exceeds −A·c.
        ratio = (log_prob - old_log_prob).clamp(-20.0, 20.0).exp()
        dual = _share((ratio > bound) & (advantages < 0), live)
    return loss, _floats(metrics["clip_fraction"], metrics["kl_old_k1"], dual)


def compute_policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> PolicyLoss:
    """ "gspo": the clipped objective with the sequence's geometric mean of ratios (:func:`policy_loss`'s ``gspo``)."""
    low, high = _clip(config)
    loss, metrics, _ = _policy_loss(
        "gspo",
        (old_log_prob, log_prob, advantages, response_mask),
        loss_agg_mode,
        config,
        rollout_is_weights,
        eps_low=low,
        eps_high=high,
    )
    return loss, _floats(metrics["clip_fraction"], metrics["kl_old_k1"])


def compute_policy_loss_sapo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> PolicyLoss:
    """ "sapo": the soft gate (:func:`policy_loss`'s ``sapo``), aggregated as seq-mean-token-mean whatever the mode."""
    config = _given(config)
    loss, metrics, _ = _policy_loss(
        "sapo",
        (old_log_prob, log_prob, advantages, response_mask),
        "seq-mean-token-mean",
        config,
        rollout_is_weights,
        tau_pos=config.tau_pos,
        tau_neg=config.tau_neg,
    )
    return loss, _floats(torch.zeros_like(metrics["kl_old_k1"]), metrics["kl_old_k1"])


def compute_policy_loss_cispo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> PolicyLoss:
    """ "cispo": −sg(clip(ρ))·A·logp (:func:`policy_loss`'s ``cispo``); the metric counts clips of either sign of A."""
    low, high = _clip(config)
    loss, metrics, live = _policy_loss(
        "cispo",
        (old_log_prob, log_prob, advantages, response_mask),
        loss_agg_mode,
        config,
        rollout_is_weights,
        eps_low=low,
        eps_high=high,
    )
    with torch.no_grad():
        ratio = (log_prob - old_log_prob).clamp(-20.0, 20.0).exp()
        clipped = _share((ratio < 1 - low) | (ratio > 1 + high), live)
    return loss, _floats(clipped, metrics["kl_old_k1"])


def compute_policy_loss_gpg(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> PolicyLoss:
    """ "gpg": −logp·A (:func:`policy_loss`'s ``pg``); no metrics."""
    tokens = (old_log_prob, log_prob, advantages, response_mask)
    return _policy_loss("pg", tokens, loss_agg_mode, config, rollout_is_weights)[0], {}


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``verl.trainer.ppo.core_algos.compute_value_loss``: half the clipped squared error (:func:`value_loss`).

    Args:
        vpreds, returns, values: the new values, their targets and the old values, (B, T). The first is differentiable.
        response_mask: (B, T), 0 or 1 of any dtype.
        cliprange_value: ε > 0.
        loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor: as in ``agg_loss``.

    Returns:
        The loss, and the share of live tokens whose clipped square is the larger one, 0-d each; the loss in the common
        dtype of the values, wider where the mask is. A batch without a live token gives 0 where verl gives NaN.
    """
    if loss_agg_mode not in _AGGREGATIONS:
        raise ValueError(f"Invalid loss_agg_mode: {loss_agg_mode}")
    checks.are_tensors(vpreds=vpreds, returns=returns, values=values, response_mask=response_mask)
    dtype = torch.promote_types(torch.promote_types(vpreds.dtype, returns.dtype), values.dtype)
    live = response_mask != 0
    info = {"dp_size": dp_size, "batch_num_tokens": batch_num_tokens, "global_batch_size": global_batch_size}
    loss, metrics = value_loss(
        vpreds.to(dtype),
        returns.to(dtype),
        old_values=values.to(dtype),
        clip=cliprange_value,
        mask=live,
        aggregation="seq_mean_token_sum" if loss_agg_mode.endswith("-norm") else _AGGREGATIONS[loss_agg_mode],
        num_tokens=batch_num_tokens,
        num_sequences=_sequences(loss_agg_mode, live, info),
        dp_size=dp_size,
    )
    if loss_agg_mode.endswith("-norm"):
        loss = loss / (response_mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    wide = torch.promote_types(dtype, response_mask.dtype) if response_mask.is_floating_point() else dtype
    return loss.to(wide), metrics["clip_fraction"].float()


POLICY_LOSSES: dict[str, Callable[..., PolicyLoss]] = {
    "vanilla": compute_policy_loss_vanilla,
    "gspo": compute_policy_loss_gspo,
    "sapo": compute_policy_loss_sapo,
    "cispo": compute_policy_loss_cispo,
    "gpg": compute_policy_loss_gpg,
}


def _given(config: Any) -> Any:
    if config is None:
        raise ValueError("config: wanted verl's ActorConfig, got None")
    return config


def _clip(config: Any) -> tuple[float, float]:
    _given(config)
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    return low, high


def _policy_loss(
    kind: str,
    tokens: tuple[Tensor, Tensor, Tensor, Tensor],
    mode: str,
    config: Any,
    weights: Tensor | None,
    **knobs: Any,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss, this library's metrics, and the live tokens."""
    if mode not in _AGGREGATIONS:
        raise ValueError(f"Invalid loss_agg_mode: {mode}")
    old, now, advantages, mask = tokens
    checks.are_tensors(old_log_prob=old, log_prob=now, advantages=advantages, response_mask=mask)
    if weights is not None:
        checks.is_tensor("rollout_is_weights", weights)
    live = mask != 0
    info = dict(_given(config).global_batch_info)
    sequences = _sequences(mode, live, info)
    loss, metrics = policy_loss(
        now,
        old,
        advantages,
        kind=kind,
        mask=live,
        aggregation=_AGGREGATIONS[mode],
        num_tokens=info.get("batch_num_tokens"),
        num_sequences=sequences,
        dp_size=info.get("dp_size", 1),
        max_length=info.get("loss_scale_factor"),
        token_weights=weights,
        **knobs,
    )
    return loss, metrics, live


def _sequences(mode: str, live: Tensor, info: dict[str, Any]) -> Any:
    """How many sequences the mode divides by; an error where verl wants a global count and has none."""
    sequences, dp_size = info.get("global_batch_size"), info.get("dp_size", 1)
    missing = {"token-mean": "batch_num_tokens", "token-sum": "dp_size"}.get(mode, "global_batch_size")
    if dp_size > 1 and info.get(missing) is None:
        raise ValueError(f"{missing}: wanted the global count with dp_size={dp_size}, got None")
    if sequences is None and mode.startswith("seq-"):
        return live.any(-1).sum().to(torch.float32)  # verl leaves out sequences without a live token
    return sequences


def _share(chosen: Tensor, live: Tensor) -> Tensor:
    return (chosen & live).sum().float() / live.sum().clamp(min=1)


def _floats(clipped: Tensor, kl: Tensor, dual: Tensor | None = None) -> dict[str, float]:
    """verl's metrics, read back in one go."""
    values = [clipped.float(), kl.float(), *(() if dual is None else (dual,))]
    clip_fraction, mean_kl, *lower = torch.stack(values).tolist()
    return {
        "actor/pg_clipfrac": clip_fraction,
        "actor/ppo_kl": mean_kl,
        "actor/pg_clipfrac_lower": lower[0] if lower else 0.0,
    }
