"""The matrix products of what starts from hidden states: the logits of a tile, and dx, dW and db from its dlogits.

They go to the vendor's library (oneDNN, cuBLAS), into memory that is used again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import schemas

_EVERYTHING = slice(None)


def large_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A workspace or a large gradient: on a CPU from kept blocks in large pages, whose first touch costs no fault."""
    if like.device.type == "cpu" and _keeps_blocks():
        return torch.ops.rl4llm_fast.kept_empty(like, shape, dtype)  # type: ignore[no-any-return]
    return like.new_empty(shape, dtype=dtype)


@functools.cache
def _keeps_blocks() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("rl4llm_fast::kept_empty", "CPU")


class Projection:
    """logits = x Wᵀ + b of one chunk after the other, written into a workspace, in its dtype.

    Logits wider than the factors are the product's own fp32 sums. cuBLAS writes them out; oneDNN does not through
    PyTorch, so on a CPU the factors are widened, which gives the same numbers at the price of an fp32 product: a slice
    of the head at a time, since the head is the largest thing there is.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype) -> None:
        self.out_dtype = logits_dtype if logits_dtype != weight.dtype and weight.is_cuda else None
        self.weight, self.dtype = weight, weight.dtype if self.out_dtype else logits_dtype
        self.bias = None if bias is None else bias.to(logits_dtype)

    def __call__(self, hidden: Tensor, out: Tensor, columns: slice = _EVERYTHING) -> Tensor:
        """The logits, or a slice of them; −inf where ``out`` is wider than that."""
        weight, bias = self.weight[columns].to(self.dtype), None if self.bias is None else self.bias[columns]
        rows = weight.shape[0]
        logits = out[:, :rows]
        out[:, rows:] = -math.inf
        if self.out_dtype is not None:
            torch.ops.aten.mm.dtype_out(hidden, weight.t(), self.out_dtype, out=logits)
            if bias is not None:
                logits += bias
        elif bias is None:
            torch.mm(hidden.to(weight.dtype), weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden.to(weight.dtype), weight.t(), out=logits)
        return out


def cast(
    compute_dtype: torch.dtype, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors in the products' dtype; a head that is narrower stays as it is, and its slices are widened."""
    wide = weight.dtype.itemsize >= compute_dtype.itemsize
    return (
        hidden.to(compute_dtype),
        weight.to(compute_dtype) if wide else weight,
        None if bias is None else bias.to(compute_dtype),
    )


def scatter(values: Tensor, index: Tensor | None, rows: int) -> Tensor:
    if index is None:
        return values
    return values.new_zeros((rows, *values.shape[1:])).index_copy_(0, index, values)


class Gradients:
    """dx = dz·W, dW = Σ dzᵀ·x and db = Σ dz from the dlogits of one tile after the other; only what is needed.

    Tiles of one chunk of tokens follow each other. Slices of the vocabulary are in fp32 or fp64 only: dx adds up in
    place.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_dtype: torch.dtype,
        grad_weight_dtype: torch.dtype | None,
        chunks: int,
        need_hidden: bool,
        need_weight: bool,
        need_bias: bool,
        *,
        room: Tensor | None = None,
    ) -> None:
        self.x, self.w, self.bias, self.weight_dtype = hidden, weight, bias, weight_dtype
        acc = schemas.accumulation_dtype(hidden.dtype)
        self.hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
        wide = grad_weight_dtype or acc
        self.weight = WeightGradient(weight, weight_dtype, chunks, wide, room) if need_weight else None
        self.db = weight.new_zeros(weight.shape[0] if need_bias else 0, dtype=acc)
        self.need_hidden, self.need_bias = need_hidden, need_bias
        self.part = slice(0, 0)

    def add(self, part: slice, grad_logits: Tensor, columns: slice = _EVERYTHING) -> None:
        if self.need_bias:
            self.db[columns] += grad_logits.sum(0, dtype=self.db.dtype)
        grad_logits = grad_logits.to(self.x.dtype)  # logits may be wider than the factors
        if self.need_hidden:
            weight = self.w[columns].to(self.x.dtype)
            if part != self.part:
                torch.mm(grad_logits, weight, out=self.hidden[part])
            else:
                self.hidden[part].addmm_(grad_logits, weight)
        self.part = part
        if self.weight is not None:
            self.weight.add(grad_logits, self.x[part], columns)

    def result(self, index: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, dW, db) in the dtypes of the factors, dx at its place among the rows of ``like``; (0,) for the rest."""
        return (
            scatter(self.hidden, index, like.shape[0]).to(like.dtype) if self.need_hidden else like.new_empty(0),
            self.weight.result() if self.weight is not None else like.new_empty(0, dtype=self.weight_dtype),
            self.db if self.bias is None else self.db.to(self.bias.dtype),
        )


_WIDENED_ROWS = 4_096


class WeightGradient:
    """dW = Σ over chunks of dzᵀ·x in ``dtype``, added up in ``wide``; in ``room`` where that is given."""

    def __init__(
        self, weight: Tensor, dtype: torch.dtype, chunks: int, wide: torch.dtype, room: Tensor | None = None
    ) -> None:
        self.dtype, self.shape, self.wide = dtype, weight.shape, wide
        self.one_chunk = chunks == 1
        if room is None:
            self.total = weight.new_zeros(self.shape if chunks == 0 else (0,), dtype=self.wide)
        else:
            self.total = room.zero_() if chunks == 0 else room
        self.begun: set[int | None] = set()  # the slices that hold something, by their first column

    def add(self, grad_logits: Tensor, hidden: Tensor, columns: slice = _EVERYTHING) -> None:
        transposed, first = grad_logits.t(), columns.start not in self.begun
        own = self.one_chunk or hidden.dtype == self.wide
        if self.total.numel() == 0:
            self.total = large_empty(hidden, self.shape, hidden.dtype if own else self.wide)
        self.begun.add(columns.start)
        if own and first:
            torch.mm(transposed, hidden, out=self.total[columns])
        elif hidden.dtype == self.wide:
            self.total[columns].addmm_(transposed, hidden)
        elif hidden.is_cuda and first:
            torch.ops.aten.mm.dtype_out(transposed, hidden, self.wide, out=self.total)
        elif hidden.is_cuda:  # cuBLAS adds a bf16 product to an fp32 matrix in one call
            torch.ops.aten.addmm.dtype_out(self.total, transposed, hidden, self.wide, out=self.total)
        else:  # a CPU's product is rounded to bf16; a block of it is widened and added while it is in the cache
            blocks = zip(self.total.split(_WIDENED_ROWS), transposed.split(_WIDENED_ROWS), strict=True)
            for total, block in blocks:
                product = torch.mm(block, hidden)
                total.copy_(product) if first else total.add_(product)

    def result(self) -> Tensor:
        if self.total.dtype == self.dtype:
            return self.total
        return large_empty(self.total, self.shape, self.dtype).copy_(self.total)
