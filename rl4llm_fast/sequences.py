"""Which tokens make a sequence: padded (B, T), or packed (N,) with cu_seqlens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks, dispatch


@dataclass(frozen=True)
class Sequences:
    """A layout of tokens. Kernels see rows: (B, T) as it is, packed tokens as one row (1, N)."""

    shape: tuple[int, ...]  # as the user gave the tokens
    rows: tuple[int, int]  # (B, T), or (1, N)
    cu_seqlens: Tensor | None  # (B+1,) where packed: int64 in [0, N], unless they were left as given
    known: bool  # False: one dimension without cu_seqlens, so that nothing is known about sequences

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def count(self) -> int:
        """B, empty sequences too."""
        return self.rows[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def index(self) -> Tensor:
        """(N,): the sequence of each packed token."""
        assert self.cu_seqlens is not None
        position = torch.arange(self.shape[0], device=self.cu_seqlens.device)
        found = torch.searchsorted(self.cu_seqlens[1:].contiguous(), position, right=True)
        return found.clamp(max=max(self.count - 1, 0))

    def as_rows(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.shape == self.rows else tensor.reshape(self.rows)

    def sums(self, rows: Tensor) -> Tensor:
        """(B,): the sum over each sequence. No atomics, no synchronisation."""
        if self.cu_seqlens is None:
            return rows.sum(-1)
        if self.count == 0:
            return rows[0, :0]  # in the graph, so that a loss of nothing has gradients: zeros
        # unsafe skips a check of the offsets that would synchronise; they were checked where that is free.
        return torch.segment_reduce(rows[0], "sum", offsets=self.cu_seqlens, axis=0, initial=0, unsafe=True)

    def spread(self, per_sequence: Tensor) -> Tensor:
        """(B,) to what broadcasts against rows: (B, 1), or (1, N)."""
        return per_sequence[self.index].unsqueeze(0) if self.packed else per_sequence.unsqueeze(-1)


def sequences(tokens: Tensor, cu_seqlens: Tensor | None, name: str = "logp", *, as_given: bool = False) -> Sequences:
    """The layout of ``tokens`` (B, T), or (N,) with ``cu_seqlens`` (B+1,).

    ``as_given`` leaves the offsets as they are, for a kernel that takes them so; nothing of the layout may be computed.

    Raises:
        TypeError, ValueError: other shapes; offsets that do not start at 0, ever decrease, or do not end at N (checked
            on the CPU always, on a GPU with RL4LLM_FAST_DEBUG=1).
    """
    shape = checks.shape(tokens)
    if cu_seqlens is None:
        if len(shape) == 2:
            return Sequences(shape, (shape[0], shape[1]), None, True)
        if len(shape) == 1:
            return Sequences(shape, (1, shape[0]), None, False)
        raise ValueError(f"{name}: wanted (B, T), or packed (N,) with cu_seqlens; got {shape}")
    if as_given:
        check_offsets(tokens, cu_seqlens, name)
        return layout_of(tokens, cu_seqlens.contiguous())
    return layout_of(tokens, packed_offsets(tokens, cu_seqlens, name))


def layout_of(tokens: Tensor, offsets: Tensor | None) -> Sequences:
    """The layout of ``tokens`` (B, T), or (N,) with ``offsets`` as :func:`packed_offsets` gives them."""
    shape = checks.shape(tokens)
    rows = (shape[0], shape[1]) if offsets is None else (1, shape[0])
    return Sequences(shape, rows, offsets, True)


def packed_offsets(tokens: Tensor, cu_seqlens: Tensor, name: str) -> Tensor:
    """``cu_seqlens`` (B+1,) of packed ``tokens`` (N,), checked, as int64 in [0, N]. Raises as :func:`sequences`."""
    check_layout(tokens, cu_seqlens, name)
    if not checks.unseen(cu_seqlens):
        return _checked_offsets(cu_seqlens, tokens.shape[0])
    if torch.compiler.is_compiling() and cu_seqlens.device.type == "cpu":  # looked at when the graph runs
        checked: Tensor = torch.ops.rl4llm_fast.checked_offsets(cu_seqlens, tokens.shape[0])
        return checked
    # Clamped, so that whatever the offsets hold on a GPU, nothing is read out of bounds.
    return cu_seqlens.long().clamp(0, tokens.shape[0])


def check_offsets(tokens: Tensor, cu_seqlens: Tensor, name: str) -> None:
    """Raises as :func:`sequences`."""
    check_layout(tokens, cu_seqlens, name)
    if not checks.unseen(cu_seqlens):
        _check_contents(cu_seqlens, tokens.shape[0])


def check_layout(tokens: Tensor, cu_seqlens: Tensor, name: str) -> None:
    """Raises as :func:`sequences`, for everything but what the offsets hold."""
    shape = checks.shape(tokens)
    if len(shape) != 1:
        raise ValueError(f"{name}: wanted packed tokens (N,) beside cu_seqlens, got {shape}")
    checks.is_integer("cu_seqlens", cu_seqlens)
    checks.same_device("cu_seqlens", cu_seqlens, tokens, name)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: wanted (B+1,), got {checks.shape(cu_seqlens)}")
    if shape[0] and cu_seqlens.shape[0] == 1:
        raise ValueError(f"cu_seqlens: wanted at least one sequence for {shape[0]} tokens, got (1,)")


def _checked_offsets(cu_seqlens: Tensor, tokens: int) -> Tensor:
    # A copy always: callers reuse their offsets, and a backward pass still needs these.
    offsets = cu_seqlens.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
    _check_contents(offsets, tokens)
    return offsets


@torch.library.custom_op("rl4llm_fast::checked_offsets", mutates_args=())
def _of_a_graph(cu_seqlens: Tensor, tokens: int) -> Tensor:
    return _checked_offsets(cu_seqlens, tokens)


@_of_a_graph.register_fake
def _(cu_seqlens: Tensor, tokens: int) -> Tensor:
    return cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int64)


def _check_contents(offsets: Tensor, tokens: int) -> None:
    extension = dispatch.extension
    plain = offsets.device.type == "cpu" and offsets.dtype == torch.int64 and offsets.is_contiguous()
    if extension is not None and plain:  # the loop below takes a fifth of a millisecond from a cold cache
        extension.check_offsets(offsets.data_ptr(), offsets.shape[0], tokens)
        return
    listed = offsets.tolist()
    if listed[0] != 0 or listed[-1] != tokens:
        raise ValueError(f"cu_seqlens: wanted offsets from 0 to the {tokens} tokens, got {listed[0]} to {listed[-1]}")
    for i, (start, end) in enumerate(itertools.pairwise(listed)):
        if end < start:
            raise ValueError(f"cu_seqlens: wanted offsets that never decrease, got {start}, {end} at position {i}")
