"""Sums over segments of answers, for 2d_dpo (79)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .sequences import Sequences


def segment_sums(
    logp: Tensor,
    ref: Tensor | None,
    mask: Tensor | None,
    layout: Sequences,
    segments_name: str,
    weights_name: str,
    segments: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(B, K): weight·Σ (logp − ref) over the live tokens of each segment, and which segments exist.

    Plain PyTorch over (tokens, K): deterministic, overlaps allowed, and K is a handful of segments.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; on the CPU, a segment that ends before it starts or beyond
            its answer.
    """
    if segments is None:
        raise ValueError(f"{segments_name}: kind '2d_dpo' wants (B, K, 2), got None")
    checks.is_integer(segments_name, segments)
    checks.same_device(segments_name, segments, logp, "the log-probabilities")
    if segments.dim() != 3 or segments.shape[0] != layout.count or segments.shape[2] != 2:
        raise ValueError(f"{segments_name}: wanted ({layout.count}, K, 2), got {checks.shape(segments)}")
    if weights is not None:
        checks.is_float(weights_name, weights)
        checks.has_shape(weights_name, weights, checks.shape(segments)[:2], f"{segments_name}, less the last dimension")
        checks.same_device(weights_name, weights, logp, "the log-probabilities")
    begin, end = segments.long().unbind(-1)
    begin = _checked(segments_name, begin, end, layout)
    exists = begin >= 0

    position = torch.arange(layout.rows[1], device=logp.device)
    if layout.cu_seqlens is None:
        begin, end = begin.unsqueeze(1), end.unsqueeze(1)  # (B, 1, K) beside positions (T, 1)
    else:
        index = layout.index
        position = position - layout.cu_seqlens[index]
        begin, end = begin[index], end[index]  # (N, K)
    position = position.unsqueeze(-1)
    inside = (position >= begin) & (position < end)
    difference = logp if ref is None else logp - ref
    if mask is not None:
        inside = inside & mask.unsqueeze(-1)
    zero = torch.zeros((), dtype=logp.dtype, device=logp.device)
    parts = torch.where(inside, difference.unsqueeze(-1), zero)
    if layout.cu_seqlens is None:
        sums = parts.sum(1)
    elif layout.count == 0:
        sums = parts[:0]  # (0, K), in the graph as in Sequences.sums
    else:
        offsets = layout.cu_seqlens
        sums = torch.segment_reduce(parts, "sum", offsets=offsets, axis=0, initial=0, unsafe=True)
    if weights is not None:
        sums = sums * torch.where(exists, weights.detach().to(logp.dtype), zero)
    return torch.where(exists, sums, zero), exists


def _checked(name: str, begin: Tensor, end: Tensor, layout: Sequences) -> Tensor:
    """``begin``, where segments lie in their answers; looked at as ``checks.at_every`` looks."""
    length = begin.new_full((layout.count,), layout.rows[1]) if layout.cu_seqlens is None else layout.cu_seqlens.diff()

    def right(begin: Tensor) -> Tensor:
        padding = (begin == -1) & (end == -1)
        return padding | ((begin >= 0) & (end >= begin) & (end <= length.unsqueeze(1)))

    if checks.unseen(begin):
        return checks.at_every(name, begin, right, "0 <= first <= end <= the answer's length, or (-1, -1) for none")
    if not bool(right(begin).all()):
        pair, segment = (~right(begin)).nonzero()[0].tolist()
        raise ValueError(
            f"{name}: wanted 0 <= first <= end <= {int(length[pair])}, or (-1, -1) for none; got "
            f"({int(begin[pair, segment])}, {int(end[pair, segment])}) at position {(pair, segment)}"
        )
    return begin
