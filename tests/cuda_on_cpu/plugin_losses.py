"""The token losses of plugin.py: what csrc/cuda/token_loss_bind.cpp does around the kernels, for the emulated ones."""

from __future__ import annotations

import ctypes

from plugin import DTYPES, Bool, Int, Int64, Pointer, fresh, library, pointer, put_in_place, struct

from rl4llm_fast import formulas, weights

# csrc/cuda/token_loss.h
NUMBERS = len(formulas.PARAMS) + formulas.MAX_KNOBS
Params = struct("Params", ("ptr", Pointer), ("values", ctypes.c_double * NUMBERS))
Floats = struct("Floats", ("ptr", Pointer), ("dtype", Int))
Policy = struct(
    "Policy", ("B", Int64), ("T", Int64), *((n, Floats) for n in ("logp", "old", "adv", "ref", "entropy")),
    ("mask", Pointer), *((n, Floats) for n in ("policy_weights", "token_weights", "log_s")), ("one_adv", Bool),
    ("one_log_s", Bool), ("correction", Int), ("loss", Pointer), ("loss_per_token", Bool),
    *((n, Pointer) for n in ("dlogp", "dentropy", "scale", "metrics", "partial")),
)  # fmt: skip
Offsets = struct("Offsets", ("ptr", Pointer), ("bytes", Int), ("is_signed", Bool))
Sequences = struct(
    "Sequences", ("cu_seqlens", Offsets), ("count", Int64), *((n, Bool) for n in ("ratio", "correction", "one_slope")),
    ("weight", Int),
)  # fmt: skip
Grads = struct(
    "Grads", ("B", Int64), ("T", Int64), ("grad", Pointer), ("one_grad", Bool),
    *((n, Pointer) for n in ("scale", "dlogp", "dentropy")), ("grad_logp", Floats), ("grad_entropy", Floats),
)  # fmt: skip
Kl = struct("Kl", ("N", Int64), *((n, Pointer) for n in ("logp", "ref", "old", "mask", "kl", "dkl")))

library.token_loss_programs.restype = library.token_loss_partials.restype = library.launches.restype = Int64
library.token_loss_programs.argtypes, library.token_loss_partials.argtypes = [Int64, Int64], [Int64]

POLICIES = [name for name, formula in formulas.FORMULAS.items() if formula.builtin]
KLS = [name for name, _ in formulas.kl_variants()]
WEIGHTS, CORRECTIONS = list(weights.AGGREGATIONS), list(formulas.CORRECTIONS)


def floats(tensor):
    assert tensor is None or tensor.is_contiguous()
    return Floats(None, 0) if tensor is None else Floats(pointer(tensor), DTYPES[tensor.dtype])


def params_of(params):
    return Params(None, (ctypes.c_double * NUMBERS)(*params.tolist()))


def one_per_row(tensor, T):
    return tensor is not None and T != 1 and tensor.shape[-1] == 1


class Call:
    """The structs of a policy loss; what they point into lives as long."""

    def __init__(
        self, logp, old, advantages, ref, entropy, mask, policy_weights, token_weights, log_s, params, formula, kl,
        aggregation, correction, entropy_grad, one_adv, programs,
    ):  # fmt: skip
        B, T = logp.shape
        per_token = aggregation == "none"
        loss, dlogp = fresh(B, T) if per_token else fresh(), fresh(B, T)
        dentropy = fresh(B, T) if entropy_grad else fresh(0)
        self.results = loss, dlogp, dentropy, fresh(B), fresh(len(formulas.METRICS))
        self.kept = fresh(library.token_loss_partials(programs))
        self.tensors = Policy(
            B, T, *map(floats, (logp, old, advantages, ref if kl else None, entropy)), pointer(mask),
            *map(floats, (policy_weights, token_weights, log_s)), one_adv, one_per_row(log_s, T),
            CORRECTIONS.index(correction) if correction else -1, pointer(loss), per_token, pointer(dlogp),
            pointer(dentropy) if entropy_grad else None, *map(pointer, (*self.results[3:], self.kept)),
        )  # fmt: skip
        self.params = params_of(params)
        self.formula, self.kl = POLICIES.index(formula), KLS.index(kl) if kl else -1
        self.weight = WEIGHTS.index("token_sum" if per_token else aggregation)

    def run(self, launch, *structs, weight=None):
        tensors = map(ctypes.byref, (self.tensors, *structs, self.params))
        assert launch(*tensors, self.formula, self.kl, self.weight if weight is None else weight) == 0
        return self.results


def policy_loss_fwd(logp, old, advantages, *others):
    one_adv = one_per_row(advantages, logp.shape[1])
    call = Call(logp, old, advantages, *others, one_adv, library.token_loss_programs(*logp.shape))
    return call.run(library.policy_loss_fwd)


def policy_loss_sequences_fwd(
    logp, old, advantages, ref, entropy, mask, policy_weights, token_weights, cu_seqlens, params, formula, kl,
    aggregation, correction, sequence_ratio, sequence_correction, entropy_grad,
):  # fmt: skip
    packed, one_adv = cu_seqlens is not None, advantages.shape != logp.shape
    count = cu_seqlens.shape[0] - 1 if packed else logp.shape[0]
    call = Call(
        logp, old, advantages, ref, entropy, mask, policy_weights, token_weights, None, params, formula, kl,
        aggregation, correction, entropy_grad, one_adv, count,
    )  # fmt: skip
    own_weight = packed and aggregation.startswith("seq_")
    offsets = Offsets(None, 0, False)
    if packed:
        offsets = Offsets(pointer(cu_seqlens), cu_seqlens.element_size(), cu_seqlens.dtype.is_signed)
    sequences = Sequences(
        offsets, count, sequence_ratio, sequence_correction and bool(correction), one_adv and formula == "gspo",
        call.weight if own_weight else -1,
    )  # fmt: skip
    weight = WEIGHTS.index("token_sum") if own_weight else None
    return call.run(library.policy_loss_sequences_fwd, sequences, weight=weight)


def token_loss_bwd(grad, logp, entropy, scale, dlogp, dentropy):
    grad_logp = fresh(*dlogp.shape, dtype=logp.dtype)
    grad_entropy = fresh(*dentropy.shape, dtype=dentropy.dtype if entropy is None else entropy.dtype)
    B = 1 if scale is None else dlogp.shape[0]
    grads = Grads(
        B, dlogp.numel() // B if B else 0, pointer(grad), grad.dim() == 0, pointer(scale), pointer(dlogp),
        pointer(dentropy), floats(grad_logp), floats(grad_entropy),
    )  # fmt: skip
    assert library.token_loss_bwd(ctypes.byref(grads)) == 0
    return grad_logp, grad_entropy


def kl_estimate_fwd(logp, ref, old, mask, variant):
    kl, dkl = fresh(*logp.shape), fresh(*logp.shape)
    tensors = Kl(logp.numel(), *map(pointer, (logp, ref, old, mask, kl, dkl)))
    assert library.kl_estimate_fwd(ctypes.byref(tensors), KLS.index(variant)) == 0
    return kl, dkl


OPS = {
    "policy_loss_fwd": policy_loss_fwd,
    "policy_loss_sequences_fwd": policy_loss_sequences_fwd,
    "token_loss_bwd": token_loss_bwd,
    "kl_estimate_fwd": kl_estimate_fwd,
}
put_in_place(OPS)
