"""The policy loss of a block of tokens: what token_loss.py (segments of rows) and token_loss_sequences.py share."""

import triton
import triton.language as tl

from rl4llm_fast.formulas import MAX_KNOBS, PARAMS

# Where each hyperparameter stands in params; knob k of the formula is at NUM_PARAMS + k.
NUM_TOKENS = tl.constexpr(PARAMS.index("num_tokens"))
NUM_SEQUENCES = tl.constexpr(PARAMS.index("num_sequences"))
MAX_LENGTH = tl.constexpr(PARAMS.index("max_length"))
DP_SIZE = tl.constexpr(PARAMS.index("dp_size"))
KL_COEF = tl.constexpr(PARAMS.index("kl_coef"))
ENTROPY_COEF = tl.constexpr(PARAMS.index("entropy_coef"))
ROLLOUT_CAP = tl.constexpr(PARAMS.index("rollout_cap"))
ROLLOUT_FLOOR = tl.constexpr(PARAMS.index("rollout_floor"))
NUM_PARAMS = tl.constexpr(len(PARAMS))

# What is summed up over the live tokens of a segment; the last two are the least and the largest ratio.
SUMS = ("count", "loss", "clipped_low", "clipped_high", "ratio", "k1", "k3", "kl", "entropy")
NUM_SUMS = tl.constexpr(len(SUMS))
NUM_PARTIALS = tl.constexpr(len(SUMS) + 2)

assert MAX_KNOBS == 4, "block_of_tokens unpacks four knobs"


@triton.jit
def param(params_ptr, numbers, INDEX: tl.constexpr):
    """A hyperparameter: read on the device where the user gave tensors there, else one of the launch's numbers."""
    if params_ptr is not None:
        value = tl.load(params_ptr + INDEX).to(tl.float32)
    else:
        value = numbers[INDEX]
    return value


@triton.jit
def live_tokens(mask_ptr, n, inside):
    live = inside
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + n, mask=inside, other=0) != 0)
    return live


@triton.jit
def store_sums(partial_ptr, programs, sums):
    for k in tl.static_range(NUM_PARTIALS):
        tl.store(partial_ptr + k * programs, sums[k])


@triton.jit
def sum_live(live, value):
    return tl.sum(tl.where(live, value, 0.0), axis=0)


@triton.jit
def token_omega(policy_weights_ptr, n, live, old, params_ptr, numbers, CORRECTION: tl.constexpr):
    """ω of tokens n, as it is given or made of the sampler's log-probabilities."""
    omega = tl.load(policy_weights_ptr + n, mask=live, other=0.0).to(tl.float32)
    if CORRECTION is not None:
        cap = param(params_ptr, numbers, ROLLOUT_CAP)
        omega = CORRECTION(old - omega, cap, param(params_ptr, numbers, ROLLOUT_FLOOR))
    return omega


@triton.jit
def block_of_tokens(
    logp_ptr, old_ptr, adv_ptr, ref_ptr, entropy_ptr, policy_weights_ptr, params_ptr, numbers, loss_ptr, dlogp_ptr,
    dentropy_ptr, row, n, inside, live, log_s, omega, weight, one_slope,
    FORMULA: tl.constexpr, KL_FORMULA: tl.constexpr, CORRECTION: tl.constexpr, ONE_ADV: tl.constexpr,
):  # fmt: skip
    """Stores loss and derivatives of tokens n, of which those inside exist; -> their sums, in the order of SUMS, and
    the extremes of the ratio. ω is ``omega``, or from policy_weights_ptr where that is given; the weight w_t is known.
    Where the sequence's tokens share the slope of the policy term, ``one_slope`` stands for w_t·ω_t in it.
    """
    logp = tl.load(logp_ptr + n, mask=live, other=0.0).to(tl.float32)
    old = logp
    if old_ptr is not None:
        old = tl.load(old_ptr + n, mask=live, other=0.0).to(tl.float32)
    if ONE_ADV:
        adv = tl.where(live, tl.load(adv_ptr + row).to(tl.float32), 0.0)
    else:
        adv = tl.load(adv_ptr + n, mask=live, other=0.0).to(tl.float32)
    knobs = (
        param(params_ptr, numbers, NUM_PARAMS),
        param(params_ptr, numbers, NUM_PARAMS + 1),
        param(params_ptr, numbers, NUM_PARAMS + 2),
        param(params_ptr, numbers, NUM_PARAMS + 3),
    )
    ref = logp
    if ref_ptr is not None:
        ref = tl.load(ref_ptr + n, mask=live, other=0.0).to(tl.float32)
    loss, dlogp, ratio, clipped_low, clipped_high, k1, k3 = FORMULA(
        logp, old, ref, adv, tl.where(live, log_s, 0.0), knobs
    )
    if policy_weights_ptr is not None:
        omega = token_omega(policy_weights_ptr, n, live, old, params_ptr, numbers, CORRECTION)
    loss *= omega
    slope = 0.0
    if one_slope is not None:
        slope = dlogp * one_slope
        dlogp = tl.zeros_like(logp)
    else:
        dlogp *= omega
    kl_sum = 0.0
    if ref_ptr is not None:
        kl, dkl = KL_FORMULA(logp, ref, old)
        kl_coef = param(params_ptr, numbers, KL_COEF)
        # With a coefficient of 0 an estimate that overflowed is a metric and nothing else.
        loss += tl.where(kl_coef != 0.0, kl_coef * kl, 0.0)
        dlogp += tl.where(kl_coef != 0.0, kl_coef * dkl, 0.0)
        kl_sum = sum_live(live, kl)
    entropy_sum = 0.0
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + n, mask=live, other=0.0).to(tl.float32)
        entropy_coef = param(params_ptr, numbers, ENTROPY_COEF)
        loss -= tl.where(entropy_coef != 0.0, entropy_coef * entropy, 0.0)
        entropy_sum = sum_live(live, entropy)
        if dentropy_ptr is not None:
            tl.store(dentropy_ptr + n, tl.where(live, -entropy_coef * weight, 0.0), mask=inside)
    loss = tl.where(live, loss * weight, 0.0)
    if loss_ptr is not None:
        tl.store(loss_ptr + n, loss * param(params_ptr, numbers, DP_SIZE), mask=inside)
    dlogp *= weight
    if one_slope is not None:
        dlogp += slope
    tl.store(dlogp_ptr + n, tl.where(live, dlogp, 0.0), mask=inside)
    ratio_sum = sum_live(live, ratio)
    # The extremes of a reduction drop NaN, its sum does not; a ratio is at most e^20, so 0·sum is 0 or NaN.
    poison = 0.0 * ratio_sum
    least = tl.min(tl.where(live, ratio, float("inf")), axis=0) + poison
    largest = tl.max(tl.where(live, ratio, float("-inf")), axis=0) + poison
    return (sum_live(live, 1.0), tl.sum(loss, axis=0), sum_live(live, clipped_low), sum_live(live, clipped_high),
            ratio_sum, sum_live(live, k1), sum_live(live, k3), kl_sum, entropy_sum, least, largest)  # fmt: skip
