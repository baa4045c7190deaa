"""The gradient of kl_divergence with respect to the policy's logits (docs/math.md section 3, "Exact")."""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .kl_math import bounded_difference, load_beta, load_mixture, log2_ratios
from .rows import check_grid, check_pair, number_or_pointer, on_device, row_pointer, row_strides
from .tl_math import LN2, LOG2E, capped, capped_slope, load_number, row_is_live


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
    inner_ptr,  # (N, 2): Σ p·(x − y), KL(p‖κm) in bits, or anything for the forward KL; then κ
    row_max_ptr,  # (N,)
    log_sum_ptr,  # (N,)
    ref_row_max_ptr,  # (N,): what y is counted from; for the reverse KL the anchor of kl_math.py
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

    Computes: du = p·((x − y) − Σ p·(x − y))/τ, p − q or (1−β)·p·(log(p/κm) − KL(p‖κm)); dz = g·du/τ·(1 − (z'/c)²)
    Grid: (N·ceil(V/BLOCK_V),), program -> (row, block of columns); blocks know nothing of each other
    Traffic: V·(2·sizeof(logit) + sizeof(ref)), and 36 bytes of the row's data per block, from the cache
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
        z = capped(z, cap)
        ref_z = capped(ref_z, cap)
    # As the forward kernels make them: what rounding does to a whole row then cancels, where 1/τ would blow it up.
    k = LOG2E * inverse_tau
    x, ref_x = z - tl.load(row_max_ptr + row), ref_z - tl.load(ref_row_max_ptr + row)
    log2_p = x * k - tl.load(log_sum_ptr + row) * LOG2E
    log2_q = ref_x * k - tl.load(ref_log_sum_ptr + row) * LOG2E
    p, inner = tl.exp2(log2_p), tl.load(inner_ptr + 2 * row.to(tl.int64))
    mean = inner.to(tl.float32)
    if DIRECTION == "reverse":
        # p = 0 has no term, and both logits may be −inf there.
        du = p * (tl.where(p == 0.0, 0.0, bounded_difference(x, ref_x)) - mean) * inverse_tau
    elif DIRECTION == "forward":
        du = p - tl.exp2(log2_q)
    else:
        weight = load_beta(beta_ptr, beta)
        p_weight, q_weight = load_mixture(weight, inner_ptr, row)
        p_over_m, _ = log2_ratios(log2_p, log2_q, p_weight, q_weight)
        rest = (inner - mean).to(tl.float32)  # of the mean, rounded
        du = (1.0 - weight) * LN2 * p * ((p_over_m - mean) - rest)
    dz = du * (tl.load(grad_ptr + row) * inverse_tau)
    if HAS_SOFTCAP:
        dz = dz * capped_slope(z, cap)
    dz = tl.where(masked_out, 0.0, dz)
    tl.store(dlogits_row_ptr + columns, dz.to(dlogits_ptr.dtype.element_ty), mask=inside)


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
