"""A pytest plugin: CUDA C++ kernels, emulated, in the place of the interpreted Triton backend.

``tests/test_cuda_on_cpu.py`` starts pytest with it. The tests of Triton's interpreter then hold the CUDA source to the
same oracle, unchanged: they ask for the backend "triton", and the ops that it dispatches to are those below.
"""

from __future__ import annotations

import ctypes
import os
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"
sys.modules["rl4llm_fast.kernels.register"] = types.ModuleType("register")  # in place of the real launchers

import torch  # noqa: E402

from rl4llm_fast import dispatch, schemas  # noqa: E402

Pointer, Int64, Int, Bool, Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_bool, ctypes.c_float
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
NAN = float("nan")


def struct(name, *fields):
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# csrc/cuda/launch.h
Number = struct("Number", ("ptr", Pointer), ("dtype", Int), ("per_row", Bool), ("value", Float))
Rows = struct(
    "Rows", ("logits", Pointer), ("dtype", Int), *((n, Int64) for n in ("N", "T", "V", "K", "stride_b", "stride_t")),
    ("token_ids", Pointer), ("mask", Pointer), ("ignore_index", Int64), ("id_per_row", Bool),
    ("temperature", Number), ("softcap", Number), ("has_softcap", Bool),
)  # fmt: skip
Results = struct("Results", *((n, Pointer) for n in ("partial", "logp", "entropy", "row_max", "log_sum")))
Grads = struct(
    "Grads", *((n, Pointer) for n in ("row_max", "log_sum", "entropy", "grad_logp", "grad_entropy", "dlogits")),
    ("stride_b", Int64), ("stride_t", Int64),
)  # fmt: skip

library = ctypes.CDLL(os.environ["RL4LLM_FAST_EMULATED"])
library.emulated_parts.restype = Int64
library.emulated_parts.argtypes = [Int64]


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr() or None


def number(tensor):
    """0-d fp64 is how a float comes: read on the host. All others as if they lay on the device."""
    if tensor is None:
        return Number(None, 0, False, 0.0)
    if tensor.dim() == 0 and tensor.dtype == torch.float64:
        return Number(None, 0, False, float(tensor))
    return Number(pointer(tensor), DTYPES[tensor.dtype], tensor.dim() == 1, 0.0)


def rows_of(logits, ids, mask, temperature, softcap, ignore_index):
    B, T, V = logits.shape
    return Rows(
        pointer(logits), DTYPES[logits.dtype], B * T, T, V, 1 if ids.dim() == 1 else ids.shape[1], *logits.stride()[:2],
        pointer(ids), pointer(mask), ignore_index, ids.dim() == 1, number(temperature),
        number(softcap.reshape(()) if softcap is not None else None), softcap is not None,
    )  # fmt: skip


def fresh(*shape, dtype=torch.float32):
    """Memory full of NaN, so that what a kernel leaves unwritten shows."""
    return torch.full(shape, NAN, dtype=dtype)


def fwd(logits, ids, mask, temperature, softcap, ignore_index, return_entropy):
    N, parts = logits.shape[0] * logits.shape[1], library.emulated_parts(logits.shape[2])
    logp, row_max, log_sum, entropy = fresh(*ids.shape), fresh(N), fresh(N), fresh(N if return_entropy else 0)
    partial = fresh(N * parts * 3) if parts > 1 else None
    results = Results(*map(pointer, (partial, logp, entropy, row_max, log_sum)))
    rows = rows_of(logits, ids, mask, temperature, softcap, ignore_index)
    assert library.emulated_fwd(ctypes.byref(rows), ctypes.byref(results)) == 0
    return logp, entropy, row_max, log_sum


def bwd_into(dlogits, logits, ids, mask, temperature, softcap, ignore_index, row_max, log_sum, entropy, g, h):
    tensors = (row_max, log_sum, entropy if h is not None else None, g, h, dlogits)
    grads = Grads(*map(pointer, tensors), *dlogits.stride()[:2])
    rows = rows_of(logits, ids, mask, temperature, softcap, ignore_index)
    assert library.emulated_bwd(ctypes.byref(rows), ctypes.byref(grads)) == 0


def bwd(logits, *arguments):
    dlogits = fresh(*logits.shape, dtype=logits.dtype)
    bwd_into(dlogits, logits, *arguments)
    return dlogits


def bwd_(logits, *arguments):
    bwd_into(logits, logits, *arguments)


_library = torch.library.Library(schemas.TRITON_NAMESPACE, "IMPL")
for _name, _op in (("token_logprobs_fwd", fwd), ("token_logprobs_bwd", bwd), ("token_logprobs_bwd_", bwd_)):
    _library.impl(_name, _op, "CPU")
dispatch._build_tables()
