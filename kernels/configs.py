"""Launch tables of the Triton kernels: data, with the reason on each row. Nothing is tuned at the first call.

A row applies to every N: how a row of logits is cut, and so the order in which it is summed, depends on V, on the dtype
and on whether rows start on 16 bytes, never on how many rows there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """One kernel's launch for one element size."""

    block: int  # columns that a program holds at once
    warps: int
    registers: int  # budget per thread on sm_80, sm_90 and sm_100; tests/test_triton_aot.py holds the compiler to it
    why: str
    maxnreg: int | None = None  # what ptxas is held to, on NVIDIA; None: it chooses


# (kernel, bytes per logit) -> launch
LAUNCHES: dict[tuple[str, int], Launch] = {
    ("token_logprobs_fwd", 2): Launch(
        8192, 8, 128, "not yet measured: 4 16-byte loads a thread in flight, 64 KiB an SM at 2 programs"
    ),
    ("token_logprobs_fwd", 4): Launch(4096, 8, 128, "not yet measured: as in 2 bytes, 4 16-byte loads a thread"),
    ("token_logprobs_bwd", 2): Launch(
        4096, 8, 96, "not yet measured: 2 16-byte loads a thread; 64 registers (4 programs an SM) without a softcap"
    ),
    ("token_logprobs_bwd", 4): Launch(2048, 8, 64, "not yet measured: as in 2 bytes, 2 16-byte loads a thread"),
    # By the wider of the two sides; with one of each size a thread loads 16 bytes of the narrow and 32 of the wide.
    ("kl_divergence_fwd", 2): Launch(4096, 8, 128, "not yet measured: 2 16-byte loads a thread of each side"),
    ("kl_divergence_fwd", 4): Launch(2048, 8, 128, "not yet measured: as in 2 bytes, 2 16-byte loads of each side"),
    ("kl_divergence_bwd", 2): Launch(4096, 8, 128, "not yet measured: 2 16-byte loads a thread of each side"),
    ("kl_divergence_bwd", 4): Launch(2048, 8, 96, "not yet measured: as in 2 bytes, 2 16-byte loads of each side"),
}

# a·b + c in one rounding, said outright because Triton's default changes after 3.9. For every launch.
COMPILE = {"enable_fp_fusion": True}

WARP = 32

# A row longer than this is summed in parts by several programs, so that a few long rows still fill the GPU; a part
# is long enough (64 KiB in bf16) that its closing reduction hides behind the other programs' loads. Not yet measured.
MAX_PART = 32_768
PART_STEP = 1_024  # parts are multiples of this, so that each starts on 16 bytes where the row does

VECTOR_BYTES = 16  # of a row that one lane of a sum takes at a time: the widest load there is. Not yet measured.
IDS_BLOCK = 32  # chosen ids read at a time when a row is finished: one warp's width


def vector(element_size: int) -> int:
    """Elements in VECTOR_BYTES."""
    return VECTOR_BYTES // element_size


def part_columns(vocabulary: int) -> int:
    """Columns in each part of a row (the last may be shorter): as even as PART_STEP lets them be."""
    parts = max(1, -(-vocabulary // MAX_PART))
    return max(1, -(-vocabulary // (parts * PART_STEP))) * PART_STEP


def row_launch(kernel: str, element_size: int, columns: int) -> tuple[int, int]:
    """(block, warps) for rows, or parts of rows, of ``columns``: the table's, less where the row is shorter."""
    launch = LAUNCHES[kernel, element_size]
    smallest = WARP * vector(element_size)  # one load of one warp
    block, warps = launch.block, launch.warps
    while block > smallest and block // 2 >= columns:
        block //= 2
        warps = max(1, warps // 2)
    return block, warps


def row_options(kernel: str, element_size: int, columns: int) -> dict[str, int | bool]:
    """``row_launch`` as a kernel takes it, with COMPILE and the cap on registers of a row that has one."""
    block, warps = row_launch(kernel, element_size, columns)
    cap = LAUNCHES[kernel, element_size].maxnreg
    options: dict[str, int | bool] = {"BLOCK_V": block, "num_warps": warps, **COMPILE}
    return options if cap is None or torch.version.hip is not None else {**options, "maxnreg": cap}


# Scans over sequences. A part is what one program scans; a longer sequence is read twice, so that few long ones still
# fill the GPU: 131,072 tokens give 32 programs. Not yet measured.
SCAN_PART = 4_096
SCAN_REGISTERS = 160  # Triton 3.6 takes up to 128, 3.9 up to 148: the packed search for a token's sequence
# Tokens at once, warps: 8 tokens a thread, two 16-byte loads of each fp32 input. The length of a packed sequence is not
# known to the launch, so one size serves all: the usual answer is two or three blocks. Not yet measured.
SCAN_ROWS = (1_024, 4)
SCAN_PACKED = (512, 2)


def scan_block(length: int) -> tuple[int, int]:
    """(block, warps) for rows of ``length`` tokens: those of SCAN_ROWS, less where a row is shorter."""
    block, warps = SCAN_ROWS
    while block > 2 * WARP and block // 2 >= length:
        block //= 2
        warps = max(1, warps // 2)
    return block, warps


# Group statistics: members that a program takes at once; a group has 4 to 64, one warp reads four to a lane.
GROUP_BLOCK = 128
# Steps and tokens at once of one answer: an answer has some ten steps. Not yet measured.
PROCESS_BLOCK = (16, 128)
# Elements of one part of whiten, warps: 8 elements a thread, two 16-byte loads of fp32. Not yet measured.
WHITEN_BLOCK, WHITEN_WARPS = 1_024, 4
WHITEN_JOIN_BLOCK = 1_024  # parts that are joined at a time

# Elements of a gradient that one program scales, warps: 64 a thread, so that few programs start where the factor turns
# out to be 1 and all of them end at once. Not yet measured.
SCALE_BLOCK, SCALE_WARPS = 16_384, 8
N_STEP_BLOCK, N_STEP_WARPS = 1_024, 4
