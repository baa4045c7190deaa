"""One side of a preference loss, checked and laid out for the ops, and the call of the op."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, dispatch, pair_formulas, reference_preference
from .autograd_preference import PreferenceLoss, PreferenceLossOptions
from .checks import Number
from .sequences import packed_offsets


class Answers:
    """One side of a call, checked: (B, T) as it is, packed (N,) with offsets, whole answers (B,) as (B, 1)."""

    def __init__(
        self, side: str, name: str, logp: Tensor, ref: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        suffix = f"_{side}" if side else ""
        checks.is_float(name, logp)
        shape = checks.shape(logp)
        self.offsets = None if cu_seqlens is None else packed_offsets(logp, cu_seqlens, name)
        self.whole = cu_seqlens is None and len(shape) == 1
        if cu_seqlens is None and len(shape) not in (1, 2):
            packed = f", packed (N,) with cu_seqlens{suffix}" if side else ""
            raise ValueError(f"{name}: wanted (B, T){packed} or (B,); got {shape}")
        self.count = shape[0] if self.offsets is None else self.offsets.shape[0] - 1
        if self.whole and mask is not None:
            raise ValueError(f"mask{suffix}: wanted None beside one log-probability per answer (B,), got a mask")
        self.mask = checks.live_mask(f"mask{suffix}", mask, shape, logp, name)
        if ref is not None:
            ref_name = f"ref{suffix}" if side else "ref_logp"
            checks.is_float(ref_name, ref)
            checks.has_shape(ref_name, ref, shape, name)
            checks.same_device(ref_name, ref, logp, name)
        self.name, self.logp, self.ref = name, logp, ref

    def prepared(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(logp, ref, mask, offsets) as ops take them."""

        def tokens(tensor: Tensor) -> Tensor:
            # What needs nothing is left alone: an op that does nothing costs its dispatch.
            if tensor.dtype != dtype:
                tensor = tensor.to(dtype)
            tensor = tensor.unsqueeze(1) if self.whole else tensor
            return tensor if tensor.is_contiguous() else tensor.contiguous()

        ref = None if self.ref is None else tokens(self.ref.detach())
        return tokens(self.logp), ref, None if self.mask is None else self.mask.contiguous(), self.offsets


def run_pairs(
    op: str,
    formula: str,
    chosen: Answers,
    rejected: Answers | None,
    per_pair: Tensor | None,
    numbers: dict[str, Number],
    average: bool,
    dtype: torch.dtype,
    backend: str | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the formula's metrics by their names."""

    def named(metrics: Tensor) -> dict[str, Tensor]:
        return dict(zip(pair_formulas.FORMULAS[formula].metrics, metrics.unbind(), strict=True))

    logp, ref, mask, offsets = chosen.prepared(dtype)
    other, other_ref, other_mask, other_offsets = (None,) * 4 if rejected is None else rejected.prepared(dtype)
    # Dynamo hands no tensor to an autograd function twice.
    if other is logp:
        other = logp.view_as(logp)
    if other_mask is not None and other_mask is mask:
        other_mask = mask.view_as(mask)
    pair = None if per_pair is None else per_pair.detach().to(dtype).contiguous()
    params = checks.numbers(numbers, len(pair_formulas.PARAMS) + pair_formulas.MAX_KNOBS, chosen.logp)
    used = dispatch.choose(op, logp, backend)
    tensors = (logp, other, ref, other_ref, mask, other_mask, offsets, other_offsets, pair, params)
    if used == "eager":
        loss, metrics = reference_preference.preference_loss(*tensors, formula, average)
        return loss, named(metrics)
    learns = torch.is_grad_enabled() and (logp.requires_grad or (other is not None and other.requires_grad))
    gradients = learns and used == "cpu" and not torch.compiler.is_compiling()
    options = PreferenceLossOptions(used, formula, average, gradients)
    loss, metrics = PreferenceLoss.apply(*tensors, options)  # type: ignore[no-untyped-call]
    return loss, named(metrics)
