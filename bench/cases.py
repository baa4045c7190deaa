"""The registry: each measured case (op × shape × dtype × mode), with what it must reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from . import work
from .work import BACKWARD, BOTH, FORWARD, IN_PLACE

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Target:
    """One threshold of a case.

    kind: ``speedup`` (at least ``value`` times faster than ``peer``), ``time_ms`` (at most), ``copy_fraction`` (at
    least this part of the copy bandwidth of the same run), ``extra_bytes`` (peak memory over the inputs, at most),
    ``memory`` (that, at most 1/``value`` of the peer's) or ``products`` (at most ``value`` times the case's bare
    matrix products).
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
        elif self.kind == "workspace_bytes":
            text = f"workspace <= {self.value / 2**20:,.0f} MiB"
        elif self.kind == "memory":
            text = f"extra <= {f'1/{self.value:g} of ' if self.value != 1 else ''}{self.peer}"
        elif self.kind == "products":
            text = f"<= {self.value:g}x the bare products"
        else:
            text = f"extra <= {self.value / 2**20:.0f} MiB"
        return f"{text} on {self.device}" if self.device else text


@dataclass(frozen=True)
class Case:
    """op: the public function. call: what the peers implement, ``op`` or a variant of it. shape: see ``bench.ops``.

    repeats: the name of the case in which the peers make the same call: only those that a target names make it again.
    """

    op: str
    call: str
    mode: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    suites: tuple[str, ...]
    targets: tuple[Target, ...] = ()
    variant: str = ""
    axis: str = ""  # the size that a sweep varies here
    repeats: str = ""

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype]

    @property
    def name(self) -> str:
        what = self.call + (f" {self.variant}" if self.variant else "")
        return f"{what}/{self.mode}/{self.dtype_name}/" + "x".join(map(str, self.shape))

    @property
    def bytes(self) -> int:
        return work.BYTES[self.op](self)

    @property
    def flops(self) -> int:
        return work.FLOPS[self.op](self)

    @property
    def entropy(self) -> bool:
        return self.call == "token_logprobs_entropy"


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
            both = case(plain, BOTH, _faster(5 if bf16 else 4, "eager"), _faster(4, "compile"), gradient, **common)
            yield both
            yield case(
                plain,
                IN_PLACE,
                _faster(5 if bf16 else 7, "eager"),
                _faster(4, "compile"),
                Target("extra_bytes", _SLACK),
                repeats=both.name,
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
    # Log-probabilities are fp32 whatever the logits are.
    for op, shape, variant, times in (
        ("policy_loss", (256, 1_024), "grpo k3", 8),
        ("preference_loss", (64, 1_024), "dpo", 3),
    ):
        yield Case(op, op, BOTH, torch.float32, shape, ("cpu",), (_faster(times, "eager"),), variant)


def _small_ops() -> Iterator[Case]:
    """The other ops of a few numbers a token, and the loss that sees whole sequences; without thresholds."""
    for suite, rows, positions in (("cpu", 256, 1_024), ("gpu", 512, 4_096)):
        common = {"dtype": torch.float32, "shape": (rows, positions), "suites": (suite,)}
        for op, mode, variant in (
            ("kl_estimate", BOTH, "k3"),
            ("value_loss", BOTH, "clipped"),
            ("kto_loss", BOTH, ""),
            ("whiten", FORWARD, "masked"),
            ("vtrace", FORWARD, "padded"),
            ("n_step_returns", FORWARD, "padded"),
        ):
            yield Case(op, op, mode, variant=variant, **common)  # type: ignore[arg-type]
        yield Case("policy_loss", "policy_loss_gspo", BOTH, variant="gspo k3", **common)  # type: ignore[arg-type]


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
        case = Case(op, op, BOTH, dtype, shape, suites, targets, variant)
        if variant == "one chunk":
            case = dataclasses.replace(case, repeats=dataclasses.replace(case, variant="").name)
        yield case
    # The size at which its rivals' chunked losses are known: faster than each of them, with less memory than any.
    op, rivals = "linear_policy_loss", ("trl", "liger", "cce")
    beyond = [target for rival in rivals for target in (_faster(1, rival), Target("memory", 1, rival))]
    targets = (*beyond, Target("products", 1.1), Target("extra_bytes", 2**28))
    yield Case(op, op, BOTH, torch.float32, (1_024, *shape[1:]), suites, targets, "grpo k3")


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
        targets: tuple[Target, ...] = (Target("time_ms", milliseconds, device=h100),)
        if op == "linear_policy_loss":
            targets += (Target("workspace_bytes", 2**30),)
        yield Case(op, op, mode, bf16, shape, ("gpu",), targets, variant)
    shape, targets = (64, 2_048), (_faster(10, "eager"),)
    yield Case("preference_loss", "preference_loss", BOTH, torch.float32, shape, ("gpu",), targets, "dpo")
    yield Case("group_advantages", "group_advantages", FORWARD, torch.float32, (2**20,), ("gpu",), (), "shuffled")


_FACTORS = (1, 3, 10, 30, 100)

# The names of a shape's sizes, for sweeps.
_SIZES = {
    "token_logprobs": ("N", "V"),
    "kl_divergence": ("N", "V"),
    "linear_token_logprobs": ("N", "D", "V"),
    "linear_policy_loss": ("N", "D", "V"),
    "gae": ("B", "T"),
    "policy_loss": ("B", "T"),
    "preference_loss": ("B", "T"),
    "group_advantages": ("B",),
}


def _sweep() -> Iterator[Case]:
    """One size at a time over two decades, the others fixed."""
    for op, mode, variant, fixed, axes in (
        ("token_logprobs", BOTH, "", {"N": 256, "V": 16_384}, {"N": 32, "V": 1_536}),
        ("kl_divergence", BOTH, "reverse", {"N": 256, "V": 16_384}, {"V": 1_536}),
        (
            *("linear_token_logprobs", BOTH, "", {"N": 512, "D": 128, "V": 16_384}),
            {"N": 32, "D": 16, "V": 1_024},
        ),
        (
            # At this vocabulary a chunk holds 256 tokens: memory is seen to be flat from there on.
            *("linear_policy_loss", BOTH, "grpo k3", {"N": 512, "D": 128, "V": 49_152}),
            {"N": 32, "D": 16, "V": 1_024},
        ),
        ("gae", FORWARD, "padded", {"B": 64, "T": 512}, {"B": 16, "T": 96}),
        ("policy_loss", BOTH, "grpo k3", {"B": 64, "T": 512}, {"B": 8, "T": 96}),
        ("preference_loss", BOTH, "dpo", {"B": 64, "T": 512}, {"B": 8, "T": 96}),
        ("group_advantages", FORWARD, "shuffled", {}, {"B": 2_000}),
    ):
        for axis, low in axes.items():
            for factor in _FACTORS:
                shape = tuple(low * factor if name == axis else fixed[name] for name in _SIZES[op])
                yield Case(op, op, mode, torch.float32, shape, ("sweep",), (), variant, axis)


def size_of(op: str, axis: str, shape: Sequence[int]) -> int:
    """The size that a sweep varied."""
    return shape[_SIZES[op].index(axis)]


CASES: tuple[Case, ...] = (
    *_cpu_logits(),
    *_cpu_kl(),
    *_cpu_small(),
    *_small_ops(),
    *_cpu_linear(),
    *_cpu_gae(),
    *_gpu(),
    *_sweep(),
)
SUITES = ("smoke", "cpu", "gpu", "sweep")


def select(suite: str, op: str | None = None) -> list[Case]:
    """The cases of a suite, of one op where it is named. Raises ValueError for names that the registry lacks."""
    if suite not in SUITES:
        raise ValueError(f"suite: wanted one of {', '.join(SUITES)}, got {suite!r}")
    ops = sorted({case.op for case in CASES if suite in case.suites})
    if op is not None and op not in ops:
        raise ValueError(f"op: the suite {suite!r} has {', '.join(ops)}, got {op!r}")
    return [case for case in CASES if suite in case.suites and op in (None, case.op)]
