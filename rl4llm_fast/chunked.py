"""The ops that start from hidden states: logits are made a tile at a time, used and overwritten.

Written once for every backend: the matrix products go to the vendor's library (oneDNN, cuBLAS), the rest to the
backend's own ``token_logprobs`` kernels. Nothing of size N×V ever exists; a workspace of one tile is reused. A tile is
a chunk of tokens, and where that is faster a slice of the vocabulary of it (tiles.py).
Registered as torch ops, so that Dynamo sees one node and not the loop.

Chunks and bits: a matrix product's bits may depend on the number of rows it is given, so results here are reproducible
run to run but, unlike those of the streaming kernels, not independent of N.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference, schemas, tiles, vocab_parallel
from .tiles import Tile, chunk_rule

__all__ = ["chunk_rule"]

_IGNORED = -100  # as an id of a slice
_EVERYTHING = slice(None)


def large_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A workspace or a large gradient: on a CPU from kept blocks in large pages, whose first touch costs no fault."""
    if like.device.type == "cpu" and _keeps_blocks():
        return torch.ops.rl4llm_fast.kept_empty(like, shape, dtype)  # type: ignore[no-any-return]
    return like.new_empty(shape, dtype=dtype)


@functools.cache
def _keeps_blocks() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("rl4llm_fast::kept_empty", "CPU")


class Rows(NamedTuple):
    """The per-row inputs of one chunk, or of the live rows."""

    hidden: Tensor
    token_ids: Tensor
    mask: Tensor | None
    temperature: Tensor


def live_rows(token_ids: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    """(N,) bool: the mask, and with one id a row also ignore_index."""
    if token_ids.dim() == 1:
        kept = token_ids != ignore_index
        return kept if mask is None else kept & mask
    return torch.ones(token_ids.shape[0], dtype=torch.bool, device=token_ids.device) if mask is None else mask


def select_live(rows: Rows, live: Tensor) -> tuple[Rows, Tensor | None]:
    """Drop the rows that are not live where that costs no synchronisation; elsewhere zero them.

    Zeroing is needed because their gradient rows are zeros and 0·NaN would reach dW through the product.
    """
    if rows.hidden.device.type != "cpu":
        return rows._replace(hidden=rows.hidden.masked_fill(~live.unsqueeze(-1), 0)), None
    if bool(live.all()):
        return rows._replace(mask=None), None
    index = live.nonzero().squeeze(-1)
    tau = rows.temperature[index] if rows.temperature.dim() else rows.temperature
    return Rows(rows.hidden[index], rows.token_ids[index], None, tau), index


def chunks_of(rows: Rows, size: int) -> list[tuple[slice, Rows]]:
    """The rows in chunks of at most ``size``, each with its place.

    As few as that allows, and about equal: a short last chunk's products run at a fraction of the library's rate.
    """
    result = []
    count = rows.hidden.shape[0]
    equal = -(-count // max(-(-count // size), 1))
    size = max(min(size, -(-equal // 16) * 16), 1)
    for start in range(0, rows.hidden.shape[0], size):
        part = slice(start, start + size)
        tau = rows.temperature[part] if rows.temperature.dim() else rows.temperature
        mask = None if rows.mask is None else rows.mask[part]
        result.append((part, Rows(rows.hidden[part], rows.token_ids[part], mask, tau)))
    return result


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


def tile_of(workspace: Tensor, tile: Tile, rows: int) -> Tensor:
    """The logits of a tile (rows, width) in the flat workspace."""
    return workspace[: rows * tile.width].view(rows, tile.width)


def ids_in(tile: Tile, slices: list[Tile], token_ids: Tensor, ignore_index: int) -> tuple[Tensor, int]:
    """Ids as a tile's kernels take them, and which of them they ignore."""
    if len(slices) == 1:
        return token_ids, ignore_index
    vocabulary = slices[-1].columns.stop
    return tiles.ids_of_slice(token_ids, tile.start, tile.size, vocabulary, ignore_index, _IGNORED), _IGNORED


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


def _forward(
    kernels: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    ignore_index: int,
    return_entropy: bool,
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype | None,
    chunk_tokens: int,
    keep_logits: bool,
    group: str,
) -> tuple[Tensor, ...]:
    total = hidden.shape[0]
    chunk_tokens, slices = tiles.tiling(
        total, weight.shape[0], compute_dtype, logits_dtype, hidden.device.type, chunk_tokens, bool(group)
    )
    live = live_rows(token_ids, mask, ignore_index)
    check_ids(token_ids, live, ignore_index, slices[0].width if group else weight.shape[0])
    rows, index = select_live(Rows(hidden, token_ids, mask, temperature), live)
    x, w, b = cast(compute_dtype, rows.hidden, weight, bias)
    rows = rows._replace(hidden=x)
    count = x.shape[0]
    acc = schemas.accumulation_dtype(compute_dtype)
    logp = x.new_empty((count, *token_ids.shape[1:]), dtype=acc)
    entropy = x.new_empty(count if return_entropy else 0, dtype=acc)
    row_max, log_sum = (x.new_empty(count, dtype=acc) for _ in range(2))
    project = Projection(w, b, logits_dtype or compute_dtype)
    elements = tiles.workspace_elements(total, chunk_tokens, slices)
    workspace = large_empty(x, (elements,), logits_dtype or compute_dtype)
    for part, chunk in chunks_of(rows, chunk_tokens):
        pieces = []
        for tile in slices:
            logits = project(chunk.hidden, tile_of(workspace, tile, chunk.hidden.shape[0]), tile.columns)
            ids, ignored = ids_in(tile, slices, chunk.token_ids, ignore_index)
            per_row = (ids, chunk.mask, chunk.temperature, softcap, ignored)
            pieces.append(kernels.token_logprobs_fwd(logits.unsqueeze(0), *per_row, return_entropy))
        outputs = pieces[0]
        if len(pieces) > 1:
            logps, entropies, maxima, sums = (torch.stack(parts) for parts in zip(*pieces, strict=True))
            outputs = tiles.join(logps, entropies, maxima, sums, chunk.temperature)
        for whole, piece in zip((logp, entropy, row_max, log_sum), outputs, strict=True):
            if whole.shape[0]:
                whole[part] = piece
    if group:
        logp, entropy, row_max, log_sum = vocab_parallel.combine(
            logp, entropy, row_max, log_sum, rows.temperature, group
        )
    if group or len(slices) > 1:  # joined log-probabilities of what is not live are no zeros
        dead = rows.token_ids == ignore_index
        if rows.mask is not None:
            dead_rows = ~rows.mask
            dead = dead | (dead_rows if dead.dim() == 1 else dead_rows.unsqueeze(-1))
            entropy = entropy.masked_fill(dead_rows, 0.0) if return_entropy else entropy
        logp = logp.masked_fill(dead, 0.0)
    return (
        scatter(logp, index, total),
        scatter(entropy, index, total) if return_entropy else entropy.clone(),
        scatter(row_max, index, total),
        scatter(log_sum, index, total),
        workspace if keep_logits else workspace.new_empty(0),
    )


def _backward(
    kernels: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    ignore_index: int,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    kept_logits: Tensor | None,
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype | None,
    grad_weight_dtype: torch.dtype | None,
    chunk_tokens: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, index = select_live(Rows(hidden, token_ids, mask, temperature), live_rows(token_ids, mask, ignore_index))
    x, w, b = cast(compute_dtype, rows.hidden, weight, bias)
    rows = rows._replace(hidden=x)
    saved = [
        t if t is None or index is None else t[index] for t in (row_max, log_sum, entropy, grad_logp, grad_entropy)
    ]
    chunk_tokens, slices = tiles.tiling(
        hidden.shape[0], weight.shape[0], compute_dtype, logits_dtype, hidden.device.type, chunk_tokens, bool(group)
    )
    chunks = chunks_of(rows, chunk_tokens)
    dtypes, needs = (weight.dtype, grad_weight_dtype), (need_hidden, need_weight, need_bias)
    gradients = Gradients(x, w, bias, *dtypes, len(chunks), *needs)
    # From the end, because there the forward's last tile lies in the workspace that it kept.
    made = kept_logits is not None and kept_logits.shape[0] > 0
    project = None if made and len(chunks) * len(slices) == 1 else Projection(w, b, logits_dtype or compute_dtype)
    elements = tiles.workspace_elements(hidden.shape[0], chunk_tokens, slices)
    workspace = kept_logits if made else large_empty(x, (elements,), logits_dtype or compute_dtype)
    assert workspace is not None
    for part, chunk in reversed(chunks):
        pieces = [None if t is None else t[part] for t in saved]
        for tile in reversed(slices):
            logits = tile_of(workspace, tile, chunk.hidden.shape[0])
            if not made:
                assert project is not None
                project(chunk.hidden, logits, tile.columns)
            made = False
            ids, ignored = ids_in(tile, slices, chunk.token_ids, ignore_index)
            per_row = (ids, chunk.mask, chunk.temperature, softcap, ignored)
            kernels.token_logprobs_bwd_(logits.unsqueeze(0), *per_row, *pieces)  # the logits are now dlogits
            gradients.add(part, logits[:, : tile.size], tile.columns)
    if group and need_hidden:
        vocab_parallel.all_reduce(gradients.hidden, group)
    return gradients.result(index, hidden)


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
    ) -> None:
        self.x, self.w, self.bias, self.weight_dtype = hidden, weight, bias, weight_dtype
        acc = schemas.accumulation_dtype(hidden.dtype)
        self.hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
        wide = grad_weight_dtype or acc
        self.weight = WeightGradient(weight, weight_dtype, chunks, wide) if need_weight else None
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
    """dW = Σ over chunks of dzᵀ·x in ``dtype``, added up in ``wide``."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, chunks: int, wide: torch.dtype) -> None:
        self.dtype, self.shape, self.wide = dtype, weight.shape, wide
        self.one_chunk = chunks == 1
        self.total = weight.new_zeros(self.shape if chunks == 0 else (0,), dtype=self.wide)
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


def check_ids(token_ids: Tensor, live: Tensor, ignore_index: int, vocabulary: int) -> None:
    """IndexError for a live id outside the vocabulary, where looking costs no synchronisation."""
    if token_ids.device.type != "cpu":
        return
    wide_live = live if token_ids.dim() == 1 else live.unsqueeze(-1) & (token_ids != ignore_index)
    invalid = wide_live & ((token_ids < 0) | (token_ids >= vocabulary))
    reference.check_token_ids(token_ids, invalid, vocabulary)


def register(library: torch.library.Library, namespace: str) -> None:
    """Implement the linear ops of one namespace by chunks over that namespace's own streaming kernels."""
    kernels = getattr(torch.ops, namespace)

    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _forward(kernels, *args)

    def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(kernels, *args)

    for key in ("CPU", "CUDA"):
        library.impl("vocab_parallel_ids", vocab_parallel.local_ids, key)
        library.impl("linear_token_logprobs_fwd", forward, key)
        library.impl("linear_token_logprobs_bwd", backward, key)
