"""How the ops that start from hidden states cut their logits (N, V) into tiles that fit a workspace."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MIB = 2**20
GPU_WORKSPACE = 512 * MIB  # of logits that are there at once; not yet measured
BY_RULE = 0  # as chunk_tokens of an op
_SLICED_TOKENS = 2048  # tokens a chunk whose vocabulary is sliced
_SLICED_WORKSPACE = 32 * MIB
_ALIGN = 16  # a slice and its phantoms are multiples of this many logits, so that rows stay aligned
NOWHERE = 2**62  # an id outside every vocabulary: kernels answer it with NaN


class Tile(NamedTuple):
    """A slice of the vocabulary, and how many logits wide its rows are with the phantoms of −inf behind it.

    Chosen tokens that stand in another slice point at a phantom, which gives them log-probability −inf here, and the
    slice's tokens their share −g·p of the gradient, by the same kernels.
    """

    start: int
    size: int
    width: int

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.size)


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
        workspace = GPU_WORKSPACE
    else:
        workspace = (64 if compute_dtype.itemsize >= 4 else 256) * MIB
    tokens = workspace // (max(vocabulary, 1) * itemsize)  # a vocabulary-parallel rank may have no row
    return max(tokens // 128 * 128, min(tokens, 128), 1)


def tiling(
    tokens: int,
    vocabulary: int,
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype | None,
    device: str,
    chunk_tokens: int,
    sharded: bool,
) -> tuple[int, list[Tile]]:
    """How many tokens a chunk has, and the slices of its vocabulary.

    With ``chunk_tokens`` given, of a sharded head, on a GPU and in 16 bits: whole rows. In fp32 on a CPU the
    vocabulary is sliced instead, unless all logits fit chunk_rule's workspace: the vendor's library reads and packs
    the head anew for every chunk of tokens, and dW is complete after one product (docs/performance.md). In 16 bits the
    partial sums of dx would be rounded.
    """
    chunk = chunk_tokens or chunk_rule(vocabulary, compute_dtype, device, logits_dtype)
    sliced = chunk_tokens == BY_RULE and not sharded and device == "cpu" and compute_dtype.itemsize >= 4
    if not sliced or tokens <= chunk:
        return chunk, [Tile(0, vocabulary, width(vocabulary) if sharded else vocabulary)]
    chunk = min(tokens, _SLICED_TOKENS)
    most = max(_SLICED_WORKSPACE // (chunk * compute_dtype.itemsize) // _ALIGN * _ALIGN, _ALIGN)
    count = -(-vocabulary // most)
    size = -(-vocabulary // count // _ALIGN) * _ALIGN
    starts = range(0, vocabulary, size)
    return chunk, [Tile(v, min(size, vocabulary - v), width(min(size, vocabulary - v))) for v in starts]


def workspace_elements(tokens: int, chunk: int, slices: list[Tile]) -> int:
    return min(chunk, tokens) * max(tile.width for tile in slices)


def has_room(
    weight_dtype: torch.dtype, compute_dtype: torch.dtype, slices: list[Tile], keep_logits: bool, need_weight: bool
) -> bool:
    """Whether the forward takes the memory of dW already, to keep logits in it that the backward need not make again.

    The backward needs that much in any case, and completes dW a slice at a time, so the peak is no higher.
    """
    return keep_logits and need_weight and len(slices) > 1 and weight_dtype == compute_dtype


def tiles_in_room(tokens: int, factor_width: int, slices: list[Tile]) -> int:
    """How many of the slices before the last find room for their logits, ``tokens`` rows each, at the start of dW.

    The backward uses up the last slice, in the workspace, and then those here, from the last to the first, and writes
    the rows of dW (V, D) in the same order: none may be written over before its turn is past.
    """
    size = tokens * max(tile.width for tile in slices)
    ends = [tile.start * factor_width for tile in reversed(slices[:-1])]  # what is still unwritten in each turn
    count = min(len(ends), ends[0] // size) if ends and size else 0
    while any((count - turn) * size > ends[turn] for turn in range(count)):
        count -= 1
    return count


def tile_of(workspace: Tensor, tile: Tile, rows: int) -> Tensor:
    """The logits of a tile (rows, width) in the flat workspace."""
    return workspace[: rows * tile.width].view(rows, tile.width)


class Places:
    """Where the logits of a chunk's slices lie: in the workspace, one after the other, but for those before the last
    that the backward will find at the start of the memory of dW."""

    def __init__(
        self, workspace: Tensor, room: Tensor | None, slices: list[Tile], tokens: int, factor_width: int
    ) -> None:
        self.workspace, self.slices, self.tokens = workspace, slices, tokens
        self.room = None if room is None else room.view(-1)
        self.kept = 0 if self.room is None else tiles_in_room(tokens, factor_width, slices)
        self.size = tokens * max(tile.width for tile in slices)

    def outlasts(self, index: int) -> bool:
        """Whether the logits of a slice are there when all are made."""
        return index >= len(self.slices) - 1 - self.kept

    def of(self, index: int) -> Tensor:
        """The logits of a slice (tokens, width)."""
        tile, last = self.slices[index], len(self.slices) - 1
        if self.room is None or index == last or not self.outlasts(index):
            return tile_of(self.workspace, tile, self.tokens)
        start = (index - last + self.kept) * self.size
        return tile_of(self.room[start:], tile, self.tokens)


def width(rows: int) -> int:
    """How many logits a row of a slice has in the workspace: the slice, and at least one phantom."""
    return rows // _ALIGN * _ALIGN + _ALIGN


def ids_of_slice(
    token_ids: Tensor, start: Tensor | int, rows: int, vocabulary: Tensor | int, ignore_index: int, ignored: int
) -> Tensor:
    """Ids of the whole vocabulary, (N,) or (N, K), as ids of a slice: the phantom for those of others."""
    own = (token_ids >= start) & (token_ids < start + rows)
    ids = torch.where(own, token_ids - start, rows)
    ids = ids.masked_fill((token_ids < 0) | (token_ids >= vocabulary), NOWHERE)
    return ids.masked_fill(token_ids == ignore_index, ignored)


def join(
    logp: Tensor, entropy: Tensor, row_max: Tensor, log_sum: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same four of the whole vocabulary, from those of its slices, first dimension; no entropy: (slices, 0).

    With share_r the probability of slice r: logp = logp_r + log share_r, H = Σ share_r (H_r − log share_r). In fp64:
    there are few of them.
    """
    dtype, tau = row_max.dtype, temperature.double()
    joint_max = row_max.amax(0)
    nothing = row_max == -torch.inf  # no token of this slice can be drawn; the kernel calls its log-sum NaN
    log_mass = (row_max.double() - joint_max.double()) / tau + log_sum.double()
    log_mass = log_mass.masked_fill(nothing & (joint_max > -torch.inf), -torch.inf)
    joint_sum = torch.logsumexp(log_mass, 0)
    log_share = log_mass - joint_sum
    columns = logp.double().reshape(*row_max.shape, -1)
    chosen = columns.masked_fill(nothing.unsqueeze(-1), -torch.inf) + log_share.unsqueeze(-1)
    if entropy.shape[1]:
        terms = log_share.exp() * (entropy.double() - log_share)
        entropy = terms.masked_fill(log_share == -torch.inf, 0.0).sum(0).to(dtype)
    else:
        entropy = entropy[0]
    return chosen.amax(0).to(dtype).reshape(logp.shape[1:]), entropy, joint_max, joint_sum.to(dtype)
