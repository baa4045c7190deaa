"""kl_divergence: the exact KL of two sets of logits per row (docs/math.md section 3, "Exact"); its gradient: kl_bwd.py.

The reverse and the forward KL are one function, Σ a·(log a − log b) of a leading and another distribution: the launcher
swaps the sides. The JSD needs both normalisers before its first term: the same kernel finds them, a second one reads
again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .kl_math import (
    LOWEST,
    anchor_at,
    bounded_difference,
    finish_row,
    load_beta,
    load_mixture,
    load_pair,
    load_parts,
    log2_ratios,
    merge_pair,
    rebase_pair,
    store_part,
)
from .rows import check_grid, check_pair, number_or_pointer, on_device, row_pointer, row_strides
from .tl_math import LN2, LOG2E, load_number, reference_max, row_is_live


@triton.jit(do_not_specialize=["T", "temperature_stride"])
def kl_divergence_fwd_kernel(
    logits_ptr,  # (B, T, V), last stride 1: of the leading distribution a
    other_logits_ptr,  # (B, T, V), last stride 1: of the other, b
    mask_ptr,  # (N,) or None
    temperature_ptr,  # (N,) or () or None
    temperature,  # number, where temperature_ptr is None
    softcap_ptr,  # () or None
    softcap,  # number or None
    beta_ptr,  # () or None
    beta,  # number, or None where the direction has none
    partial_ptr,  # (N, parts, 8), or None where a row is one part
    kl_ptr,  # (N,)
    inner_ptr,  # (N, 2)
    row_max_ptr,  # (N,)
    log_sum_ptr,  # (N,)
    other_row_max_ptr,  # (N,)
    other_log_sum_ptr,  # (N,)
    T,
    V,
    stride_b,
    stride_t,
    other_stride_b,
    other_stride_t,
    temperature_stride,  # 1 for a temperature per row, else 0
    parts,
    part_columns,
    ANCHORED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
):
    """KL(a‖b) of every row, with what the backward pass and the JSD need of both sides, in one read of both.

    Computes: KL = Σ 2^x_v·((z'_v − max z') − (y'_v − max y'))/(s·τ) + log(s_b/s), s = Σ 2^x_v, x_v = (z'_v − max z')·k
    Grid: (N·parts,), program -> (row, part); V alone decides the cut, ``kl_divergence_merge_kernel`` joins the parts
    Traffic: V·(sizeof(logit) + sizeof(other)) read, 36 bytes written (32·parts more each way when the row is cut)
    Numerics: fp32; per-lane online maxima, lanes joined in one tree; a_v = 0: 0; only b_v = 0: inf; bad row: NaN
    Gradient: kl_divergence_bwd_kernel, from the maxima and log-sums of both sides
    """
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    HAS_SOFTCAP: tl.constexpr = (softcap_ptr is not None) or (softcap is not None)
    LANES: tl.constexpr = BLOCK_V // VEC
    live = row_is_live(row, mask_ptr, None, 0, False)
    row_ptr = row_pointer(logits_ptr, row, T, stride_b, stride_t)
    other_row_ptr = row_pointer(other_logits_ptr, row, T, other_stride_b, other_stride_t)
    tau = load_number(temperature_ptr, temperature, row * temperature_stride)
    cap = load_number(softcap_ptr, softcap, 0) if HAS_SOFTCAP else 0.0
    k = LOG2E / tau
    first = part * part_columns
    # A row that is not live is not read at all.
    last = tl.where(live, tl.minimum(first + part_columns, V), first)

    # Every 16-byte load keeps maxima of its own: no thread waits for another before the last column.
    nothing, zero = tl.full([LANES], float("-inf"), tl.float32), tl.zeros([LANES], tl.float32)
    m, s, other_m, other_s, d, lost, anchor, g = nothing, zero, nothing, zero, zero, zero, nothing, zero
    tile = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    for start in range(first, last, BLOCK_V):
        z, other_z = load_pair(row_ptr, other_row_ptr, start + tile, last, cap, HAS_SOFTCAP)
        only_other = (other_z == float("-inf")) & (z != float("-inf"))
        lost = tl.maximum(lost, tl.max(tl.where(only_other, 1.0, 0.0), axis=1))
        new_m, new_other_m = tl.maximum(m, tl.max(z, axis=1)), tl.maximum(other_m, tl.max(other_z, axis=1))
        new_anchor = anchor_at(z, other_z, m, new_m, anchor)
        s, other_s, d, g = rebase_pair(m, s, other_m, other_s, d, anchor, g, new_m, new_other_m, new_anchor, k)
        # NaN: `max` may drop it, but 2^NaN puts it into the sums. +inf: inf − inf does the same.
        x = z - reference_max(new_m)[:, None]
        other_x = other_z - reference_max(new_other_m)[:, None]
        weight = tl.exp2(x * k)
        s += tl.sum(weight, axis=1)
        other_s += tl.sum(tl.exp2(other_x * k), axis=1)
        d += tl.sum(weight * (tl.maximum(x, LOWEST) - tl.maximum(other_x, LOWEST)), axis=1)
        g += tl.sum(weight * bounded_difference(x, other_z - new_anchor[:, None]), axis=1)
        m, other_m, anchor = new_m, new_other_m, new_anchor

    m, s, other_m, other_s, d, lost, anchor, g = merge_pair(m, s, other_m, other_s, d, lost, anchor, g, k)
    if partial_ptr is not None:
        store_part(partial_ptr, row, parts, m, s, other_m, other_s, d, lost, anchor, g)
    else:
        weight = load_beta(beta_ptr, beta)
        finish_row(row, live, m, s, other_m, other_s, d, lost, anchor, g, tau, weight, kl_ptr, inner_ptr, row_max_ptr,
                   log_sum_ptr, other_row_max_ptr, other_log_sum_ptr, ANCHORED)  # fmt: skip


@triton.jit(do_not_specialize=["temperature_stride"])
def kl_divergence_merge_kernel(
    mask_ptr,  # (N,) or None
    temperature_ptr,  # (N,) or () or None
    temperature,  # number, where temperature_ptr is None
    beta_ptr,  # () or None
    beta,  # number, or None where the direction has none
    partial_ptr,  # (N, parts, 8)
    kl_ptr,  # (N,)
    inner_ptr,  # (N, 2)
    row_max_ptr,  # (N,)
    log_sum_ptr,  # (N,)
    other_row_max_ptr,  # (N,)
    other_log_sum_ptr,  # (N,)
    temperature_stride,  # 1 for a temperature per row, else 0
    parts,
    ANCHORED: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """The second pass over rows that were cut: joins the parts of a row and writes its results.

    Computes: both maxima over the parts, every sum scaled by 2^((m_j − max)·k); then as kl_divergence_fwd_kernel
    Grid: (N,), program -> row
    Traffic: 32·parts bytes read, 36 written
    Numerics: fp32; the parts of a row are joined in one tree that V alone decides; a part of −inf only weighs 0
    Gradient: kl_divergence_bwd_kernel
    """
    row = tl.program_id(0)
    tau = load_number(temperature_ptr, temperature, row * temperature_stride)
    m, s, other_m, other_s, d, lost, anchor, g = load_parts(partial_ptr, row, parts, BLOCK_PARTS)
    m, s, other_m, other_s, d, lost, anchor, g = merge_pair(m, s, other_m, other_s, d, lost, anchor, g, LOG2E / tau)
    live, weight = row_is_live(row, mask_ptr, None, 0, False), load_beta(beta_ptr, beta)
    finish_row(row, live, m, s, other_m, other_s, d, lost, anchor, g, tau, weight, kl_ptr, inner_ptr, row_max_ptr,
               log_sum_ptr, other_row_max_ptr, other_log_sum_ptr, ANCHORED)  # fmt: skip


@triton.jit(do_not_specialize=["T", "temperature_stride"])
def kl_divergence_jsd_kernel(
    logits_ptr,  # (B, T, V), last stride 1
    ref_logits_ptr,  # (B, T, V), last stride 1
    mask_ptr,  # (N,) or None
    temperature_ptr,  # (N,) or () or None
    temperature,  # number, where temperature_ptr is None
    softcap_ptr,  # () or None
    softcap,  # number or None
    row_max_ptr,  # (N,)
    log_sum_ptr,  # (N,)
    ref_row_max_ptr,  # (N,)
    ref_log_sum_ptr,  # (N,)
    beta_ptr,  # () or None
    beta,  # number, where beta_ptr is None
    inner_ptr,  # (N, 2): the κ of kl_math.py comes second
    partial_ptr,  # (N, parts, 4): Σ p·log2(p/κm), Σ q·log2(q/κm), Σ p and Σ q over the part
    T,
    V,
    stride_b,
    stride_t,
    ref_stride_b,
    ref_stride_t,
    temperature_stride,  # 1 for a temperature per row, else 0
    parts,
    part_columns,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
):
    """The terms of the Jensen-Shannon divergence, from the normalisers that kl_divergence_fwd_kernel left.

    Computes: Σ p·log2(p/κm), Σ q·log2(q/κm), m = β·q + (1−β)·p, Σ p and Σ q
    Grid: (N·parts,), program -> (row, part); ``kl_divergence_jsd_merge_kernel`` adds the parts
    Traffic: V·(sizeof(logit) + sizeof(ref)) read once more, 16·parts bytes written
    Numerics: fp32; from log2(q/p), so that nothing overflows and p = q gives 0; p = 0 and q = 0 weigh 0
    Gradient: kl_divergence_bwd_kernel
    """
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    HAS_SOFTCAP: tl.constexpr = (softcap_ptr is not None) or (softcap is not None)
    LANES: tl.constexpr = BLOCK_V // VEC
    live = row_is_live(row, mask_ptr, None, 0, False)
    row_ptr = row_pointer(logits_ptr, row, T, stride_b, stride_t)
    ref_row_ptr = row_pointer(ref_logits_ptr, row, T, ref_stride_b, ref_stride_t)
    cap = load_number(softcap_ptr, softcap, 0) if HAS_SOFTCAP else 0.0
    k = LOG2E / load_number(temperature_ptr, temperature, row * temperature_stride)
    p_weight, q_weight = load_mixture(load_beta(beta_ptr, beta), inner_ptr, row)
    row_max, log2_sum = tl.load(row_max_ptr + row), tl.load(log_sum_ptr + row) * LOG2E
    ref_row_max, ref_log2_sum = tl.load(ref_row_max_ptr + row), tl.load(ref_log_sum_ptr + row) * LOG2E
    first = part * part_columns
    last = tl.where(live, tl.minimum(first + part_columns, V), first)

    zero = tl.zeros([LANES], tl.float32)
    p_sum, q_sum, p_total, q_total = zero, zero, zero, zero
    tile = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    for start in range(first, last, BLOCK_V):
        z, ref_z = load_pair(row_ptr, ref_row_ptr, start + tile, last, cap, HAS_SOFTCAP)
        log2_p = (z - row_max) * k - log2_sum
        log2_q = (ref_z - ref_row_max) * k - ref_log2_sum
        p_over_m, q_over_m = log2_ratios(log2_p, log2_q, p_weight, q_weight)
        p, q = tl.exp2(log2_p), tl.exp2(log2_q)
        p_sum += tl.sum(p * p_over_m, axis=1)
        q_sum += tl.sum(q * q_over_m, axis=1)
        p_total += tl.sum(p, axis=1)
        q_total += tl.sum(q, axis=1)
    partial_row_ptr = partial_ptr + (row.to(tl.int64) * parts + part) * 4
    tl.store(partial_row_ptr, tl.sum(p_sum, axis=0))
    tl.store(partial_row_ptr + 1, tl.sum(q_sum, axis=0))
    tl.store(partial_row_ptr + 2, tl.sum(p_total, axis=0))
    tl.store(partial_row_ptr + 3, tl.sum(q_total, axis=0))


@triton.jit
def kl_divergence_jsd_merge_kernel(
    mask_ptr,  # (N,) or None
    beta_ptr,  # () or None
    beta,  # number, where beta_ptr is None
    partial_ptr,  # (N, parts, 4)
    kl_ptr,  # (N,)
    inner_ptr,  # (N, 2)
    parts,
    BLOCK_PARTS: tl.constexpr,
):
    """The JSD of a row from the terms of its parts.

    Computes: JSD = β·KL(q‖κm)/Σ q + (1−β)·KL(p‖κm)/Σ p + log κ, inner = KL(p‖κm)/Σ p in bits, κ
    Grid: (N,), program -> row
    Traffic: 16·(parts + 1) bytes read, 12 written
    Numerics: fp32; one tree that V alone decides; fp64 from the sums on
    Gradient: kl_divergence_bwd_kernel
    """
    row = tl.program_id(0)
    part = tl.arange(0, BLOCK_PARTS)
    part_ptr = partial_ptr + (row.to(tl.int64) * parts + part) * 4
    p_sum = tl.sum(tl.load(part_ptr, mask=part < parts, other=0.0), axis=0)
    q_sum = tl.sum(tl.load(part_ptr + 1, mask=part < parts, other=0.0), axis=0)
    p_total = tl.sum(tl.load(part_ptr + 2, mask=part < parts, other=0.0), axis=0)
    q_total = tl.sum(tl.load(part_ptr + 3, mask=part < parts, other=0.0), axis=0)
    weight, live = load_beta(beta_ptr, beta), row_is_live(row, mask_ptr, None, 0, False)
    # Over the sums of p and q as they are rounded, 1 but for that: then the gradients of a row add up to 0, where 1/τ
    # would blow up what is left. Where only q is bad, `maximum` has dropped its NaN from the terms of p.
    p_mean = p_sum.to(tl.float64) / p_total + 0.0 * q_sum
    q_mean = q_sum.to(tl.float64) / q_total
    inner_row_ptr = inner_ptr + 2 * row.to(tl.int64)
    scale = tl.load(inner_row_ptr + 1)
    kl = LN2 * (weight * q_mean + (1.0 - weight) * p_mean) + tl.log(scale.to(tl.float32))
    tl.store(kl_ptr + row, tl.where(live, kl, 0.0))
    tl.store(inner_row_ptr, tl.where(live, p_mean, 0.0))


def kl_divergence_fwd(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    direction: str,
    beta: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """schemas.OPS["kl_divergence_fwd"]: (kl, inner, row_max, log_sum, ref_row_max, ref_log_sum); inner (N, 2)."""
    check_pair("kl_divergence_fwd", logits, ref_logits)
    B, T, V = logits.shape
    N = B * T
    kl, *both = (logits.new_empty((N,), dtype=torch.float32) for _ in range(5))
    inner = logits.new_empty((N, 2), dtype=torch.float64)
    results = (kl, inner, *both)
    if N == 0:
        return results

    narrow, wide = sorted((logits.element_size(), ref_logits.element_size()))
    columns = configs.part_columns(V)
    parts = max(1, triton.cdiv(V, columns))
    grid = check_grid("kl_divergence_fwd", N * parts)
    tile = {"VEC": configs.vector(narrow), **configs.row_options("kl_divergence_fwd", wide, min(V, columns))}
    join = {"BLOCK_PARTS": triton.next_power_of_2(parts), "num_warps": 1, **configs.COMPILE}
    hyper = (*number_or_pointer(temperature), *number_or_pointer(softcap))
    weight = number_or_pointer(beta) if direction == "jsd" else (None, None)
    per_row = int(temperature.dim() > 0)
    partial = logits.new_empty((N, parts, 8), dtype=torch.float32) if parts > 1 else None
    anchored = direction == "reverse"
    rows, outputs = (logits, ref_logits), results
    if direction == "forward":
        rows, outputs = (ref_logits, logits), (kl, inner, *both[2:], *both[:2])
    with on_device(logits):
        strides = (*row_strides(rows[0]), *row_strides(rows[1]))
        kl_divergence_fwd_kernel[grid](
            *rows, mask, *hyper, *weight, partial, *outputs, T, V, *strides, per_row, parts, columns, anchored, **tile
        )
        if parts > 1:
            kl_divergence_merge_kernel[(N,)](
                mask, *hyper[:2], *weight, partial, *outputs, per_row, parts, anchored, **join
            )
        if direction == "jsd":
            partial = logits.new_empty((N, parts, 4), dtype=torch.float32)
            kl_divergence_jsd_kernel[grid](
                *rows, mask, *hyper, *both, *weight, inner, partial, T, V, *strides, per_row, parts, columns, **tile
            )
            kl_divergence_jsd_merge_kernel[(N,)](mask, *weight, partial, kl, inner, parts, **join)
    return results
