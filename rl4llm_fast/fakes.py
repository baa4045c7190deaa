"""The shapes and dtypes that every op of ``schemas`` returns: what torch.compile and opcheck see of it.

A fake takes the op's arguments and returns empty tensors; it never looks at contents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import formulas, pair_formulas, tiles


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an op on ``dtype`` adds up, and which it returns."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wider_accumulation(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The accumulation dtype of an op on two dtypes."""
    return torch.promote_types(accumulation_dtype(a), accumulation_dtype(b))


def token_logprobs_fwd(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(logits.dtype)
    rows = logits.shape[0] * logits.shape[1]
    logp = logits.new_empty(token_ids.shape, dtype=acc)
    entropy = logits.new_empty((rows if return_entropy else 0,), dtype=acc)
    row_max = logits.new_empty((rows,), dtype=acc)
    return logp, entropy, row_max, torch.empty_like(row_max)


def token_logprobs_bwd(logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def token_logprobs_bwd_(logits: Tensor, *args: Any) -> None:
    return None


def linear_token_logprobs_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    ignore_index: int,
    return_entropy: bool,
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype | None,
    chunk_tokens: int,
    keep_logits: bool,
    need_weight: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, acc = hidden.shape[0], accumulation_dtype(compute_dtype)
    device = hidden.device.type
    cut = tiles.tiling(rows, weight.shape[0], compute_dtype, logits_dtype, device, chunk_tokens, bool(group))
    kept = tiles.workspace_elements(rows, *cut) if keep_logits else 0
    room = tiles.has_room(weight.dtype, compute_dtype, cut[1], keep_logits, need_weight)
    return (
        hidden.new_empty(token_ids.shape, dtype=acc),
        hidden.new_empty((rows if return_entropy else 0,), dtype=acc),
        hidden.new_empty((rows,), dtype=acc),
        hidden.new_empty((rows,), dtype=acc),
        hidden.new_empty((kept,), dtype=logits_dtype or compute_dtype),
        hidden.new_empty(
            weight.shape if room else (0,), dtype=compute_dtype if room else logits_dtype or compute_dtype
        ),
    )


def linear_token_logprobs_bwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    room, need_hidden, need_weight, need_bias = args[-9], *args[-4:-1]
    return _factor_gradients(hidden, weight, bias, args[-8], need_hidden, need_weight and room is None, need_bias)


def _factor_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    compute_dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    bias_dtype = accumulation_dtype(compute_dtype) if bias is None else bias.dtype
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty((weight.shape[0] if need_bias else 0,), dtype=bias_dtype),
    )


def vocab_parallel_ids(token_ids: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(token_ids)


def linear_policy_loss_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with_entropy, compute_dtype = args[-8:-6]
    logp = hidden.new_empty((hidden.shape[0],), dtype=accumulation_dtype(compute_dtype))
    entropy = logp.new_empty((hidden.shape[0] if with_entropy else 0,))
    return logp, entropy, *_factor_gradients(hidden, weight, bias, compute_dtype, *args[-3:])


def scaled_gradient(grad: Tensor, factor: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def scale_gradient_(gradient: Tensor, grad: Tensor) -> None:
    return None


def kept_empty(like: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


def kl_divergence_results(like: Tensor, rows: int, acc: torch.dtype) -> tuple[Tensor, ...]:
    kl, *norms = (like.new_empty((rows,), dtype=acc) for _ in range(5))
    return kl, like.new_empty((rows, 2), dtype=torch.float64), *norms


def kl_divergence_fwd(logits: Tensor, ref_logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    acc = wider_accumulation(logits.dtype, ref_logits.dtype)
    return kl_divergence_results(logits, logits.shape[0] * logits.shape[1], acc)


def linear_kl_divergence_fwd(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    acc = wider_accumulation(*args[-4:-2])
    return kl_divergence_results(hidden, hidden.shape[0], acc)


def linear_kl_divergence_bwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _factor_gradients(hidden, weight, bias, args[-8], *args[-3:])


def kl_divergence_bwd(logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def kl_divergence_bwd_(logits: Tensor, *args: Any) -> None:
    return None


def group_advantages(rewards: Tensor, *args: Any) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=accumulation_dtype(rewards.dtype))


def gae_fwd(rewards: Tensor, values: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    kl, advantages = args[3], args[-1]
    tokens = rewards if kl is None else kl
    returns = tokens.new_empty(tokens.shape, dtype=accumulation_dtype(tokens.dtype))
    return returns.new_empty(tokens.shape if advantages else (0,)), returns


def gae_bwd(grad_advantages: Tensor | None, grad_returns: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad_returns if grad_advantages is None else grad_advantages
    if grad is None:
        raise ValueError("grad_advantages, grad_returns: wanted at least one")
    cu_seqlens = args[1]
    count = grad.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape), grad.new_empty((count,))


def vtrace(logp: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    advantages = logp.new_empty(logp.shape, dtype=accumulation_dtype(logp.dtype))
    return advantages, torch.empty_like(advantages)


def n_step_returns(rewards: Tensor, *args: Any) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=accumulation_dtype(rewards.dtype))


def process_advantages(step_rewards: Tensor, *args: Any) -> Tensor:
    length = args[-2]
    return step_rewards.new_empty((step_rewards.shape[0], length), dtype=accumulation_dtype(step_rewards.dtype))


def whiten_stats(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty((3,), dtype=torch.float64)


def whiten_apply(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=accumulation_dtype(x.dtype))


def policy_loss_fwd(logp: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    aggregation, _, entropy_grad = args[-3:]
    dtype = accumulation_dtype(logp.dtype)
    return (
        logp.new_empty(logp.shape if aggregation == "none" else (), dtype=dtype),
        logp.new_empty(logp.shape, dtype=dtype),
        logp.new_empty(logp.shape if entropy_grad else (0,), dtype=dtype),
        logp.new_empty((logp.shape[0],), dtype=dtype),
        logp.new_empty((len(formulas.METRICS),), dtype=dtype),
    )


def policy_loss_sequences_fwd(logp: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, aggregation, correction, _, _, entropy_grad = args
    return policy_loss_fwd(logp, aggregation, correction, entropy_grad)


def kl_estimate_fwd(logp: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logp), torch.empty_like(logp)


def token_loss_bwd(
    grad: Tensor, logp: Tensor, entropy: Tensor | None, scale: Tensor | None, dlogp: Tensor, dentropy: Tensor
) -> tuple[Tensor, Tensor]:
    entropy_dtype = dentropy.dtype if entropy is None else entropy.dtype
    return torch.empty_like(dlogp, dtype=logp.dtype), torch.empty_like(dentropy, dtype=entropy_dtype)


def preference_loss_fwd(chosen: Tensor, rejected: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    cu_chosen, formula, gradients = args[4], args[-3], args[-1]
    pairs = chosen.shape[0] if cu_chosen is None else cu_chosen.shape[0] - 1
    metrics = chosen.new_empty((len(pair_formulas.FORMULAS[formula].metrics),))
    towards = [chosen.new_empty((0,) if x is None or not gradients else x.shape) for x in (chosen, rejected)]
    return chosen.new_empty(()), chosen.new_empty((2, pairs)), metrics, *towards


def preference_loss_bwd(
    grad: Tensor, slopes: Tensor, chosen: Tensor, rejected: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(chosen), chosen.new_empty((0,)) if rejected is None else torch.empty_like(rejected)
