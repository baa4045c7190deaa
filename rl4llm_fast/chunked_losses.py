"""A token-level policy loss from hidden states, its gradient made in the forward pass (see chunked.py).

For each chunk of tokens the logits are made once, in a workspace that is used again, reduced to log-probabilities and
entropies, turned by the loss formula into dL/dlogp and dL/dH, overwritten with dlogits and multiplied into dx and dW:
three matrix products, where a forward and a backward of their own take four. What a token weighs in the loss depends
on the mask only, so it is known before the first chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import schemas
from .chunked import Gradients, Rows, cast, check_ids, chunks_of, live_rows, project, scatter, select_live

IGNORED = -100  # as an id: the token is not live


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
    chunk_tokens: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    total, vocabulary = hidden.shape[0], weight.shape[0]
    live = live_rows(token_ids, mask, IGNORED)
    check_ids(token_ids, live, IGNORED, vocabulary)
    rows, index = select_live(Rows(hidden, token_ids, mask, temperature), live)
    x, w, b = cast(compute_dtype, rows.hidden, weight, bias)
    assert x is not None
    assert w is not None
    rows = rows._replace(hidden=x)
    tokens = [t if t is None or index is None else t[index] for t in (old, advantages, ref, omega, token_weights)]
    count = x.shape[0]
    acc = schemas.accumulation_dtype(compute_dtype)
    logp = x.new_empty(count, dtype=acc)
    entropy = x.new_empty(count if with_entropy else 0, dtype=acc)
    gradients = Gradients(x, w, weight.dtype, bias, -(-count // chunk_tokens), need_hidden, need_weight, need_bias)
    workspace = x.new_empty((min(chunk_tokens, count), vocabulary))
    for part, chunk in chunks_of(rows, chunk_tokens):
        logits = project(chunk.hidden, w, b, workspace[: chunk.hidden.shape[0]]).unsqueeze(0)
        per_row = (chunk.token_ids, chunk.mask, chunk.temperature, softcap, IGNORED)
        chunk_logp, chunk_entropy, row_max, log_sum = kernels.token_logprobs_fwd(logits, *per_row, with_entropy)
        logp[part] = chunk_logp
        if with_entropy:
            entropy[part] = chunk_entropy
        if not (need_hidden or need_weight or need_bias):
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
    return gradient * grad.to(schemas.accumulation_dtype(gradient.dtype))


def register(library: torch.library.Library, namespace: str) -> None:
    """Implement the losses from hidden states of one namespace over that namespace's own streaming kernels."""
    kernels = getattr(torch.ops, namespace)

    def policy_loss(*args: Any) -> tuple[Tensor, ...]:
        return _policy_loss(kernels, *args)

    for key in ("CPU", "CUDA"):
        library.impl("linear_policy_loss_fwd", policy_loss, key)
        library.impl("scaled_gradient", _scaled, key)
