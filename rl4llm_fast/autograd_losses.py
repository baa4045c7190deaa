"""The differentiable token losses: the forward kernel returns the derivative too, the backward only scales it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch


@dataclass(frozen=True)
class PolicyLossOptions:
    """What policy_loss knows besides tensors."""

    backend: str
    formula: str
    kl: str
    aggregation: str
    correction: str
    entropy_grad: bool
    # What policy_loss_sequences_fwd makes of whole sequences: (the ratio, the correction). None: policy_loss_fwd.
    of_sequences: tuple[bool, bool] | None = None


class PolicyLoss(torch.autograd.Function):
    """(loss, metrics); the arguments are those of ``policy_loss_fwd``, or of ``policy_loss_sequences_fwd``.

    Differentiable in logp and entropy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logp: Tensor,
        entropy: Tensor | None,
        old: Tensor | None,
        advantages: Tensor,
        ref: Tensor | None,
        mask: Tensor | None,
        policy_weights: Tensor | None,
        token_weights: Tensor | None,
        log_s: Tensor | None,
        cu_seqlens: Tensor | None,
        params: Tensor,
        options: PolicyLossOptions,
    ) -> tuple[Tensor, Tensor]:
        kernels = dispatch.ops(options.backend)
        tensors = (logp, old, advantages, ref, entropy, mask, policy_weights, token_weights)
        how = (options.formula, options.kl, options.aggregation, options.correction)
        if options.of_sequences is None:
            found = kernels.policy_loss_fwd(*tensors, log_s, params, *how, options.entropy_grad)
        else:
            given = (cu_seqlens, params, *how, *options.of_sequences, options.entropy_grad)
            found = kernels.policy_loss_sequences_fwd(*tensors, *given)
        loss, dlogp, dentropy, scale, metrics = found
        ctx.save_for_backward(logp, entropy if options.entropy_grad else None, dlogp, dentropy, scale)
        ctx.options = options
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)  # zeros for the metrics' gradient would be a launch
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_metrics: Tensor | None) -> Any:
        if grad_loss is None:
            return (None,) * 12
        logp, entropy, dlogp, dentropy, scale = ctx.saved_tensors
        options: PolicyLossOptions = ctx.options
        if options.backend == "cpu" and dispatch.is_last_backward() and dispatch.is_one(grad_loss):
            return dlogp, dentropy if options.entropy_grad else None, *(None,) * 10
        grad_logp, grad_entropy = dispatch.run_backward(
            options.backend, "token_loss_bwd", grad_loss.contiguous(), logp, entropy, scale, dlogp, dentropy
        )
        return grad_logp, grad_entropy if options.entropy_grad else None, *(None,) * 10


class PrecomputedGradients(torch.autograd.Function):
    """A loss whose gradient towards hidden, weight and bias is known already: backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grad_hidden: Tensor,
        grad_weight: Tensor,
        grad_bias: Tensor,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, grad_hidden, grad_weight, grad_bias)
        ctx.backend = backend
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: activation checkpointing hands them out once
        factors, gradients = saved[:3], saved[3:]
        kernels, needed = dispatch.ops(ctx.backend), ctx.needs_input_grad[1:4]
        # The last backward through this node hands on what was saved. One that keeps the graph makes tensors of its
        # own; so does one under compile, where the graph decides what it overwrites, and one that is differentiated
        # again, which must raise.
        last = dispatch.is_last_backward()
        unscaled = last and dispatch.is_one(grad)  # on a GPU the kernel looks, not the host
        found: list[Tensor | None] = [None, None, None]
        for i in range(3):
            if needed[i] and not last:
                found[i] = kernels.scaled_gradient(grad, factors[i], gradients[i])
            elif needed[i]:
                if not unscaled:
                    kernels.scale_gradient_(gradients[i], grad)
                found[i] = gradients[i]
        return None, *found, None, None, None, None


@dataclass(frozen=True)
class KlEstimateOptions:
    """What kl_estimate knows besides tensors."""

    backend: str
    variant: str


class KlEstimate(torch.autograd.Function):
    """The per-token estimate on (N,); differentiable in logp."""

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, ref: Tensor, old: Tensor | None, mask: Tensor | None, options: KlEstimateOptions
    ) -> Tensor:
        kl: Tensor
        kl, dkl = dispatch.ops(options.backend).kl_estimate_fwd(logp, ref, old, mask, options.variant)
        ctx.save_for_backward(logp, dkl)
        ctx.options = options
        return kl

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor) -> Any:
        logp, dkl = ctx.saved_tensors
        nothing = dkl.new_empty((0,))
        grad_logp, _ = dispatch.run_backward(
            ctx.options.backend, "token_loss_bwd", grad_kl.contiguous(), logp, None, None, dkl, nothing
        )
        return grad_logp, None, None, None, None
