"""group_advantages and process_advantages: statistics of groups of answers (docs/math.md section 4, "group" rows).

Ids are sorted (stably, so that a group's members keep their order), and where each group starts is found by a running
sum: no group need be counted by the host. One program then takes one group, however long; there are at most as many
groups as answers, and a program without a group ends at once. Sums are fp64: a group is small beside its tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .rows import check_grid, number_or_pointer, on_device
from .scan import number
from .whiten import whiten_stats


@triton.jit
def group_members(starts_ptr, g, group_size):
    """(start, end) of a group in the sorted answers."""
    if starts_ptr is None:
        start = g.to(tl.int64) * group_size
        end = start + group_size
    else:
        start = tl.load(starts_ptr + g)
        end = tl.load(starts_ptr + g + 1)
    return start, end


@triton.jit
def answer_of(order_ptr, i, inside):
    """The answer at place i of the sorted ones."""
    answer = i
    if order_ptr is not None:
        answer = tl.load(order_ptr + i, mask=inside, other=0)
    return answer


@triton.jit(do_not_specialize=["group_size"])
def group_advantages_kernel(
    rewards_ptr,  # (B,)
    order_ptr,  # (B,) answers sorted by group, or None: as they are
    starts_ptr,  # (B+1,) where each group starts in order, B where there is none; or None: groups of group_size
    group_size,
    batch_stats_ptr,  # (3,) fp64: whiten_stats of all rewards, or None: no batch scale
    eps_ptr,  # () or None
    eps,  # number or None
    advantages_ptr,  # (B,)
    LEAVE_ONE_OUT: tl.constexpr,
    BY_GROUP: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Outcome advantages of one group.

    Computes: (R_i − mean R)/(std R + ε), or that with the batch's std, R_i − mean R, or (R_i − mean R)·G/(G−1)
    Grid: (B,) or (B/group_size,), program -> group
    Traffic: a group's rewards and its places in the order three times (cache), 4 bytes a reward written
    Numerics: fp64 about the group's first reward, in the order of its members; all equal, or one member: exactly 0
    Gradient: none flows
    """
    start, end = group_members(starts_ptr, tl.program_id(0), group_size)
    if start < end:
        lane = tl.arange(0, BLOCK)
        first = tl.load(rewards_ptr + answer_of(order_ptr, start, True)).to(tl.float64)
        origin = tl.where(tl.abs(first) < float("inf"), first, 0.0)
        total = first * 0.0
        different = tl.where(first == first, 0, 1)  # NaN equals nothing
        for i0 in range(start, end, BLOCK):
            i = i0 + lane
            r = tl.load(rewards_ptr + answer_of(order_ptr, i, i < end), mask=i < end, other=0.0).to(tl.float64)
            total += tl.sum(tl.where(i < end, r - origin, 0.0), axis=0)
            different = tl.maximum(different, tl.max(tl.where((i < end) & (r != first), 1, 0), axis=0))
        size = (end - start).to(tl.float64)
        mean = total / size
        divisor = mean * 0.0 + 1.0
        if LEAVE_ONE_OUT:
            divisor = (size - 1.0) / size
        elif BY_GROUP:
            squares = mean * 0.0
            for i0 in range(start, end, BLOCK):
                i = i0 + lane
                r = tl.load(rewards_ptr + answer_of(order_ptr, i, i < end), mask=i < end, other=0.0).to(tl.float64)
                centred = tl.where(i < end, (r - origin) - mean, 0.0)
                squares += tl.sum(centred * centred, axis=0)
            freedom = tl.maximum(size - (1.0 if UNBIASED else 0.0), 1.0)
            divisor = tl.sqrt(squares / freedom) + number(eps_ptr, eps)
        elif batch_stats_ptr is not None:
            freedom = tl.maximum(tl.load(batch_stats_ptr) - (1.0 if UNBIASED else 0.0), 1.0)
            divisor = tl.sqrt(tl.load(batch_stats_ptr + 2) / freedom) + number(eps_ptr, eps)
        for i0 in range(start, end, BLOCK):
            i = i0 + lane
            answer = answer_of(order_ptr, i, i < end)
            r = tl.load(rewards_ptr + answer, mask=i < end, other=0.0).to(tl.float64)
            advantage = tl.where((different != 0) & (size > 1.0), ((r - origin) - mean) / divisor, 0.0)
            tl.store(advantages_ptr + answer, advantage.to(tl.float32), mask=i < end)


@triton.jit(do_not_specialize=["group_size", "K"])
def process_stats_kernel(
    rewards_ptr,  # (B, K)
    ends_ptr,  # (B, K), −1 where there is no step
    order_ptr,  # (B,) or None
    starts_ptr,  # (B+1,) or None
    group_size,
    eps_ptr,  # () or None
    eps,  # number or None
    stats_ptr,  # (B, 2) fp64: mean, 1/(std + ε), the latter 0 for a group that is constant
    K,
    BLOCK: tl.constexpr,
):
    """Mean and scale of the step rewards of one group, for each of its answers.

    Computes: mean r, 1/(std r + ε) over all steps of the group, 0 where all are equal or there is one
    Grid: (B,) or (B/group_size,), program -> group
    Traffic: 4 + 8 bytes a step read twice (cache), 16 an answer written
    Numerics: fp64, in the order of answers and steps
    Gradient: none flows
    """
    start, end = group_members(starts_ptr, tl.program_id(0), group_size)
    if start < end:
        lane = tl.arange(0, BLOCK)
        total = tl.sum(lane * 0, axis=0).to(tl.float64)
        count = total
        squares = total
        low = total + float("inf")
        high = total - float("inf")
        steps = (end - start) * K
        for e0 in range(0, steps, BLOCK):
            e = e0 + lane
            at = answer_of(order_ptr, start + e // K, e < steps).to(tl.int64) * K + e % K
            there = (e < steps) & (tl.load(ends_ptr + at, mask=e < steps, other=-1) >= 0)
            r = tl.load(rewards_ptr + at, mask=there, other=0.0).to(tl.float64)
            total += tl.sum(r, axis=0)
            count += tl.sum(there.to(tl.float64), axis=0)
            low = tl.minimum(low, tl.min(tl.where(there, r, float("inf")), axis=0))
            high = tl.maximum(high, tl.max(tl.where(there, r, -float("inf")), axis=0))
        mean = total / tl.maximum(count, 1.0)
        for e0 in range(0, steps, BLOCK):
            e = e0 + lane
            at = answer_of(order_ptr, start + e // K, e < steps).to(tl.int64) * K + e % K
            there = (e < steps) & (tl.load(ends_ptr + at, mask=e < steps, other=-1) >= 0)
            r = tl.load(rewards_ptr + at, mask=there, other=0.0).to(tl.float64)
            centred = tl.where(there, r - mean, 0.0)
            squares += tl.sum(centred * centred, axis=0)
        scale = 1.0 / (tl.sqrt(squares / tl.maximum(count - 1.0, 1.0)) + number(eps_ptr, eps))
        constant = ((low == high) & (mean == mean)) | (count <= 1.0)  # min and max drop NaN
        scale = tl.where(constant, 0.0, scale)
        for i0 in range(start, end, BLOCK):
            i = i0 + lane
            answer = answer_of(order_ptr, i, i < end).to(tl.int64)
            tl.store(stats_ptr + answer * 2, tl.zeros(i.shape, tl.float64) + mean, mask=i < end)
            tl.store(stats_ptr + answer * 2 + 1, tl.zeros(i.shape, tl.float64) + scale, mask=i < end)


@triton.jit(do_not_specialize=["K", "length"])
def process_advantages_kernel(
    rewards_ptr,  # (B, K)
    ends_ptr,  # (B, K)
    stats_ptr,  # (B, 2) fp64
    advantages_ptr,  # (B, length)
    K,
    length,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Step rewards summed from the right and spread over the tokens of one answer.

    Computes: A_t = Σ_{j: index(j) >= t} r̃_j
    Grid: (B·ceil(length/BLOCK_T),), program -> (answer, tokens)
    Traffic: 12 bytes a step (cache), 4 a token written
    Numerics: fp64, steps in blocks of BLOCK_K from the first
    Gradient: none flows
    """
    blocks = (length + BLOCK_T - 1) // BLOCK_T
    answer = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    mean = tl.load(stats_ptr + answer * 2)
    scale = tl.load(stats_ptr + answer * 2 + 1)
    total = tl.zeros(t.shape, tl.float64)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        last = tl.load(ends_ptr + answer * K + k, mask=k < K, other=-1)
        r = tl.load(rewards_ptr + answer * K + k, mask=last >= 0, other=0.0).to(tl.float64)
        normalised = tl.where(scale == 0.0, 0.0, (r - mean) * scale)
        total += tl.sum(tl.where(last[None, :] >= t[:, None], normalised[None, :], 0.0), axis=1)
    tl.store(advantages_ptr + answer * length + t, total.to(tl.float32), mask=t < length)


def sorted_groups(group_ids: Tensor | None, group_size: int, count: int) -> tuple[Tensor | None, Tensor | None, int]:
    """(order, starts, groups at most); without ids consecutive groups need neither."""
    if group_ids is None:
        return None, None, count // group_size
    ids, order = torch.sort(group_ids, stable=True)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[1:] = ids[1:] != ids[:-1]
    # Every other answer writes the same number to the same last place: which comes last is no matter.
    place = torch.where(begins, begins.cumsum(0) - 1, count)
    starts = torch.full((count + 1,), count, dtype=torch.int64, device=ids.device)
    position = torch.arange(count, device=ids.device)
    return order, starts.scatter_(0, place, torch.where(begins, position, count)), count


def group_advantages(
    rewards: Tensor, group_ids: Tensor | None, group_size: int, scale: str, baseline: str, unbiased: bool, eps: Tensor
) -> Tensor:
    """``schemas.OPS["group_advantages"]``."""
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    if rewards.numel() == 0:
        return advantages
    order, starts, groups = sorted_groups(group_ids, group_size, rewards.shape[0])
    leave_one_out = baseline == "leave_one_out"
    batch = whiten_stats(rewards, None) if scale == "batch" and not leave_one_out else None
    with on_device(rewards):
        group_advantages_kernel[check_grid("group_advantages", groups)](
            rewards, order, starts, group_size, batch, *number_or_pointer(eps), advantages,
            LEAVE_ONE_OUT=leave_one_out, BY_GROUP=scale == "group", UNBIASED=unbiased, BLOCK=configs.GROUP_BLOCK,
            num_warps=1, **configs.COMPILE,
        )  # fmt: skip
    return advantages


def process_advantages(
    step_rewards: Tensor, step_ends: Tensor, group_ids: Tensor | None, group_size: int, length: int, eps: Tensor
) -> Tensor:
    """``schemas.OPS["process_advantages"]``."""
    answers, steps = step_rewards.shape
    advantages = torch.empty((answers, length), dtype=torch.float32, device=step_rewards.device)
    if advantages.numel() == 0 or steps == 0:
        return advantages.zero_()
    order, starts, groups = sorted_groups(group_ids, group_size, answers)
    stats = torch.empty((answers, 2), dtype=torch.float64, device=step_rewards.device)
    block_k, block_t = configs.PROCESS_BLOCK
    grid = check_grid("process_advantages", answers * triton.cdiv(length, block_t))
    with on_device(step_rewards):
        process_stats_kernel[check_grid("process_advantages", groups)](
            step_rewards, step_ends, order, starts, group_size, *number_or_pointer(eps), stats, steps,
            BLOCK=configs.GROUP_BLOCK, num_warps=1, **configs.COMPILE,
        )  # fmt: skip
        process_advantages_kernel[grid](
            step_rewards,
            step_ends,
            stats,
            advantages,
            steps,
            length,
            BLOCK_K=block_k,
            BLOCK_T=block_t,
            num_warps=4,
            **configs.COMPILE,
        )
    return advantages
