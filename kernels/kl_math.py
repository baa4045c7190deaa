"""What the kernels of kl.py share: the sums over a pair of rows, as tl_math.py has them for one, and the JSD's terms.

Differences of the logits are summed in their own units, before k: finfo.min, which libraries write for masked tokens,
does not overflow there. They are summed twice. d = Σ 2^x·((z' − m) − (y' − m_y)) makes the value. g = Σ 2^x·((z' − m) −
(y' − c)), with c the other side's logit where z' is largest, makes the gradient: the likeliest token counts 0 in it, so
what a peaked row is off by does not drown the little that is left of p·(log p − log q − KL). For the same reason the
mixture m of the JSD is counted as κ·m, with κ = p/m at the likeliest token where q is not above p: log p/(κm) is about
0 there. κ is 1 where p = q.
"""

import triton
import triton.language as tl

from .tl_math import LOG2_ZERO, capped, load_number, reference_max

LOWEST = tl.constexpr(-3.4028234663852886e38)  # stands for −inf where it is multiplied by a weight that is exactly 0
BOUND = tl.constexpr(1e36)  # of the terms of g: hundreds of them still have a finite sum


@triton.jit
def bounded_difference(x, other_x):
    """x − other_x, as a term of g."""
    return tl.minimum(tl.maximum(x - other_x, -BOUND), BOUND)


@triton.jit
def anchor_at(z, other_z, m, new_m, anchor):
    """c at the new maximum of each lane of (LANES, VEC) columns; of equally likely tokens, the largest of the other."""
    found = tl.max(tl.where(z == new_m[:, None], other_z, float("-inf")), axis=1)
    return tl.maximum(found, tl.where(m == new_m, anchor, float("-inf")))


@triton.jit
def rebase_pair(m, s, other_m, other_s, d, anchor, g, new_m, new_other_m, new_anchor, k):
    """s, other_s, d and g relative to new maxima >= the old, and to the anchor at the new one."""
    shift = tl.maximum(m - reference_max(new_m), LOWEST)
    other_shift = tl.maximum(other_m - reference_max(new_other_m), LOWEST)
    scale = tl.exp2(shift * k)
    # What no longer counts may be infinite: 0·inf must not arise. NaN must stay, so the sums are multiplied.
    d = tl.where(scale == 0.0, 0.0, scale * (d + s * (shift - other_shift)))
    g = tl.where(scale == 0.0, 0.0, scale * (g + s * bounded_difference(shift, anchor - new_anchor)))
    return s * scale, other_s * tl.exp2(other_shift * k), d, g


@triton.jit
def merge_pair(m, s, other_m, other_s, d, lost, anchor, g, k):
    """The sums of one row from those of its lanes or parts, a vector each: one fixed tree, so the same bits always."""
    row_m, row_other_m = tl.max(m, axis=0), tl.max(other_m, axis=0)
    row_anchor = tl.max(tl.where(m == row_m, anchor, float("-inf")), axis=0)
    s, other_s, d, g = rebase_pair(m, s, other_m, other_s, d, anchor, g, row_m, row_other_m, row_anchor, k)
    s, other_s, d, g = tl.sum(s, axis=0), tl.sum(other_s, axis=0), tl.sum(d, axis=0), tl.sum(g, axis=0)
    return row_m, s, row_other_m, other_s, d, tl.max(lost, axis=0), row_anchor, g


@triton.jit
def store_part(partial_ptr, row, parts, m, s, other_m, other_s, d, lost, anchor, g):
    """The sums of this program's part of a row, in partial (N, parts, 8)."""
    part_ptr = partial_ptr + (row.to(tl.int64) * parts + tl.program_id(0) % parts) * 8
    tl.store(part_ptr, m)
    tl.store(part_ptr + 1, s)
    tl.store(part_ptr + 2, other_m)
    tl.store(part_ptr + 3, other_s)
    tl.store(part_ptr + 4, d)
    tl.store(part_ptr + 5, lost)
    tl.store(part_ptr + 6, anchor)
    tl.store(part_ptr + 7, g)


@triton.jit
def load_parts(partial_ptr, row, parts, BLOCK_PARTS: tl.constexpr):
    """The sums of all parts of a row; beyond them those of no columns."""
    part = tl.arange(0, BLOCK_PARTS)
    there = part < parts
    part_ptr = partial_ptr + (row.to(tl.int64) * parts + part) * 8
    m = tl.load(part_ptr, mask=there, other=float("-inf"))
    s = tl.load(part_ptr + 1, mask=there, other=0.0)
    other_m = tl.load(part_ptr + 2, mask=there, other=float("-inf"))
    other_s = tl.load(part_ptr + 3, mask=there, other=0.0)
    d = tl.load(part_ptr + 4, mask=there, other=0.0)
    lost = tl.load(part_ptr + 5, mask=there, other=0.0)
    anchor = tl.load(part_ptr + 6, mask=there, other=float("-inf"))
    return m, s, other_m, other_s, d, lost, anchor, tl.load(part_ptr + 7, mask=there, other=0.0)


@triton.jit
def load_pair(row_ptr, other_row_ptr, columns, last, softcap, HAS_SOFTCAP: tl.constexpr):
    """Columns of both rows, soft-capped; −inf from ``last`` on, where nothing is read."""
    inside = columns < last
    z = tl.load(row_ptr + columns, mask=inside, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
    other_z = tl.load(other_row_ptr + columns, mask=inside, other=float("-inf"), eviction_policy="evict_first")
    other_z = other_z.to(tl.float32)
    if HAS_SOFTCAP:
        z = capped(z, softcap)
        other_z = capped(other_z, softcap)
    return z, other_z


@triton.jit
def log2_ratios(log2_p, log2_q, p_weight, q_weight):
    """log2(p/κm) and log2(q/κm) of the mixture κm = q_weight·q + p_weight·p; finite also where p or q is 0."""
    delta = tl.maximum(log2_q, LOG2_ZERO) - tl.maximum(log2_p, LOG2_ZERO)
    smaller = tl.exp2(-tl.abs(delta))  # the ratio of the smaller to the larger: nothing overflows
    lead, other = tl.where(delta <= 0, p_weight, q_weight), tl.where(delta <= 0, q_weight, p_weight)
    total = tl.fma(other, smaller, lead)
    mixed = log2_of_sum(total, tl.fma(other, smaller, lead - total))
    # Not one from the other: where they are far apart, the smaller one's rounding would be in both.
    return tl.minimum(-delta, 0.0) - mixed, tl.minimum(delta, 0.0) - mixed


@triton.jit
def log2_of_sum(x, rest):
    """log2(x + rest) of a normal x > 0, rest below an ulp of x: around 1, where it counts, x − 1 is exact.

    x = m·2^e, 2/3 <= m < 4/3; the polynomial is that of csrc/hd.h.
    """
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F2AAAAB) >> 23
    f = ((bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0) + tl.where(e == 0, rest, 0.0)
    p = 0.202784181 * f - 0.222221166
    p = p * f + 0.201799735
    p = p * f - 0.236786529
    p = p * f + 0.28871128
    p = p * f - 0.360789567
    p = p * f + 0.480895966
    p = p * f - 0.721346557
    p = p * f + 1.44269502
    return p * f + e.to(tl.float32) + (x - x)  # the bits of a NaN give some number


@triton.jit
def load_beta(ptr, number):
    """β of the JSD; NaN outside (0, 1); 0 for the other directions, which have none."""
    if ptr is None and number is None:
        beta = 0.0
    else:
        beta = load_number(ptr, number, 0)
        beta = tl.where(beta < 1.0, beta, float("nan"))
    return beta


@triton.jit
def load_mixture(beta, inner_ptr, row):
    """The weights of p and q in κm."""
    scale = tl.load(inner_ptr + 2 * row.to(tl.int64) + 1).to(tl.float32)
    return (1.0 - beta) * scale, beta * scale


@triton.jit
def finish_row(row, live, m, s, other_m, other_s, d, lost, anchor, g, tau, beta, kl_ptr, inner_ptr, row_max_ptr,
               log_sum_ptr, other_row_max_ptr, other_log_sum_ptr, ANCHORED: tl.constexpr):  # fmt: skip
    """Writes a row's results from its sums. All 0 where the row is not live.

    ANCHORED: the other side is counted from c, not from its maximum, as the gradient of the reverse KL wants it.
    """
    nan = float("nan")
    log_sum = tl.where(m == float("-inf"), nan, tl.log(s))
    other_log_sum = tl.where(other_m == float("-inf"), nan, tl.log(other_s))
    bad = 0.0 * (log_sum + other_log_sum)  # a bad row on either side is NaN all over
    # The logarithm of the ratio, not the difference of the logarithms: near KL = 0 all of it would be rounding.
    kl = d / s / tau + tl.log(tl.div_rn(other_s, s))  # / may make 1 ± 6e-8 of equal sums
    mean = g / s
    q_over_p = (anchor - other_m) / tau - other_log_sum + log_sum  # its logarithm at the likeliest token
    scale = tl.where(q_over_p <= 0, 1.0 / ((1.0 - beta) + beta * tl.exp(q_over_p)), 1.0)
    if ANCHORED:
        anchor = tl.where(lost > 0, other_m, anchor)
        other_log_sum += (other_m - anchor) / tau
    else:
        anchor = other_m
    # lost: a token that only the other distribution cannot draw
    tl.store(kl_ptr + row, tl.where(live, tl.where(lost > 0, float("inf"), kl) + bad, 0.0))
    inner_row_ptr = inner_ptr + 2 * row.to(tl.int64)
    tl.store(inner_row_ptr, tl.where(live, tl.where(lost > 0, float("inf"), mean) + bad, 0.0))
    tl.store(inner_row_ptr + 1, tl.where(live, scale, 0.0))
    tl.store(row_max_ptr + row, tl.where(live, m, 0.0))
    tl.store(log_sum_ptr + row, tl.where(live, log_sum, 0.0))
    tl.store(other_row_max_ptr + row, tl.where(live, anchor, 0.0))
    tl.store(other_log_sum_ptr + row, tl.where(live, other_log_sum, 0.0))
