"""Returns and advantages."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from . import checks, dispatch, reference
from .checks import Number


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: Literal["group", "batch"] | None = "group",
    baseline: Literal["mean", "leave_one_out"] = "mean",
    unbiased: bool = True,
    eps: Number = 1e-6,
    backend: str | None = None,
) -> Tensor:
    r"""Outcome advantages of a group of answers to one prompt: GRPO, Dr.GRPO and leave-one-out (RLOO).

    .. math::
        A_i = \frac{R_i - \operatorname{mean}(R)}{\operatorname{std}(R) + \varepsilon}

    (survey §6.3; Shao et al. 2024, §4.1.2.) ``scale="batch"`` divides by the standard deviation of all raw rewards of
    the batch; ``scale=None`` not at all (Dr.GRPO, Liu et al. 2025); ``baseline="leave_one_out"`` gives
    R_i − mean of the others, never scaled (Ahmadian et al. 2024).

    Args:
        rewards: (B,), one number per answer. No gradient flows through them.
        group_size: consecutive answers of one prompt; must divide B. Give this or ``group_ids``.
        group_ids: (B,) integers, any values in any order, ragged groups: equal ids form a group.
        scale: "group", "batch" or None.
        baseline: "mean" or "leave_one_out".
        unbiased: the standard deviation with Bessel's correction.
        eps: ε, added to the standard deviation (TRL's is 1e-4).
        backend: "eager" or "cpu"; None chooses by device.

    Returns:
        Advantages (B,), fp32 (fp64 for fp64 rewards). Groups of one and groups of equal rewards give exactly 0.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; not exactly one of ``group_size`` and ``group_ids``; a
            ``group_size`` that does not divide B.
    """
    checks.is_float("rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"rewards: wanted (B,), got {checks.shape(rewards)}")
    checks.choice("baseline", baseline, ("mean", "leave_one_out"))
    if scale is not None:
        checks.choice("scale", scale, ("group", "batch"))
    if (group_size is None) == (group_ids is None):
        raise ValueError("group_size, group_ids: wanted exactly one of the two")
    if group_ids is not None:
        checks.is_integer("group_ids", group_ids)
        checks.has_shape("group_ids", group_ids, rewards.shape, "rewards")
        checks.same_device("group_ids", group_ids, rewards, "rewards")
        group_ids = group_ids.long().contiguous()
    elif group_size is not None and (group_size < 1 or rewards.shape[0] % group_size):
        raise ValueError(f"group_size: wanted a divisor of the {rewards.shape[0]} rewards, got {group_size}")
    chosen = dispatch.choose("group_advantages", rewards, backend)
    epsilon = checks.number("eps", eps, rewards)
    kernel = reference.group_advantages if chosen == "eager" else dispatch.ops(chosen).group_advantages
    advantages: Tensor = kernel(
        rewards.detach().contiguous(), group_ids, group_size or 0, scale or "none", baseline, unbiased, epsilon
    )
    return advantages
