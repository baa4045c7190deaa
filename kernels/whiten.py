"""whiten: count, mean and squares over live elements, then the normalised elements (docs/math.md section 4)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .rows import check_grid, number_or_pointer, on_device
from .scan import number


@triton.jit
def join(count1, mean1, squares1, count2, mean2, squares2):
    """Count, mean and Σ(x − mean)² of two parts as one (Chan et al. 1983)."""
    count = count1 + count2
    part = count2 / tl.where(count == 0, 1.0, count)
    step = tl.where(count2 == 0, 0.0, tl.where(count1 == 0, mean2, mean2 - mean1))
    mean = mean1 + step * part
    squares = squares1 + squares2 + tl.where(count1 == 0, 0.0, step * step * count1 * part)
    return count, mean, squares


@triton.jit(do_not_specialize=["parts"])  # N on 16 alone: a mask that ends on 16 bytes leaves loads whole
def whiten_parts_kernel(
    x_ptr,  # (N,)
    minus_ptr,  # (N,) or None
    mask_ptr,  # (N,) or None
    partial_ptr,  # (3, parts) fp64
    N,
    parts,
    BLOCK: tl.constexpr,
):
    """Count, mean and squares of one part.

    Computes: n = Σ m_i, x̄ = Σ m_i·x_i/n, Σ m_i·(x_i − x̄)², of x − minus where that is given
    Grid: (parts,), program -> BLOCK elements
    Traffic: an element and its mask read once, 24 bytes a part written
    Numerics: fp64, two passes over registers; one tree
    Gradient: none flows
    """
    part = tl.program_id(0)
    i = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < N
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + i, mask=live, other=0) != 0)
    x = tl.load(x_ptr + i, mask=live, other=0.0).to(tl.float64)
    if minus_ptr is not None:
        x -= tl.load(minus_ptr + i, mask=live, other=0.0).to(tl.float64)
    count = tl.sum(live.to(tl.int32), axis=0).to(tl.float64)
    mean = tl.sum(x, axis=0) / tl.maximum(count, 1.0)
    centred = tl.where(live, x - mean, 0.0)
    tl.store(partial_ptr + part, count)
    tl.store(partial_ptr + parts + part, mean)
    tl.store(partial_ptr + 2 * parts + part, tl.sum(centred * centred, axis=0))


@triton.jit(do_not_specialize=["parts"])
def whiten_join_kernel(
    partial_ptr,  # (3, parts) fp64
    stats_ptr,  # (3,) fp64
    parts,
    BLOCK: tl.constexpr,
):
    """All parts as one.

    Computes: count, mean and squares of the whole
    Grid: (1,): 24 bytes for every BLOCK elements of whiten_parts_kernel is next to nothing
    Traffic: 24 bytes a part
    Numerics: fp64; one tree in a block of parts, blocks in order
    Gradient: none flows
    """
    lane = tl.arange(0, BLOCK)
    count = tl.sum(lane * 0, axis=0).to(tl.float64)
    mean = count
    squares = count
    for p0 in range(0, parts, BLOCK):
        p = p0 + lane
        n = tl.load(partial_ptr + p, mask=p < parts, other=0.0)
        m = tl.load(partial_ptr + parts + p, mask=p < parts, other=0.0)
        s = tl.load(partial_ptr + 2 * parts + p, mask=p < parts, other=0.0)
        n, m, s = tl.reduce((n, m, s), 0, join)
        count, mean, squares = join(count, mean, squares, n, m, s)
    tl.store(stats_ptr, count)
    tl.store(stats_ptr + 1, mean)
    tl.store(stats_ptr + 2, squares)


@triton.jit  # N on 16 alone
def whiten_apply_kernel(
    x_ptr,  # (N,)
    mask_ptr,  # (N,) or None
    stats_ptr,  # (3,) fp64
    eps_ptr,  # () or None
    eps,  # number or None
    out_ptr,  # (N,)
    N,
    SHIFT_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalised elements.

    Computes: (x − mean)/sqrt(squares/(count − 1) + ε), plus the mean unless SHIFT_MEAN
    Grid: (ceil(N/BLOCK),), program -> elements
    Traffic: an element and its mask read, 4 bytes written
    Numerics: fp64, rounded once. One live element: 0. Dead ones: 0
    Gradient: none flows
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < N
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + i, mask=live, other=0) != 0)
    count = tl.load(stats_ptr)
    mean = tl.load(stats_ptr + 1)
    variance = tl.load(stats_ptr + 2) / tl.maximum(count - 1.0, 1.0)
    scale = tl.where(count == 1.0, 0.0, 1.0 / tl.sqrt(variance + number(eps_ptr, eps)))
    x = tl.load(x_ptr + i, mask=live, other=0.0).to(tl.float64)
    out = (x - mean) * scale
    if not SHIFT_MEAN:
        out += mean
    tl.store(out_ptr + i, tl.where(live, out, 0.0).to(tl.float32), mask=i < N)


def whiten_stats(x: Tensor, mask: Tensor | None, minus: Tensor | None = None) -> Tensor:
    """``schemas.OPS["whiten_stats"]``."""
    count = x.numel()
    parts = triton.cdiv(count, configs.WHITEN_BLOCK)
    partial = torch.empty((3, parts), dtype=torch.float64, device=x.device)
    stats = torch.empty((3,), dtype=torch.float64, device=x.device)
    with on_device(x):
        if parts:
            whiten_parts_kernel[check_grid("whiten", parts)](
                x, minus, mask, partial, count, parts, BLOCK=configs.WHITEN_BLOCK, num_warps=configs.WHITEN_WARPS,
                **configs.COMPILE,
            )  # fmt: skip
        whiten_join_kernel[(1,)](
            partial, stats, parts, BLOCK=configs.WHITEN_JOIN_BLOCK, num_warps=configs.WHITEN_WARPS, **configs.COMPILE
        )
    return stats


def whiten_apply(x: Tensor, mask: Tensor | None, stats: Tensor, eps: Tensor, shift_mean: bool) -> Tensor:
    """``schemas.OPS["whiten_apply"]``."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.numel():
        with on_device(x):
            whiten_apply_kernel[check_grid("whiten", triton.cdiv(x.numel(), configs.WHITEN_BLOCK))](
                x, mask, stats, *number_or_pointer(eps), out, x.numel(), SHIFT_MEAN=shift_mean,
                BLOCK=configs.WHITEN_BLOCK, num_warps=configs.WHITEN_WARPS, **configs.COMPILE,
            )  # fmt: skip
    return out
