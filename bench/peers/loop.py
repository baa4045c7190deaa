"""Python loops as trainers write them: over groups (the ids sorted once), and over positions for gae."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cases import Case
from . import pick


def version() -> str:
    return torch.__version__


def group_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    order = torch.argsort(group_ids, stable=True)
    sizes = torch.unique_consecutive(group_ids[order], return_counts=True)[1]
    result = torch.empty_like(rewards)
    for members in order.split(sizes.tolist()):
        r = rewards[members]
        result[members] = (r - r.mean()) / (r.std() + 1e-6) if r.numel() > 1 else 0.0
    return result


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor | None, mask_mode: str, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A step for every position, all rows at once; a pack is padded first, as trainers do."""
    shape, index = rewards.shape, None
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1].long()
        lengths = cu_seqlens.diff().long()
        position = torch.arange(int(lengths.max()), device=rewards.device)
        there = position < lengths[:, None]
        index = (starts[:, None] + position).clamp(max=rewards.numel() - 1)
        live = there if mask is None else there & mask[index]
        rewards, values, mask = rewards[index], values[index], live
    if mask is not None:
        rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantage, following = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    found = []
    for t in reversed(range(rewards.shape[1])):
        new = rewards[:, t] + 0.99 * following - values[:, t] + 0.99 * 0.95 * advantage
        if mask is not None and mask_mode == "skip":
            advantage, following = (
                torch.where(mask[:, t], new, advantage),
                torch.where(mask[:, t], values[:, t], following),
            )
        else:
            advantage, following = new, values[:, t]
        found.append(advantage)
    advantages = torch.stack(found[::-1], 1)
    returns = advantages + values
    if index is not None:
        advantages, returns = advantages[there], returns[there]
        mask = None if mask is None else mask[there]
    if mask is not None:
        advantages, returns = torch.where(mask, advantages, 0.0), torch.where(mask, returns, 0.0)
    return advantages.reshape(shape), returns.reshape(shape)


def build(case: Case, device: str) -> Callable[..., Any]:
    return pick({"group_advantages": group_advantages, "gae": gae}, case)
