"""n_step_returns: windows of n steps by doubling (docs/math.md section 4).

The tokens that take a step are brought side by side first, each sequence followed by its bootstrap value, so that a
window is a run of neighbours. A sum over 2m steps is that over m and, m steps further on, the same again: for every bit
of n one launch, whatever n is. No difference of long sums is taken, so nothing cancels and a NaN reaches n tokens back,
no further.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rl4llm_fast.reference_returns import token_layout

from . import configs
from .rows import check_grid, number_or_pointer, on_device
from .scan import number


@triton.jit
def power(x, n):
    """x^n for n >= 0, in fp64: a squaring rounds, and the rounding doubles with every one that follows."""
    result = x.to(tl.float64) * 0.0 + 1.0
    base = x.to(tl.float64)
    while n > 0:
        if n % 2 == 1:
            result *= base
        base *= base
        n = n // 2
    return result.to(tl.float32)


@triton.jit(do_not_specialize=["N", "m", "done"])
def n_step_kernel(
    sums_ptr,  # (N,) Σ of m steps from each place; m = 1: rewards, and after each sequence its bootstrap value
    result_ptr,  # (N,) Σ of `done` steps; None: done = 0
    ends_ptr,  # (N,) where the sequence of each place ends, its bootstrap value included
    values_ptr,  # (N,) values, and after each sequence its bootstrap value; None but in the last launch
    gamma_ptr,  # () or None
    gamma,  # number or None
    doubled_ptr,  # (N,) Σ of 2m steps, or None
    out_ptr,  # (N,) Σ of done + m steps, or None where n lacks the bit m
    N,
    m,
    done,
    BLOCK: tl.constexpr,
):
    """One bit of n: sums of 2m steps from those of m; where n has the bit m, m steps more for the result.

    Computes: S_2m(i) = S_m(i) + γ^m·S_m(i+m); R(i) += γ^done·S_m(i+done); in the last launch R(i) += γ^n·V(i+n)
    Grid: (ceil(N/BLOCK),), program -> places
    Traffic: 20 to 36 bytes a place and bit of n
    Numerics: fp32, powers in fp64; beyond the end of a sequence there is nothing
    Gradient: none flows
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    gamma = number(gamma_ptr, gamma)
    end = tl.load(ends_ptr + i, mask=inside, other=0)
    if doubled_ptr is not None:
        more = tl.load(sums_ptr + i + m, mask=i + m < end, other=0.0)
        doubled = tl.load(sums_ptr + i, mask=inside, other=0.0) + power(gamma, m) * more
        tl.store(doubled_ptr + i, doubled, mask=inside)
    if out_ptr is not None:
        result = tl.zeros(i.shape, tl.float32)
        if result_ptr is not None:
            result = tl.load(result_ptr + i, mask=inside, other=0.0)
        result += power(gamma, done) * tl.load(sums_ptr + i + done, mask=i + done < end, other=0.0)
        if values_ptr is not None:
            behind = tl.load(values_ptr + i + done + m, mask=i + done + m < end, other=0.0)
            result += power(gamma, done + m) * behind
        tl.store(out_ptr + i, result, mask=inside)


def n_step_returns(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    n: int,
    gamma: Tensor,
    mask_mode: str,
) -> Tensor:
    """``schemas.OPS["n_step_returns"]``."""
    layout, live, active = token_layout(rewards, mask, cu_seqlens, mask_mode)
    N, B = rewards.numel(), layout.count
    if N == 0:
        return torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    if not layout.packed:
        index = torch.arange(B, device=rewards.device).repeat_interleave(layout.rows[1], output_size=N)
        offsets = torch.arange(B + 1, device=rewards.device) * layout.rows[1]
    else:
        index, offsets = layout.index, layout.cu_seqlens
    # Sequence b begins b places later than the tokens before it ask for: theirs end with a bootstrap value each.
    taken = torch.nn.functional.pad(active.reshape(-1).cumsum(0), (1, 0))
    boot = taken[offsets[1:]] + torch.arange(B, device=rewards.device)
    place = torch.where(active.reshape(-1), taken[1:] - 1 + index, N + B)  # the last place takes what has none
    last = torch.zeros(B, device=rewards.device) if bootstrap is None else bootstrap

    def side_by_side(tokens: Tensor) -> Tensor:
        live_tokens = torch.where(live, layout.as_rows(tokens).float(), 0.0).reshape(-1)
        return live_tokens.new_zeros(N + B + 1).scatter_(0, place, live_tokens).index_copy_(0, boot, last)

    ends = torch.zeros(N + B + 1, dtype=torch.int64, device=rewards.device)
    ends = ends.scatter_(0, place, (boot + 1)[index]).index_copy_(0, boot, boot + 1)
    sums, behind = side_by_side(rewards), side_by_side(values)
    result, done, m = None, 0, 1
    n = min(n, layout.rows[1] + 1)  # one more than the longest sequence can have: its bootstrap value is in the sum
    grid = check_grid("n_step_returns", triton.cdiv(N + B, configs.N_STEP_BLOCK))
    with on_device(rewards):
        while m <= n:
            final = 2 * m > n
            doubled = None if final else torch.empty_like(sums)
            out = torch.empty_like(sums) if n & m else None
            n_step_kernel[grid](
                sums, result, ends, behind if final else None, *number_or_pointer(gamma), doubled, out, N + B, m, done,
                BLOCK=configs.N_STEP_BLOCK, num_warps=configs.N_STEP_WARPS, **configs.COMPILE,
            )  # fmt: skip
            if out is not None:
                result, done = out, done + m
            sums, m = doubled, 2 * m
    found = torch.where(live.reshape(-1), result[place.clamp(max=N + B - 1)], 0.0)
    return found.reshape(rewards.shape)
