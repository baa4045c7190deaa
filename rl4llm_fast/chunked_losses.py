"""A token-level policy loss from hidden states, its gradient made in the forward pass (see chunked.py).

For each chunk of tokens the logits are made once, in a workspace that is used again, reduced to log-probabilities and
entropies, turned by the loss formula into dL/dlogp and dL/dH, overwritten with dlogits and multiplied into dx and dW:
three matrix products, where a forward and a backward of their own take four. What a token weighs in the loss depends
on the mask only, so it is known before the first chunk.

A loss that looks at whole sequences, or pairs of them, is made the same way where each fits a chunk: its gradient
towards one of them depends on that one's log-probabilities and on masks. Elsewhere it takes two passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference, schemas
from .chunked import Rows, chunks_of, live_rows, select_live
from .products import Gradients, Projection, cast, large_empty, scatter

IGNORED = -100  # as an id: the token is not live
_BLOCK = 2**24  # elements that are widened at a time


def _policy_loss(
    kernels: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    old: Tensor | None,
    advantages: Tensor,
    ref: Tensor | None,
    omega: Tensor | None,
    token_weights: Tensor,
    params: Tensor,
    formula: str,
    kl: str,
    correction: str,
    with_entropy: bool,
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype | None,
    grad_weight_dtype: torch.dtype | None,
    chunk_tokens: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    total, vocabulary = hidden.shape[0], weight.shape[0]
    live = live_rows(token_ids, mask, IGNORED)
    reference.check_token_ids(token_ids, live, IGNORED, vocabulary)
    rows, index = select_live(Rows(hidden, token_ids, mask, temperature), live)
    x, w, b = cast(compute_dtype, rows.hidden, weight, bias)
    rows = rows._replace(hidden=x)
    tokens = [t if t is None or index is None else t[index] for t in (old, advantages, ref, omega, token_weights)]
    count = x.shape[0]
    acc = schemas.accumulation_dtype(compute_dtype)
    logp = x.new_empty(count, dtype=acc)
    entropy = x.new_empty(count if with_entropy else 0, dtype=acc)
    dtypes, needs = (weight.dtype, grad_weight_dtype), (need_hidden, need_weight, need_bias)
    gradients = Gradients(x, w, bias, *dtypes, -(-count // chunk_tokens), *needs)
    project = Projection(w, b, logits_dtype or compute_dtype)
    workspace = large_empty(x, (min(chunk_tokens, count), vocabulary), logits_dtype or compute_dtype)
    for part, chunk in chunks_of(rows, chunk_tokens):
        logits = project(chunk.hidden, workspace[: chunk.hidden.shape[0]]).unsqueeze(0)
        per_row = (chunk.token_ids, chunk.mask, chunk.temperature, softcap, IGNORED)
        chunk_logp, chunk_entropy, row_max, log_sum = kernels.token_logprobs_fwd(logits, *per_row, with_entropy)
        logp[part] = chunk_logp
        if with_entropy:
            entropy[part] = chunk_entropy
        if not any(needs):
            continue
        old_c, adv_c, ref_c, omega_c, weight_c = (None if t is None else t[part] for t in tokens)
        grad_logp, grad_entropy = _policy_gradients(
            kernels,
            (chunk_logp, chunk_entropy if with_entropy else None, old_c, adv_c, ref_c, chunk.mask, omega_c, weight_c),
            params,
            formula,
            kl,
            correction,
        )
        saved_entropy = chunk_entropy if with_entropy else None
        kernels.token_logprobs_bwd_(logits, *per_row, row_max, log_sum, saved_entropy, grad_logp, grad_entropy)
        gradients.add(part, logits[0])
    return (
        scatter(logp, index, total),
        scatter(entropy, index, total) if with_entropy else entropy,
        *gradients.result(index, hidden),
    )


class Units(NamedTuple):
    """Tokens in chunks that cut no unit (a sequence, or a pair of answers)."""

    order: Tensor | None  # which tokens are looked at, unit behind unit; None: all, as they stand
    parts: list[slice]  # of ``order``


def whole_units(unit: Tensor | None, counts: Sequence[int], live: Tensor, chunk_tokens: int) -> Units | None:
    """Chunks of at most ``chunk_tokens`` tokens that cut no unit; None where one is longer than that.

    Consecutive units are put together while they fit, so that a chunk is half full at least, on average.

    Args:
        unit: (N,), each token's unit; None: ascending by blocks of ``counts``.
        counts: tokens of each unit, those included that are not live. On a CPU these are dropped.
        live: (N,) bool.
    """
    order = None if unit is None else torch.argsort(unit, stable=True)
    if live.device.type == "cpu" and not bool(live.all()):
        if unit is None:
            lengths = torch.tensor(counts, dtype=torch.long, device="cpu")
            unit = torch.arange(len(counts), device="cpu").repeat_interleave(lengths)
        counts = torch.bincount(unit[live], minlength=len(counts)).tolist()
        order = live.nonzero().squeeze(-1) if order is None else order[live[order]]
    parts, start, end = [], 0, 0
    for count in counts:
        if count > chunk_tokens:
            return None
        if end + count - start > chunk_tokens:
            parts.append(slice(start, end))
            start = end
        end += count
    return Units(order, [*parts, slice(start, end)] if end > start else parts)


Slopes = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def loss_of_units(
    kernels: Any,
    rows: Rows,
    weight: Tensor,
    bias: Tensor | None,
    softcap: Tensor | None,
    units: Units,
    slopes: Slopes,
    with_entropy: bool,
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype | None,
    grad_weight_dtype: torch.dtype | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """logp and entropy (N,), dx, dW and db of a loss of whole units, in three products.

    ``slopes(logp, entropy)`` gives dL/dlogp and dL/dH (N,), right for every unit whose numbers are there already;
    those of later ones are still 0.
    """
    hidden, order = rows.hidden, units.order
    live = live_rows(rows.token_ids, rows.mask, IGNORED)
    reference.check_token_ids(rows.token_ids, live, IGNORED, weight.shape[0])
    logp = hidden.new_zeros(hidden.shape[0], dtype=schemas.accumulation_dtype(compute_dtype))
    entropy = torch.zeros_like(logp) if with_entropy else None
    dropped = hidden.device.type == "cpu"
    taken = rows._replace(hidden=hidden if dropped else hidden.masked_fill(~live.unsqueeze(-1), 0))
    if order is not None:
        tau = rows.temperature[order] if rows.temperature.dim() else rows.temperature
        mask = None if dropped or rows.mask is None else rows.mask[order]
        taken = Rows(taken.hidden[order], rows.token_ids[order], mask, tau)
    x, w, b = cast(compute_dtype, taken.hidden, weight, bias)
    gradients = Gradients(x, w, bias, weight.dtype, grad_weight_dtype, len(units.parts), *needs)
    project = Projection(w, b, logits_dtype or compute_dtype)
    longest = max((part.stop - part.start for part in units.parts), default=0)
    workspace = large_empty(x, (longest, weight.shape[0]), logits_dtype or compute_dtype)
    for part in units.parts:
        place: Any = part if order is None else order[part]
        tau = taken.temperature[part] if taken.temperature.dim() else taken.temperature
        per_row = (taken.token_ids[part], None if taken.mask is None else taken.mask[part], tau, softcap, IGNORED)
        logits = project(x[part], workspace[: part.stop - part.start]).unsqueeze(0)
        chunk_logp, chunk_entropy, *saved = kernels.token_logprobs_fwd(logits, *per_row, with_entropy)
        logp[place] = chunk_logp
        if entropy is not None:
            entropy[place] = chunk_entropy
        grad_logp, grad_entropy = slopes(logp, entropy)
        upstream = (grad_logp[place].contiguous(), None if grad_entropy is None else grad_entropy[place].contiguous())
        kernels.token_logprobs_bwd_(logits, *per_row, *saved, chunk_entropy if with_entropy else None, *upstream)
        gradients.add(part, logits[0])
    return logp, entropy, *gradients.result(order, hidden)


def _policy_gradients(
    kernels: Any, tokens: tuple[Tensor | None, ...], params: Tensor, formula: str, kl: str, correction: str
) -> tuple[Tensor, Tensor | None]:
    """dL/dlogp and dL/dH (N,) of Σ w_t ℓ_t, from a backend's kernels; None for the latter without entropies.

    ``tokens``: logp, entropy, old, advantages, ref, mask, policy weights ω (with a ``correction`` the sampler's
    log-probabilities) and token weights w, each (N,) or None.
    """
    rows = [None if t is None else t.unsqueeze(0).contiguous() for t in tokens]
    logp, entropy, old, advantages, ref, mask, omega, weights = rows
    _, dlogp, dentropy, scale, _ = kernels.policy_loss_fwd(
        logp, old, advantages, ref, entropy, mask, omega, weights, None, params, formula, kl, "token_sum", correction,
        entropy is not None,
    )  # fmt: skip
    one = torch.ones_like(scale[0])
    grad_logp, grad_entropy = kernels.token_loss_bwd(one, logp, entropy, scale, dlogp, dentropy)
    return grad_logp[0], None if entropy is None else grad_entropy[0]


def _scaled(grad: Tensor, factor: Tensor, gradient: Tensor) -> Tensor:
    result = torch.empty_like(gradient)
    scale(gradient, grad, result)
    return result


def _scale_in_place(gradient: Tensor, grad: Tensor) -> None:
    scale(gradient, grad, gradient)


def scale(gradient: Tensor, grad: Tensor, out: Tensor) -> None:
    """gradient·grad, rounded once; all are contiguous but grad, which is 0-d."""
    factor = grad.to(schemas.accumulation_dtype(gradient.dtype))
    if gradient.device.type == "cpu" and not math.isfinite(grad.item()):  # not 0·∞ at tokens that are not live
        torch.where(gradient == 0, gradient, (gradient * factor).to(gradient.dtype), out=out)
    elif gradient.device.type == "cpu" or factor.dtype == gradient.dtype:
        torch.mul(gradient, factor, out=out)
    else:
        scale_blocks(gradient, factor, out)


def scale_blocks(gradient: Tensor, factor: Tensor, out: Tensor) -> None:
    """The same where a 0-d factor would be rounded to 16 bits first, as on a GPU: a vector of one makes it fp32."""
    for part, result in zip(gradient.view(-1).split(_BLOCK), out.view(-1).split(_BLOCK), strict=True):
        result.copy_(part * factor.reshape(1))


def register(library: torch.library.Library, namespace: str) -> None:
    """Implement the losses from hidden states of one namespace over that namespace's own streaming kernels."""
    kernels = getattr(torch.ops, namespace)

    def policy_loss(*args: Any) -> tuple[Tensor, ...]:
        return _policy_loss(kernels, *args)

    for key in ("CPU", "CUDA"):
        library.impl("linear_policy_loss_fwd", policy_loss, key)
        library.impl("scaled_gradient", _scaled, key)
        if namespace == schemas.NAMESPACE:  # Triton's kernel leaves at once where the factor is 1
            library.impl("scale_gradient_", _scale_in_place, key)
