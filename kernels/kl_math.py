"""What the kernels of kl.py share: the sums over a pair of rows, as tl_math.py has them for one, and the JSD's terms.

The difference of the exponents, d = Σ 2^x·((z' − m) − (y' − m_y)), is summed in units of the logits, before k: logits
of finfo.min, which libraries write for masked tokens, do not overflow there.
"""

import triton
import triton.language as tl

from .tl_math import LOG2_ZERO, capped, load_number, reference_max

LOWEST = tl.constexpr(-3.4028234663852886e38)  # stands for −inf where it is multiplied by a weight that is exactly 0


@triton.jit
def rebase_pair(m, s, other_m, other_s, d, new_m, new_other_m, k):
    """s, other_s and d = Σ 2^x·((z' − m) − (other z' − other m)) relative to new maxima >= the old."""
    shift = tl.maximum(m - reference_max(new_m), LOWEST)
    other_shift = tl.maximum(other_m - reference_max(new_other_m), LOWEST)
    scale = tl.exp2(shift * k)
    # What no longer counts may be infinite: 0·inf must not arise. NaN must stay, so the sums are multiplied.
    d = tl.where(scale == 0.0, 0.0, scale * (d + s * (shift - other_shift)))
    return s * scale, other_s * tl.exp2(other_shift * k), d


@triton.jit
def merge_pair(m, s, other_m, other_s, d, lost, k):
    """The sums of one row from those of its lanes or parts, a vector each: one fixed tree, so the same bits always."""
    row_m, row_other_m = tl.max(m, axis=0), tl.max(other_m, axis=0)
    s, other_s, d = rebase_pair(m, s, other_m, other_s, d, row_m, row_other_m, k)
    s, other_s, d = tl.sum(s, axis=0), tl.sum(other_s, axis=0), tl.sum(d, axis=0)
    return row_m, s, row_other_m, other_s, d, tl.max(lost, axis=0)


@triton.jit
def store_part(partial_ptr, row, parts, m, s, other_m, other_s, d, lost):
    """The sums of this program's part of a row, in partial (N, parts, 6)."""
    part_ptr = partial_ptr + (row.to(tl.int64) * parts + tl.program_id(0) % parts) * 6
    tl.store(part_ptr, m)
    tl.store(part_ptr + 1, s)
    tl.store(part_ptr + 2, other_m)
    tl.store(part_ptr + 3, other_s)
    tl.store(part_ptr + 4, d)
    tl.store(part_ptr + 5, lost)


@triton.jit
def load_parts(partial_ptr, row, parts, BLOCK_PARTS: tl.constexpr):
    """The sums of all parts of a row; beyond them those of no columns."""
    part = tl.arange(0, BLOCK_PARTS)
    part_ptr = partial_ptr + (row.to(tl.int64) * parts + part) * 6
    m = tl.load(part_ptr, mask=part < parts, other=float("-inf"))
    s = tl.load(part_ptr + 1, mask=part < parts, other=0.0)
    other_m = tl.load(part_ptr + 2, mask=part < parts, other=float("-inf"))
    other_s = tl.load(part_ptr + 3, mask=part < parts, other=0.0)
    d = tl.load(part_ptr + 4, mask=part < parts, other=0.0)
    return m, s, other_m, other_s, d, tl.load(part_ptr + 5, mask=part < parts, other=0.0)


@triton.jit
def load_pair(row_ptr, other_row_ptr, columns, last, softcap, HAS_SOFTCAP: tl.constexpr):
    """Columns of both rows, soft-capped; −inf from ``last`` on, where nothing is read."""
    inside = columns < last
    z = tl.load(row_ptr + columns, mask=inside, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
    other_z = tl.load(other_row_ptr + columns, mask=inside, other=float("-inf"), eviction_policy="evict_first")
    other_z = other_z.to(tl.float32)
    if HAS_SOFTCAP:
        z, _ = capped(z, softcap)
        other_z, _ = capped(other_z, softcap)
    return z, other_z


@triton.jit
def log2_ratios(log2_p, log2_q, beta):
    """log2(m/p) and log2(q/p) of the mixture m = β·q + (1−β)·p; finite also where p or q is 0."""
    delta = tl.maximum(log2_q, LOG2_ZERO) - tl.maximum(log2_p, LOG2_ZERO)
    smaller = tl.exp2(-tl.abs(delta))  # the ratio of the smaller to the larger: nothing overflows
    mixed = tl.where(delta <= 0, (1.0 - beta) + beta * smaller, beta + (1.0 - beta) * smaller)
    return tl.log2(mixed) + tl.maximum(delta, 0.0), delta


@triton.jit
def load_beta(ptr, number):
    """β of the JSD; NaN outside (0, 1)."""
    beta = load_number(ptr, number, 0)
    return tl.where(beta < 1.0, beta, float("nan"))


@triton.jit
def finish_row(row, live, m, s, other_m, other_s, d, lost, tau, kl_ptr, inner_ptr, row_max_ptr, log_sum_ptr,
               other_row_max_ptr, other_log_sum_ptr):  # fmt: skip
    """Writes a row's results from its sums. All 0 where the row is not live."""
    nan = float("nan")
    log_sum = tl.where(m == float("-inf"), nan, tl.log(s))
    other_log_sum = tl.where(other_m == float("-inf"), nan, tl.log(other_s))
    # The logarithm of the ratio, not the difference of the logarithms: near KL = 0 all of it would be rounding.
    kl = d / s / tau + tl.log(other_s / s)
    # A token that only the other distribution cannot draw; a bad row on either side is NaN all the same.
    kl = tl.where(lost > 0, float("inf"), kl) + 0.0 * (log_sum + other_log_sum)
    kl = tl.where(live, kl, 0.0)
    tl.store(kl_ptr + row, kl)
    tl.store(inner_ptr + row, kl)
    tl.store(row_max_ptr + row, tl.where(live, m, 0.0))
    tl.store(log_sum_ptr + row, tl.where(live, log_sum, 0.0))
    tl.store(other_row_max_ptr + row, tl.where(live, other_m, 0.0))
    tl.store(other_log_sum_ptr + row, tl.where(live, other_log_sum, 0.0))
