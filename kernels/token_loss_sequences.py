"""policy_loss where a token's loss takes something of its whole sequence: still three launches, forward and backward.

Those are gspo's ratio, a sequence's sampler correction, and for packed tokens the length of the sequence and an
advantage per sequence. One program takes one sequence: it goes over it once for what belongs to the whole, and again,
while the tokens are in the cache, for the losses. Its sums, joined by token_loss.policy_loss_finish_kernel, are those
of a segment there.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rl4llm_fast.formulas import METRICS

from .configs import COMPILE
from .rows import DTYPES, check_grid, numbers_or_pointer, on_device
from .token_block import (
    MAX_LENGTH,
    NUM_PARTIALS,
    NUM_SEQUENCES,
    ROLLOUT_CAP,
    ROLLOUT_FLOOR,
    block_of_tokens,
    live_tokens,
    param,
    store_sums,
    sum_live,
    token_omega,
)
from .token_formulas_gen import CORRECTIONS, KL, WEIGHTS
from .token_loss import SEGMENT, WARPS, check_rows, cut, finish, policy_formula

TILE_B = 1024  # lengths that a program looks at together for the longest
# Left alone, some version of ptxas aims at 64 or 128, and spills a few bytes.
REGISTERS = {"maxnreg": 128} if torch.version.hip is None else {}


@triton.jit
def extent(cu_ptr, b, N):
    """(first token, number of tokens) of a packed sequence; within [0, N] whatever the offsets hold."""
    start = tl.minimum(tl.maximum(tl.load(cu_ptr + b).to(tl.int64), 0), N)
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + b + 1).to(tl.int64), 0), N)
    return start, tl.maximum(end - start, 0).to(tl.int32)


@triton.jit
def longest(cu_ptr, programs, TILE: tl.constexpr):
    found = tl.zeros([TILE], tl.int64)
    for b0 in range(0, programs, TILE):
        b = b0 + tl.arange(0, TILE)
        start = tl.load(cu_ptr + b, mask=b < programs, other=0).to(tl.int64)
        found = tl.maximum(found, tl.load(cu_ptr + b + 1, mask=b < programs, other=0).to(tl.int64) - start)
    return tl.max(found, axis=0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "N", "programs"])
def policy_loss_sequences_kernel(
    logp_ptr,  # (B, T), or packed (N,)
    old_ptr,  # like logp, or None: logp
    adv_ptr,  # like logp, or (B, 1)
    ref_ptr,  # like logp, or None
    entropy_ptr,  # like logp, or None
    mask_ptr,  # like logp, or None
    policy_weights_ptr,  # like logp, or None; with a CORRECTION the sampler's log-probabilities
    token_weights_ptr,  # like logp, or None
    cu_ptr,  # (B+1,) where packed
    params_ptr,  # (NUM_PARAMS + knobs,) or None
    numbers,  # the same as numbers, or None; Triton's launcher has a variable named params
    loss_ptr,  # like logp, or None
    dlogp_ptr,  # like logp
    dentropy_ptr,  # like logp, or None
    partial_ptr,  # (NUM_PARTIALS, B)
    T,
    N,
    programs,
    FORMULA: tl.constexpr,
    KL_FORMULA: tl.constexpr,
    CORRECTION: tl.constexpr,
    ONE_ADV: tl.constexpr,
    SEQUENCE_RATIO: tl.constexpr,
    ONE_SLOPE: tl.constexpr,
    ONE_OMEGA: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILE: tl.constexpr,
):
    """The policy loss, its derivative and the sums behind the metrics, one sequence.

    Computes: as policy_loss_fwd_kernel, with log s = mean(log π − log π_old) where SEQUENCE_RATIO, ω from
        Σ(log π_old − log π_rollout) where ONE_OMEGA, and the sequence's weight in w_t where there is a WEIGHT
    Grid: (B,), program -> sequence; BLOCK_T does not depend on the batch
    Traffic: as policy_loss_fwd_kernel; logp, old, the sampler's log-probabilities, weights and mask are read twice,
        the second time from the cache
    Numerics: fp32; a sequence's sums block by block, in order
    Gradient: as policy_loss_fwd_kernel; where there is ONE_SLOPE, of gspo with one advantage, every token's share of
        the policy term moves the one ratio, so that the mean of w_t·ω_t counts
    """
    b = tl.program_id(0)
    if cu_ptr is not None:
        start, length = extent(cu_ptr, b, N)
    else:
        start = b.to(tl.int64) * T
        length = b * 0 + T
    OWN_OMEGA: tl.constexpr = policy_weights_ptr is not None and not ONE_OMEGA
    tokens = 0.0
    log_rho = 0.0
    log_omega = 0.0
    shares = 0.0
    if SEQUENCE_RATIO or ONE_OMEGA or WEIGHT is not None:
        for t0 in range(0, length, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            n = start + t
            live = live_tokens(mask_ptr, n, t < length)
            tokens += sum_live(live, 1.0)
            if SEQUENCE_RATIO or ONE_OMEGA:
                logp = tl.load(logp_ptr + n, mask=live, other=0.0).to(tl.float32)
                old = logp
                if old_ptr is not None:
                    old = tl.load(old_ptr + n, mask=live, other=0.0).to(tl.float32)
                if SEQUENCE_RATIO:
                    log_rho += sum_live(live, logp - old)
                if ONE_OMEGA:
                    rollout = tl.load(policy_weights_ptr + n, mask=live, other=0.0).to(tl.float32)
                    log_omega += sum_live(live, old - rollout)
            if ONE_SLOPE:
                share = tl.where(live, 1.0, 0.0)
                if token_weights_ptr is not None:
                    share = tl.load(token_weights_ptr + n, mask=live, other=0.0).to(tl.float32)
                if OWN_OMEGA:
                    share *= token_omega(policy_weights_ptr, n, live, old, params_ptr, numbers, CORRECTION)
                shares += sum_live(live, share)
    least_one = tl.maximum(tokens, 1.0)
    log_s = log_rho / least_one
    omega = 1.0
    if ONE_OMEGA:
        cap = param(params_ptr, numbers, ROLLOUT_CAP)
        omega = CORRECTION(log_omega, cap, param(params_ptr, numbers, ROLLOUT_FLOOR))
    of_sequence = 1.0
    if WEIGHT is not None:
        max_length = param(params_ptr, numbers, MAX_LENGTH)
        if cu_ptr is not None:
            max_length = tl.where(max_length < 0.0, longest(cu_ptr, programs, TILE), max_length)
        of_sequence = WEIGHT(tokens, 1.0, param(params_ptr, numbers, NUM_SEQUENCES), max_length)

    count = 0.0
    loss = 0.0
    low = 0.0
    high = 0.0
    ratio = 0.0
    k1 = 0.0
    k3 = 0.0
    kl = 0.0
    entropy = 0.0
    least = float("inf")
    largest = float("-inf")
    for t0 in range(0, length, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        n = start + t
        inside = t < length
        live = live_tokens(mask_ptr, n, inside)
        weight = tl.where(live, of_sequence, 0.0)
        if token_weights_ptr is not None:
            weight *= tl.load(token_weights_ptr + n, mask=live, other=0.0).to(tl.float32)
        found = block_of_tokens(
            logp_ptr, old_ptr, adv_ptr, ref_ptr, entropy_ptr, None if ONE_OMEGA else policy_weights_ptr, params_ptr,
            numbers, loss_ptr, dlogp_ptr, dentropy_ptr, b, n, inside, live, log_s, omega, weight,
            of_sequence * omega * shares / least_one if ONE_SLOPE else None, FORMULA, KL_FORMULA, CORRECTION, ONE_ADV,
        )  # fmt: skip
        count += found[0]
        loss += found[1]
        low += found[2]
        high += found[3]
        ratio += found[4]
        k1 += found[5]
        k3 += found[6]
        kl += found[7]
        entropy += found[8]
        # A maximum drops NaN, which a sum of ratios has kept.
        least = tl.minimum(least, found[9])
        largest = tl.maximum(largest, found[10])
    poison = 0.0 * ratio
    sums = (count, loss, low, high, ratio, k1, k3, kl, entropy, least + poison, largest + poison)
    store_sums(partial_ptr + b, programs, sums)


def policy_loss_sequences_fwd(
    logp: Tensor,
    old: Tensor | None,
    advantages: Tensor,
    ref: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor | None,
    policy_weights: Tensor | None,
    token_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    params: Tensor,
    formula: str,
    kl: str,
    aggregation: str,
    correction: str,
    sequence_ratio: bool,
    sequence_correction: bool,
    entropy_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """schemas.OPS["policy_loss_sequences_fwd"]: (loss, dlogp, dentropy, scale, metrics)."""
    check_rows("policy_loss_sequences_fwd", DTYPES, logp=logp, old=old, advantages=advantages, ref=ref, entropy=entropy,
               policy_weights=policy_weights, token_weights=token_weights)  # fmt: skip
    packed = cu_seqlens is not None
    rows, T = logp.shape
    B = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else rows
    per_token = aggregation == "none"
    fp32 = functools.partial(logp.new_empty, dtype=torch.float32)
    loss, dlogp = fp32((rows, T) if per_token else ()), fp32((rows, T))
    dentropy = fp32((rows, T) if entropy_grad else (0,))
    scale, metrics = fp32((rows,)), fp32((len(METRICS),))
    (grid,) = check_grid("policy_loss_sequences_fwd", B)
    partial = fp32((NUM_PARTIALS.value, B))
    # A row's weight is the finisher's; what packed sequences weigh, it cannot know: there it is in the tokens' weights.
    own_weight = packed and aggregation.startswith("seq_")
    one_adv = advantages.shape != logp.shape
    with on_device(logp):
        if B:
            policy_loss_sequences_kernel[(grid,)](
                logp, old, advantages, ref if kl else None, entropy, mask, policy_weights, token_weights, cu_seqlens,
                *numbers_or_pointer(params), loss if per_token else None, dlogp, dentropy if entropy_grad else None,
                partial, T, logp.numel(), B, FORMULA=policy_formula(formula), KL_FORMULA=KL[kl or "k3_value"],
                CORRECTION=CORRECTIONS[correction] if correction else None, ONE_ADV=one_adv,
                SEQUENCE_RATIO=sequence_ratio, ONE_SLOPE=one_adv and formula == "gspo",
                ONE_OMEGA=sequence_correction and bool(correction),
                WEIGHT=WEIGHTS[aggregation] if own_weight else None, BLOCK_T=SEGMENT if packed else cut(T)[0],
                TILE=TILE_B, num_warps=WARPS, **REGISTERS, **COMPILE,
            )  # fmt: skip
        how = "token_sum" if own_weight else aggregation
        sequences = (1, B) if packed else (B, 1)
        finish(partial, params, None if per_token else loss, scale, metrics, *sequences, how)
    return loss, dlogp, dentropy, scale, metrics
