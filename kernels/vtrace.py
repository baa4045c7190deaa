"""vtrace: off-policy advantages and value targets by the scan of scan.py (docs/math.md section 4)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import number_or_pointer
from .scan import (
    Cut,
    chain,
    incoming,
    lane_of,
    last_live,
    live_tokens,
    load_tokens,
    locate,
    nearest,
    neighbour,
    number,
    row_start,
    side_by_side,
    store_zeros,
)
from .tl_math import exp


@triton.jit
def value_behind(values_ptr, mask_ptr, end, last, behind, SKIP: tl.constexpr, BLOCK: tl.constexpr):
    """V of the token after a part that takes the next step, or what stands behind the last one."""
    if end <= last:
        t = end
        if mask_ptr is not None:
            if SKIP:
                found = end * 0 - 1
                t0 = end
                while found < 0:  # there is one: `last`
                    i = t0 + tl.arange(0, BLOCK)
                    live = tl.load(mask_ptr + i, mask=i <= last, other=0) != 0
                    nearest_live = tl.min(tl.where(live, i, last + 1), axis=0)
                    found = tl.where(nearest_live <= last, nearest_live, found)
                    t0 += BLOCK
                t = found
            behind = tl.where(tl.load(mask_ptr + t) != 0, tl.load(values_ptr + t).to(tl.float32), 0.0)
        else:
            behind = tl.load(values_ptr + t).to(tl.float32)
    return behind


@triton.jit(do_not_specialize=["B", "parts"])  # T on 16 alone: rows then start on 16 bytes
def vtrace_kernel(
    logp_stride,  # of rows, in elements; so the next four
    rollout_stride,
    rewards_stride,
    values_stride,
    mask_stride,
    logp_ptr,  # (B, T) or (N,)
    rollout_logp_ptr,  # (B, T) or (N,)
    rewards_ptr,  # (B, T) or (N,)
    values_ptr,  # (B, T) or (N,)
    mask_ptr,  # (B, T) or (N,), or None
    offsets_ptr,  # (B+1,) or None
    bootstrap_ptr,  # (B,) or None
    gamma_ptr,  # () or None
    gamma,  # number or None
    lam_ptr,  # () or None
    lam,  # number or None
    rho_max_ptr,  # () or None
    rho_max,  # number or None
    c_max_ptr,  # () or None
    c_max,  # number or None
    partial_ptr,  # (slots, 2) or None
    advantages_ptr,  # (B, T) or (N,)
    targets_ptr,  # (B, T) or (N,)
    B,
    T,
    parts,
    SKIP: tl.constexpr,
    WRITE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """V-trace advantages and value targets.

    Computes: x_t = v_t − V_t = ρ_t(r_t + γ·V_{t+1} − V_t) + γ·c_t·x_{t+1}, A_t = ρ_t(r_t + γ·v_{t+1} − V_t)
    Grid: (slots,), program -> part of a sequence
    Traffic: four inputs a token read, 8 bytes written; inputs once more where a sequence has several parts
    Numerics: as gae_fwd_kernel; the value of the next step's token comes by a scan of its own where a mask has holes
    Gradient: none flows
    """
    slot = tl.program_id(0)
    b, part, row, start, length = locate(slot, offsets_ptr, B, T, parts, PART)
    gamma = number(gamma_ptr, gamma)
    lam = number(lam_ptr, lam)
    rho_max = number(rho_max_ptr, rho_max)
    c_max = number(c_max_ptr, c_max)
    if mask_ptr is not None:
        mask_ptr = row_start(mask_ptr, row, mask_stride, start)
    last = last_live(mask_ptr, length, BLOCK)
    begin = part * PART
    end = tl.minimum(begin + PART, last + 1)
    logp_ptr = row_start(logp_ptr, row, logp_stride, start)
    rollout_logp_ptr = row_start(rollout_logp_ptr, row, rollout_stride, start)
    rewards_ptr = row_start(rewards_ptr, row, rewards_stride, start)
    values_ptr = row_start(values_ptr, row, values_stride, start)
    x = 0.0
    product = 1.0
    next_value = 0.0
    if bootstrap_ptr is not None:
        next_value = tl.load(bootstrap_ptr + b)
    if begin < end:
        next_value = value_behind(values_ptr, mask_ptr, end, last, next_value, SKIP, BLOCK)
    if WRITE:
        if partial_ptr is not None:  # noqa: SIM102 - decided when the kernel is compiled
            if begin < end:
                x = incoming(partial_ptr, slot - part, part, last // PART, x, True)
        place = row.to(tl.int64) * T + start
        advantages_ptr = advantages_ptr + place
        targets_ptr = targets_ptr + place
        store_zeros(advantages_ptr, tl.maximum(begin, end), tl.minimum(begin + PART, length), BLOCK)
        store_zeros(targets_ptr, tl.maximum(begin, end), tl.minimum(begin + PART, length), BLOCK)
    lane = tl.arange(0, BLOCK)
    blocks = (tl.maximum(end - begin, 0) + BLOCK - 1) // BLOCK
    for k in range(blocks):
        t = begin + (blocks - 1 - k) * BLOCK + lane
        live = live_tokens(mask_ptr, t, end)
        steps = live if SKIP else t < end
        r = load_tokens(rewards_ptr, t, live)
        v = load_tokens(values_ptr, t, live)
        ratio = exp(load_tokens(logp_ptr, t, live) - load_tokens(rollout_logp_ptr, t, live))
        rho = tl.where(ratio > rho_max, rho_max, ratio)  # NaN stays
        c = lam * tl.where(ratio > c_max, c_max, ratio)
        known = v
        is_known = steps
        if SKIP:  # noqa: SIM102 - each decided when the kernel is compiled
            if mask_ptr is not None:
                known, found = tl.associative_scan((v, steps.to(tl.int32)), 0, nearest, reverse=True)
                is_known = found != 0
        known = tl.where(is_known, known, next_value)
        after = neighbour(known, lane, next_value, True, BLOCK)
        next_value = lane_of(known, lane, 0)
        a = tl.where(steps, rho * ((r + gamma * after) - v), 0.0)
        factor = tl.where(steps, gamma * c, 1.0)
        a, factor = tl.associative_scan((a, factor), 0, chain, reverse=True)
        x_all = a + factor * x
        if WRITE:
            found_x = neighbour(x_all, lane, x, True, BLOCK)
            advantage = rho * ((r + gamma * (after + found_x)) - v)
            tl.store(advantages_ptr + t, tl.where(live, advantage, 0.0), mask=t < end)
            tl.store(targets_ptr + t, tl.where(live, v + x_all, 0.0), mask=t < end)
        else:
            product *= lane_of(factor, lane, 0)
        x = lane_of(x_all, lane, 0)
    if not WRITE:
        tl.store(partial_ptr + slot.to(tl.int64) * 2, x)
        tl.store(partial_ptr + slot.to(tl.int64) * 2 + 1, product)


def vtrace(
    logp: Tensor,
    rollout_logp: Tensor,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
    rho_max: Tensor,
    c_max: Tensor,
    mask_mode: str,
) -> tuple[Tensor, Tensor]:
    """``schemas.OPS["vtrace"]``."""
    cut = Cut("vtrace", logp, cu_seqlens)
    advantages = torch.empty(logp.shape, dtype=torch.float32, device=logp.device)
    targets = torch.empty_like(advantages)
    inputs, strides = zip(*map(side_by_side, (logp, rollout_logp, rewards, values, mask)), strict=True)
    numbers = [x for value in (gamma, lam, rho_max, c_max) for x in number_or_pointer(value)]
    cut.launch(
        vtrace_kernel,
        (*strides, *inputs, cu_seqlens, bootstrap, *numbers),
        (advantages, targets),
        skip=mask_mode == "skip",
        tokens=logp,
    )
    return advantages, targets
