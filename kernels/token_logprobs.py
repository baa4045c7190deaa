"""token_logprobs: log-probabilities of chosen tokens and the entropy, from logits (docs/math.md section 1)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .rows import check_grid, check_logits, number_or_pointer, on_device, row_pointer, row_strides
from .tl_math import LN2, LOG2_ZERO, LOG2E, capped, capped_slope, load_number, merge, rebase, reference_max, row_is_live


@triton.jit
def sum_part(row_ptr, first, last, tau, softcap, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
             BLOCK_V: tl.constexpr, VEC: tl.constexpr):  # fmt: skip
    """max, Σ 2^x and Σ 2^x·x over columns [first, last) of one row, each column read once.

    Every 16-byte load keeps a running maximum of its own: no thread waits for another before the last column, and
    rescaling costs one exponential in VEC elements.
    """
    LANES: tl.constexpr = BLOCK_V // VEC
    k = LOG2E / tau
    m = tl.full([LANES], float("-inf"), tl.float32)
    s = tl.zeros([LANES], tl.float32)
    xs = tl.zeros([LANES], tl.float32)
    tile = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    for start in range(first, last, BLOCK_V):
        columns = start + tile
        # The row is read once and never again in this kernel: first to leave the cache.
        z = tl.load(row_ptr + columns, mask=columns < last, other=float("-inf"), eviction_policy="evict_first")
        z = z.to(tl.float32)
        if HAS_SOFTCAP:
            z = capped(z, softcap)
        new_m = tl.maximum(m, tl.max(z, axis=1))
        s, xs = rebase(s, xs, m, new_m, k)
        # NaN: `max` may drop it, but 2^NaN puts it into s. +inf: inf − inf does the same.
        x = (z - reference_max(new_m)[:, None]) * k
        weight = tl.exp2(x)
        s += tl.sum(weight, axis=1)
        if ENTROPY:
            xs += tl.sum(weight * tl.maximum(x, LOG2_ZERO), axis=1)
        m = new_m
    return merge(m, s, xs, k)


@triton.jit
def finish_row(row, row_ptr, live, m, s, xs, tau, softcap, token_ids_ptr, logp_ptr, entropy_ptr, row_max_ptr,
               log_sum_ptr, V, K, ignore_index, HAS_SOFTCAP: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Writes a row's results from its sums: logp (K,), entropy, row_max, log_sum. All 0 where the row is not live."""
    nan = float("nan")
    log_sum = tl.where(m == float("-inf"), nan, tl.log(s))
    ids_ptr = token_ids_ptr + row.to(tl.int64) * K
    bad = 0
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        y = tl.load(ids_ptr + k, mask=k < K, other=ignore_index)
        bad += tl.sum(((y != ignore_index) & ((y < 0) | (y >= V))).to(tl.int32), axis=0)
    # One NaN here is a NaN in all that follows from the row, the gradient included, without an id out of bounds
    # ever becoming an address.
    log_sum = tl.where(bad > 0, nan, log_sum)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        y = tl.load(ids_ptr + k, mask=k < K, other=ignore_index)
        counts = tl.where(live, y != ignore_index, False)  # `&` of a block and a scalar fails in 3.9's interpreter
        z = tl.load(row_ptr + y, mask=counts & (y >= 0) & (y < V), other=0.0).to(tl.float32)
        if HAS_SOFTCAP:
            z = capped(z, softcap)
        logp = (z - m) / tau - log_sum
        tl.store(logp_ptr + row.to(tl.int64) * K + k, tl.where(counts, logp, 0.0), mask=k < K)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, tl.where(live, log_sum - LN2 * (xs / s), 0.0))
    tl.store(row_max_ptr + row, tl.where(live, m, 0.0))
    tl.store(log_sum_ptr + row, tl.where(live, log_sum, 0.0))


@triton.jit(do_not_specialize=["T", "temperature_stride", "ignore_index"])
def token_logprobs_fwd_kernel(
    logits_ptr,  # (B, T, V), last stride 1
    token_ids_ptr,  # (N,) or (N, K)
    mask_ptr,  # (N,) or None
    temperature_ptr,  # (N,) or () or None
    temperature,  # number, where temperature_ptr is None
    softcap_ptr,  # () or None
    softcap,  # number or None
    partial_ptr,  # (N, parts, 3), or None where a row is one part
    logp_ptr,  # (N,) or (N, K)
    entropy_ptr,  # (N,) or None
    row_max_ptr,  # (N,)
    log_sum_ptr,  # (N,)
    T,
    V,
    K,
    stride_b,
    stride_t,
    temperature_stride,  # 1 for a temperature per row, else 0
    ignore_index,
    parts,
    part_columns,
    ID_PER_ROW: tl.constexpr,  # ids are (N,): ignore_index takes the whole row out
    ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VEC: tl.constexpr,
):
    """Log-probability of K chosen tokens per row, and the row's entropy, in one read of the logits.

    Computes: logp = (z'_y − max z')/τ − log s, s = Σ exp((z'_v − max z')/τ), H = log s − Σ p_v (u_v − m)
    Grid: (N·parts,), program -> (row, part); V alone decides the cut, ``token_logprobs_merge_kernel`` joins the parts
    Traffic: V·sizeof(logit) read, 4·K + 12 bytes written (12·parts more each way when the row is cut)
    Numerics: fp32; per-lane online maximum, lanes joined in one tree; −inf is weight 0; NaN, +inf, only −inf: NaN
    Gradient: token_logprobs_bwd_kernel, from row_max and log_sum
    """
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    HAS_SOFTCAP: tl.constexpr = (softcap_ptr is not None) or (softcap is not None)

    live = row_is_live(row, mask_ptr, token_ids_ptr, ignore_index, ID_PER_ROW)
    row_ptr = row_pointer(logits_ptr, row, T, stride_b, stride_t)
    tau = load_number(temperature_ptr, temperature, row * temperature_stride)
    cap = load_number(softcap_ptr, softcap, 0) if HAS_SOFTCAP else 0.0
    first = part * part_columns
    # A row that is not live is not read at all.
    last = tl.where(live, tl.minimum(first + part_columns, V), first)
    m, s, xs = sum_part(row_ptr, first, last, tau, cap, HAS_SOFTCAP, ENTROPY, BLOCK_V, VEC)
    if partial_ptr is not None:
        partial_row_ptr = partial_ptr + (row.to(tl.int64) * parts + part) * 3
        tl.store(partial_row_ptr, m)
        tl.store(partial_row_ptr + 1, s)
        tl.store(partial_row_ptr + 2, xs)
    else:
        finish_row(row, row_ptr, live, m, s, xs, tau, cap, token_ids_ptr, logp_ptr, entropy_ptr, row_max_ptr,
                   log_sum_ptr, V, K, ignore_index, HAS_SOFTCAP, BLOCK_K)  # fmt: skip


@triton.jit(do_not_specialize=["T", "temperature_stride", "ignore_index"])
def token_logprobs_merge_kernel(
    logits_ptr,  # (B, T, V), last stride 1; only the chosen logits are read
    token_ids_ptr,  # (N,) or (N, K)
    mask_ptr,  # (N,) or None
    temperature_ptr,  # (N,) or () or None
    temperature,  # number, where temperature_ptr is None
    softcap_ptr,  # () or None
    softcap,  # number or None
    partial_ptr,  # (N, parts, 3)
    logp_ptr,  # (N,) or (N, K)
    entropy_ptr,  # (N,) or None
    row_max_ptr,  # (N,)
    log_sum_ptr,  # (N,)
    T,
    V,
    K,
    stride_b,
    stride_t,
    temperature_stride,  # 1 for a temperature per row, else 0
    ignore_index,
    parts,
    ID_PER_ROW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """The second pass over rows that were cut: joins the parts of a row and writes its results.

    Computes: max = max_j m_j, s = Σ_j s_j·2^((m_j − max)·k), the same for Σ 2^x·x; then as token_logprobs_fwd_kernel
    Grid: (N,), program -> row
    Traffic: 12·parts + K·(8 + sizeof(logit)) bytes read, 4·K + 12 written
    Numerics: fp32; the parts of a row are joined in one tree that V alone decides; a part of −inf only weighs 0
    Gradient: token_logprobs_bwd_kernel
    """
    row = tl.program_id(0)
    HAS_SOFTCAP: tl.constexpr = (softcap_ptr is not None) or (softcap is not None)
    live = row_is_live(row, mask_ptr, token_ids_ptr, ignore_index, ID_PER_ROW)
    tau = load_number(temperature_ptr, temperature, row * temperature_stride)
    cap = load_number(softcap_ptr, softcap, 0) if HAS_SOFTCAP else 0.0
    part = tl.arange(0, BLOCK_PARTS)
    part_ptr = partial_ptr + (row.to(tl.int64) * parts + part) * 3
    m = tl.load(part_ptr, mask=part < parts, other=float("-inf"))
    s = tl.load(part_ptr + 1, mask=part < parts, other=0.0)
    xs = tl.load(part_ptr + 2, mask=part < parts, other=0.0)
    m, s, xs = merge(m, s, xs, LOG2E / tau)
    row_ptr = row_pointer(logits_ptr, row, T, stride_b, stride_t)
    finish_row(row, row_ptr, live, m, s, xs, tau, cap, token_ids_ptr, logp_ptr, entropy_ptr, row_max_ptr,
               log_sum_ptr, V, K, ignore_index, HAS_SOFTCAP, BLOCK_K)  # fmt: skip


@triton.jit(do_not_specialize=["T", "temperature_stride", "ignore_index"])
def token_logprobs_bwd_kernel(
    logits_ptr,  # (B, T, V), last stride 1
    token_ids_ptr,  # (N,) or (N, K)
    mask_ptr,  # (N,) or None
    temperature_ptr,  # (N,) or () or None
    temperature,  # number, where temperature_ptr is None
    softcap_ptr,  # () or None
    softcap,  # number or None
    row_max_ptr,  # (N,)
    log_sum_ptr,  # (N,)
    entropy_ptr,  # (N,), or None without grad_entropy
    grad_logp_ptr,  # (N,) or (N, K), or None
    grad_entropy_ptr,  # (N,) or None
    dlogits_ptr,  # (B, T, V), last stride 1; may be logits_ptr
    T,
    V,
    K,
    stride_b,
    stride_t,
    dlogits_stride_b,
    dlogits_stride_t,
    temperature_stride,  # 1 for a temperature per row, else 0
    ignore_index,
    ID_PER_ROW: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dL/dlogits from the upstream gradients g of logp and h of the entropy, in one read and one write of the logits.

    Computes: dL/dz_v = (Σ_k g_k·1[v=y_k] − p_v·(G + h·(log p_v + H)))/τ·(1 − (z'_v/c)²), G = Σ_k g_k
    Grid: (N·ceil(V/BLOCK_V),), program -> (row, block of columns); blocks know nothing of each other
    Traffic: 2·V·sizeof(logit), and 20 + 12·K bytes of the row's data per block, from the cache
    Numerics: built in fp32, rounded once; −inf logits and dead rows exactly 0, whatever else is NaN
    Gradient: p_v = exp(u_v − m − log s), so dlogp_y/du_v = 1[v=y] − p_v and dH/du_v = −p_v·(log p_v + H)
    """
    blocks = tl.cdiv(V, BLOCK_V)
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    HAS_SOFTCAP: tl.constexpr = (softcap_ptr is not None) or (softcap is not None)
    row_ptr = row_pointer(logits_ptr, row, T, stride_b, stride_t)
    dlogits_row_ptr = row_pointer(dlogits_ptr, row, T, dlogits_stride_b, dlogits_stride_t)

    live = row_is_live(row, mask_ptr, token_ids_ptr, ignore_index, ID_PER_ROW)
    inside = columns < V
    # Neither −inf columns nor those of a dead row get a gradient: reading −inf for a dead row makes it zero all over.
    read = tl.where(live, inside, False)
    z = tl.load(row_ptr + columns, mask=read, other=float("-inf"), eviction_policy="evict_first")
    z = z.to(tl.float32)
    masked_out = z == float("-inf")
    tau = load_number(temperature_ptr, temperature, row * temperature_stride)
    if HAS_SOFTCAP:
        cap = load_number(softcap_ptr, softcap, 0)
        z = capped(z, cap)
    log2_p = (z - tl.load(row_max_ptr + row)) * (LOG2E / tau) - tl.load(log_sum_ptr + row) * LOG2E
    p = tl.exp2(log2_p)

    grad_sum = 0.0
    if grad_logp_ptr is not None:
        for k in range(K):
            y = tl.load(token_ids_ptr + row.to(tl.int64) * K + k)
            grad_sum += tl.where(y != ignore_index, tl.load(grad_logp_ptr + row.to(tl.int64) * K + k), 0.0)
    factor = grad_sum
    if grad_entropy_ptr is not None:
        h = tl.load(grad_entropy_ptr + row)
        # p = 0 has no term in the entropy, and log p is −inf there.
        log_p = tl.maximum(log2_p, LOG2_ZERO) * LN2
        factor = factor + h * (log_p + tl.load(entropy_ptr + row))
    du = -p * factor
    if grad_logp_ptr is not None:
        for k in range(K):
            y = tl.load(token_ids_ptr + row.to(tl.int64) * K + k)
            # Few of many ids fall into this block; the branch is the same for the whole program.
            if (y != ignore_index) & (y // BLOCK_V == block):
                du = tl.where(columns == y, du + tl.load(grad_logp_ptr + row.to(tl.int64) * K + k), du)
    dz = du * (1.0 / tau)
    if HAS_SOFTCAP:
        dz = dz * capped_slope(z, cap)
    dz = tl.where(masked_out, 0.0, dz)
    tl.store(dlogits_row_ptr + columns, dz.to(dlogits_ptr.dtype.element_ty), mask=inside)


def check_rows(op: str, logits: Tensor, token_ids: Tensor) -> None:
    """As check_logits, for what belongs to the rows."""
    check_logits(op, "logits", logits)
    rows = logits.shape[0] * logits.shape[1]
    if token_ids.dtype != torch.int64 or token_ids.dim() not in (1, 2) or token_ids.shape[0] != rows:
        raise ValueError(f"{op}: token_ids must be int64 ({rows},) or ({rows}, K), got {tuple(token_ids.shape)}")


def token_logprobs_fwd(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """schemas.OPS["token_logprobs_fwd"]: (logp, entropy, row_max, log_sum)."""
    check_rows("token_logprobs_fwd", logits, token_ids)
    B, T, V = logits.shape
    N = B * T
    logp = logits.new_empty(token_ids.shape, dtype=torch.float32)
    entropy = logits.new_empty((N if return_entropy else 0,), dtype=torch.float32)
    row_max = logits.new_empty((N,), dtype=torch.float32)
    log_sum = torch.empty_like(row_max)
    if N == 0:
        return logp, entropy, row_max, log_sum

    K = 1 if token_ids.dim() == 1 else token_ids.shape[1]
    columns = configs.part_columns(V)
    parts = max(1, triton.cdiv(V, columns))
    partial = logits.new_empty((N, parts, 3), dtype=torch.float32) if parts > 1 else None
    row = configs.row_options("token_logprobs_fwd", logits.element_size(), min(V, columns))
    grid = check_grid("token_logprobs_fwd", N * parts)
    inputs = (logits, token_ids, mask, *number_or_pointer(temperature), *number_or_pointer(softcap))
    outputs = (partial, logp, entropy if return_entropy else None, row_max, log_sum)
    sizes = (T, V, K, *row_strides(logits), int(temperature.dim() > 0), ignore_index)
    flags = {"ID_PER_ROW": token_ids.dim() == 1, "BLOCK_K": configs.IDS_BLOCK}
    with on_device(logits):
        token_logprobs_fwd_kernel[grid](
            *inputs, *outputs, *sizes, parts, columns, **flags, ENTROPY=return_entropy,
            VEC=configs.vector(logits.element_size()), **row,
        )  # fmt: skip
        if parts > 1:
            token_logprobs_merge_kernel[(N,)](
                *inputs, *outputs, *sizes, parts, **flags, BLOCK_PARTS=triton.next_power_of_2(parts), num_warps=1,
                **configs.COMPILE,
            )  # fmt: skip
    return logp, entropy, row_max, log_sum


def token_logprobs_bwd_into(
    dlogits: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    ignore_index: int,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """Both backward ops: ``dlogits`` (B, T, V) may be the logits themselves."""
    check_rows("token_logprobs_bwd", logits, token_ids)
    B, T, V = logits.shape
    if logits.numel() == 0:
        return
    K = 1 if token_ids.dim() == 1 else token_ids.shape[1]
    row = configs.row_options("token_logprobs_bwd", logits.element_size(), V)
    grid = check_grid("token_logprobs_bwd", B * T * triton.cdiv(V, row["BLOCK_V"]))
    with on_device(logits):
        token_logprobs_bwd_kernel[grid](
            logits, token_ids, mask, *number_or_pointer(temperature), *number_or_pointer(softcap), row_max, log_sum,
            entropy if grad_entropy is not None else None, grad_logp, grad_entropy, dlogits, T, V, K,
            *row_strides(logits), *row_strides(dlogits), int(temperature.dim() > 0), ignore_index,
            ID_PER_ROW=token_ids.dim() == 1, **row,
        )  # fmt: skip


def token_logprobs_bwd(logits: Tensor, *args: object) -> Tensor:
    """schemas.OPS["token_logprobs_bwd"]: dlogits (B, T, V), contiguous."""
    dlogits = logits.new_empty(logits.shape)
    token_logprobs_bwd_into(dlogits, logits, *args)
    return dlogits


def token_logprobs_bwd_(logits: Tensor, *args: object) -> None:
    """schemas.OPS["token_logprobs_bwd_"]: the same, written over the logits."""
    token_logprobs_bwd_into(logits, logits, *args)
