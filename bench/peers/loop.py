"""A Python loop over groups, as trainers write it; the ids are sorted once: no group searches for its members."""

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


def build(case: Case, device: str) -> Callable[..., Any]:
    return pick({"group_advantages": group_advantages}, case)
