"""The eager backend of the preference losses: sums, the pair formula on tensors, autograd. The oracle of the others.

Takes the same prepared arguments as ``schemas.OPS["preference_loss_fwd"]``, in fp64 too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import pair_formulas
from .pair_formulas import EagerPairMaths
from .sequences import Sequences, layout_of


def preference_loss(
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
    formula: str,
    average: bool,
) -> tuple[Tensor, Tensor]:
    """docs/math.md section 7: the loss, and the metrics in the order of the formula's."""
    function = pair_formulas.FORMULAS[formula]
    beta, default, *knobs = params.to(chosen.device, chosen.dtype).unbind()
    total, length = answer_sums(chosen, ref_chosen, mask_chosen, layout_of(chosen, cu_chosen))
    pairs = max(total.shape[0], 1)
    x = total / length if average else total
    y = torch.zeros_like(x)
    if rejected is not None:
        y, other_length = answer_sums(rejected, ref_rejected, mask_rejected, layout_of(rejected, cu_rejected))
        y = y / other_length if average else y
    nll = -total * (pairs / length.sum().clamp(min=1)) if function.token_nll else None
    extra = default if per_pair is None else per_pair
    used = knobs[: len(function.knobs)]
    loss = pair_formulas.pair_loss(EagerPairMaths, x, y, nll, extra, beta, *used, formula=function)
    with torch.no_grad():
        won, lost = beta * x, beta * y
        if function.labelled:
            metrics = _labelled_metrics(won, extra, *used)
        else:
            means = (won, lost, (won > lost).to(x.dtype), won - lost)
            metrics = torch.stack([value.sum() / pairs for value in means])
    return loss.sum() / pairs, metrics


def _labelled_metrics(reward: Tensor, desirable: Tensor, kl: Tensor, lambda_d: Tensor, lambda_u: Tensor) -> Tensor:
    """Mean rewards of the desirable answers and of the others; accuracy, margin, and the ratio of their weights."""
    wanted = desirable > 0.5
    good, bad = wanted.to(reward.dtype).sum(), (~wanted).to(reward.dtype).sum()
    zero = torch.zeros_like(reward)
    better = torch.where(wanted, reward, zero).sum() / good.clamp(min=1)
    worse = torch.where(wanted, zero, reward).sum() / bad.clamp(min=1)
    right = torch.where(wanted, reward > kl, reward < kl).to(reward.dtype).sum() / max(reward.shape[0], 1)
    return torch.stack([better, worse, right, better - worse, lambda_d * good / (lambda_u * bad)])


def answer_sums(logp: Tensor, ref: Tensor | None, mask: Tensor | None, layout: Sequences) -> tuple[Tensor, Tensor]:
    """(B,): Σ (logp − ref) over the live tokens of each answer, and their number, at least 1."""
    difference = layout.as_rows(logp if ref is None else logp - ref)
    live = torch.ones_like(difference, dtype=torch.bool) if mask is None else layout.as_rows(mask)
    zero = torch.zeros((), dtype=logp.dtype, device=logp.device)
    return layout.sums(torch.where(live, difference, zero)), layout.sums(live.to(logp.dtype)).clamp(min=1)
