"""TorchRL's vectorised GAE, a convolution over trajectories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cases import Case
from . import Absent, installed, pick


def version() -> str:
    return installed("torchrl")


def build(case: Case, device: str) -> Callable[..., Any]:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    def gae(
        rewards: Tensor, values: Tensor, mask: Tensor | None, mask_mode: str, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        done = torch.zeros(rewards.shape, dtype=torch.bool, device=rewards.device)
        if cu_seqlens is None:
            done[:, -1] = True
        else:
            done[cu_seqlens[1:].long() - 1] = True
        following = torch.where(done, 0.0, values.roll(-1, -1))
        # (..., T, 1): a trajectory each row, or one long row that `done` cuts
        column = [(t if t.dim() == 2 else t[None]).unsqueeze(-1) for t in (values, following, rewards, done)]
        advantages, returns = vec_generalized_advantage_estimate(0.99, 0.95, *column)
        return advantages.view(rewards.shape), returns.view(rewards.shape)

    function = pick({"gae": gae}, case)
    if "holes" in case.variant:
        raise Absent("its estimate takes no mask")
    return function
