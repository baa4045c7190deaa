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


_libraries = []  # one unregisters its ops when it is collected


def put_in_place(ops):
    """Emulated ops in the place of those of Triton's interpreter."""
    library = torch.library.Library(schemas.TRITON_NAMESPACE, "IMPL")
    for name, op in ops.items():
        library.impl(name, op, "CPU")
    _libraries.append(library)
    dispatch._build_tables()


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


# csrc/cuda/kl.h
KlSide = struct("KlSide", ("ptr", Pointer), ("dtype", Int), ("stride_b", Int64), ("stride_t", Int64))
KlRows = struct(
    "KlRows", ("logits", KlSide), ("ref", KlSide), *((n, Int64) for n in ("N", "T", "V")), ("mask", Pointer),
    ("temperature", Number), ("softcap", Number), ("has_softcap", Bool), ("direction", Int), ("beta", Number),
)  # fmt: skip
KlNorms = struct("KlNorms", ("row_max", Pointer), ("log_sum", Pointer))
KlResults = struct(
    "KlResults", *((n, Pointer) for n in ("partial", "kl", "inner")), ("logits", KlNorms), ("ref", KlNorms)
)
KlGrads = struct(
    "KlGrads", ("inner", Pointer), ("logits", KlNorms), ("ref", KlNorms), ("grad", Pointer), ("dlogits", Pointer),
    ("stride_b", Int64), ("stride_t", Int64),
)  # fmt: skip
DIRECTIONS = {"reverse": 0, "forward": 1, "jsd": 2}


# csrc/cuda/scan.h
ScanTokens = struct("ScanTokens", ("ptr", Pointer), ("stride_b", Int64), ("stride_t", Int64))
ScanNumber = struct("ScanNumber", ("device", Number), ("value", ctypes.c_double))
SCAN_NUMBERS = ("gamma", "lam", "beta", "rho_max", "c_max")
ScanTensors = struct(
    "ScanTensors", ("dtype", Int), ("inputs", ScanTokens * 4), ("mask", ScanTokens), ("offsets", Pointer),
    ("scores", Pointer), ("bootstrap", Pointer), *((n, ScanNumber) for n in SCAN_NUMBERS), ("skip", Bool),
    ("out", Pointer * 2), ("x_out", Pointer), ("partial", Pointer), ("B", Int64), ("T", Int64),
)  # fmt: skip


# csrc/cuda/advantages.h
WhitenTensors = struct(
    "WhitenTensors", ("x", Pointer), ("minus", Pointer), ("dtype", Int), ("mask", Pointer), ("N", Int64)
)
Groups = struct(
    "Groups", ("rewards", Pointer), ("dtype", Int), ("ids", Pointer), ("order", Pointer), ("B", Int64),
    ("group_size", Int64), ("eps", Number),
)  # fmt: skip
OutcomeGroups = struct(
    "OutcomeGroups", ("groups", Groups), ("batch_stats", Pointer), ("leave_one_out", Bool), ("by_group", Bool),
    ("unbiased", Bool), ("advantages", Pointer),
)  # fmt: skip
ProcessGroups = struct(
    "ProcessGroups", ("groups", Groups), ("ends", Pointer), ("K", Int64), ("length", Int64), ("suffix", Pointer),
    ("advantages", Pointer),
)  # fmt: skip

library = ctypes.CDLL(os.environ["RL4LLM_FAST_EMULATED"])
library.token_logprobs_parts.restype = library.kl_divergence_partials.restype = Int64
library.scan_partials.restype, library.scan_partials.argtypes = Int64, [Int64, Int64, Bool]
library.n_step_workspace.restype = library.whiten_parts.restype = Int64
library.n_step_workspace.argtypes = [Int64, Int64, Bool, Bool, Int64]
library.token_logprobs_parts.argtypes = library.whiten_parts.argtypes = [Int64]


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
    N, parts = logits.shape[0] * logits.shape[1], library.token_logprobs_parts(logits.shape[2])
    logp, row_max, log_sum, entropy = fresh(*ids.shape), fresh(N), fresh(N), fresh(N if return_entropy else 0)
    partial = fresh(N * parts * 3) if parts > 1 else None
    results = Results(*map(pointer, (partial, logp, entropy, row_max, log_sum)))
    rows = rows_of(logits, ids, mask, temperature, softcap, ignore_index)
    assert library.token_logprobs_fwd(ctypes.byref(rows), ctypes.byref(results)) == 0
    return logp, entropy, row_max, log_sum


def bwd_into(dlogits, logits, ids, mask, temperature, softcap, ignore_index, row_max, log_sum, entropy, g, h):
    tensors = (row_max, log_sum, entropy if h is not None else None, g, h, dlogits)
    grads = Grads(*map(pointer, tensors), *dlogits.stride()[:2])
    rows = rows_of(logits, ids, mask, temperature, softcap, ignore_index)
    assert library.token_logprobs_bwd(ctypes.byref(rows), ctypes.byref(grads)) == 0


def bwd(logits, *arguments):
    dlogits = fresh(*logits.shape, dtype=logits.dtype)
    bwd_into(dlogits, logits, *arguments)
    return dlogits


def bwd_(logits, *arguments):
    bwd_into(logits, logits, *arguments)


def kl_rows_of(logits, ref, mask, temperature, softcap, direction, beta):
    B, T, V = logits.shape
    sides = (KlSide(pointer(x), DTYPES[x.dtype], *x.stride()[:2]) for x in (logits, ref))
    cap = number(softcap.reshape(()) if softcap is not None else None)
    return KlRows(
        *sides, B * T, T, V, pointer(mask), number(temperature), cap, softcap is not None, DIRECTIONS[direction],
        number(beta),
    )  # fmt: skip


def kl_fwd(logits, *arguments):
    N, rows = logits.shape[0] * logits.shape[1], kl_rows_of(logits, *arguments)
    kl, *norms = (fresh(N) for _ in range(5))
    inner = fresh(N, 2, dtype=torch.float64)
    partial = fresh(library.kl_divergence_partials(ctypes.byref(rows)))
    policy, ref = (KlNorms(*map(pointer, pair)) for pair in (norms[:2], norms[2:]))
    results = KlResults(*map(pointer, (partial, kl, inner)), policy, ref)
    assert library.kl_divergence_fwd(ctypes.byref(rows), ctypes.byref(results)) == 0
    return kl, inner, *norms


def kl_bwd_into(dlogits, logits, ref, mask, temperature, softcap, direction, beta, inner, *saved):
    rows = kl_rows_of(logits, ref, mask, temperature, softcap, direction, beta)
    *norms, grad = map(pointer, saved)
    grads = KlGrads(
        pointer(inner), KlNorms(*norms[:2]), KlNorms(*norms[2:]), grad, pointer(dlogits), *dlogits.stride()[:2]
    )
    assert library.kl_divergence_bwd(ctypes.byref(rows), ctypes.byref(grads)) == 0


def kl_bwd(logits, *arguments):
    dlogits = fresh(*logits.shape, dtype=logits.dtype)
    kl_bwd_into(dlogits, logits, *arguments)
    return dlogits


def kl_bwd_(logits, *arguments):
    kl_bwd_into(logits, logits, *arguments)


def scan(
    launch, tokens, inputs, mask, cu_seqlens, mask_mode, outs, scores=None, bootstrap=None, x_out=None, workspace=None,
    **numbers,
):  # fmt: skip
    packed = cu_seqlens is not None
    B, T = cu_seqlens.shape[0] - 1 if packed else tokens.shape[0], tokens.shape[-1]

    def at(x):
        return (
            ScanTokens(None, 0, 0) if x is None else ScanTokens(pointer(x), 0 if packed else x.stride(0), x.stride(-1))
        )

    def scan_number(x):
        on_host = x is None or (x.dim() == 0 and x.dtype == torch.float64)
        return ScanNumber(number(None if on_host else x), float(x) if on_host and x is not None else 0.0)

    partial = fresh(library.scan_partials(B, T, packed) if workspace is None else workspace(B, T, packed))
    tensors = ScanTensors(
        DTYPES[tokens.dtype], (ScanTokens * 4)(*map(at, inputs)), at(mask), pointer(cu_seqlens), pointer(scores),
        pointer(bootstrap), *(scan_number(numbers.get(n)) for n in SCAN_NUMBERS), mask_mode == "skip",
        (Pointer * 2)(*map(pointer, outs)), pointer(x_out), pointer(partial), B, T,
    )  # fmt: skip
    assert launch(ctypes.byref(tensors)) == 0
    return outs


def gae_fwd(rewards, values, mask, cu_seqlens, bootstrap, kl, gamma, lam, beta, mask_mode, advantages):
    tokens, scores = rewards if kl is None else kl, None
    if kl is not None and rewards.shape != kl.shape:
        rewards, scores = None, rewards
    outs = fresh(*tokens.shape) if advantages else None, fresh(*tokens.shape)
    lam = torch.ones((), dtype=torch.float64) if values is None else lam
    inputs = (rewards, values, kl, None)
    scan(
        library.gae_fwd_scan, tokens, inputs, mask, cu_seqlens, mask_mode, outs, scores, bootstrap,
        gamma=gamma, lam=lam, beta=beta,
    )  # fmt: skip
    return outs if advantages else (fresh(0), outs[1])


def gae_bwd(grad_advantages, grad_returns, mask, cu_seqlens, gamma, lam, mask_mode):
    tokens = grad_returns if grad_advantages is None else grad_advantages
    outs = fresh(*tokens.shape), fresh(*tokens.shape)
    dbootstrap = fresh(tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    inputs = (grad_advantages, grad_returns, None, None)
    scan(
        library.gae_bwd_scan, tokens, inputs, mask, cu_seqlens, mask_mode, outs, x_out=dbootstrap, gamma=gamma, lam=lam
    )
    return *outs, dbootstrap


def vtrace(logp, rollout, rewards, values, mask, cu_seqlens, bootstrap, gamma, lam, rho_max, c_max, mask_mode):
    outs, inputs = (fresh(*logp.shape), fresh(*logp.shape)), (rewards, values, logp, rollout)
    return scan(library.vtrace_scan, logp, inputs, mask, cu_seqlens, mask_mode, outs, bootstrap=bootstrap, gamma=gamma,
                lam=lam, rho_max=rho_max, c_max=c_max)  # fmt: skip


def n_step_returns(rewards, values, mask, cu_seqlens, bootstrap, n, gamma, mask_mode):
    n = min(n, rewards.shape[-1] + 1)  # as the binding does
    outs, inputs = (fresh(*rewards.shape), None), (rewards, values, None, None)
    scan(
        lambda tensors: library.n_step_returns(tensors, Int64(n)), rewards, inputs, mask, cu_seqlens, mask_mode, outs,
        bootstrap=bootstrap, gamma=gamma,
        workspace=lambda B, T, packed: library.n_step_workspace(B, T, packed, mask is not None, n),
    )  # fmt: skip
    return outs[0]


def whiten_tensors(x, mask, minus=None):
    return ctypes.byref(WhitenTensors(pointer(x), pointer(minus), DTYPES[x.dtype], pointer(mask), x.numel()))


def whiten_stats(x, mask, minus=None):
    partial = fresh(library.whiten_parts(x.numel()), 3, dtype=torch.float64)
    stats = fresh(3, dtype=torch.float64)
    tensors = whiten_tensors(x, mask, minus)
    assert library.whiten_stats(tensors, Pointer(pointer(partial)), Pointer(pointer(stats))) == 0
    return stats


def whiten_apply(x, mask, stats, eps, shift_mean):
    out = fresh(*x.shape)
    arguments = (Pointer(pointer(stats)), ctypes.byref(number(eps)), Bool(shift_mean), Pointer(pointer(out)))
    assert library.whiten_apply(whiten_tensors(x, mask), *arguments) == 0
    return out


def groups_of(rewards, group_ids, group_size, eps):
    """The groups, and the tensors that they point into."""
    ids, order = (None, None) if group_ids is None else torch.sort(group_ids, stable=True)
    arguments = (pointer(rewards), DTYPES[rewards.dtype], pointer(ids), pointer(order), rewards.shape[0], group_size)
    return Groups(*arguments, number(eps)), (ids, order)


def group_advantages(rewards, group_ids, group_size, scale, baseline, unbiased, eps):
    groups, _kept = groups_of(rewards, group_ids, group_size, eps)
    leave_one_out = baseline == "leave_one_out"
    batch = whiten_stats(rewards, None) if scale == "batch" and not leave_one_out else None
    out = fresh(*rewards.shape)
    outcome = OutcomeGroups(groups, pointer(batch), leave_one_out, scale == "group", unbiased, pointer(out))
    assert library.group_advantages(ctypes.byref(outcome)) == 0
    return out


def process_advantages(step_rewards, step_ends, group_ids, group_size, length, eps):
    groups, _kept = groups_of(step_rewards, group_ids, group_size, eps)
    B, K = step_rewards.shape
    suffix, out = fresh(B, K, dtype=torch.float64), fresh(B, length)
    process = ProcessGroups(groups, pointer(step_ends), K, length, pointer(suffix), pointer(out))
    assert library.process_advantages(ctypes.byref(process)) == 0
    return out


OPS = {
    "n_step_returns": n_step_returns,
    "whiten_stats": whiten_stats,
    "whiten_apply": whiten_apply,
    "group_advantages": group_advantages,
    "process_advantages": process_advantages,
    "gae_fwd": gae_fwd,
    "gae_bwd": gae_bwd,
    "vtrace": vtrace,
    "token_logprobs_fwd": fwd,
    "token_logprobs_bwd": bwd,
    "token_logprobs_bwd_": bwd_,
    "kl_divergence_fwd": kl_fwd,
    "kl_divergence_bwd": kl_bwd,
    "kl_divergence_bwd_": kl_bwd_,
}
put_in_place(OPS)
