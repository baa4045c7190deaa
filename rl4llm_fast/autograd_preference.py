"""The differentiable preference loss: forward leaves one slope per answer, backward spreads it over its tokens.

On the CPU the forward pass spreads the slopes too, while the masks are in the cache, and the last backward pass hands
that on where the upstream gradient is 1, as it is unless somebody scales the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch


@dataclass(frozen=True)
class PreferenceLossOptions:
    """What the preference losses know besides tensors."""

    backend: str
    formula: str
    average: bool
    gradients: bool  # made in the forward pass


class PreferenceLoss(torch.autograd.Function):
    """(loss, metrics); the arguments are those of ``preference_loss_fwd``. Differentiable in both answers."""

    @staticmethod
    def forward(
        ctx: Any,
        chosen: Tensor,
        rejected: Tensor | None,
        ref_chosen: Tensor | None,
        ref_rejected: Tensor | None,
        mask_chosen: Tensor | None,
        mask_rejected: Tensor | None,
        cu_chosen: Tensor | None,
        cu_rejected: Tensor | None,
        per_pair: Tensor | None,
        params: Tensor,
        options: PreferenceLossOptions,
    ) -> tuple[Tensor, Tensor]:
        answers = (mask_chosen, mask_rejected, cu_chosen, cu_rejected)
        tensors = (chosen, rejected, ref_chosen, ref_rejected, *answers, per_pair, params)
        how = (options.formula, options.average, options.gradients)
        loss, slopes, metrics, *gradients = dispatch.ops(options.backend).preference_loss_fwd(*tensors, *how)
        ctx.gradients = gradients if options.gradients else None
        ctx.save_for_backward(slopes, chosen, rejected, *answers)
        ctx.options, ctx.pairs = options, rejected is not None
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_metrics: Tensor | None) -> Any:
        if grad_loss is None:
            return (None,) * 11
        made, ctx.gradients = ctx.gradients, None
        if made is None or not (dispatch.is_last_backward() and dispatch.is_one(grad_loss)):
            saved = ctx.saved_tensors  # not before they are needed: unpacking them costs a tenth of this pass
            made = dispatch.run_backward(ctx.options.backend, "preference_loss_bwd", grad_loss, *saved)
        return made[0], made[1] if ctx.pairs else None, *(None,) * 9
