"""preference_loss and kto_loss (docs/math.md section 7) from per-token log-probabilities: three launches in all.

One program sums one answer, padded or packed; one program makes losses, slopes and metrics of the sums; in the backward
one program spreads one answer's slope over its tokens. No atomics: the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rl4llm_fast.pair_formulas import FORMULAS, MAX_KNOBS, PARAMS

from .configs import COMPILE
from .pair_formulas_gen import PAIR
from .rows import check_grid, numbers_or_pointer, on_device
from .token_loss import check_rows

BETA = tl.constexpr(PARAMS.index("beta"))
PER_PAIR = tl.constexpr(PARAMS.index("per_pair"))
NUM_PARAMS = tl.constexpr(len(PARAMS))
# Of answers with labels.
KL, LAMBDA_D, LAMBDA_U = (tl.constexpr(FORMULAS["kto"].knobs.index(name)) for name in ("kl", "lambda_d", "lambda_u"))

BLOCK_T = 2048  # tokens that a program holds at once: 2 loads of 16 bytes a thread of each input; not yet measured
WARPS = 8
TILE_B = 256  # pairs that the finishing program holds at once, in fp64; not yet measured
FINISH_WARPS = 8
# Left alone, ptxas aims at 64 for some formulas, and spills 8 bytes.
FINISH_REGISTERS = {"maxnreg": 128} if torch.version.hip is None else {}


@triton.jit
def param(params_ptr, numbers, INDEX: tl.constexpr):
    """A number of the call, in fp64: read on the device where the user gave tensors there, else a launch argument."""
    if params_ptr is not None:
        value = tl.load(params_ptr + INDEX)
    else:
        value = numbers[INDEX]
    return value.to(tl.float64)


@triton.jit
def extent(cu_ptr, b, T):
    """(first token, number of tokens) of an answer."""
    if cu_ptr is not None:
        start = tl.load(cu_ptr + b)
        length = tl.maximum(tl.load(cu_ptr + b + 1) - start, 0).to(tl.int32)
    else:
        start = b.to(tl.int64) * T
        length = b * 0 + T
    return start, length


@triton.jit
def live_tokens(mask_ptr, start, t, length):
    live = t < length
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + start + t, mask=live, other=0) != 0)
    return live


@triton.jit
def answer_sum(logp_ptr, ref_ptr, mask_ptr, cu_ptr, sums_ptr, b, T, BLOCK: tl.constexpr):
    start, length = extent(cu_ptr, b, T)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for t0 in range(0, length, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        live = live_tokens(mask_ptr, start, t, length)
        x = tl.load(logp_ptr + start + t, mask=live, other=0.0)
        if ref_ptr is not None:
            x -= tl.load(ref_ptr + start + t, mask=live, other=0.0)
        total += x
        count += live.to(tl.int32)
    tl.store(sums_ptr, tl.sum(total.to(tl.float64), axis=0))
    tl.store(sums_ptr + 1, tl.maximum(tl.sum(count, axis=0), 1).to(tl.float64))


@triton.jit(do_not_specialize=["B", "T_chosen", "T_rejected"])
def preference_sums_kernel(
    chosen_ptr,  # (B, T_chosen), or packed
    rejected_ptr,  # (B, T_rejected), or packed; None: a grid of (B,)
    ref_chosen_ptr,
    ref_rejected_ptr,
    mask_chosen_ptr,
    mask_rejected_ptr,
    cu_chosen_ptr,  # (B+1,) where packed
    cu_rejected_ptr,
    sums_ptr,  # (2·B, 2) fp64: Σ (logp − ref), the number of live tokens; the chosen, then the rejected
    B,
    T_chosen,
    T_rejected,
    BLOCK: tl.constexpr,
):
    """Sums over the live tokens of every answer.

    Computes: π(y|x) − ref(y|x), and |y|, at least 1
    Grid: (2·B,), program -> one answer, the chosen ones first
    Traffic: 4 bytes a token for logp and ref each, 1 for the mask
    Numerics: fp32 in a lane, fp64 across them; dead tokens are not loaded
    Gradient: preference_spread_kernel
    """
    answer = tl.program_id(0)
    out_ptr = sums_ptr + answer * 2
    if answer < B:
        answer_sum(chosen_ptr, ref_chosen_ptr, mask_chosen_ptr, cu_chosen_ptr, out_ptr, answer, T_chosen, BLOCK)
    else:
        if rejected_ptr is not None:
            answer_sum(rejected_ptr, ref_rejected_ptr, mask_rejected_ptr, cu_rejected_ptr, out_ptr, answer - B,
                       T_rejected, BLOCK)  # fmt: skip


@triton.jit(do_not_specialize=["B"])
def preference_finish_kernel(
    sums_ptr,  # (2·B, 2) fp64
    per_pair_ptr,  # (B,) or None
    params_ptr,  # (NUM_PARAMS + knobs,) fp64 or None
    numbers,  # the same as numbers, or None; Triton's launcher has a variable named params
    loss_ptr,  # ()
    slopes_ptr,  # (2, B)
    metrics_ptr,  # (the formula's,)
    B,
    FORMULA: tl.constexpr,
    TOKEN_NLL: tl.constexpr,
    LABELLED: tl.constexpr,
    AVERAGE: tl.constexpr,
    PAIRS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The pair formula, its slopes, the loss and the metrics, from the answers' sums.

    Computes: L = 1/B·Σ ℓ(x_w, x_l), x a sum or a mean; per answer dL/dlogp of its live tokens; mean rewards β·x
    Grid: (1,), one program: a few numbers a pair, and no other order of adding them exists
    Traffic: 40 bytes a pair
    Numerics: fp64; without pairs all is 0
    Gradient: comes with the value from the generated formula, divided by B, and by |y| where x is a mean
    """
    beta = param(params_ptr, numbers, BETA)
    knobs = (
        param(params_ptr, numbers, NUM_PARAMS),
        param(params_ptr, numbers, NUM_PARAMS + 1),
        param(params_ptr, numbers, NUM_PARAMS + 2),
    )
    pairs = tl.maximum(B, 1).to(tl.float64)
    nll_scale = pairs
    if TOKEN_NLL:
        tokens = tl.zeros([TILE], tl.float64)
        for b0 in range(0, B, TILE):
            b = b0 + tl.arange(0, TILE)
            tokens += tl.load(sums_ptr + b * 2 + 1, mask=b < B, other=0.0)
        nll_scale = pairs / tl.maximum(tl.sum(tokens, axis=0), 1.0)
    losses = tl.zeros([TILE], tl.float64)
    better = tl.zeros([TILE], tl.float64)
    worse = tl.zeros([TILE], tl.float64)
    right = tl.zeros([TILE], tl.float64)
    margin = tl.zeros([TILE], tl.float64)
    good = tl.zeros([TILE], tl.float64)
    for b0 in range(0, B, TILE):
        b = b0 + tl.arange(0, TILE)
        inside = b < B
        total = tl.load(sums_ptr + b * 2, mask=inside, other=0.0)
        length = tl.load(sums_ptr + b * 2 + 1, mask=inside, other=1.0)
        y = tl.zeros([TILE], tl.float64)
        other_length = tl.full([TILE], 1.0, tl.float64)
        if PAIRS:
            y = tl.load(sums_ptr + (B + b) * 2, mask=inside, other=0.0)
            other_length = tl.load(sums_ptr + (B + b) * 2 + 1, mask=inside, other=1.0)
        x = total
        if AVERAGE:
            x = total / length
            y = y / other_length
        per_pair = param(params_ptr, numbers, PER_PAIR)
        if per_pair_ptr is not None:
            per_pair = tl.load(per_pair_ptr + b, mask=inside, other=0.0).to(tl.float64)
        loss, d_chosen, d_rejected, d_nll = FORMULA(x, y, -total * nll_scale, per_pair, beta, knobs)
        if AVERAGE:
            d_chosen = d_chosen / length
            d_rejected = d_rejected / other_length
        if TOKEN_NLL:
            d_chosen = d_chosen - d_nll * nll_scale
        zero = tl.zeros([TILE], tl.float64)  # a slope may be a plain number in the formula
        tl.store(slopes_ptr + b, ((zero + d_chosen) / pairs).to(tl.float32), mask=inside)
        tl.store(slopes_ptr + B + b, ((zero + d_rejected) / pairs).to(tl.float32), mask=inside)
        won = beta * x
        lost = beta * y
        losses += tl.where(inside, loss, 0.0)
        if LABELLED:
            desirable = inside & (per_pair > 0.5)
            other = inside & (per_pair <= 0.5)
            good += tl.where(desirable, 1.0, 0.0)
            better += tl.where(desirable, won, 0.0)
            worse += tl.where(other, won, 0.0)
            # As fp32, which β and z came in: a reward that is z then is so exactly.
            reward, bound = won.to(tl.float32), knobs[KL].to(tl.float32)
            right += tl.where((desirable & (reward > bound)) | (other & (reward < bound)), 1.0, 0.0)
        else:
            better += tl.where(inside, won, 0.0)
            worse += tl.where(inside, lost, 0.0)
            right += tl.where(inside & (won > lost), 1.0, 0.0)
            margin += tl.where(inside, won - lost, 0.0)
    tl.store(loss_ptr, (tl.sum(losses, axis=0) / pairs).to(tl.float32))
    mean_better = tl.sum(better, axis=0)
    mean_worse = tl.sum(worse, axis=0)
    if LABELLED:
        count = tl.sum(good, axis=0)
        others = B - count
        mean_better = mean_better / tl.maximum(count, 1.0)
        mean_worse = mean_worse / tl.maximum(others, 1.0)
        mean_margin = mean_better - mean_worse
        weight_ratio = knobs[LAMBDA_D] * count / (knobs[LAMBDA_U] * others)
        tl.store(metrics_ptr + 4, weight_ratio.to(tl.float32))
    else:
        mean_better = mean_better / pairs
        mean_worse = mean_worse / pairs
        mean_margin = tl.sum(margin, axis=0) / pairs
    tl.store(metrics_ptr, mean_better.to(tl.float32))
    tl.store(metrics_ptr + 1, mean_worse.to(tl.float32))
    tl.store(metrics_ptr + 2, (tl.sum(right, axis=0) / pairs).to(tl.float32))
    tl.store(metrics_ptr + 3, mean_margin.to(tl.float32))


@triton.jit
def answer_spread(out_ptr, mask_ptr, cu_ptr, value, b, T, BLOCK: tl.constexpr):
    start, length = extent(cu_ptr, b, T)
    for t0 in range(0, length, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        live = live_tokens(mask_ptr, start, t, length)
        tl.store(out_ptr + start + t, tl.where(live, value, 0.0), mask=t < length)


@triton.jit(do_not_specialize=["B", "T_chosen", "T_rejected"])
def preference_spread_kernel(
    grad_ptr,  # ()
    slopes_ptr,  # (2, B)
    mask_chosen_ptr,
    mask_rejected_ptr,
    cu_chosen_ptr,
    cu_rejected_ptr,
    grad_chosen_ptr,  # like the answers
    grad_rejected_ptr,  # None: a grid of (B,)
    B,
    T_chosen,
    T_rejected,
    BLOCK: tl.constexpr,
):
    """The backward: one number for all live tokens of an answer.

    Computes: g·slope_i at live tokens, 0 at others
    Grid: (2·B,), program -> one answer, the chosen ones first
    Traffic: 4 bytes a token written, 1 read for the mask
    Numerics: fp32; a slope of 0 stays exactly 0, whatever g is
    Gradient: none: a second derivative raises
    """
    answer = tl.program_id(0)
    slope = tl.load(slopes_ptr + answer)
    value = tl.where(slope == 0.0, 0.0, tl.load(grad_ptr) * slope)
    if answer < B:
        answer_spread(grad_chosen_ptr, mask_chosen_ptr, cu_chosen_ptr, value, answer, T_chosen, BLOCK)
    else:
        if grad_rejected_ptr is not None:
            answer_spread(grad_rejected_ptr, mask_rejected_ptr, cu_rejected_ptr, value, answer - B, T_rejected, BLOCK)


def row_length(tokens: Tensor | None, cu_seqlens: Tensor | None) -> int:
    return tokens.shape[1] if tokens is not None and cu_seqlens is None else 0


def preference_loss_fwd(
    chosen: Tensor,
    rejected: Tensor | None,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    mask_chosen: Tensor | None,
    mask_rejected: Tensor | None,
    cu_chosen: Tensor | None,
    cu_rejected: Tensor | None,
    per_pair: Tensor | None,
    params: Tensor,
    formula: str,
    average: bool,
    gradients: bool,
) -> tuple[Tensor, ...]:
    """schemas.OPS["preference_loss_fwd"]: (loss, slopes, metrics, and no gradients)."""
    if gradients:
        raise ValueError("gradients: preference_loss_bwd makes them here")
    check_rows("preference_loss_fwd", (torch.float32,), chosen=chosen, rejected=rejected, ref_chosen=ref_chosen,
               ref_rejected=ref_rejected, per_pair=per_pair)  # fmt: skip
    B = chosen.shape[0] if cu_chosen is None else cu_chosen.shape[0] - 1
    sides = 1 if rejected is None else 2
    loss, slopes = chosen.new_empty(()), chosen.new_empty((2, B))
    metrics = chosen.new_empty((len(FORMULAS[formula].metrics),))
    sums = chosen.new_empty((sides * B, 2), dtype=torch.float64)
    grid = check_grid("preference_loss_fwd", sides * B)
    with on_device(chosen):
        if B:
            preference_sums_kernel[grid](
                chosen, rejected, ref_chosen, ref_rejected, mask_chosen, mask_rejected, cu_chosen, cu_rejected, sums,
                B, row_length(chosen, cu_chosen), row_length(rejected, cu_rejected), BLOCK=BLOCK_T, num_warps=WARPS,
                **COMPILE,
            )  # fmt: skip
        preference_finish_kernel[(1,)](
            sums, per_pair, *numbers_or_pointer(params), loss, slopes, metrics, B,
            FORMULA=PAIR[formula], TOKEN_NLL=FORMULAS[formula].token_nll, LABELLED=FORMULAS[formula].labelled,
            AVERAGE=average, PAIRS=rejected is not None, TILE=TILE_B, num_warps=FINISH_WARPS, **FINISH_REGISTERS,
            **COMPILE,
        )  # fmt: skip
    return loss, slopes, metrics, chosen.new_empty((0,)), chosen.new_empty((0,))


def preference_loss_bwd(
    grad: Tensor,
    slopes: Tensor,
    chosen: Tensor,
    rejected: Tensor | None,
    mask_chosen: Tensor | None,
    mask_rejected: Tensor | None,
    cu_chosen: Tensor | None,
    cu_rejected: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """schemas.OPS["preference_loss_bwd"]: (grad_chosen, grad_rejected)."""
    check_rows("preference_loss_bwd", (torch.float32,), grad=grad, slopes=slopes, chosen=chosen, rejected=rejected)
    grad_chosen = torch.empty_like(chosen)
    grad_rejected = chosen.new_empty((0,)) if rejected is None else torch.empty_like(rejected)
    B = slopes.shape[1]
    grid = check_grid("preference_loss_bwd", B if rejected is None else 2 * B)
    if B:
        with on_device(chosen):
            preference_spread_kernel[grid](
                grad, slopes, mask_chosen, mask_rejected, cu_chosen, cu_rejected, grad_chosen,
                None if rejected is None else grad_rejected, B, row_length(chosen, cu_chosen),
                row_length(rejected, cu_rejected), BLOCK=BLOCK_T, num_warps=WARPS, **COMPILE,
            )  # fmt: skip
    return grad_chosen, grad_rejected


assert MAX_KNOBS == 3, "preference_finish_kernel unpacks three knobs"
