"""Vocabulary-parallel heads: every rank of a group holds some rows of the weight, in rank order, any number of them.

A rank reduces its own logits as it always does. What makes the numbers of the whole vocabulary out of that is one
all-gather of three or four numbers a token, joined in rank order, so that all ranks get the same bits; the backward
takes the joint maximum and log-sum, and adds up d hidden over the group. No rank ever sees another one's logits.

A rank's rows are one slice of the vocabulary, with its phantoms, as tiles.py cuts it within a process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference, tiles
from .checks import debug


def resolve(group: str) -> Any:
    """The process group of a name: ops take strings."""
    return torch.distributed.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]


def _all_gather(tensor: Tensor, group: str) -> Tensor:
    """(ranks, ...) in rank order."""
    ranks = resolve(group)
    parts = [torch.empty_like(tensor) for _ in range(ranks.size())]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=ranks)
    return torch.stack(parts)


def all_reduce(tensor: Tensor, group: str) -> None:
    """The sum over the group, in place."""
    torch.distributed.all_reduce(tensor, group=resolve(group))


def local_ids(
    token_ids: Tensor, mask: Tensor | None, weight: Tensor, ignore_index: int, ignored: int, group: str
) -> Tensor:
    """Ids of the whole vocabulary, (N,) or (N, K), as ids of this rank's workspace: the phantom for those of others."""
    rows = weight.shape[0]
    shapes = _all_gather(torch.tensor([rows, *weight.shape[1:], *token_ids.shape], device=token_ids.device), group)
    look = token_ids.device.type == "cpu" or debug()
    if look and bool((shapes[:, 1:] != shapes[0, 1:]).any()):
        raise ValueError(
            "tp_group: wanted the same tokens and hidden size on all ranks; got (D, tokens, ids a token if several) "
            f"{', '.join(f'{tuple(row)} on rank {i}' for i, row in enumerate(shapes[:, 1:].tolist()))}"
        )
    sizes = shapes[:, 0]
    start = sizes[: resolve(group).rank()].sum()
    total = sizes.sum()
    if look:
        reference.check_token_ids(token_ids, mask, ignore_index, int(total))
    return tiles.ids_of_slice(token_ids, start, rows, total, ignore_index, ignored)


def combine(
    logp: Tensor, entropy: Tensor, row_max: Tensor, log_sum: Tensor, temperature: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same four of the whole vocabulary; the entropy (0,) where it is."""
    count, columns = row_max.shape[0], logp.reshape(row_max.shape[0], -1)
    with_entropy = entropy.shape[0] == count and count > 0
    own = [row_max.unsqueeze(1), log_sum.unsqueeze(1), entropy.reshape(count, -1) if with_entropy else columns[:, :0]]
    gathered = _all_gather(torch.cat([*own, columns], 1), group)
    entropies = gathered[..., 2] if with_entropy else entropy[:0].expand(gathered.shape[0], 0)
    chosen = gathered[..., 2 + with_entropy :].reshape(-1, *logp.shape)
    return tiles.join(chosen, entropies, gathered[..., 0], gathered[..., 1], temperature)


class GatheredRows(torch.autograd.Function):
    """Eager: the rows of all ranks as one tensor; backward hands each rank the gradient of its own.

    Every rank computes with the whole vocabulary, so its gradients are whole and there is nothing to add up.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: str) -> Tensor:
        sizes = _all_gather(torch.tensor([rows.shape[0]], device=rows.device), group).flatten().tolist()
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = _all_gather(padded, group)
        start = sum(sizes[: resolve(group).rank()])
        ctx.own = slice(start, start + rows.shape[0])
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.own], None
