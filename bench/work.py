"""What a case must move and compute, by formula: the bytes and FLOPs behind every GB/s and TFLOP/s of the suite.

Bytes are the least that any implementation of the mode must move between memory and the processor: inputs read once
per pass, outputs written once. A forward and a backward are two passes, because the upstream gradient arrives between
them. FLOPs count a fused multiply-add as two and an exponential as one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import small

if TYPE_CHECKING:
    from .cases import Case

FORWARD = "forward"
BACKWARD = "backward"
BOTH = "forward+backward"
IN_PLACE = "forward+backward in place"  # the gradient overwrites the logits


def _logits_bytes(case: Case) -> int:
    """Forward: logits, an int64 id; logp (and H). Backward: logits, id, (m, log s), g (and h, H); dlogits."""
    rows, vocabulary = case.shape
    logits = rows * vocabulary * case.dtype.itemsize
    per_row = 4 * (1 + case.entropy)
    forward = logits + rows * (8 + per_row)
    backward = 2 * logits + rows * (8 + 8 + per_row + 4 * case.entropy)
    return {FORWARD: forward, BACKWARD: backward}.get(case.mode, forward + backward)


def _logits_flops(case: Case) -> int:
    """Forward, a logit: max 1, scale-and-shift 2, exp 1, sum 1; entropy +2. Backward: 2, exp 1, scale 1; entropy +3."""
    rows, vocabulary = case.shape
    forward, backward = 5 + 2 * case.entropy, 4 + 3 * case.entropy
    each = {FORWARD: forward, BACKWARD: backward}.get(case.mode, forward + backward)
    return rows * vocabulary * each


def _policy_bytes(case: Case) -> int:
    """logp, old, ref, mask in and dlogp out, then dlogp once more through the upstream gradient; an advantage a row."""
    rows, positions = case.shape
    forward = rows * positions * (3 * 4 + 1 + 4) + 4 * rows
    return forward if case.mode == FORWARD else forward + rows * positions * (4 + 4)


def _policy_flops(case: Case) -> int:
    """About 30 a live token: two exponentials, the clipped objective with its derivative, k3, ten metric sums."""
    rows, positions = case.shape
    return 30 * rows * positions


def _preference_bytes(case: Case) -> int:
    """logp, ref, mask of both answers in; both gradients out, with the masks once more."""
    pairs, positions = case.shape
    return 2 * pairs * positions * (2 * 4 + 1 + 4 + 1)


def _preference_flops(case: Case) -> int:
    """A token: subtract, add, count, scale."""
    pairs, positions = case.shape
    return 2 * pairs * positions * 4


def _group_bytes(case: Case) -> int:
    """fp32 rewards and int64 ids in, fp32 advantages out."""
    return case.shape[0] * (4 + 8 + 4)


def _group_flops(case: Case) -> int:
    """Mean 1, centre 1, square and add 2, scale 1."""
    return 5 * case.shape[0]


def _gae_bytes(case: Case) -> int:
    """Rewards and values in, with holes a mask too; advantages and returns out."""
    tokens = case.shape[0] * case.shape[1]
    return tokens * (2 * case.dtype.itemsize + 2 * 4 + ("holes" in case.variant))


def _gae_flops(case: Case) -> int:
    """About 10 a token: the offset, one step of the scan, two results."""
    return 10 * case.shape[0] * case.shape[1]


def _kl_bytes(case: Case) -> int:
    """Forward: both logits; kl. Backward: both logits, kl, (m, log s) twice, g; dlogits."""
    rows, vocabulary = case.shape
    logits = rows * vocabulary * case.dtype.itemsize
    forward, backward = 2 * logits + 4 * rows, 3 * logits + rows * 4 * 6
    return {FORWARD: forward, BACKWARD: backward}.get(case.mode, forward + backward)


def _kl_flops(case: Case) -> int:
    """Forward, a pair of logits: 5 a side, 3 for Σ p·(x − y). Backward: shifts 3, exp 1, difference 1, scale 3."""
    rows, vocabulary = case.shape
    return rows * vocabulary * {FORWARD: 13, BACKWARD: 8}.get(case.mode, 21)


def _linear_bytes(case: Case) -> int:
    """Hidden states and head read in each of three passes, both gradients written: what no chunking can avoid."""
    rows, width, vocabulary = case.shape
    return (1 if case.mode == FORWARD else 4) * (rows + vocabulary) * width * case.dtype.itemsize


def _linear_flops(case: Case) -> int:
    """Three products: logits, dx, dW. The forward alone: the first."""
    rows, width, vocabulary = case.shape
    return (1 if case.mode == FORWARD else 3) * 2 * rows * width * vocabulary


def _small_bytes(case: Case) -> int:
    op, (rows, positions) = small.OPS[case.op], case.shape
    return rows * positions * (op.forward_bytes + (op.backward_bytes if case.mode == BOTH else 0))


def _small_flops(case: Case) -> int:
    rows, positions = case.shape
    return small.OPS[case.op].flops * rows * positions


BYTES = {
    **dict.fromkeys(small.OPS, _small_bytes),
    "linear_token_logprobs": _linear_bytes,
    "linear_policy_loss": _linear_bytes,
    "gae": _gae_bytes,
    "token_logprobs": _logits_bytes,
    "kl_divergence": _kl_bytes,
    "policy_loss": _policy_bytes,
    "preference_loss": _preference_bytes,
    "group_advantages": _group_bytes,
}
FLOPS = {
    **dict.fromkeys(small.OPS, _small_flops),
    "linear_token_logprobs": _linear_flops,
    "linear_policy_loss": _linear_flops,
    "gae": _gae_flops,
    "token_logprobs": _logits_flops,
    "kl_divergence": _kl_flops,
    "policy_loss": _policy_flops,
    "preference_loss": _preference_flops,
    "group_advantages": _group_flops,
}
