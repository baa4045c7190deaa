"""The eager backend: plain PyTorch, no cleverness. Everything else is tested against this, in fp64.

The functions take validated arguments (``rl4llm_fast.logprobs`` and friends validate) and let autograd make the
gradients, so that the explicit backward passes elsewhere are checked against a derivation that nobody wrote by hand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks
from .schemas import accumulation_dtype


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """docs/math.md section 1 on logits (..., V) and ids (...) or (..., K): logp like the ids, entropy (...)."""
    one_id = token_ids.dim() == logits.dim() - 1
    vocabulary = logits.shape[-1]
    ids = (token_ids.unsqueeze(-1) if one_id else token_ids).long()

    live = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if mask is None else mask
    if one_id:
        live = live & (token_ids != ignore_index)
    check_token_ids(token_ids, live, ignore_index, vocabulary)
    ids_live = live_ids(ids, live, ignore_index)
    invalid = _outside(ids, ids_live, vocabulary)
    ids = ids.masked_fill(~ids_live | invalid, 0)

    shifted, log_sum = _shifted_log_softmax(logits, live, temperature, softcap)
    logp = shifted.gather(-1, ids) - log_sum if vocabulary else shifted.new_zeros(ids.shape)
    nothing = torch.zeros((), dtype=logp.dtype, device=logp.device)
    bad_row = invalid.any(-1, keepdim=True)
    logp = torch.where(ids_live, torch.where(bad_row, math.nan, logp), nothing)
    logp = logp.squeeze(-1) if one_id else logp
    if not return_entropy:
        return logp, None

    weight = shifted.exp()
    mean = (weight * shifted.masked_fill(shifted == -math.inf, 0.0)).sum(-1) / weight.sum(-1)
    entropy = log_sum.squeeze(-1) - mean
    return logp, torch.where(live, torch.where(bad_row.squeeze(-1), math.nan, entropy), nothing)


def project(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    live: Tensor | None,
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype | None,
) -> Tensor:
    """Logits x Wᵀ + b; rows that are not live count as 0, so that a NaN in them does not reach dW as 0·NaN."""
    if live is not None:
        hidden = hidden.masked_fill(~live.unsqueeze(-1), 0.0)
    if logits_dtype in (None, compute_dtype):
        return torch.nn.functional.linear(hidden, weight, bias)
    # The sums of compute_dtype's products as they are: products of two bf16 numbers are exact in fp32.
    with torch.autocast(hidden.device.type, enabled=False):
        x, w = (t.to(compute_dtype).to(logits_dtype) for t in (hidden, weight))
        return torch.nn.functional.linear(x, w, None if bias is None else bias.to(compute_dtype).to(logits_dtype))


def live_rows(token_ids: Tensor, rows: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor | None:
    """Which rows (...) count: the mask, and with one id a row also ignore_index; None: all."""
    if token_ids.dim() == rows.dim():
        return mask
    kept = token_ids != ignore_index
    return kept if mask is None else kept & mask


def _shifted_log_softmax(
    logits: Tensor, live: Tensor, temperature: Tensor, softcap: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(u − m, log s) of docs/math.md section 1; −inf logits and whole rows that are not live never touch the graph."""
    acc = accumulation_dtype(logits.dtype)
    z = logits.to(acc)
    hidden = (z == -math.inf) | ~live.unsqueeze(-1)
    z = z.masked_fill(hidden, 0.0)
    if softcap is not None:
        cap = softcap.to(z.dtype)
        z = z + torch.zeros_like(z).masked_fill(z == math.inf, math.nan)  # tanh would turn +inf into a number
        z = cap * torch.tanh(z / cap)
    tau = temperature.to(z.dtype)  # a number stays on the host, where it waits for no copy
    tau = torch.where(tau > 0, tau, math.nan)
    u = z / (tau.unsqueeze(-1) if tau.dim() else tau)
    u = u.masked_fill(hidden, -math.inf)
    shifted = u - u.detach().amax(-1, keepdim=True) if u.shape[-1] else u
    return shifted, shifted.exp().sum(-1, keepdim=True).log()


def kl_divergence(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    direction: str,
    beta: Tensor,
) -> Tensor:
    """docs/math.md section 3, exact KL of two sets of logits (..., V): (...)."""
    live = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if mask is None else mask
    acc = torch.promote_types(accumulation_dtype(logits.dtype), accumulation_dtype(ref_logits.dtype))
    shifted, log_sum = _shifted_log_softmax(logits.to(acc), live, temperature, softcap)
    log_p = shifted - log_sum
    shifted, log_sum = _shifted_log_softmax(ref_logits.detach().to(acc), live, temperature, softcap)
    log_q = shifted - log_sum
    if direction == "reverse":
        terms = _relative_entropy_terms(log_p, log_q)
    elif direction == "forward":
        terms = _relative_entropy_terms(log_q, log_p)
    else:
        weight = beta.to(log_p.dtype)
        log_m = torch.logaddexp(weight.log() + log_q, (1 - weight).log() + _without_gradient_at_minus_inf(log_p))
        terms = weight * _relative_entropy_terms(log_q, log_m) + (1 - weight) * _relative_entropy_terms(log_p, log_m)
    return torch.where(live, terms.sum(-1), torch.zeros((), dtype=acc, device=logits.device))


def _relative_entropy_terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    """a·(log a − log b); 0 where a is 0, +inf where b is 0 and a is not."""
    impossible = log_a == -math.inf
    log_a = log_a.masked_fill(impossible, 0.0)
    log_b = log_b.masked_fill(impossible, 0.0)
    terms = log_a.exp() * (log_a - log_b)
    terms = torch.where((log_b == -math.inf) & terms.isnan() & ~log_a.isnan(), math.inf, terms)  # a underflowed
    return terms.masked_fill(impossible, 0.0)


def _without_gradient_at_minus_inf(log_p: Tensor) -> Tensor:
    impossible = log_p == -math.inf
    return log_p.masked_fill(impossible, 0.0).masked_fill(impossible, -math.inf)


def live_ids(token_ids: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    """Which ids (...) or (..., K) count, from the mask (...) of their rows."""
    kept = token_ids != ignore_index
    if mask is None:
        return kept
    return kept & (mask if mask.dim() == token_ids.dim() else mask.unsqueeze(-1))


def _outside(token_ids: Tensor, live: Tensor, vocabulary: int) -> Tensor:
    return live & ((token_ids < 0) | (token_ids >= vocabulary))


def check_token_ids(token_ids: Tensor, mask: Tensor | None, ignore_index: int, vocabulary: int) -> None:
    """IndexError for the first live id outside [0, V): always on the CPU; elsewhere it would cost a synchronisation."""
    if checks.unseen(token_ids):
        return
    invalid = _outside(token_ids, live_ids(token_ids, mask, ignore_index), vocabulary)
    if bool(invalid.any()):
        position = tuple(invalid.nonzero()[0].tolist())
        raise IndexError(
            f"token_ids: {int(token_ids[position])} at position {position} is outside the vocabulary [0, {vocabulary})"
        )


def group_advantages(
    rewards: Tensor, group_ids: Tensor | None, group_size: int, scale: str, baseline: str, unbiased: bool, eps: Tensor
) -> Tensor:
    """docs/math.md section 4, "group" rows, on rewards (B,)."""
    r = rewards.to(accumulation_dtype(rewards.dtype))
    if r.numel() == 0:
        return r
    if group_ids is None:
        group = torch.arange(r.numel(), device=r.device) // group_size
    else:
        group = torch.unique(group_ids, return_inverse=True)[1]
    groups = int(group.max()) + 1

    wide = r.double()
    size = torch.zeros(groups, dtype=wide.dtype, device=r.device).index_add_(0, group, torch.ones_like(wide))
    mean = torch.zeros_like(size).index_add_(0, group, wide) / size
    centred = wide - mean[group]
    low = torch.full_like(size, math.inf).scatter_reduce_(0, group, wide, "amin")
    high = torch.full_like(size, -math.inf).scatter_reduce_(0, group, wide, "amax")
    # The mean of equal floats need not equal them: without the test their advantages would be rounding noise / eps.
    constant = (low == high)[group] | (size == 1)[group]

    advantages = centred
    if baseline == "leave_one_out":
        advantages = centred * (size / (size - 1).clamp(min=1))[group]
    elif scale == "group":
        spread = torch.zeros_like(size).index_add_(0, group, centred.square()) / (size - int(unbiased)).clamp(min=1)
        advantages = centred / (spread.sqrt()[group] + eps)
    elif scale == "batch":
        around = (wide - wide.mean()).square().sum() / max(wide.numel() - int(unbiased), 1)
        advantages = centred / (around.sqrt() + eps)
    return torch.where(constant, 0.0, advantages).to(r.dtype)
