"""kl_divergence: the exact KL of two sets of logits per row, and its gradient (docs/math.md section 3, "Exact").

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
    finish_row,
    load_beta,
    load_pair,
    load_parts,
    log2_ratios,
    merge_pair,
    rebase_pair,
    store_part,
)
from .rows import check_grid, check_pair, number_or_pointer, on_device, row_pointer, row_strides
from .tl_math import LN2, LOG2E, capped, load_number, reference_max, row_is_live


@triton.jit(do_not_specialize=["T", "temperature_stride"])
def kl_divergence_fwd_kernel(
    logits_ptr,  # (B, T, V), last stride 1: of the leading distribution a
    other_logits_ptr,  # (B, T, V), last stride 1: of the other, b
    mask_ptr,  # (N,) or None
    temperature_ptr,  # (N,) or () or None
    temperature,  # number, where temperature_ptr is None
    softcap_ptr,  # () or None
    softcap,  # number or None
    partial_ptr,  # (N, parts, 6), or None where a row is one part
    kl_ptr,  # (N,)
    inner_ptr,  # (N,)
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
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
):
    """KL(a‖b) of every row, with what the backward pass and the JSD need of both sides, in one read of both.

    Computes: KL = Σ 2^x_v·((z'_v − max z') − (y'_v − max y'))/(s·τ) + log(s_b/s), s = Σ 2^x_v, x_v = (z'_v − max z')·k
    Grid: (N·parts,), program -> (row, part); V alone decides the cut, ``kl_divergence_merge_kernel`` joins the parts
    Traffic: V·(sizeof(logit) + sizeof(other)) read, 24 bytes written (24·parts more each way when the row is cut)
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
    m, s, other_m, other_s, d, lost = nothing, zero, nothing, zero, zero, zero
    tile = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    for start in range(first, last, BLOCK_V):
        z, other_z = load_pair(row_ptr, other_row_ptr, start + tile, last, cap, HAS_SOFTCAP)
        only_other = (other_z == float("-inf")) & (z != float("-inf"))
        lost = tl.maximum(lost, tl.max(tl.where(only_other, 1.0, 0.0), axis=1))
        new_m, new_other_m = tl.maximum(m, tl.max(z, axis=1)), tl.maximum(other_m, tl.max(other_z, axis=1))
        s, other_s, d = rebase_pair(m, s, other_m, other_s, d, new_m, new_other_m, k)
        # NaN: `max` may drop it, but 2^NaN puts it into the sums. +inf: inf − inf does the same.
        x = z - reference_max(new_m)[:, None]
        other_x = other_z - reference_max(new_other_m)[:, None]
        weight = tl.exp2(x * k)
        s += tl.sum(weight, axis=1)
        other_s += tl.sum(tl.exp2(other_x * k), axis=1)
        d += tl.sum(weight * (tl.maximum(x, LOWEST) - tl.maximum(other_x, LOWEST)), axis=1)
        m, other_m = new_m, new_other_m

    m, s, other_m, other_s, d, lost = merge_pair(m, s, other_m, other_s, d, lost, k)
    if partial_ptr is not None:
        store_part(partial_ptr, row, parts, m, s, other_m, other_s, d, lost)
    else:
        finish_row(row, live, m, s, other_m, other_s, d, lost, tau, kl_ptr, inner_ptr, row_max_ptr, log_sum_ptr,
                   other_row_max_ptr, other_log_sum_ptr)  # fmt: skip


@triton.jit(do_not_specialize=["temperature_stride"])
def kl_divergence_merge_kernel(
    mask_ptr,  # (N,) or None
    temperature_ptr,  # (N,) or () or None
    temperature,  # number, where temperature_ptr is None
    partial_ptr,  # (N, parts, 6)
    kl_ptr,  # (N,)
    inner_ptr,  # (N,)
    row_max_ptr,  # (N,)
    log_sum_ptr,  # (N,)
    other_row_max_ptr,  # (N,)
    other_log_sum_ptr,  # (N,)
    temperature_stride,  # 1 for a temperature per row, else 0
    parts,
    BLOCK_PARTS: tl.constexpr,
):
    """The second pass over rows that were cut: joins the parts of a row and writes its results.

    Computes: both maxima over the parts, every sum scaled by 2^((m_j − max)·k); then as kl_divergence_fwd_kernel
    Grid: (N,), program -> row
    Traffic: 24·parts bytes read, 24 written
    Numerics: fp32; the parts of a row are joined in one tree that V alone decides; a part of −inf only weighs 0
    Gradient: kl_divergence_bwd_kernel
    """
    row = tl.program_id(0)
    tau = load_number(temperature_ptr, temperature, row * temperature_stride)
    m, s, other_m, other_s, d, lost = load_parts(partial_ptr, row, parts, BLOCK_PARTS)
    m, s, other_m, other_s, d, lost = merge_pair(m, s, other_m, other_s, d, lost, LOG2E / tau)
    live = row_is_live(row, mask_ptr, None, 0, False)
    finish_row(row, live, m, s, other_m, other_s, d, lost, tau, kl_ptr, inner_ptr, row_max_ptr, log_sum_ptr,
               other_row_max_ptr, other_log_sum_ptr)  # fmt: skip


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
    partial_ptr,  # (N, parts, 2): KL(p‖m) and KL(q‖m) over the part
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

    Computes: KL(p‖m) = Σ p·log(p/m), KL(q‖m) = Σ q·log(q/m), m = β·q + (1−β)·p
    Grid: (N·parts,), program -> (row, part); ``kl_divergence_jsd_merge_kernel`` adds the parts
    Traffic: V·(sizeof(logit) + sizeof(ref)) read once more, 8·parts bytes written
    Numerics: fp32; from log2(q/p), so that nothing overflows and p = q gives about 0; p = 0 and q = 0 weigh 0
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
    weight = load_beta(beta_ptr, beta)
    row_max, log2_sum = tl.load(row_max_ptr + row), tl.load(log_sum_ptr + row) * LOG2E
    ref_row_max, ref_log2_sum = tl.load(ref_row_max_ptr + row), tl.load(ref_log_sum_ptr + row) * LOG2E
    first = part * part_columns
    last = tl.where(live, tl.minimum(first + part_columns, V), first)

    p_sum, q_sum = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    tile = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    for start in range(first, last, BLOCK_V):
        z, ref_z = load_pair(row_ptr, ref_row_ptr, start + tile, last, cap, HAS_SOFTCAP)
        log2_p = (z - row_max) * k - log2_sum
        log2_q = (ref_z - ref_row_max) * k - ref_log2_sum
        m_over_p, q_over_p = log2_ratios(log2_p, log2_q, weight)
        p_sum -= tl.sum(tl.exp2(log2_p) * m_over_p, axis=1)
        q_sum += tl.sum(tl.exp2(log2_q) * (q_over_p - m_over_p), axis=1)
    partial_row_ptr = partial_ptr + (row.to(tl.int64) * parts + part) * 2
    tl.store(partial_row_ptr, tl.sum(p_sum, axis=0) * LN2)
    tl.store(partial_row_ptr + 1, tl.sum(q_sum, axis=0) * LN2)


@triton.jit
def kl_divergence_jsd_merge_kernel(
    mask_ptr,  # (N,) or None
    beta_ptr,  # () or None
    beta,  # number, where beta_ptr is None
    partial_ptr,  # (N, parts, 2)
    kl_ptr,  # (N,)
    inner_ptr,  # (N,)
    parts,
    BLOCK_PARTS: tl.constexpr,
):
    """The JSD of a row from the terms of its parts.

    Computes: JSD = β·KL(q‖m) + (1−β)·KL(p‖m), inner = KL(p‖m)
    Grid: (N,), program -> row
    Traffic: 8·parts bytes read, 8 written
    Numerics: fp32; one tree that V alone decides
    Gradient: kl_divergence_bwd_kernel
    """
    row = tl.program_id(0)
    part = tl.arange(0, BLOCK_PARTS)
    part_ptr = partial_ptr + (row.to(tl.int64) * parts + part) * 2
    p_term = tl.sum(tl.load(part_ptr, mask=part < parts, other=0.0), axis=0)
    q_term = tl.sum(tl.load(part_ptr + 1, mask=part < parts, other=0.0), axis=0)
    weight, live = load_beta(beta_ptr, beta), row_is_live(row, mask_ptr, None, 0, False)
    tl.store(kl_ptr + row, tl.where(live, weight * q_term + (1.0 - weight) * p_term, 0.0))
    # Where only q is bad, `maximum` has dropped its NaN from the terms of p.
    tl.store(inner_ptr + row, tl.where(live, p_term + 0.0 * q_term, 0.0))


@triton.jit(do_not_specialize=["T", "temperature_stride"])
def kl_divergence_bwd_kernel(
    logits_ptr,  # (B, T, V), last stride 1
    ref_logits_ptr,  # (B, T, V), last stride 1
    mask_ptr,  # (N,) or None
    temperature_ptr,  # (N,) or () or None
    temperature,  # number, where temperature_ptr is None
    softcap_ptr,  # () or None
    softcap,  # number or None
    beta_ptr,  # () or None
    beta,  # number, or None where the direction has none
    inner_ptr,  # (N,): KL(p‖q), KL(p‖m), or anything for the forward KL
    row_max_ptr,  # (N,)
    log_sum_ptr,  # (N,)
    ref_row_max_ptr,  # (N,)
    ref_log_sum_ptr,  # (N,)
    grad_ptr,  # (N,)
    dlogits_ptr,  # (B, T, V), last stride 1; may be logits_ptr
    T,
    V,
    stride_b,
    stride_t,
    ref_stride_b,
    ref_stride_t,
    dlogits_stride_b,
    dlogits_stride_t,
    temperature_stride,  # 1 for a temperature per row, else 0
    DIRECTION: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dL/dlogits from the upstream gradient g of the divergence, in one read of both sides and one write.

    Computes: du = p·((log p − log q) − KL), p − q or (1−β)·p·(log(p/m) − KL(p‖m)); dz = g·du/τ·(1 − (z'/c)²)
    Grid: (N·ceil(V/BLOCK_V),), program -> (row, block of columns); blocks know nothing of each other
    Traffic: V·(2·sizeof(logit) + sizeof(ref)), and 24 bytes of the row's data per block, from the cache
    Numerics: built in fp32, rounded once; −inf logits and dead rows exactly 0, whatever else is NaN
    Gradient: dKL/du_v of docs/math.md section 3; the reference has none
    """
    blocks = tl.cdiv(V, BLOCK_V)
    row = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    HAS_SOFTCAP: tl.constexpr = (softcap_ptr is not None) or (softcap is not None)
    row_ptr = row_pointer(logits_ptr, row, T, stride_b, stride_t)
    ref_row_ptr = row_pointer(ref_logits_ptr, row, T, ref_stride_b, ref_stride_t)
    dlogits_row_ptr = row_pointer(dlogits_ptr, row, T, dlogits_stride_b, dlogits_stride_t)

    live = row_is_live(row, mask_ptr, None, 0, False)
    inside = columns < V
    # Neither −inf columns nor those of a dead row get a gradient: reading −inf for a dead row makes it zero all over.
    read = tl.where(live, inside, False)
    z = tl.load(row_ptr + columns, mask=read, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
    ref_z = tl.load(ref_row_ptr + columns, mask=read, other=float("-inf"), eviction_policy="evict_first")
    ref_z = ref_z.to(tl.float32)
    masked_out = z == float("-inf")
    inverse_tau = 1.0 / load_number(temperature_ptr, temperature, row * temperature_stride)
    if HAS_SOFTCAP:
        cap = load_number(softcap_ptr, softcap, 0)
        z, ratio = capped(z, cap)
        ref_z, _ = capped(ref_z, cap)
    log_sum, ref_log_sum = tl.load(log_sum_ptr + row), tl.load(ref_log_sum_ptr + row)
    x = (z - tl.load(row_max_ptr + row)) * inverse_tau
    ref_x = (ref_z - tl.load(ref_row_max_ptr + row)) * inverse_tau
    log2_p = (x - log_sum) * LOG2E
    p = tl.exp2(log2_p)
    if DIRECTION == "reverse":
        # p = 0 has no term, and both logarithms may be −inf there.
        log_ratio = tl.where(p == 0.0, 0.0, (x - log_sum) - (ref_x - ref_log_sum))
        du = p * (log_ratio - tl.load(inner_ptr + row))
    elif DIRECTION == "forward":
        du = p - tl.exp2((ref_x - ref_log_sum) * LOG2E)
    else:
        weight = load_beta(beta_ptr, beta)
        m_over_p, _ = log2_ratios(log2_p, (ref_x - ref_log_sum) * LOG2E, weight)
        du = (1.0 - weight) * p * (-LN2 * m_over_p - tl.load(inner_ptr + row))
    dz = du * (tl.load(grad_ptr + row) * inverse_tau)
    if HAS_SOFTCAP:
        dz = dz * (1.0 - ratio * ratio)
    dz = tl.where(masked_out, 0.0, dz)
    tl.store(dlogits_row_ptr + columns, dz.to(dlogits_ptr.dtype.element_ty), mask=inside)


def kl_divergence_fwd(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    direction: str,
    beta: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """schemas.OPS["kl_divergence_fwd"]: (kl, inner, row_max, log_sum, ref_row_max, ref_log_sum)."""
    check_pair("kl_divergence_fwd", logits, ref_logits)
    B, T, V = logits.shape
    N = B * T
    kl, inner, *both = (logits.new_empty((N,), dtype=torch.float32) for _ in range(6))
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
    per_row = int(temperature.dim() > 0)
    partial = logits.new_empty((N, parts, 6), dtype=torch.float32) if parts > 1 else None
    rows, outputs = (logits, ref_logits), results
    if direction == "forward":
        rows, outputs = (ref_logits, logits), (kl, inner, *both[2:], *both[:2])
    with on_device(logits):
        strides = (*row_strides(rows[0]), *row_strides(rows[1]))
        kl_divergence_fwd_kernel[grid](
            *rows, mask, *hyper, partial, *outputs, T, V, *strides, per_row, parts, columns, **tile
        )
        if parts > 1:
            kl_divergence_merge_kernel[(N,)](mask, *hyper[:2], partial, *outputs, per_row, parts, **join)
        if direction == "jsd":
            partial = logits.new_empty((N, parts, 2), dtype=torch.float32)
            weight = number_or_pointer(beta)
            kl_divergence_jsd_kernel[grid](
                *rows, mask, *hyper, *both, *weight, partial, T, V, *strides, per_row, parts, columns, **tile
            )
            kl_divergence_jsd_merge_kernel[(N,)](mask, *weight, partial, kl, inner, parts, **join)
    return results


def kl_divergence_bwd_into(
    dlogits: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    direction: str,
    beta: Tensor,
    *saved: Tensor,
) -> None:
    """Both backward ops: ``dlogits`` (B, T, V) may be the logits themselves. saved: the forward's, then grad."""
    check_pair("kl_divergence_bwd", logits, ref_logits)
    B, T, V = logits.shape
    if logits.numel() == 0:
        return
    wide = max(logits.element_size(), ref_logits.element_size())
    row = configs.row_options("kl_divergence_bwd", wide, V)
    grid = check_grid("kl_divergence_bwd", B * T * triton.cdiv(V, row["BLOCK_V"]))
    weight = number_or_pointer(beta) if direction == "jsd" else (None, None)
    with on_device(logits):
        kl_divergence_bwd_kernel[grid](
            logits, ref_logits, mask, *number_or_pointer(temperature), *number_or_pointer(softcap), *weight, *saved,
            dlogits, T, V, *row_strides(logits), *row_strides(ref_logits), *row_strides(dlogits),
            int(temperature.dim() > 0), DIRECTION=direction, **row,
        )  # fmt: skip


def kl_divergence_bwd(logits: Tensor, *args: object) -> Tensor:
    """schemas.OPS["kl_divergence_bwd"]: dlogits (B, T, V), contiguous."""
    dlogits = logits.new_empty(logits.shape)
    kl_divergence_bwd_into(dlogits, logits, *args)
    return dlogits


def kl_divergence_bwd_(logits: Tensor, *args: object) -> None:
    """schemas.OPS["kl_divergence_bwd_"]: the same, written over the logits."""
    kl_divergence_bwd_into(logits, logits, *args)
