"""The exact KL divergence over the vocabulary, per token. Its sampled estimates are in kl.py."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from . import checks, dispatch, reference
from .autograd import KlDivergence, KlDivergenceOptions
from .checks import Number
from .logprobs import check_temperature, flat_rows

Direction = Literal["reverse", "forward", "jsd"]


def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    direction: Direction = "reverse",
    beta: Number = 0.5,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Exact KL divergence of two distributions over the vocabulary, per token, in one pass over both sets of logits.

    .. math::
        \text{reverse: } KL(p\|q) = \sum_v p_v(\log p_v - \log q_v), \qquad \text{forward: } KL(q\|p)

        \text{jsd: } \beta\,KL(q\|m) + (1-\beta)\,KL(p\|m), \quad m = \beta q + (1-\beta) p

    with p from ``logits`` and q from ``ref_logits``, both through soft-cap and temperature. The reverse KL is the
    constraint of RLHF and TRPO (survey (7), (9)); the generalised JSD is that of Agarwal et al. 2024 (GKD). The
    gradients are explicit: :math:`p_v((\log p_v - \log q_v) - KL)`, :math:`p_v - q_v`, and
    :math:`(1-\beta)p_v(\log(p_v/m_v) - KL(p\|m))`.

    Args:
        logits: (..., V), fp32, bf16, fp16; fp64 on the eager and CPU backends. Any strides. Differentiable.
        ref_logits: the same shape, possibly another dtype. Gets no gradient.
        direction: "reverse", "forward" or "jsd".
        beta: β of the JSD, in (0, 1), a number or a 0-d tensor; not looked at otherwise. At 0 and 1 the JSD is
            identically 0 (TRL and Liger return the forward and the reverse KL there: ask for those by name).
        temperature, softcap, mask, backend: as in :func:`token_logprobs`.

    Returns:
        (...), in nats; fp32, or fp64 where either input is fp64.

    A token that the leading distribution cannot draw contributes 0; one that only the other cannot draw makes the
    reverse or forward KL +inf. A logit of −inf gets gradient 0. Rows that are not live give 0 and a zero gradient.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, direction; β outside (0, 1); temperature <= 0.
    """
    checks.is_float("logits", logits)
    checks.is_float("ref_logits", ref_logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: wanted (..., V) with V of at least 1, got {checks.shape(logits)}")
    checks.has_shape("ref_logits", ref_logits, logits.shape, "logits")
    checks.same_device("ref_logits", ref_logits, logits, "logits")
    weight = _check_direction(direction, beta, logits)
    mask = checks.live_mask("mask", mask, logits.shape[:-1], logits, "logits without V")
    tau = check_temperature(temperature, logits)
    cap = None if softcap is None else checks.number("softcap", softcap, logits, positive=True)
    chosen = dispatch.choose("kl_divergence", logits, backend)
    if chosen == "eager":
        return reference.kl_divergence(logits, ref_logits, mask, tau, cap, direction, weight)
    kl: Tensor = KlDivergence.apply(  # type: ignore[no-untyped-call]
        checks.as_rows(logits),
        checks.as_rows(ref_logits.detach()),
        *flat_rows(mask, tau),
        cap,
        weight,
        KlDivergenceOptions(chosen, direction),
    )
    return kl.reshape(logits.shape[:-1])


def _check_direction(direction: str, beta: Number, like: Tensor) -> Tensor:
    """β as a 0-d tensor, checked where that costs no synchronisation."""
    checks.choice("direction", direction, ("reverse", "forward", "jsd"))
    weight = checks.number("beta", beta, like)
    if direction != "jsd" or (weight.device.type != "cpu" and not checks.debug()):
        return weight
    inside = bool(0 < weight < 1) if not torch.compiler.is_compiling() else isinstance(beta, Tensor) or 0 < beta < 1
    if not inside:
        raise ValueError(f"beta: wanted a number in (0, 1), got {beta}; the JSD is identically 0 at the ends")
    return weight
