"""The differentiable returns: the adjoint of a reverse scan is a forward scan over the same coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch


@dataclass(frozen=True)
class GaeOptions:
    """What gae knows besides tensors."""

    backend: str
    mask_mode: str
    advantages: bool  # whether they are wanted, or the returns alone


class Gae(torch.autograd.Function):
    """(advantages, returns); the arguments are those of ``gae_fwd``. Differentiable in rewards, values, bootstrap."""

    @staticmethod
    def forward(
        ctx: Any,
        rewards: Tensor,
        values: Tensor | None,
        bootstrap: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        kl: Tensor | None,
        gamma: Tensor,
        lam: Tensor,
        beta: Tensor,
        options: GaeOptions,
    ) -> tuple[Tensor, Tensor]:
        advantages, returns = dispatch.ops(options.backend).gae_fwd(
            rewards,
            values,
            mask,
            cu_seqlens,
            bootstrap,
            kl,
            gamma,
            lam,
            beta,
            options.mask_mode,
            options.advantages,
        )
        ctx.save_for_backward(mask, cu_seqlens, gamma, lam)
        ctx.options = options
        ctx.dtypes = [None if x is None else x.dtype for x in (rewards, values, bootstrap)]
        ctx.set_materialize_grads(False)
        if not options.advantages:
            ctx.mark_non_differentiable(advantages)
        return advantages, returns

    @staticmethod
    def backward(ctx: Any, grad_advantages: Tensor | None, grad_returns: Tensor | None) -> Any:
        mask, cu_seqlens, gamma, lam = ctx.saved_tensors
        options: GaeOptions = ctx.options
        if not options.advantages:
            grad_advantages = None  # Dynamo hands zeros to an output that is not differentiable
        if grad_advantages is None and grad_returns is None:
            return (None,) * 10
        grads = dispatch.ops(options.backend).gae_bwd(
            None if grad_advantages is None else grad_advantages.contiguous(),
            None if grad_returns is None else grad_returns.contiguous(),
            mask,
            cu_seqlens,
            gamma,
            lam,
            options.mask_mode,
        )
        wanted = zip(grads, ctx.dtypes, ctx.needs_input_grad, strict=False)
        return *(g.to(dtype) if need else None for g, dtype, need in wanted), *(None,) * 7
