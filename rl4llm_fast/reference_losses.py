"""The eager backend of the token losses: the formulas on tensors, plain reductions, autograd. The oracle of the others.

Takes the same prepared arguments as the ops (``schemas``), in fp64 too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, formulas, weights
from .formulas import EagerMaths


def kl_estimate(logp: Tensor, ref: Tensor, old: Tensor | None, mask: Tensor | None, variant: str) -> Tensor:
    """docs/math.md section 3, "sampled estimators", on tensors of one shape."""
    live = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    logp, ref = _select(live, logp), _select(live, ref)
    old = logp.detach() if old is None else _select(live, old)
    kl: Tensor = formulas.kl_estimate(EagerMaths, logp, ref, old, **dict(formulas.kl_variants())[variant])
    return _select(live, kl)


def importance_weights(log_omega: Tensor, correction: str, cap: Tensor, floor: Tensor) -> Tensor:
    """ω of docs/math.md section 5, "sampler mismatch": "truncate" min(ω, cap), "mask" 0 outside [floor, cap]."""
    bounds = (bound.to(log_omega.dtype) for bound in (cap, floor))
    omega: Tensor = formulas.CORRECTIONS[correction](EagerMaths, log_omega, *bounds)
    return omega


def policy_loss(
    logp: Tensor,
    old: Tensor | None,
    advantages: Tensor,
    ref: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor | None,
    policy_weights: Tensor | None,
    token_weights: Tensor | None,
    log_s: Tensor | None,
    params: Tensor,
    formula: str,
    kl: str,
    aggregation: str,
    correction: str = "",
) -> tuple[Tensor, Tensor]:
    """docs/math.md section 5 on (B, T): the loss, and the metrics in the order of ``formulas.METRICS``."""
    live = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    if params.device == logp.device or torch.compiler.is_compiling() or checks.without_contents():
        values = params.to(logp.device, logp.dtype).unbind()
    else:  # fills, where a copy would wait for the GPU
        values = tuple(torch.full((), v, dtype=logp.dtype, device=logp.device) for v in params.tolist())
    param = dict(zip(formulas.PARAMS, values, strict=False))
    function = formulas.FORMULAS[formula]
    knobs = values[len(formulas.PARAMS) :][: len(function.knobs)]

    # Selected out before anything is computed with it, so that NaN in a dead token reaches no gradient either.
    logp = _select(live, logp)
    old = logp.detach() if old is None else _select(live, old)
    adv = _select(live, advantages)
    loss, ratio, clipped_low, clipped_high, k1, k3 = formulas.policy_token(
        EagerMaths,
        logp,
        old,
        None if ref is None else _select(live, ref),
        adv,
        None if log_s is None else _select(live, log_s),
        *knobs,
        formula=function,
    )
    if policy_weights is not None:
        omega = _select(live, policy_weights)
        if correction:
            omega = importance_weights(old - omega, correction, param["rollout_cap"], param["rollout_floor"])
        loss = loss * omega.detach()
    divergence = torch.zeros_like(logp)
    if ref is not None and kl:
        divergence = kl_estimate(logp, ref, old, live, kl)
        # An estimate that overflowed must not become NaN where it is only a metric.
        loss = loss + torch.where(param["kl_coef"] != 0, param["kl_coef"] * divergence, 0.0)
    uncertainty = torch.zeros_like(logp) if entropy is None else _select(live, entropy)
    if entropy is not None:
        loss = loss - torch.where(param["entropy_coef"] != 0, param["entropy_coef"] * uncertainty, 0.0)
    loss = _select(live, loss)
    if token_weights is not None:
        loss = loss * _select(live, token_weights)

    count = live.sum().to(logp.dtype)
    if aggregation == "none":
        result = loss * param["dp_size"]
    else:
        num_tokens = torch.where(param["num_tokens"] >= 0, param["num_tokens"], count)
        weight = weights.AGGREGATIONS[aggregation](
            EagerMaths,
            live.sum(-1, keepdim=True).to(logp.dtype),
            num_tokens,
            param["num_sequences"],
            param["max_length"],
        )
        result = (loss * (weight * param["dp_size"])).sum()

    with torch.no_grad():

        def mean(value: Tensor | float) -> Tensor:
            return torch.where(live, value, 0.0).to(logp.dtype).sum() / count.clamp(min=1)

        low, high = mean(clipped_low), mean(clipped_high)
        some = count > 0
        if logp.numel():
            least = torch.where(live, ratio, torch.inf).min()
            most = torch.where(live, ratio, -torch.inf).max()
        else:
            least = most = torch.ones_like(count)
        ratios = (torch.where(some, value, 1.0) for value in (mean(ratio), least, most))
        metrics = torch.stack([low + high, low, high, *ratios, mean(k1), mean(k3), mean(divergence), mean(uncertainty)])
    return result, metrics


def _select(live: Tensor, value: Tensor) -> Tensor:
    return torch.where(live, value, torch.zeros((), dtype=value.dtype, device=value.device))
