"""The differentiable preference loss: forward leaves one slope per answer, backward spreads it over its tokens."""

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


class PreferenceLoss(torch.autograd.Function):
    """(loss, rewards, metrics); the arguments are those of ``preference_loss_fwd``. Differentiable in both answers."""

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        answers = (mask_chosen, mask_rejected, cu_chosen, cu_rejected)
        loss, slopes, rewards, metrics = dispatch.ops(options.backend).preference_loss_fwd(
            chosen, rejected, ref_chosen, ref_rejected, *answers, per_pair, params, options.formula, options.average
        )
        ctx.save_for_backward(slopes, chosen, rejected, *answers)
        ctx.options = options
        ctx.mark_non_differentiable(rewards, metrics)
        ctx.set_materialize_grads(False)
        return loss, rewards, metrics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_rewards: Tensor | None, grad_metrics: Tensor | None) -> Any:
        if grad_loss is None:
            return (None,) * 11
        slopes, chosen, rejected, *answers = ctx.saved_tensors
        grad_chosen, grad_rejected = dispatch.run_backward(
            ctx.options.backend, "preference_loss_bwd", grad_loss, slopes, chosen, rejected, *answers
        )
        return grad_chosen, None if rejected is None else grad_rejected, *(None,) * 9
