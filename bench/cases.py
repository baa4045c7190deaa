"""The registry: each measured case (op × shape × dtype × mode), its bytes and FLOPs by formula, what it must reach.

Bytes are the least that any implementation of the mode must move between memory and the processor: inputs read once
per pass, outputs written once. A forward and a backward are two passes, because the upstream gradient arrives between
them. FLOPs count a fused multiply-add as two and an exponential as one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}

FORWARD = "forward"
BACKWARD = "backward"
BOTH = "forward+backward"
IN_PLACE = "forward+backward in place"  # the gradient overwrites the logits
MODES = (FORWARD, BACKWARD, BOTH, IN_PLACE)


@dataclass(frozen=True)
class Target:
    """One threshold of a case.

    kind: ``speedup`` (at least ``value`` times faster than ``peer``), ``time_ms`` (at most), ``copy_fraction`` (at
    least this part of the copy bandwidth of the same run), ``extra_bytes`` (peak memory over the inputs, at most) or
    ``memory`` (that, at most 1/``value`` of the peer's).
    device: the threshold speaks of devices with this in their name, and is not judged on others.
    """

    kind: str
    value: float
    peer: str | None = None
    device: str | None = None

    def __str__(self) -> str:
        if self.kind == "speedup":
            text = f">= {self.value:g}x {self.peer}"
        elif self.kind == "time_ms":
            text = f"<= {self.value:g} ms"
        elif self.kind == "copy_fraction":
            text = f">= {self.value:.0%} of copy"
        elif self.kind == "memory":
            text = f"extra <= 1/{self.value:g} of {self.peer}"
        else:
            text = f"extra <= {self.value / 2**20:.0f} MiB"
        return f"{text} on {self.device}" if self.device else text


@dataclass(frozen=True)
class Case:
    """op: the public function. call: what the peers implement, ``op`` or a variant of it. shape: see ``bench.ops``."""

    op: str
    call: str
    mode: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    suites: tuple[str, ...]
    targets: tuple[Target, ...] = ()
    variant: str = ""

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype]

    @property
    def name(self) -> str:
        what = self.call + (f" {self.variant}" if self.variant else "")
        return f"{what}/{self.mode}/{self.dtype_name}/" + "x".join(map(str, self.shape))

    @property
    def bytes(self) -> int:
        return _BYTES[self.op](self)

    @property
    def flops(self) -> int:
        return _FLOPS[self.op](self)

    @property
    def entropy(self) -> bool:
        return self.call == "token_logprobs_entropy"


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


_BYTES = {
    "linear_token_logprobs": _linear_bytes,
    "linear_policy_loss": _linear_bytes,
    "gae": _gae_bytes,
    "token_logprobs": _logits_bytes,
    "kl_divergence": _kl_bytes,
    "policy_loss": _policy_bytes,
    "preference_loss": _preference_bytes,
    "group_advantages": _group_bytes,
}
_FLOPS = {
    "linear_token_logprobs": _linear_flops,
    "linear_policy_loss": _linear_flops,
    "gae": _gae_flops,
    "token_logprobs": _logits_flops,
    "kl_divergence": _kl_flops,
    "policy_loss": _policy_flops,
    "preference_loss": _preference_flops,
    "group_advantages": _group_flops,
}

# Per-row results, the engine's records and whole pages: what a measured peak may hold beyond the formula.
_SLACK = 4 * 2**20


def _cpu_logits() -> Iterator[Case]:
    rows = 512
    for vocabulary in (49_152, 151_936):
        suites = ("smoke", "cpu") if vocabulary == 49_152 else ("cpu",)
        for dtype in (torch.bfloat16, torch.float32):
            bf16 = dtype == torch.bfloat16
            gradient = Target("extra_bytes", rows * vocabulary * dtype.itemsize + _SLACK)
            plain, entropy = "token_logprobs", "token_logprobs_entropy"

            def case(call: str, mode: str, *targets: Target, **common: object) -> Case:
                return Case("token_logprobs", call, mode, targets=targets, **common)  # type: ignore[arg-type]

            common = {"dtype": dtype, "shape": (rows, vocabulary), "suites": suites}
            yield case(plain, FORWARD, _faster(5, "eager"), _faster(1.5, "compile"), **common)
            yield case(plain, BOTH, _faster(5 if bf16 else 4, "eager"), _faster(4, "compile"), gradient, **common)
            yield case(
                plain,
                IN_PLACE,
                _faster(5 if bf16 else 7, "eager"),
                _faster(4, "compile"),
                Target("extra_bytes", _SLACK),
                **common,
            )
            yield case(entropy, BOTH, _faster(12 if bf16 else 9, "eager"), _faster(4, "compile"), gradient, **common)


def _cpu_kl() -> Iterator[Case]:
    for vocabulary in (49_152, 151_936):
        for dtype in (torch.bfloat16, torch.float32):
            gradient = Target("extra_bytes", 512 * vocabulary * dtype.itemsize + _SLACK)
            yield Case(
                "kl_divergence", "kl_divergence", BOTH, dtype, (512, vocabulary), ("cpu",), (gradient,), "reverse"
            )


def _faster(times: float, peer: str) -> Target:
    return Target("speedup", times, peer)


def _cpu_small() -> Iterator[Case]:
    targets = (_faster(20, "loop"), _faster(2, "eager"))
    for variant in ("sorted", "shuffled"):
        yield Case(
            "group_advantages", "group_advantages", FORWARD, torch.float32, (65_536,), ("cpu",), targets, variant
        )
    for dtype in (torch.float32, torch.bfloat16):
        targets = (_faster(8, "eager"),)
        yield Case("policy_loss", "policy_loss", BOTH, dtype, (256, 1_024), ("cpu",), targets, "grpo k3")
    yield Case(
        "preference_loss", "preference_loss", BOTH, torch.float32, (64, 1_024), ("cpu",), (_faster(3, "eager"),), "dpo"
    )


def _cpu_linear() -> Iterator[Case]:
    """From hidden states (N, D, V), with little memory and, "one chunk", with all logits kept for the backward."""
    shape, suites = (2_048, 576, 49_152), ("cpu",)
    rows: tuple[tuple[str, torch.dtype, str, float, float], ...] = (
        ("linear_token_logprobs", torch.float32, "", 1.0, 7),
        ("linear_token_logprobs", torch.float32, "one chunk", 1.1, 2),
        ("linear_token_logprobs", torch.bfloat16, "", 1.9, 2.5),
        ("linear_policy_loss", torch.float32, "grpo k3", 1.1, 7),
        ("linear_policy_loss", torch.bfloat16, "grpo k3", 1.9, 4),
    )
    for op, dtype, variant, speedup, memory in rows:
        targets = (_faster(speedup, "eager"), Target("memory", memory, "eager"))
        yield Case(op, op, BOTH, dtype, shape, suites, targets, variant)


def _cpu_gae() -> Iterator[Case]:
    """Padded 512 × 2,048, and the same tokens packed in ragged sequences; no mask, holes skipped, holes as zeros."""
    targets = (_faster(100, "loop"), Target("copy_fraction", 0.5))
    for layout in ("padded", "packed"):
        for mask in ("", " holes skip", " holes zero"):
            yield Case("gae", "gae", FORWARD, torch.float32, (512, 2_048), ("cpu",), targets, layout + mask)


def _gpu() -> Iterator[Case]:
    h100 = "H100"
    for shape, milliseconds in (((8_192, 2_048), 0.095), ((512, 4_096), 0.015), ((16, 131_072), 0.060)):
        target = Target("time_ms", milliseconds, device=h100)
        yield Case("gae", "gae", FORWARD, torch.float32, shape, ("gpu",), (target,), "padded")
    bf16, shape = torch.bfloat16, (8_192, 151_936)
    call = "token_logprobs_entropy"
    yield Case("token_logprobs", call, FORWARD, bf16, shape, ("gpu",), (Target("time_ms", 0.85, device=h100),))
    yield Case("token_logprobs", call, BACKWARD, bf16, shape, ("gpu",), (Target("copy_fraction", 0.92),))
    yield Case("token_logprobs", call, BOTH, bf16, shape, ("gpu",))
    yield Case("token_logprobs", "token_logprobs", BOTH, bf16, shape, ("gpu",))
    yield Case("token_logprobs", "token_logprobs", IN_PLACE, bf16, shape, ("gpu",), (Target("extra_bytes", _SLACK),))
    yield Case("token_logprobs", call, BOTH, torch.float32, (8_192, 49_152), ("gpu",))
    yield Case(
        "policy_loss",
        "policy_loss",
        BOTH,
        torch.float32,
        (256, 4_096),
        ("gpu",),
        (Target("time_ms", 0.030, device=h100),),
        "grpo k3",
    )
    kl_shape = (4_096, 131_072)
    kl = Case("kl_divergence", "kl_divergence", BOTH, bf16, kl_shape, ("gpu",), (), "reverse")
    at_2500_gb_s = Target("time_ms", kl.bytes / 2.5e12 * 1e3, device=h100)
    yield dataclasses.replace(kl, targets=(at_2500_gb_s,))
    shape = (8_192, 4_096, 131_072)
    for op, mode, variant, milliseconds in (
        ("linear_token_logprobs", FORWARD, "", 12.2),
        ("linear_token_logprobs", BOTH, "", 48),
        ("linear_policy_loss", BOTH, "grpo k3", 40),
    ):
        yield Case(op, op, mode, bf16, shape, ("gpu",), (Target("time_ms", milliseconds, device=h100),), variant)
    shape, targets = (64, 2_048), (_faster(10, "eager"),)
    yield Case("preference_loss", "preference_loss", BOTH, torch.float32, shape, ("gpu",), targets, "dpo")
    yield Case("group_advantages", "group_advantages", FORWARD, torch.float32, (2**20,), ("gpu",), (), "shuffled")


CASES: tuple[Case, ...] = (*_cpu_logits(), *_cpu_kl(), *_cpu_small(), *_cpu_linear(), *_cpu_gae(), *_gpu())
SUITES = ("smoke", "cpu", "gpu")


def select(suite: str, op: str | None = None) -> list[Case]:
    """The cases of a suite, of one op where it is named. Raises ValueError for names that the registry lacks."""
    if suite not in SUITES:
        raise ValueError(f"suite: wanted one of {', '.join(SUITES)}, got {suite!r}")
    ops = sorted({case.op for case in CASES if suite in case.suites})
    if op is not None and op not in ops:
        raise ValueError(f"op: the suite {suite!r} has {', '.join(ops)}, got {op!r}")
    return [case for case in CASES if suite in case.suites and op in (None, case.op)]
