"""Returns and advantages."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks, dispatch, reference, reference_returns
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
        backend: "eager", "cpu", "triton" or "cuda"; None chooses by device.

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
    group_size, group_ids = _groups(rewards, "rewards", group_size, group_ids)
    checks.in_range("eps", eps, 0.0)
    unbiased = checks.flag("unbiased", unbiased)
    chosen = dispatch.choose("group_advantages", rewards, backend)
    epsilon = checks.number("eps", eps, rewards)
    kernel = reference.group_advantages if chosen == "eager" else dispatch.ops(chosen).group_advantages
    advantages: Tensor = kernel(
        rewards.detach().contiguous(), group_ids, group_size, scale or "none", baseline, unbiased, epsilon
    )
    return advantages


def process_advantages(
    step_rewards: Tensor,
    step_ends: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    length: int,
    eps: Number = 1e-6,
    backend: str | None = None,
) -> Tensor:
    r"""Process-supervised advantages of a group of answers: one reward a reasoning step, spread over tokens.

    .. math::
        \tilde r = \frac{r - \operatorname{mean}(r)}{\operatorname{std}(r) + \varepsilon}, \qquad
        A_{i,t} = \sum_{j:\,\mathrm{index}(j) \ge t} \tilde r_{i,j}

    mean and std (with Bessel's correction) over all step rewards of the group; index(j) is the last token of step j,
    0-based (survey §6.3; Shao et al. 2024, §4.1.3).

    Args:
        step_rewards: (B, K), K the largest number of steps. No gradient flows through them.
        step_ends: (B, K) integers, index(j), strictly increasing in [0, length); -1 after an answer's last step.
        group_size, group_ids: which answers form a group, as in :func:`group_advantages`.
        length: T, the tokens of an answer. Tokens after the last step get 0.
        eps: ε, added to the standard deviation.
        backend: "eager", "cpu", "triton" or "cuda"; None chooses by device.

    Returns:
        Advantages (B, length), fp32 (fp64 for fp64 rewards). Groups with one step, or of equal rewards, give exactly 0.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; not exactly one of ``group_size`` and ``group_ids``; ends
            out of range or not increasing (checked on the CPU always, on a GPU with RL4LLM_FAST_DEBUG=1).
    """
    checks.is_float("step_rewards", step_rewards)
    if step_rewards.dim() != 2:
        raise ValueError(f"step_rewards: wanted (B, K), got {checks.shape(step_rewards)}")
    checks.is_integer("step_ends", step_ends)
    checks.has_shape("step_ends", step_ends, step_rewards.shape, "step_rewards")
    checks.same_device("step_ends", step_ends, step_rewards, "step_rewards")
    length = checks.integer("length", length)
    if length < 0:
        raise ValueError(f"length: wanted at least 0, got {length}")
    checks.in_range("eps", eps, 0.0)
    group_size, group_ids = _groups(step_rewards, "step_rewards", group_size, group_ids)
    step_ends = step_ends.long().contiguous()
    _check_step_ends(step_ends, length)
    chosen = dispatch.choose("process_advantages", step_rewards, backend)
    kernel = reference_returns.process_advantages if chosen == "eager" else dispatch.ops(chosen).process_advantages
    epsilon = checks.number("eps", eps, step_rewards)
    advantages: Tensor = kernel(step_rewards.detach().contiguous(), step_ends, group_ids, group_size, length, epsilon)
    return advantages


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    eps: Number = 1e-8,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Normalise over live tokens: (x − mean)/sqrt(var + ε), var with Bessel's correction.

    Args:
        x: any shape. No gradient flows through it.
        mask: like ``x``, bool or 0/1 integers, True for a live token; others get 0.
        shift_mean: False keeps the mean: the mean is added again.
        eps: ε, added to the variance.
        group: a process group: mean and variance over the live tokens of all its ranks, which all must call this. One
            collective of three numbers a rank, combined in the order of the ranks: the same bits on every rank.
        backend: "eager", "cpu", "triton" or "cuda"; None chooses by device.

    Returns:
        Like ``x``, fp32 (fp64 for fp64 input). One live token: 0 (or the mean, where it is kept).
    """
    checks.is_float("x", x)
    live = checks.live_mask("mask", mask, x.shape, x, "x")
    checks.in_range("eps", eps, 0.0)
    epsilon, shift_mean = checks.number("eps", eps, x), checks.flag("shift_mean", shift_mean)
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group: wanted a torch.distributed process group or None, got {type(group).__name__}")
    chosen = dispatch.choose("whiten", x, backend)
    x = x.detach()
    if chosen == "eager":
        stats = _over_ranks(reference_returns.whiten_stats(x, live), group)
        return reference_returns.whiten_apply(x, live, stats, epsilon, shift_mean)
    x, live = x.contiguous(), None if live is None else live.contiguous()
    kernels = dispatch.ops(chosen)
    stats = _over_ranks(kernels.whiten_stats(x, live), group)
    result: Tensor = kernels.whiten_apply(x, live, stats, epsilon, shift_mean)
    return result


def _groups(rewards: Tensor, name: str, group_size: int | None, group_ids: Tensor | None) -> tuple[int, Tensor | None]:
    """Validation of the two ways to say which answers form a group; the size or 0, the ids (B,) in int64, if any."""
    answers = rewards.shape[0]
    if (group_size is None) == (group_ids is None):
        raise ValueError("group_size, group_ids: wanted exactly one of the two")
    if group_ids is not None:
        checks.is_integer("group_ids", group_ids)
        checks.has_shape("group_ids", group_ids, (answers,), name)
        checks.same_device("group_ids", group_ids, rewards, name)
        return 0, group_ids.long().contiguous()
    size = checks.integer("group_size", group_size)
    if size < 1 or answers % size:
        raise ValueError(f"group_size: wanted a divisor of the {answers} {name}, got {size}")
    return size, None


def _check_step_ends(step_ends: Tensor, length: int) -> None:
    if checks.unseen(step_ends):
        return
    before = torch.nn.functional.pad(step_ends, (1, 0), value=-1)[:, :-1]
    padding = torch.nn.functional.pad(step_ends < 0, (1, 0), value=False)[:, :-1]
    wrong = (step_ends < -1) | (step_ends >= length) | ((step_ends >= 0) & (padding | (step_ends <= before)))
    if bool(wrong.any()):
        answer, step = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"step_ends: wanted ends in [0, {length}), increasing, and -1 only after the last; got "
            f"{int(step_ends[answer, step])} at position {(answer, step)}"
        )


def _over_ranks(stats: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(count, mean, Σ(x − mean)²) of all ranks from those of each, joined in rank order (Chan et al. 1983)."""
    if group is None:
        return stats
    ranks = [torch.empty_like(stats) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, stats, group=group)
    count, mean, squares = ranks[0].unbind()
    for rank in ranks[1:]:
        more, other, others = rank.unbind()
        total = count + more
        part = more / total.clamp(min=1)
        squares = squares + others + (other - mean).square() * count * part
        mean, count = mean + (other - mean) * part, total
    return torch.stack([count, mean, squares])
