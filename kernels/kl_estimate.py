"""kl_estimate (docs/math.md section 3) from per-token log-probabilities; its backward is token_loss.token_loss_bwd."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import COMPILE
from .rows import check_grid, on_device
from .token_formulas_gen import KL
from .token_loss import SEGMENT, WARPS, check_rows


@triton.jit(do_not_specialize=["N"])
def kl_estimate_fwd_kernel(
    logp_ptr,  # (N,)
    ref_ptr,  # (N,)
    old_ptr,  # (N,) or None: logp
    mask_ptr,  # (N,) or None
    kl_ptr,  # (N,)
    dkl_ptr,  # (N,)
    N,
    KL_FORMULA: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A sampled estimate of the KL divergence per token, with its derivative.

    Computes: k1, k2, k3 or |d| of d = ref − logp, and d/dlogp in the chosen way
    Grid: (ceil(N/BLOCK_N),), program -> tokens
    Traffic: 16 bytes a token, 4 more with old, 1 with the mask
    Numerics: fp32; dead tokens are not loaded, their results exactly 0
    Gradient: comes with the value from the generated formula
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    live = inside
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + n, mask=inside, other=0) != 0)
    logp = tl.load(logp_ptr + n, mask=live, other=0.0)
    ref = tl.load(ref_ptr + n, mask=live, other=0.0)
    old = logp
    if old_ptr is not None:
        old = tl.load(old_ptr + n, mask=live, other=0.0)
    kl, dkl = KL_FORMULA(logp, ref, old)
    tl.store(kl_ptr + n, tl.where(live, kl, 0.0), mask=inside)
    tl.store(dkl_ptr + n, tl.where(live, dkl, 0.0), mask=inside)


def kl_estimate_fwd(
    logp: Tensor, ref: Tensor, old: Tensor | None, mask: Tensor | None, variant: str
) -> tuple[Tensor, Tensor]:
    """schemas.OPS["kl_estimate_fwd"]: (kl, dkl)."""
    check_rows("kl_estimate_fwd", (torch.float32,), logp=logp, ref=ref, old=old)
    kl, dkl = torch.empty_like(logp), torch.empty_like(logp)
    grid = check_grid("kl_estimate_fwd", triton.cdiv(logp.numel(), SEGMENT))
    if logp.numel():
        with on_device(logp):
            kl_estimate_fwd_kernel[grid](
                logp, ref, old, mask, kl, dkl, logp.numel(), KL_FORMULA=KL[variant], BLOCK_N=SEGMENT, num_warps=WARPS,
                **COMPILE,
            )  # fmt: skip
    return kl, dkl
