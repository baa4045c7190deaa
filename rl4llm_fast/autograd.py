"""The differentiable vocabulary ops: an autograd.Function over a forward and an explicit backward kernel.

One Function per op; everything that is no tensor travels in one frozen dataclass, so that the signatures of forward
and backward stay readable and Dynamo treats the whole as a constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch


@dataclass(frozen=True)
class TokenLogprobsOptions:
    """What token_logprobs knows besides tensors."""

    backend: str
    ignore_index: int
    return_entropy: bool
    inplace_backward: bool


class TokenLogprobs(torch.autograd.Function):
    """(logp, entropy) of rows (B, T, V); backward builds dlogits in one read and one write of the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        token_ids: Tensor,
        mask: Tensor | None,
        temperature: Tensor,
        softcap: Tensor | None,
        options: TokenLogprobsOptions,
    ) -> tuple[Tensor, Tensor]:
        logp, entropy, row_max, log_sum = dispatch.ops(options.backend).token_logprobs_fwd(
            logits, token_ids, mask, temperature, softcap, options.ignore_index, options.return_entropy
        )
        ctx.save_for_backward(logits, token_ids, mask, temperature, softcap, row_max, log_sum, entropy)
        ctx.options = options
        ctx.set_materialize_grads(False)
        if not options.return_entropy:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Any:
        logits, token_ids, mask, temperature, softcap, row_max, log_sum, entropy = ctx.saved_tensors
        options: TokenLogprobsOptions = ctx.options
        if not options.return_entropy:
            grad_entropy = None  # Dynamo hands zeros to an output that is not differentiable
        if grad_logp is None and grad_entropy is None:
            return None, None, None, None, None, None
        arguments = (
            logits,
            token_ids,
            mask,
            temperature,
            softcap,
            options.ignore_index,
            row_max,
            log_sum,
            entropy if grad_entropy is not None else None,
            None if grad_logp is None else grad_logp.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
        )
        kernels = dispatch.ops(options.backend)
        if options.inplace_backward:
            # The op's schema says that it writes to the logits, so their version goes up: a second backward through
            # this node, or through any other node that saved them, raises instead of reading the gradient as logits.
            kernels.token_logprobs_bwd_(*arguments)
            grad_logits = logits
        else:
            grad_logits = kernels.token_logprobs_bwd(*arguments)
        return grad_logits, None, None, None, None, None


@dataclass(frozen=True)
class LinearTokenLogprobsOptions:
    """What linear_token_logprobs knows besides tensors."""

    backend: str
    ignore_index: int
    return_entropy: bool
    compute_dtype: torch.dtype
    logits_dtype: torch.dtype | None
    grad_weight_dtype: torch.dtype | None
    chunk_tokens: int
    keep_logits: bool
    group: str


class LinearTokenLogprobs(torch.autograd.Function):
    """(logp, entropy) of hidden rows (N, D) through the head (V, D); backward makes the logits of a chunk again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        mask: Tensor | None,
        temperature: Tensor,
        softcap: Tensor | None,
        options: LinearTokenLogprobsOptions,
    ) -> tuple[Tensor, Tensor]:
        logp, entropy, row_max, log_sum, kept, room = dispatch.ops(options.backend).linear_token_logprobs_fwd(
            hidden,
            weight,
            bias,
            token_ids,
            mask,
            temperature,
            softcap,
            options.ignore_index,
            options.return_entropy,
            options.compute_dtype,
            options.logits_dtype,
            options.chunk_tokens,
            options.keep_logits,
            ctx.needs_input_grad[1],
            options.group,
        )
        ctx.save_for_backward(hidden, weight, bias, token_ids, mask, temperature, softcap, row_max, log_sum, entropy)
        ctx.options = options
        ctx.kept = (kept, room if room.numel() else None) if options.keep_logits else (None, None)
        ctx.set_materialize_grads(False)
        if not options.return_entropy:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Any:
        hidden, weight, bias, token_ids, mask, temperature, softcap, row_max, log_sum, entropy = ctx.saved_tensors
        options: LinearTokenLogprobsOptions = ctx.options
        if not options.return_entropy:
            grad_entropy = None  # Dynamo hands zeros to an output that is not differentiable
        if grad_logp is None and grad_entropy is None:
            return (None,) * 8
        # The first backward overwrites the kept logits and hands on the memory of dW; one after it (retain_graph) makes
        # them again.
        (kept, room), ctx.kept = ctx.kept, (None, None)
        need = ctx.needs_input_grad
        grads = dispatch.ops(options.backend).linear_token_logprobs_bwd(
            hidden,
            weight,
            bias,
            token_ids,
            mask,
            temperature,
            softcap,
            options.ignore_index,
            row_max,
            log_sum,
            entropy if grad_entropy is not None else None,
            None if grad_logp is None else grad_logp.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            kept,
            room,
            options.compute_dtype,
            options.logits_dtype,
            options.grad_weight_dtype,
            options.chunk_tokens,
            need[0],
            need[1],
            need[2],
            options.group,
        )
        made = (grads[0], grads[1] if room is None else room, grads[2])
        grad_hidden, grad_weight, grad_bias = (g if needed else None for g, needed in zip(made, need, strict=False))
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


@dataclass(frozen=True)
class KlDivergenceOptions:
    """What kl_divergence knows besides tensors."""

    backend: str
    direction: str


class KlDivergence(torch.autograd.Function):
    """Exact KL of rows (B, T, V) against reference rows; backward reads both once and writes dlogits once."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ref_logits: Tensor,
        mask: Tensor | None,
        temperature: Tensor,
        softcap: Tensor | None,
        beta: Tensor,
        options: KlDivergenceOptions,
    ) -> Tensor:
        kl, *saved = dispatch.ops(options.backend).kl_divergence_fwd(
            logits, ref_logits, mask, temperature, softcap, options.direction, beta
        )
        ctx.save_for_backward(logits, ref_logits, mask, temperature, softcap, beta, *saved)
        ctx.options = options
        result: Tensor = kl
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, ref_logits, mask, temperature, softcap, beta, *saved = ctx.saved_tensors
        options: KlDivergenceOptions = ctx.options
        grad_logits = dispatch.ops(options.backend).kl_divergence_bwd(
            logits, ref_logits, mask, temperature, softcap, options.direction, beta, *saved, grad.contiguous()
        )
        return grad_logits, None, None, None, None, None, None


@dataclass(frozen=True)
class LinearKlDivergenceOptions:
    """What linear_kl_divergence knows besides tensors."""

    backend: str
    direction: str
    compute_dtype: torch.dtype
    ref_compute_dtype: torch.dtype
    logits_dtype: torch.dtype | None
    grad_weight_dtype: torch.dtype | None
    chunk_tokens: int


class LinearKlDivergence(torch.autograd.Function):
    """Exact KL from hidden states; backward makes both sets of logits of a chunk again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        mask: Tensor | None,
        temperature: Tensor,
        softcap: Tensor | None,
        beta: Tensor,
        options: LinearKlDivergenceOptions,
    ) -> Tensor:
        inputs = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask, temperature, softcap)
        kl, *saved = dispatch.ops(options.backend).linear_kl_divergence_fwd(
            *inputs, options.direction, beta, options.compute_dtype, options.ref_compute_dtype, options.logits_dtype,
            options.chunk_tokens,
        )  # fmt: skip
        ctx.save_for_backward(*inputs, beta, *saved)
        ctx.options = options
        result: Tensor = kl
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *inputs, beta, inner, row_max, log_sum, ref_row_max, ref_log_sum = ctx.saved_tensors
        options: LinearKlDivergenceOptions = ctx.options
        need = ctx.needs_input_grad[:3]
        grads = dispatch.ops(options.backend).linear_kl_divergence_bwd(
            *inputs,
            options.direction,
            beta,
            inner,
            row_max,
            log_sum,
            ref_row_max,
            ref_log_sum,
            grad.contiguous(),
            options.compute_dtype,
            options.ref_compute_dtype,
            options.logits_dtype,
            options.grad_weight_dtype,
            options.chunk_tokens,
            *need,
        )
        return *(g if needed else None for g, needed in zip(grads, need, strict=True)), *(None,) * 8
