"""gae and its backward by the scan of scan.py (docs/math.md section 4): discounted and λ-returns are its returns."""

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
    neighbour,
    number,
    row_start,
    side_by_side,
    store_zeros,
)


@triton.jit(do_not_specialize=["B", "parts"])  # T on 16 alone: rows then start on 16 bytes
def gae_fwd_kernel(
    rewards_stride,  # of rows, in elements; so the next three
    values_stride,
    kl_stride,
    mask_stride,
    rewards_ptr,  # (B, T) or (N,), or None with scores
    values_ptr,  # (B, T) or (N,), or None: 0
    kl_ptr,  # (B, T) or (N,), or None
    mask_ptr,  # (B, T) or (N,), or None
    offsets_ptr,  # (B+1,) of packed tokens, or None
    scores_ptr,  # (B,) or None
    bootstrap_ptr,  # (B,) or None
    gamma_ptr,  # () or None
    gamma,  # number or None
    lam_ptr,  # () or None
    lam,  # number or None
    beta_ptr,  # () or None
    beta,  # number or None
    partial_ptr,  # (slots, 2), or None where every sequence is one part
    advantages_ptr,  # (B, T) or (N,), or None
    returns_ptr,  # (B, T) or (N,)
    B,
    T,
    parts,
    SKIP: tl.constexpr,
    WRITE: tl.constexpr,  # False: the parts' own (a, b) into partial
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Advantages and returns, with reward shaping on the way, from one pass over the tokens.

    Computes: A_t = r_t − V_t + x_{t+1}, R_t = r_t + x_{t+1}, x_t = γ(λ·r_t + (1−λ)·V_t) + γλ·x_{t+1}
    Grid: (slots,), program -> part of a sequence
    Traffic: a token's inputs read and 4 or 8 bytes written; inputs once more where a sequence has several parts
    Numerics: fp32; one tree in a block, blocks in order; how a sequence is cut depends on its length alone
    Gradient: gae_bwd_kernel
    """
    slot = tl.program_id(0)
    b, part, row, start, length = locate(slot, offsets_ptr, B, T, parts, PART)
    gamma = number(gamma_ptr, gamma)
    lam = number(lam_ptr, lam)
    if mask_ptr is not None:
        mask_ptr = row_start(mask_ptr, row, mask_stride, start)
    last = last_live(mask_ptr, length, BLOCK)
    begin = part * PART
    end = tl.minimum(begin + PART, last + 1)
    if rewards_ptr is not None:
        rewards_ptr = row_start(rewards_ptr, row, rewards_stride, start)
    if values_ptr is not None:
        values_ptr = row_start(values_ptr, row, values_stride, start)
    if kl_ptr is not None:
        kl_ptr = row_start(kl_ptr, row, kl_stride, start)
    decay = gamma * lam
    x = 0.0
    product = 1.0
    if WRITE:
        if bootstrap_ptr is not None:
            x = gamma * tl.load(bootstrap_ptr + b)
        if partial_ptr is not None:  # noqa: SIM102 - decided when the kernel is compiled
            if begin < end:
                x = incoming(partial_ptr, slot - part, part, last // PART, x, True)
        returns_ptr = row_start(returns_ptr, row, T, start)
        if advantages_ptr is not None:
            advantages_ptr = row_start(advantages_ptr, row, T, start)
            store_zeros(advantages_ptr, tl.maximum(begin, end), tl.minimum(begin + PART, length), BLOCK)
        store_zeros(returns_ptr, tl.maximum(begin, end), tl.minimum(begin + PART, length), BLOCK)
    lane = tl.arange(0, BLOCK)
    blocks = (tl.maximum(end - begin, 0) + BLOCK - 1) // BLOCK
    for k in range(blocks):
        t = begin + (blocks - 1 - k) * BLOCK + lane
        live = live_tokens(mask_ptr, t, end)
        r = load_tokens(rewards_ptr, t, live)
        v = load_tokens(values_ptr, t, live)
        if kl_ptr is not None:
            r -= number(beta_ptr, beta) * load_tokens(kl_ptr, t, live)
        if scores_ptr is not None:
            r = tl.where(t == last, r + tl.load(scores_ptr + b), r)
        a = gamma * (lam * r + (1.0 - lam) * v)
        factor = tl.where(live if SKIP else t < end, decay, 1.0)
        a, factor = tl.associative_scan((a, factor), 0, chain, reverse=True)
        if WRITE:
            found = neighbour(a + factor * x, lane, x, True, BLOCK)
            if advantages_ptr is not None:
                tl.store(advantages_ptr + t, tl.where(live, (r - v) + found, 0.0), mask=t < end)
            tl.store(returns_ptr + t, tl.where(live, r + found, 0.0), mask=t < end)
        else:
            product *= lane_of(factor, lane, 0)
        x = lane_of(a + factor * x, lane, 0)
    if not WRITE:
        tl.store(partial_ptr + slot.to(tl.int64) * 2, x)
        tl.store(partial_ptr + slot.to(tl.int64) * 2 + 1, product)


@triton.jit(do_not_specialize=["B", "parts"])  # T on 16 alone: rows then start on 16 bytes
def gae_bwd_kernel(
    mask_stride,  # of rows, in elements
    grad_advantages_ptr,  # (B, T) or (N,), or None
    grad_returns_ptr,  # (B, T) or (N,), or None
    mask_ptr,  # (B, T) or (N,), or None
    offsets_ptr,  # (B+1,) or None
    gamma_ptr,  # () or None
    gamma,  # number or None
    lam_ptr,  # () or None
    lam,  # number or None
    partial_ptr,  # (slots, 2) or None
    drewards_ptr,  # (B, T) or (N,)
    dvalues_ptr,  # (B, T) or (N,)
    dbootstrap_ptr,  # (B,)
    B,
    T,
    parts,
    SKIP: tl.constexpr,
    WRITE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of rewards, values and bootstrap values: the adjoint scan, from the first token to the last.

    Computes: h_t = g_t + b_t·h_{t−1}, g = dA + dR, b as in the forward; dr_t = h_t, dV_t = −dA_t + γ(1−λ)·h_{t−1}
    Grid: (slots,), program -> part of a sequence
    Traffic: 4 or 8 bytes a token read, 8 written; the gradients read once more where a sequence has several parts
    Numerics: as gae_fwd_kernel
    Gradient: none: a double backward raises
    """
    slot = tl.program_id(0)
    b, part, row, start, length = locate(slot, offsets_ptr, B, T, parts, PART)
    gamma = number(gamma_ptr, gamma)
    lam = number(lam_ptr, lam)
    if mask_ptr is not None:
        mask_ptr = row_start(mask_ptr, row, mask_stride, start)
    last = last_live(mask_ptr, length, BLOCK)
    begin = part * PART
    end = tl.minimum(begin + PART, last + 1)
    place = row.to(tl.int64) * T + start
    if grad_advantages_ptr is not None:
        grad_advantages_ptr = row_start(grad_advantages_ptr, row, T, start)
    if grad_returns_ptr is not None:
        grad_returns_ptr = row_start(grad_returns_ptr, row, T, start)
    decay = gamma * lam
    x = 0.0
    product = 1.0
    if WRITE:
        if partial_ptr is not None:  # noqa: SIM102 - decided when the kernel is compiled
            if begin < end:
                x = incoming(partial_ptr, slot - part, part, last // PART, x, False)
        drewards_ptr = drewards_ptr + place
        dvalues_ptr = dvalues_ptr + place
        store_zeros(drewards_ptr, tl.maximum(begin, end), tl.minimum(begin + PART, length), BLOCK)
        store_zeros(dvalues_ptr, tl.maximum(begin, end), tl.minimum(begin + PART, length), BLOCK)
    lane = tl.arange(0, BLOCK)
    blocks = (tl.maximum(end - begin, 0) + BLOCK - 1) // BLOCK
    for k in range(blocks):
        t = begin + k * BLOCK + lane
        live = live_tokens(mask_ptr, t, end)
        grad_advantage = load_tokens(grad_advantages_ptr, t, live)
        g = grad_advantage + load_tokens(grad_returns_ptr, t, live)
        factor = tl.where(live if SKIP else t < end, decay, 1.0)
        h, factor = tl.associative_scan((g, factor), 0, chain)
        h_all = h + factor * x
        if WRITE:
            before = neighbour(h_all, lane, x, False, BLOCK)
            tl.store(drewards_ptr + t, tl.where(live, h_all, 0.0), mask=t < end)
            dvalue = gamma * (1.0 - lam) * before - grad_advantage
            tl.store(dvalues_ptr + t, tl.where(live, dvalue, 0.0), mask=t < end)
        else:
            product *= lane_of(factor, lane, BLOCK - 1)
        x = lane_of(h_all, lane, BLOCK - 1)
    if WRITE:
        if (begin <= last) & (last < begin + PART):
            tl.store(dbootstrap_ptr + b, gamma * x)
        elif (part == 0) & (last < 0):
            tl.store(dbootstrap_ptr + b, 0.0)
    else:
        tl.store(partial_ptr + slot.to(tl.int64) * 2, x)
        tl.store(partial_ptr + slot.to(tl.int64) * 2 + 1, product)


def gae_fwd(
    rewards: Tensor,
    values: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    kl: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
    beta: Tensor,
    mask_mode: str,
    advantages: bool,
) -> tuple[Tensor, Tensor]:
    """``schemas.OPS["gae_fwd"]``."""
    tokens = rewards if kl is None else kl
    cut = Cut("gae_fwd", tokens, cu_seqlens)
    returns = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
    first = returns.new_empty(tokens.shape if advantages else (0,))
    scores = None
    if kl is not None and rewards.shape != kl.shape:
        rewards, scores = None, rewards
    if values is None:
        lam = torch.ones((), dtype=torch.float64, device="cpu")  # without values G = A + V is the Monte-Carlo return
    inputs, strides = zip(*map(side_by_side, (rewards, values, kl, mask)), strict=True)
    numbers = (*number_or_pointer(gamma), *number_or_pointer(lam), *number_or_pointer(beta))
    cut.launch(
        gae_fwd_kernel,
        (*strides, *inputs, cu_seqlens, scores, bootstrap, *numbers),
        (first if advantages else None, returns),
        skip=mask_mode == "skip",
        tokens=tokens,
    )
    return first, returns


def gae_bwd(
    grad_advantages: Tensor | None,
    grad_returns: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
    mask_mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``schemas.OPS["gae_bwd"]``."""
    tokens = grad_returns if grad_advantages is None else grad_advantages
    cut = Cut("gae_bwd", tokens, cu_seqlens)
    drewards, dvalues = torch.empty_like(tokens), torch.empty_like(tokens)
    dbootstrap = tokens.new_empty((cut.B,))
    mask, stride = side_by_side(mask)
    numbers = (*number_or_pointer(gamma), *number_or_pointer(lam))
    cut.launch(
        gae_bwd_kernel,
        (stride, grad_advantages, grad_returns, mask, cu_seqlens, *numbers),
        (drewards, dvalues, dbootstrap),
        skip=mask_mode == "skip",
        tokens=tokens,
    )
    return drewards, dvalues, dbootstrap
