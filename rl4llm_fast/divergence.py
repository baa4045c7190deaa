"""The exact KL divergence over the vocabulary, per token. Its sampled estimates are in kl.py."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import checks, dispatch, reference
from .autograd import KlDivergence, KlDivergenceOptions, LinearKlDivergence, LinearKlDivergenceOptions
from .checks import Number
from .heads import check_chunk, check_dtypes, check_linear, product_dtype
from .kl import Estimator, Gradient, kl_estimate
from .logprobs import check_temperature, flat_rows, linear_token_logprobs
from .tiles import chunk_rule

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
    wider = ref_logits if ref_logits.dtype == torch.float64 else logits  # fp64 on either side decides
    chosen = dispatch.choose("kl_divergence", wider, backend)
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


def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    *,
    direction: Direction = "reverse",
    beta: Number = 0.5,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    mask: Tensor | None = None,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
    grad_weight_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Exact KL divergence straight from hidden states: :func:`kl_divergence` of x Wᵀ + b against x' W'ᵀ + b'.

    Both sets of logits exist for one chunk of tokens at a time; the backward makes them anew and adds up dW and db in
    fp32, as in :func:`linear_token_logprobs`.

    Args:
        hidden, weight, bias: (..., D), (V, D), (V,) or None: the policy, differentiable.
        ref_hidden, ref_weight, ref_bias: (..., D'), (V, D'), (V,) or None: the reference, without gradient. D' may
            differ from D, and the dtypes from the policy's.
        direction, beta, temperature, softcap, mask, backend: as in :func:`kl_divergence`.
        chunk_tokens: tokens per chunk; None: both workspaces together as large as ``linear_token_logprobs``' one.
        logits_dtype, grad_weight_dtype: as in :func:`linear_token_logprobs`; the former of both sets of logits.

    Returns:
        (...), in nats; fp32, or fp64 where either side is fp64.

    Raises:
        As :func:`kl_divergence`; ValueError for shapes that do not fit, naming the argument.
    """
    compute_dtype, ref_compute_dtype = _check_heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    check_dtypes(compute_dtype, logits_dtype, grad_weight_dtype)
    check_dtypes(ref_compute_dtype, logits_dtype, None)
    chunk_tokens = check_chunk(chunk_tokens)
    beta_tensor = _check_direction(direction, beta, hidden)
    mask = checks.live_mask("mask", mask, hidden.shape[:-1], hidden, "hidden without D")
    tau = check_temperature(temperature, hidden)
    cap = None if softcap is None else checks.number("softcap", softcap, hidden, positive=True)
    chosen = dispatch.choose("linear_kl_divergence", hidden, backend)
    ref_hidden, ref_weight = ref_hidden.detach(), ref_weight.detach()
    ref_bias = None if ref_bias is None else ref_bias.detach()
    if chosen == "eager":
        logits = reference.project(hidden, weight, bias, mask, compute_dtype, logits_dtype)
        ref_logits = reference.project(ref_hidden, ref_weight, ref_bias, mask, ref_compute_dtype, logits_dtype)
        return reference.kl_divergence(logits, ref_logits, mask, tau, cap, direction, beta_tensor)
    asked = (logits_dtype, grad_weight_dtype)
    compute_dtype = product_dtype(compute_dtype, hidden, *asked)
    ref_compute_dtype = product_dtype(ref_compute_dtype, ref_hidden, *asked)
    wider = max(compute_dtype, ref_compute_dtype, key=lambda dtype: dtype.itemsize)
    options = LinearKlDivergenceOptions(
        backend=chosen,
        direction=direction,
        compute_dtype=compute_dtype,
        ref_compute_dtype=ref_compute_dtype,
        logits_dtype=logits_dtype,
        grad_weight_dtype=grad_weight_dtype,
        chunk_tokens=chunk_tokens or chunk_rule(2 * weight.shape[0], wider, hidden.device.type, logits_dtype),
    )
    kl: Tensor = LinearKlDivergence.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        ref_hidden.reshape(-1, ref_hidden.shape[-1]),
        ref_weight,
        ref_bias,
        *flat_rows(mask, tau),
        cap,
        beta_tensor,
        options,
    )
    return kl.reshape(hidden.shape[:-1])


def linear_kl_estimate(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    token_ids: Tensor,
    estimator: Estimator = "k3",
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    gradient: Gradient = "value",
    old_logp: Tensor | None = None,
    clamp: bool = False,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
    grad_weight_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sampled KL estimates straight from two pairs of hidden states and heads, without either set of logits.

    :func:`kl_estimate` of two :func:`linear_token_logprobs`, the reference's without gradient; arguments, results and
    errors are theirs (survey (83), (84), §6.4). ``mask`` is (...), one value a row; ids that are ``ignore_index`` are
    not live.
    """
    _check_heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    mask = checks.live_mask("mask", mask, hidden.shape[:-1], hidden, "hidden without D")
    settings: dict[str, Any] = {
        "temperature": temperature,
        "softcap": softcap,
        "mask": mask,
        "ignore_index": ignore_index,
        "chunk_tokens": chunk_tokens,
        "logits_dtype": logits_dtype,
        "grad_weight_dtype": grad_weight_dtype,
        "backend": backend,
    }
    logp = linear_token_logprobs(hidden, weight, token_ids, bias, **settings)
    with torch.no_grad():
        ref_logp = linear_token_logprobs(ref_hidden, ref_weight, token_ids, ref_bias, **settings)
    live = reference.live_ids(token_ids, mask, ignore_index)  # old_logp may hold anything at the others
    return kl_estimate(
        logp, ref_logp, estimator, gradient=gradient, old_logp=old_logp, clamp=clamp, mask=live, backend=backend
    )


def _check_heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
) -> tuple[torch.dtype, torch.dtype]:
    """Validate the policy's and the reference's factors; the dtypes in which their products run."""
    compute_dtype = check_linear(hidden, weight, bias)
    ref_compute_dtype = check_linear(ref_hidden, ref_weight, ref_bias, prefix="ref_")
    checks.has_shape("ref_hidden", ref_hidden[..., 0], hidden.shape[:-1], "hidden, up to D")
    checks.same_device("ref_hidden", ref_hidden, hidden, "hidden")
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(f"ref_weight: wanted the {weight.shape[0]} rows of weight, got {checks.shape(ref_weight)}")
    return compute_dtype, ref_compute_dtype


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
