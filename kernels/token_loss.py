"""policy_loss (docs/math.md section 5) from per-token log-probabilities: three launches, forward and backward.

The formulas are generated (token_formulas_gen.py); here stand the loads, the sums and the weights. A row is cut into
segments, each segment's sums are written, and one program joins them in order: no atomics, so the same bits every time.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rl4llm_fast import user_losses
from rl4llm_fast.formulas import METRICS

from .configs import COMPILE
from .rows import DTYPES, check_grid, numbers_or_pointer, on_device
from .token_block import (
    DP_SIZE,
    MAX_LENGTH,
    NUM_PARTIALS,
    NUM_SEQUENCES,
    NUM_SUMS,
    NUM_TOKENS,
    block_of_tokens,
    live_tokens,
    param,
    store_sums,
)
from .token_formulas_gen import CORRECTIONS, KL, POLICY, WEIGHTS

SEGMENT = 1024  # tokens of a row that one program takes: 4 loads a thread of each input in flight; not yet measured
WARPS = 8
# Left alone, or at 80, some version of ptxas aims at 48 or 64 for some formula and architecture, and spills 8 bytes.
REGISTERS = {"maxnreg": 96} if torch.version.hip is None else {}
FINISH_TILE = 1024  # partial sums that the last program holds at once


@triton.jit(do_not_specialize=["T", "segments", "programs"])
def policy_loss_fwd_kernel(
    logp_ptr,  # (B, T)
    old_ptr,  # (B, T) or None: logp
    adv_ptr,  # (B, T) or (B, 1)
    ref_ptr,  # (B, T) or None
    entropy_ptr,  # (B, T) or None
    mask_ptr,  # (B, T) or None
    policy_weights_ptr,  # (B, T) or None; with a CORRECTION the sampler's log-probabilities
    token_weights_ptr,  # (B, T) or None
    log_s_ptr,  # (B, T) or (B, 1) or None
    params_ptr,  # (NUM_PARAMS + knobs,) or None
    numbers,  # the same as numbers, or None; Triton's launcher has a variable named params
    loss_ptr,  # (B, T) or None
    dlogp_ptr,  # (B, T)
    dentropy_ptr,  # (B, T) or None
    partial_ptr,  # (NUM_SUMS + 2, B·segments)
    T,
    segments,
    programs,
    FORMULA: tl.constexpr,
    KL_FORMULA: tl.constexpr,
    CORRECTION: tl.constexpr,
    ONE_ADV: tl.constexpr,
    ONE_LOG_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The policy loss, its derivative and the sums behind the metrics, one segment of a row.

    Computes: w_t·(ω_t·ℓ_t + β·kl_t − c₂·H_t) without the weight of the sequence, and its derivatives in logp and H
    Grid: (B·segments,), program -> (row, segment); T alone decides the cut
    Traffic: 2 or 4 bytes a token for each input given, 4 for each derivative written, 1 for the mask
    Numerics: fp32; dead tokens are not loaded, their results exactly 0; a segment's sums in one tree
    Gradient: dloss/dlogp comes with the value from the generated formula; dloss/dH = −c₂·w_t
    """
    row = tl.program_id(0) // segments
    t = tl.program_id(0) % segments * BLOCK_T + tl.arange(0, BLOCK_T)
    n = row.to(tl.int64) * T + t
    inside = t < T
    live = live_tokens(mask_ptr, n, inside)
    log_s = 0.0
    if log_s_ptr is not None:
        if ONE_LOG_S:
            log_s = tl.where(live, tl.load(log_s_ptr + row).to(tl.float32), 0.0)
        else:
            log_s = tl.load(log_s_ptr + n, mask=live, other=0.0).to(tl.float32)
    weight = tl.where(live, 1.0, 0.0)
    if token_weights_ptr is not None:
        weight = tl.load(token_weights_ptr + n, mask=live, other=0.0).to(tl.float32)
    count, loss, low, high, ratio, k1, k3, kl, entropy, least, largest = block_of_tokens(
        logp_ptr, old_ptr, adv_ptr, ref_ptr, entropy_ptr, policy_weights_ptr, params_ptr, numbers, loss_ptr, dlogp_ptr,
        dentropy_ptr, row, n, inside, live, log_s, 1.0, weight, None, FORMULA, KL_FORMULA, CORRECTION,
        ONE_ADV,
    )  # fmt: skip
    sums = (count, loss, low, high, ratio, k1, k3, kl, entropy, least, largest)
    store_sums(partial_ptr + tl.program_id(0), programs, sums)


@triton.jit
def joined(partial_ptr, INDEX: tl.constexpr, B, segments, TILE_B: tl.constexpr, TILE_S: tl.constexpr):
    """The sum of one quantity over all segments of all rows."""
    total = tl.zeros([TILE_B], tl.float32)
    for row0 in range(0, B, TILE_B):
        total += row_sums(partial_ptr, INDEX, row0, B, segments, TILE_B, TILE_S)
    return tl.sum(total, axis=0)


@triton.jit
def row_sums(partial_ptr, INDEX: tl.constexpr, row0, B, segments, TILE_B: tl.constexpr, TILE_S: tl.constexpr):
    """(TILE_B,): the sum of one quantity over the segments of each of the rows from row0 on."""
    row = row0 + tl.arange(0, TILE_B)[:, None]
    total = tl.zeros([TILE_B], tl.float32)
    for s0 in range(0, segments, TILE_S):
        s = s0 + tl.arange(0, TILE_S)[None, :]
        part_ptr = partial_ptr + INDEX * B * segments + row * segments + s
        total += tl.sum(tl.load(part_ptr, mask=(row < B) & (s < segments), other=0.0), axis=1)
    return total


@triton.jit(do_not_specialize=["B", "segments"])
def policy_loss_finish_kernel(
    partial_ptr,  # (NUM_SUMS + 2, B·segments)
    params_ptr,  # (NUM_PARAMS + knobs,) or None
    numbers,  # the same as numbers, or None; Triton's launcher has a variable named params
    loss_ptr,  # () or None
    scale_ptr,  # (B,)
    metrics_ptr,  # (len(METRICS),)
    B,
    segments,
    WEIGHT: tl.constexpr,
    TILE_B: tl.constexpr,
    TILE_S: tl.constexpr,
):
    """The second launch: the weight of each sequence, the loss and the metrics, from the segments' sums.

    Computes: loss = Σ_i scale_i·Σ_t loss_it, scale_i = dp_size·(the aggregation's weight); means over live tokens
    Grid: (1,), one program: it is a few hundred numbers, and no other order of adding them exists
    Traffic: 4·(NUM_SUMS + 4) bytes a segment read, 4 a row written
    Numerics: fp32, in tiles whose shape depends on T only; no live token: ratios 1, all else 0
    Gradient: token_loss_bwd_kernel multiplies by scale
    """
    count = joined(partial_ptr, 0, B, segments, TILE_B, TILE_S)
    num_tokens = param(params_ptr, numbers, NUM_TOKENS)
    num_tokens = tl.where(num_tokens >= 0.0, num_tokens, count)
    total = tl.zeros([TILE_B], tl.float32)
    for row0 in range(0, B, TILE_B):
        row = row0 + tl.arange(0, TILE_B)
        length = row_sums(partial_ptr, 0, row0, B, segments, TILE_B, TILE_S)
        weight = WEIGHT(
            length, num_tokens, param(params_ptr, numbers, NUM_SEQUENCES), param(params_ptr, numbers, MAX_LENGTH)
        )
        scale = tl.zeros([TILE_B], tl.float32) + weight * param(params_ptr, numbers, DP_SIZE)
        tl.store(scale_ptr + row, scale, mask=row < B)
        total += scale * row_sums(partial_ptr, 1, row0, B, segments, TILE_B, TILE_S)
    if loss_ptr is not None:
        tl.store(loss_ptr, tl.sum(total, axis=0))

    least = tl.full([TILE_B * TILE_S], float("inf"), tl.float32)
    largest = tl.full([TILE_B * TILE_S], float("-inf"), tl.float32)
    programs = B * segments
    for i0 in range(0, programs, TILE_B * TILE_S):
        i = i0 + tl.arange(0, TILE_B * TILE_S)
        part_ptr = partial_ptr + NUM_SUMS * programs + i
        least = tl.minimum(least, tl.load(part_ptr, mask=i < programs, other=float("inf")))
        largest = tl.maximum(largest, tl.load(part_ptr + programs, mask=i < programs, other=float("-inf")))
    per_token = 1.0 / tl.maximum(count, 1.0)
    some = count > 0.0
    low = joined(partial_ptr, 2, B, segments, TILE_B, TILE_S) * per_token
    high = joined(partial_ptr, 3, B, segments, TILE_B, TILE_S) * per_token
    ratio = joined(partial_ptr, 4, B, segments, TILE_B, TILE_S) * per_token
    poison = 0.0 * ratio  # NaN where a ratio was NaN, which the extremes may have dropped
    tl.store(metrics_ptr, low + high)
    tl.store(metrics_ptr + 1, low)
    tl.store(metrics_ptr + 2, high)
    tl.store(metrics_ptr + 3, tl.where(some, ratio, 1.0))
    tl.store(metrics_ptr + 4, tl.where(some, tl.min(least, axis=0) + poison, 1.0))
    tl.store(metrics_ptr + 5, tl.where(some, tl.max(largest, axis=0) + poison, 1.0))
    tl.store(metrics_ptr + 6, joined(partial_ptr, 5, B, segments, TILE_B, TILE_S) * per_token)
    tl.store(metrics_ptr + 7, joined(partial_ptr, 6, B, segments, TILE_B, TILE_S) * per_token)
    tl.store(metrics_ptr + 8, joined(partial_ptr, 7, B, segments, TILE_B, TILE_S) * per_token)
    tl.store(metrics_ptr + 9, joined(partial_ptr, 8, B, segments, TILE_B, TILE_S) * per_token)


@triton.jit(do_not_specialize=["T", "segments"])
def token_loss_bwd_kernel(
    grad_ptr,  # () or (B, T)
    scale_ptr,  # (B,) or None: 1
    dlogp_ptr,  # (B, T)
    dentropy_ptr,  # (B, T) or None
    grad_logp_ptr,  # (B, T)
    grad_entropy_ptr,  # (B, T) or None
    T,
    segments,
    ONE_GRAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The upstream gradient times the derivatives that the forward pass left.

    Computes: g·scale_i·dloss/dlogp, and the same for the entropy
    Grid: (B·segments,), program -> (row, segment)
    Traffic: 6 or 8 bytes a token, twice that with the entropy, 4 more with a gradient per token
    Numerics: fp32; a derivative of 0 stays exactly 0, whatever g is
    Gradient: none: a second derivative raises
    """
    row = tl.program_id(0) // segments
    t = tl.program_id(0) % segments * BLOCK_T + tl.arange(0, BLOCK_T)
    n = row.to(tl.int64) * T + t
    inside = t < T
    if ONE_GRAD:
        grad = tl.load(grad_ptr)
    else:
        grad = tl.load(grad_ptr + n, mask=inside, other=0.0)
    if scale_ptr is not None:
        grad *= tl.load(scale_ptr + row)
    dlogp = tl.load(dlogp_ptr + n, mask=inside, other=0.0)
    tl.store(grad_logp_ptr + n, tl.where(dlogp == 0.0, 0.0, grad * dlogp), mask=inside)
    if dentropy_ptr is not None:
        dentropy = tl.load(dentropy_ptr + n, mask=inside, other=0.0)
        tl.store(grad_entropy_ptr + n, tl.where(dentropy == 0.0, 0.0, grad * dentropy), mask=inside)


def policy_formula(name: str) -> triton.JITFunction:
    """A built-in formula, or one that a user registered."""
    return POLICY[name] if name in POLICY else user_losses.triton_function(name)


def cut(T: int) -> tuple[int, int]:
    """(tokens in a segment, segments of a row): by T alone."""
    block = min(SEGMENT, max(32, triton.next_power_of_2(T)))
    return block, triton.cdiv(T, block)


def check_rows(op: str, dtypes: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not (tensor.dtype in dtypes and tensor.is_contiguous()):
            raise TypeError(f"{op}: {name} must be contiguous and one of {dtypes} here, got {tensor.dtype}")


def finish(
    partial: Tensor,
    params: Tensor,
    loss: Tensor | None,
    scale: Tensor,
    metrics: Tensor,
    B: int,
    segments: int,
    how: str,
) -> None:
    tile_s = min(FINISH_TILE, triton.next_power_of_2(max(segments, 1)))
    policy_loss_finish_kernel[(1,)](
        partial, *numbers_or_pointer(params), loss, scale, metrics, B, segments,
        WEIGHT=WEIGHTS["token_sum" if how == "none" else how], TILE_B=FINISH_TILE // tile_s, TILE_S=tile_s,
        num_warps=8, **COMPILE,
    )  # fmt: skip


def policy_loss_fwd(
    logp: Tensor,
    old: Tensor | None,
    advantages: Tensor,
    ref: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor | None,
    policy_weights: Tensor | None,
    token_weights: Tensor | None,
    log_s: Tensor | None,
    params: Tensor,
    formula: str,
    kl: str,
    aggregation: str,
    correction: str,
    entropy_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """schemas.OPS["policy_loss_fwd"]: (loss, dlogp, dentropy, scale, metrics)."""
    check_rows("policy_loss_fwd", DTYPES, logp=logp, old=old, advantages=advantages, ref=ref, entropy=entropy,
               log_s=log_s, policy_weights=policy_weights, token_weights=token_weights)  # fmt: skip
    B, T = logp.shape
    per_token = aggregation == "none"
    fp32 = functools.partial(logp.new_empty, dtype=torch.float32)
    loss, dlogp = fp32((B, T) if per_token else ()), fp32((B, T))
    dentropy = fp32((B, T) if entropy_grad else (0,))
    scale, metrics = fp32((B,)), fp32((len(METRICS),))
    block, segments = cut(T)
    programs = B * segments
    (grid,) = check_grid("policy_loss_fwd", programs)
    partial = fp32((NUM_PARTIALS.value, programs))
    params_ptr, numbers = numbers_or_pointer(params)
    with on_device(logp):
        if programs:
            policy_loss_fwd_kernel[(grid,)](
                logp, old, advantages, ref if kl else None, entropy, mask, policy_weights, token_weights, log_s,
                params_ptr, numbers, loss if per_token else None, dlogp, dentropy if entropy_grad else None, partial, T,
                segments, programs, FORMULA=policy_formula(formula), KL_FORMULA=KL[kl or "k3_value"],
                CORRECTION=CORRECTIONS[correction] if correction else None,
                ONE_ADV=advantages.shape != (B, T), ONE_LOG_S=log_s is not None and log_s.shape != (B, T),
                BLOCK_T=block, num_warps=WARPS, **REGISTERS, **COMPILE,
            )  # fmt: skip
        finish(partial, params, None if per_token else loss, scale, metrics, B, segments, aggregation)
    return loss, dlogp, dentropy, scale, metrics


def token_loss_bwd(
    grad: Tensor, logp: Tensor, entropy: Tensor | None, scale: Tensor | None, dlogp: Tensor, dentropy: Tensor
) -> tuple[Tensor, Tensor]:
    """schemas.OPS["token_loss_bwd"]: (grad_logp, grad_entropy)."""
    check_rows("token_loss_bwd", (torch.float32,), grad=grad, scale=scale, dlogp=dlogp, dentropy=dentropy)
    grad_logp = torch.empty_like(dlogp, dtype=logp.dtype)
    grad_entropy = torch.empty_like(dentropy, dtype=dentropy.dtype if entropy is None else entropy.dtype)
    if dlogp.numel():
        B = 1 if scale is None else dlogp.shape[0]
        block, segments = cut(dlogp.numel() // B)
        grid = check_grid("token_loss_bwd", B * segments)
        with_entropy = dentropy.numel() > 0
        with on_device(dlogp):
            token_loss_bwd_kernel[grid](
                grad, scale, dlogp, dentropy if with_entropy else None, grad_logp,
                grad_entropy if with_entropy else None, dlogp.numel() // B, segments, ONE_GRAD=grad.dim() == 0,
                BLOCK_T=block, num_warps=WARPS, **COMPILE,
            )  # fmt: skip
    return grad_logp, grad_entropy
