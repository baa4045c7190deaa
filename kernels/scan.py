"""The scan of returns: x_t = a_t + b_t·x_{t+1} over every sequence (docs/math.md section 4); gae.py, vtrace.py use it.

Sequences are rows (B, T), or packed (N,) with cu_seqlens. Each is cut into parts of SCAN_PART tokens, counted from its
first; a part is scanned block by block. Where a sequence has several parts, a first launch writes each part's own
(a, b), and in the second every part joins those between it and the end of the sequence in one fixed order.

Program s takes part ``s − first`` of a sequence b, where first = b·parts in rows, and offsets[b] // SCAN_PART + b in a
pack: there are never more parts than slots from one such first to the next, so no length need be known to launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .rows import check_grid, on_device

PARTS_BLOCK = tl.constexpr(64)  # parts that are joined at a time


@triton.jit
def chain(a1, b1, a2, b2):
    """x -> a1 + b1·x, then x -> a2 + b2·x."""
    return a2 + b2 * a1, b1 * b2


@triton.jit
def nearest(value1, known1, value2, known2):
    return tl.where(known2 != 0, value2, value1), known1 | known2


@triton.jit
def number(ptr, value):
    """A hyperparameter: read on the device where the user gave a tensor there, else the launch's number."""
    if ptr is not None:
        value = tl.load(ptr).to(tl.float32)
    return value


@triton.jit
def lane_of(x, lane, i):
    return tl.sum(tl.where(lane == i, x, 0.0), axis=0)


@triton.jit
def neighbour(x, lane, incoming, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """What the scan finds at each lane: the next lane's x (the one before, in a forward scan)."""
    if REVERSE:
        shifted = tl.gather(x, tl.minimum(lane + 1, BLOCK - 1), axis=0)
        return tl.where(lane == BLOCK - 1, incoming, shifted)
    shifted = tl.gather(x, tl.maximum(lane - 1, 0), axis=0)
    return tl.where(lane == 0, incoming, shifted)


@triton.jit
def locate(slot, offsets_ptr, B, T, parts, PART: tl.constexpr):
    """(sequence, part, row, first position in the row, length)."""
    if offsets_ptr is None:
        b = slot // parts
        part = slot % parts
        row = b
        start = (slot * 0).to(tl.int64)
        length = slot * 0 + T
    else:
        b = slot * 0
        high = b + B - 1
        while b < high:  # the last sequence whose first slot is not beyond this one
            middle = (b + high + 1) // 2
            if tl.load(offsets_ptr + middle) // PART + middle <= slot:
                b = middle
            else:
                high = middle - 1
        row = b * 0
        start = tl.load(offsets_ptr + b)
        length = tl.maximum(tl.load(offsets_ptr + b + 1) - start, 0).to(tl.int32)
        part = (slot - start // PART - b).to(tl.int32)
    return b, part, row, start, length


@triton.jit
def last_live(mask_ptr, length, BLOCK: tl.constexpr):
    """The last live token of a sequence whose mask starts at mask_ptr; −1 where there is none."""
    found = length - 1
    if mask_ptr is not None:
        found = length * 0 - 1
        end = length
        while (end > 0) & (found < 0):
            t = end - BLOCK + tl.arange(0, BLOCK)
            live = tl.load(mask_ptr + t, mask=t >= 0, other=0) != 0
            found = tl.max(tl.where(live, t, -1), axis=0)
            end -= BLOCK
    return found


@triton.jit
def live_tokens(mask_ptr, t, end):
    live = t < end
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + t, mask=live, other=0) != 0)
    return live


@triton.jit
def load_tokens(ptr, t, live):
    """fp32, 0 where a token is not live; all 0 where there is no such input."""
    x = tl.zeros(t.shape, tl.float32)
    if ptr is not None:
        x = tl.load(ptr + t, mask=live, other=0.0).to(tl.float32)
    return x


@triton.jit
def incoming(partial_ptr, first_slot, part, last_part, x, REVERSE: tl.constexpr):
    """What reaches a part: x through the parts beyond it, from the far end on."""
    i = tl.arange(0, PARTS_BLOCK)
    groups = last_part // PARTS_BLOCK + 1
    for g in range(groups):
        q = (groups - 1 - g if REVERSE else g) * PARTS_BLOCK + i
        between = (q > part) & (q <= last_part) if REVERSE else q < part
        pair_ptr = partial_ptr + (first_slot + q).to(tl.int64) * 2
        a = tl.load(pair_ptr, mask=between, other=0.0)
        b = tl.load(pair_ptr + 1, mask=between, other=1.0)
        a, b = tl.associative_scan((a, b), 0, chain, reverse=REVERSE)
        x = lane_of(a + b * x, i, 0 if REVERSE else PARTS_BLOCK - 1)
    return x


@triton.jit
def store_zeros(out_ptr, begin, end, BLOCK: tl.constexpr):
    for t0 in range(begin, end, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        tl.store(out_ptr + t, tl.zeros(t.shape, tl.float32), mask=t < end)


@triton.jit
def row_start(ptr, row, stride_b, start):
    return ptr + row.to(tl.int64) * stride_b + start


class Cut:
    """How the tokens of a launch are dealt out: by the length of a row alone; a pack is cut as if it were long."""

    def __init__(self, op: str, tokens: Tensor, cu_seqlens: Tensor | None) -> None:
        part = configs.SCAN_PART
        if cu_seqlens is None:
            self.B, self.T = tokens.shape
            self.parts = max(1, -(-self.T // part))
            self.slots, self.several = self.B * self.parts, self.parts > 1
            self.block, self.warps = configs.scan_block(self.T)
        else:
            self.B, self.T, self.parts = cu_seqlens.shape[0] - 1, tokens.shape[0], 1
            self.slots, self.several = tokens.shape[0] // part + self.B, tokens.shape[0] > part
            self.block, self.warps = configs.SCAN_PACKED
        if self.T + part > 2**31 - 1:  # places are counted in int32, up to the end of the last part
            raise ValueError(f"{op}: wanted rows, or a pack, of fewer than {2**31 - part} tokens, got {self.T}")
        self.grid = check_grid(op, self.slots)

    def launch(self, kernel, first, last, *, skip, tokens):
        """The kernel over all parts: their own (a, b) first where sequences have several, then the results."""
        if self.B == 0:
            return
        constants = {"SKIP": skip, "PART": configs.SCAN_PART, "BLOCK": self.block, "num_warps": self.warps}
        constants |= configs.COMPILE
        shape = (self.B, self.T, self.parts)
        with on_device(tokens):
            partial = None
            if self.several:
                partial = torch.empty((self.slots, 2), dtype=torch.float32, device=tokens.device)
                kernel[self.grid](*first, partial, *last, *shape, WRITE=False, **constants)
            kernel[self.grid](*first, partial, *last, *shape, WRITE=True, **constants)


def side_by_side(x: Tensor | None) -> tuple[Tensor | None, int]:
    """(tokens with unit stride, the stride of rows): a view where there is one."""
    if x is None:
        return None, 0
    x = x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()
    return x, x.stride(0) if x.dim() == 2 else 0
