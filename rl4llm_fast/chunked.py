"""The ops that start from hidden states: logits are made a tile at a time, used and overwritten.

Written once for every backend: the matrix products go to the vendor's library (oneDNN, cuBLAS), the rest to the
backend's own ``token_logprobs`` kernels. Nothing of size N×V ever exists; a workspace of one tile is reused. A tile is
a chunk of tokens, and where that is faster a slice of the vocabulary of it (tiles.py).
Registered as torch ops, so that Dynamo sees one node and not the loop.

Chunks and bits: a matrix product's bits may depend on the number of rows it is given, so results here are reproducible
run to run but, unlike those of the streaming kernels, not independent of N.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference, schemas, tiles, vocab_parallel
from .products import Gradients, Projection, cast, large_empty, scatter
from .tiles import Places, Tile

_IGNORED = -100  # as an id of a slice


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


def ids_in(tile: Tile, slices: list[Tile], token_ids: Tensor, ignore_index: int) -> tuple[Tensor, int]:
    """Ids as a tile's kernels take them, and which of them they ignore."""
    if len(slices) == 1:
        return token_ids, ignore_index
    vocabulary = slices[-1].columns.stop
    return tiles.ids_of_slice(token_ids, tile.start, tile.size, vocabulary, ignore_index, _IGNORED), _IGNORED


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
    need_weight: bool,
    group: str,
) -> tuple[Tensor, ...]:
    total = hidden.shape[0]
    chunk_tokens, slices = tiles.tiling(
        total, weight.shape[0], compute_dtype, logits_dtype, hidden.device.type, chunk_tokens, bool(group)
    )
    live = live_rows(token_ids, mask, ignore_index)
    reference.check_token_ids(token_ids, live, ignore_index, slices[0].width if group else weight.shape[0])
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
    has_room = tiles.has_room(weight.dtype, compute_dtype, slices, keep_logits, need_weight)
    room = large_empty(x, weight.shape, compute_dtype) if has_room else None
    chunks = chunks_of(rows, chunk_tokens)
    for part, chunk in chunks:
        pieces = []
        last = part == chunks[-1][0]
        places = Places(workspace, room if last else None, slices, *chunk.hidden.shape)
        for number, tile in enumerate(slices):
            logits = project(chunk.hidden, places.of(number), tile.columns)
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
        workspace.new_empty(0) if room is None else room,
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
    weight_room: Tensor | None,
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
    gradients = Gradients(x, w, bias, *dtypes, len(chunks), *needs, room=weight_room)
    # From the end, because there the forward's last tiles lie in the memory that it kept.
    made = kept_logits is not None and kept_logits.shape[0] > 0
    project = None if made and len(chunks) * len(slices) == 1 else Projection(w, b, logits_dtype or compute_dtype)
    elements = tiles.workspace_elements(hidden.shape[0], chunk_tokens, slices)
    workspace = kept_logits if made else large_empty(x, (elements,), logits_dtype or compute_dtype)
    assert workspace is not None
    for part, chunk in reversed(chunks):
        pieces = [None if t is None else t[part] for t in saved]
        places = Places(workspace, weight_room if made else None, slices, *chunk.hidden.shape)
        for number, tile in reversed(list(enumerate(slices))):
            logits = places.of(number)
            if not (made and places.outlasts(number)):
                assert project is not None
                project(chunk.hidden, logits, tile.columns)
            ids, ignored = ids_in(tile, slices, chunk.token_ids, ignore_index)
            per_row = (ids, chunk.mask, chunk.temperature, softcap, ignored)
            kernels.token_logprobs_bwd_(logits.unsqueeze(0), *per_row, *pieces)  # the logits are now dlogits
            gradients.add(part, logits[:, : tile.size], tile.columns)
        made = False
    if group and need_hidden:
        vocab_parallel.all_reduce(gradients.hidden, group)
    grad_hidden, grad_weight, grad_bias = gradients.result(index, hidden)
    return grad_hidden, grad_weight if weight_room is None else w.new_empty(0), grad_bias


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
