"""Small Triton functions that several kernels share; docs/math.md section 1 gives the formulas.

A row's sums are kept relative to its running maximum m of the softcapped logits z', in powers of two:
x_v = (z'_v − m)·k with k = log2(e)/τ, s = Σ 2^x_v, xs = Σ 2^x_v·x_v. So a large common offset of the logits cancels in
an exact subtraction before anything is rounded, and one `ex2` instruction is all the exponential there is.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# 2^x is exactly 0 in fp32 from here down. Exponents are cut off at it where they are multiplied by a 2^x, because
# 0·(−inf) would be NaN; where NaN must come through, they are not (`max` drops NaN on a GPU).
LOG2_ZERO = tl.constexpr(-1024.0)


@triton.jit
def exp(x):
    """e^x in fp32 to an ulp or two, as 2^n·e^r: tl.exp's 2^(x·log2 e) rounds the product, 8 ulp of the result at 20."""
    bounded = tl.minimum(tl.maximum(x, -110.0), 95.0)
    n = tl.floor(bounded * LOG2E)
    r = (bounded - n * 0.693359375) + n * 2.12194440e-4  # ln 2 in two parts: the first product is exact
    return tl.where(x == x, tl.exp2(r * LOG2E) * tl.exp2(n), x)


@triton.jit
def load_number(ptr, number, offset):
    """A hyperparameter: read on the device where the user gave a tensor, else the launch's number. NaN if <= 0."""
    if ptr is not None:
        value = tl.load(ptr + offset).to(tl.float32)
    else:
        value = number
    return tl.where(value > 0, value, float("nan"))


@triton.jit
def capped(z, softcap):
    """z' = c·tanh(z/c). ±inf stands for itself: −inf is a masked-out token, +inf poisons its row.

    libdevice's tanh is out of the interpreter's reach. z' is z + z·curve near 0, where an exponential would cancel, and
    c − c·rest from there on: what was rounded before is added to an exact number, so that z' is off by little more than
    its own rounding (docs/numerics.md). The polynomial, minimax for |z| < 0.9·c, is that of csrc/cpu/vec.h.
    """
    x = z / softcap
    square = x * x
    curve = tl.fma(square, -4.51494939e-4, 2.57686329e-3)
    curve = tl.fma(square, curve, -8.26512383e-3)
    curve = tl.fma(square, curve, 2.16684038e-2)
    curve = tl.fma(square, curve, -5.39321690e-2)
    curve = tl.fma(square, curve, 1.33330390e-1)
    curve = square * tl.fma(square, curve, -3.33333262e-1)
    rest = 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)  # 1 − tanh |x|
    c = tl.where(x < 0, -1.0, 1.0) * softcap
    z_capped = tl.where(tl.abs(x) < 0.9, tl.fma(z, curve, z), tl.fma(-rest, c, c))
    return tl.where(tl.abs(z) == float("inf"), z, z_capped)


@triton.jit
def capped_slope(z_capped, softcap):
    """dz'/dz = 1 − tanh²(z/c) from z': exactly 0 where z' is ±c."""
    inverse = 1.0 / softcap
    return ((softcap - z_capped) * inverse) * ((softcap + z_capped) * inverse)


@triton.jit
def reference_max(m):
    """What to subtract: m, or 0 where every logit so far is −inf, so that −inf − m stays −inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def rebase(s, xs, m, new_m, k):
    """Σ 2^x and Σ 2^x·x relative to ``new_m`` >= m, from those relative to m."""
    shift = tl.maximum((m - reference_max(new_m)) * k, LOG2_ZERO)
    scale = tl.exp2(shift)
    return s * scale, (xs + s * shift) * scale


@triton.jit
def merge(m, s, xs, k):
    """The sums of one row from those of its lanes or parts, a vector each: one fixed tree, so the same bits always."""
    row_m = tl.max(m, axis=0)
    s, xs = rebase(s, xs, m, row_m, k)
    return row_m, tl.sum(s, axis=0), tl.sum(xs, axis=0)


@triton.jit
def row_is_live(row, mask_ptr, token_ids_ptr, ignore_index, ID_PER_ROW: tl.constexpr):
    """Whether a row counts: mask (N,) is not 0, and with ids (N,) its id is not ignore_index."""
    live = True
    if mask_ptr is not None:
        live = tl.load(mask_ptr + row) != 0
    if ID_PER_ROW:
        live = live & (tl.load(token_ids_ptr + row) != ignore_index)
    return live
