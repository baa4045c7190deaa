"""The ops that start from hidden states: logits are made a chunk of tokens at a time, used and overwritten.

Written once for every backend: the matrix products go to the vendor's library (oneDNN, cuBLAS), the rest to the
backend's own ``token_logprobs`` kernels. Nothing of size N×V ever exists; a workspace of chunk×V is reused.
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

from . import reference, schemas, vocab_parallel

MIB = 2**20


def chunk_rule(
    vocabulary: int, compute_dtype: torch.dtype, device: str, logits_dtype: torch.dtype | None = None
) -> int:
    """How many tokens' logits the workspace holds: 512 MiB on a GPU; on a CPU 64 MiB, or 256 MiB in bf16 and fp16.

    Large enough that a product runs at the library's full rate (a few hundred rows), small enough to be noise beside
    the weights. On a CPU a wider workspace buys nothing in fp32, whose products are slow; in bf16 they are 2.6 times as
    fast and the fp32 accumulation of dW between chunks starts to show, so chunks are larger (docs/performance.md).
    Logits that are kept in another dtype need the room of both: their gradient is rounded for the products.
    """
    wide = logits_dtype is not None and logits_dtype != compute_dtype
    itemsize = compute_dtype.itemsize + (logits_dtype.itemsize if wide and logits_dtype is not None else 0)
    if device != "cpu":
        workspace = 512 * MIB
    else:
        workspace = (64 if compute_dtype.itemsize >= 4 else 256) * MIB
    tokens = workspace // (max(vocabulary, 1) * itemsize)  # a vocabulary-parallel rank may have no row
    return max(tokens // 128 * 128, min(tokens, 128), 1)


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
    PyTorch, so on a CPU the factors are widened, which gives the same numbers at the price of an fp32 product.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, logits_dtype: torch.dtype) -> None:
        self.out_dtype = logits_dtype if logits_dtype != weight.dtype and weight.is_cuda else None
        self.weight = weight if self.out_dtype else weight.to(logits_dtype)
        self.bias = None if bias is None else bias.to(logits_dtype)

    def __call__(self, hidden: Tensor, out: Tensor) -> Tensor:
        """The logits; −inf where ``out`` is wider than the head."""
        rows = self.weight.shape[0]
        logits = out[:, :rows]
        out[:, rows:] = -math.inf
        if self.out_dtype is not None:
            torch.ops.aten.mm.dtype_out(hidden, self.weight.t(), self.out_dtype, out=logits)
            if self.bias is not None:
                logits += self.bias
        elif self.bias is None:
            torch.mm(hidden.to(self.weight.dtype), self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, hidden.to(self.weight.dtype), self.weight.t(), out=logits)
        return out


def cast(compute_dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.to(compute_dtype) for t in tensors)


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
    rows_total, vocabulary = hidden.shape[0], vocab_parallel.width(weight.shape[0], group)
    live = live_rows(token_ids, mask, ignore_index)
    check_ids(token_ids, live, ignore_index, vocabulary)
    rows, index = select_live(Rows(hidden, token_ids, mask, temperature), live)
    x, w, b = cast(compute_dtype, rows.hidden, weight, bias)
    assert x is not None
    assert w is not None
    rows = rows._replace(hidden=x)
    count = x.shape[0]
    acc = schemas.accumulation_dtype(compute_dtype)
    logp = x.new_empty((count, *token_ids.shape[1:]), dtype=acc)
    entropy, row_max, log_sum = (x.new_empty(count, dtype=acc) for _ in range(3))
    project = Projection(w, b, logits_dtype or compute_dtype)
    workspace = large_empty(x, (min(chunk_tokens, rows_total), vocabulary), logits_dtype or compute_dtype)
    for part, chunk in chunks_of(rows, chunk_tokens):
        logits = project(chunk.hidden, workspace[: chunk.hidden.shape[0]])
        outputs = kernels.token_logprobs_fwd(
            logits.unsqueeze(0), chunk.token_ids, chunk.mask, chunk.temperature, softcap, ignore_index, return_entropy
        )
        for whole, piece in zip((logp, entropy, row_max, log_sum), outputs, strict=True):
            if piece.shape[0]:
                whole[part] = piece
    entropy = entropy if return_entropy else entropy[:0]
    if group:
        logp, entropy, row_max, log_sum = vocab_parallel.combine(
            logp, entropy, row_max, log_sum, rows.temperature, group
        )
        dead = rows.token_ids == ignore_index
        if rows.mask is not None:
            dead_rows = ~rows.mask
            dead = dead | (dead_rows if dead.dim() == 1 else dead_rows.unsqueeze(-1))
            entropy = entropy.masked_fill(dead_rows, 0.0) if return_entropy else entropy
        logp = logp.masked_fill(dead, 0.0)
    kept = workspace if keep_logits and rows_total <= chunk_tokens else workspace.new_empty(0)
    return (
        scatter(logp, index, rows_total),
        scatter(entropy, index, rows_total) if return_entropy else entropy.clone(),
        scatter(row_max, index, rows_total),
        scatter(log_sum, index, rows_total),
        kept,
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
    assert x is not None
    assert w is not None
    rows = rows._replace(hidden=x)
    saved = [
        t if t is None or index is None else t[index] for t in (row_max, log_sum, entropy, grad_logp, grad_entropy)
    ]
    count, vocabulary = x.shape[0], vocab_parallel.width(weight.shape[0], group)
    dtypes, needs = (weight.dtype, grad_weight_dtype), (need_hidden, need_weight, need_bias)
    gradients = Gradients(x, w, bias, *dtypes, -(-count // chunk_tokens), *needs)
    reuse = kept_logits is not None and kept_logits.shape[0] > 0
    if reuse:
        workspace, project = kept_logits, None
    else:
        project = Projection(w, b, logits_dtype or compute_dtype)
        workspace = large_empty(x, (min(chunk_tokens, count), vocabulary), logits_dtype or compute_dtype)
    assert workspace is not None
    for part, chunk in chunks_of(rows, chunk_tokens):
        logits = workspace[: chunk.hidden.shape[0]]
        if project is not None:
            project(chunk.hidden, logits)
        pieces = [None if t is None else t[part] for t in saved]
        kernels.token_logprobs_bwd_(
            logits.unsqueeze(0), chunk.token_ids, chunk.mask, chunk.temperature, softcap, ignore_index, *pieces
        )  # the logits are now dlogits
        gradients.add(part, logits[:, : weight.shape[0]])
    if group and need_hidden:
        vocab_parallel.all_reduce(gradients.hidden, group)
    return gradients.result(index, hidden)


class Gradients:
    """dx = dz·W, dW = Σ dzᵀ·x and db = Σ dz from the dlogits of one chunk after the other; only what is needed."""

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
        self.weight = WeightGradient(weight, weight_dtype, chunks, grad_weight_dtype) if need_weight else None
        self.db = weight.new_zeros(weight.shape[0] if need_bias else 0, dtype=acc)
        self.need_hidden, self.need_bias = need_hidden, need_bias

    def add(self, part: slice, grad_logits: Tensor) -> None:
        if self.need_bias:
            self.db += grad_logits.sum(0, dtype=self.db.dtype)
        grad_logits = grad_logits.to(self.w.dtype)  # logits may be wider than the factors
        if self.need_hidden:
            torch.mm(grad_logits, self.w, out=self.hidden[part])
        if self.weight is not None:
            self.weight.add(grad_logits, self.x[part])

    def result(self, index: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, dW, db) in the dtypes of the factors, dx at its place among the rows of ``like``; (0,) for the rest."""
        return (
            scatter(self.hidden, index, like.shape[0]).to(like.dtype) if self.need_hidden else like.new_empty(0),
            self.weight.result() if self.weight is not None else like.new_empty(0, dtype=self.weight_dtype),
            self.db if self.bias is None else self.db.to(self.bias.dtype),
        )


_WIDENED_ROWS = 4_096


class WeightGradient:
    """dW = Σ over chunks of dzᵀ·x, added up in ``wide``: None for fp32 (fp64 for fp64) whatever the products' dtype."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, chunks: int, wide: torch.dtype | None = None) -> None:
        self.dtype, self.shape = dtype, weight.shape
        self.wide = wide or schemas.accumulation_dtype(weight.dtype)
        self.one_chunk = chunks == 1
        self.total = weight.new_zeros(self.shape if chunks == 0 else (0,), dtype=self.wide)

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        transposed, first = grad_logits.t(), self.total.numel() == 0
        if first:
            own = self.one_chunk or hidden.dtype == self.wide
            self.total = large_empty(hidden, self.shape, hidden.dtype if own else self.wide)
            if own:
                torch.mm(transposed, hidden, out=self.total)
                return
        if hidden.dtype == self.wide:
            self.total.addmm_(transposed, hidden)
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
