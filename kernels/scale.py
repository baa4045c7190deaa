"""scale_gradient_: a gradient made in the forward pass times the upstream gradient, over its own storage."""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .rows import check_grid, on_device


@triton.jit  # N on 16 alone
def scale_gradient_kernel(
    gradient_ptr,  # (N,)
    grad_ptr,  # ()
    N,
    BLOCK: tl.constexpr,
):
    """Scaling that costs nothing where there is nothing to scale.

    Computes: gradient_i ← grad·gradient_i, unless grad = 1; 0 stays 0 whatever grad is
    Grid: (ceil(N/BLOCK),), program -> elements
    Traffic: 4 bytes a program where grad = 1, which the host does not know; else an element read and written
    Numerics: the product in fp32, rounded once
    Gradient: none flows
    """
    factor = tl.load(grad_ptr).to(tl.float32)
    if factor != 1.0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(gradient_ptr + i, mask=i < N, other=0.0).to(tl.float32)
        tl.store(gradient_ptr + i, tl.where(x == 0.0, x, x * factor).to(gradient_ptr.dtype.element_ty), mask=i < N)


def scale_gradient_(gradient: Tensor, grad: Tensor) -> None:
    """``schemas.OPS["scale_gradient_"]``."""
    if not gradient.is_contiguous():
        raise ValueError(f"scale_gradient_: gradient must be contiguous, got strides {gradient.stride()}")
    if gradient.numel():
        with on_device(gradient):
            scale_gradient_kernel[check_grid("scale_gradient_", triton.cdiv(gradient.numel(), configs.SCALE_BLOCK))](
                gradient, grad, gradient.numel(), BLOCK=configs.SCALE_BLOCK, num_warps=configs.SCALE_WARPS,
                **configs.COMPILE,
            )  # fmt: skip
