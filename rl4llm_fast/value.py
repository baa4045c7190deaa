"""The losses beside the policy's: of the value function, and of supervised tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, dispatch, formulas, reference_losses, reference_returns, weights
from .autograd_losses import PolicyLoss, PolicyLossOptions
from .checks import Number
from .kl import check_like
from .losses import aggregation_weights, check_counts, pack_params, policy_loss
from .schemas import accumulation_dtype
from .sequences import sequences


def value_loss(
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: Number | None = None,
    half: bool = True,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    aggregation: str = "token_mean",
    num_tokens: Number | None = None,
    num_sequences: Number | None = None,
    dp_size: Number = 1,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Squared error of the value function, optionally clipped (survey (5), (11), (12); Schulman et al. 2017).

    .. math::
        L = \sum_t w_t\,\ell_t, \qquad
        \ell_t = \tfrac12 \max\big((V_t - R_t)^2, (\mathrm{clip}(V_t, V^{old}_t \pm \varepsilon) - R_t)^2\big)

    without the second square where nothing is clipped. At V = V_old ± ε the gradient is the full one.
    The unified objective of PPO (33) is ``policy_loss(..., entropy=H, entropy_coef=c2)[0] + c1 * value_loss(...)[0]``,
    with ``half=False`` for (12)'s squares.

    Args:
        values: V, (B, T), or packed (N,) with ``cu_seqlens``; fp32, bf16, fp16; fp64 on the eager and CPU backends.
            Differentiable.
        returns: R, the targets, like ``values``. No gradient.
        old_values: V_old, like ``values``, for ``clip``. No gradient.
        clip: ε; None: no clipping.
        half: whether the squares are halved, as trainers do; (12) has them whole.
        mask, cu_seqlens, aggregation, num_tokens, num_sequences, dp_size: as in :func:`policy_loss`.
        backend: "eager", "cpu", "triton" or "cuda"; None chooses by device.

    Returns:
        The loss, 0-d in fp32 (fp64 for fp64 input; like ``values`` for aggregation "none"), and as 0-d tensors over
        live tokens, made without a synchronisation: clip_fraction, the share of tokens whose clipped square is the
        larger one (0 without ``clip``), and explained_variance, 1 − Var(R − V)/Var(R), 0 where the returns do not vary.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; ``clip`` without ``old_values`` or the other way round.
        BackendError: a backend asked for by name cannot run here.
    """
    checks.is_float("values", values)
    layout = sequences(values, cu_seqlens, "values")
    checks.choice("aggregation", aggregation, weights.NAMES)
    checks.is_tensor("returns", returns)
    for name, tensor in (("returns", returns), ("old_values", old_values)):
        check_like(name, tensor, values, "values")
    if (clip is None) != (old_values is None):
        missing = "clip" if clip is None else "old_values"
        raise ValueError(f"{missing}: clip and old_values want each other, got None")
    checks.in_range("clip", clip, 0.0, strict=True)
    half = checks.flag("half", half)
    check_counts(num_tokens=num_tokens, num_sequences=num_sequences, dp_size=dp_size)
    if not layout.known and aggregation.startswith("seq_"):
        raise ValueError(f"cu_seqlens: wanted with packed (N,) tokens for aggregation={aggregation!r}")
    mask = checks.live_mask("mask", mask, values.shape, values, "values")
    chosen = dispatch.choose("value_loss", values, backend)
    dtype = accumulation_dtype(values.dtype)

    def rows(tensor: Tensor) -> Tensor:
        return layout.as_rows(tensor.to(dtype)).contiguous()

    now, target, live = (
        rows(values),
        rows(returns.detach()),
        None if mask is None else layout.as_rows(mask).contiguous(),
    )
    old = None if old_values is None else rows(old_values.detach())
    how, weight = aggregation, None
    if layout.packed and aggregation.startswith("seq_"):
        weight, how = aggregation_weights(aggregation, layout, live, now, num_tokens, num_sequences, None), "token_sum"
    scale = 0.5 if half else 1.0
    formula = "value_mse" if clip is None else "value_clipped"
    params = pack_params(
        now,
        {
            "num_tokens": -1.0 if num_tokens is None else num_tokens,
            "num_sequences": float(layout.count) if num_sequences is None else num_sequences,
            "max_length": float(layout.rows[1]),
            "dp_size": dp_size,
            "kl_coef": 0.0,
            "entropy_coef": 0.0,
            "scale": scale,
            **({} if clip is None else {"clip": clip}),
        },
    )
    if chosen == "eager":
        arguments = (now, old, target, None, None, live, None, weight, None, params, formula, "", how)
        loss, vector = reference_losses.policy_loss(*arguments)
    else:
        options = PolicyLossOptions(chosen, formula, "", how, "", False)
        loss, vector = PolicyLoss.apply(  # type: ignore[no-untyped-call]
            now, None, old, target, None, live, None, weight, None, None, params, options
        )
    loss = loss.reshape(values.shape) if aggregation == "none" else loss
    clip_fraction = vector[formulas.METRICS.index("clip_fraction")]
    return loss, {
        "clip_fraction": clip_fraction,
        "explained_variance": _explained_variance(now.detach(), target, live, backend),
    }


def _explained_variance(values: Tensor, returns: Tensor, live: Tensor | None, backend: str | None) -> Tensor:
    """1 − Var(R − V)/Var(R), from the sums that whiten takes."""
    chosen = dispatch.choose("whiten", values, "eager" if backend == "eager" else None)
    stats = reference_returns.whiten_stats if chosen == "eager" else dispatch.ops(chosen).whiten_stats
    with torch.no_grad():
        total, left = (stats(returns, live, minus)[2] for minus in (None, values))
        return torch.where(total > 0, 1.0 - left / total, 0.0).to(values.dtype)


def sft_loss(
    logp: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    aggregation: str = "token_mean",
    num_tokens: Number | None = None,
    num_sequences: Number | None = None,
    dp_size: Number = 1,
    backend: str | None = None,
) -> Tensor:
    """Supervised loss −Σ w_t·logp_t (survey (3)): ``policy_loss`` of kind pg with an advantage of 1.

    PPO-ptx (14; Ouyang et al. 2022, eq. 2) adds it on a batch of the pre-training data:
    ``policy_loss(...)[0] + lam * sft_loss(logp_of_pretraining_tokens)``.

    Args:
        logp: log-probabilities of the tokens to learn, (B, T), or packed (N,) with ``cu_seqlens``. Differentiable.
        mask, cu_seqlens, aggregation, num_tokens, num_sequences, dp_size: as in :func:`policy_loss`.
        backend: "eager", "cpu", "triton" or "cuda"; None chooses by device.

    Returns:
        The loss, 0-d in fp32 (fp64 for fp64 input); like ``logp`` for aggregation "none".

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
        BackendError: a backend asked for by name cannot run here.
    """
    checks.is_float("logp", logp)
    loss, _ = policy_loss(
        logp,
        None,
        torch.ones_like(logp.detach()),
        kind="pg",
        mask=mask,
        cu_seqlens=cu_seqlens,
        aggregation=aggregation,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        dp_size=dp_size,
        backend=backend,
    )
    return loss
