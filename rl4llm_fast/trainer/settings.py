"""What every run can be told: the settings all trainers share, and how TOML and ``--set key=value`` fill a config."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .devices import choose_device, multiplies_bf16

if sys.version_info >= (3, 11):
    import tomllib
else:  # the extra `trainer` brings it
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

C = TypeVar("C", bound="RunConfig")


@dataclass
class RunConfig:
    """The model, the optimiser and the run. A trainer's config adds its own settings, and its own limits to them."""

    model: str = "smollm2-135m-instruct"  # that name, or anything AutoModelForCausalLM.from_pretrained takes
    # bf16: bf16 weights over an fp32 master | autocast: fp32 weights | fp32 | auto: bf16 where the device has
    # instructions for it, else fp32 (products in bf16 take a CPU without them several times as long)
    precision: str = "auto"

    # Optimisation
    steps: int = 40
    micro_batch_size: int = 0  # how much of a batch a forward takes; 0: all of it
    learning_rate: float = 1e-5
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    gradient_checkpointing: bool = False  # keep a layer's input only and compute the layer again in the backward pass

    # The run
    seed: int = 0
    device: str = "auto"
    parallel: str = "ddp"  # several processes each hold the model (ddp), or a part of it (fsdp)
    backend: str = "auto"  # of every op of the library; eager: plain PyTorch
    output_dir: str = "runs/run"
    strict: bool = False  # stop at a row or prompt that cannot be used, in place of leaving it out
    resume: bool = True  # go on from the checkpoint in output_dir, where there is one
    checkpoint_every: int = 20  # steps; 0: never
    save_model: bool = True  # at the end, as a folder that from_pretrained takes
    eval_every: int = 0  # steps; 0: never
    progress: bool = True
    tensorboard: bool = False  # the metrics also as events in output_dir/tensorboard
    on_divergence: str = "stop"  # at a loss or gradient that is not finite, or max_ratio; skip: leave the update out
    max_ratio: float = 1000.0  # of the policy to the one that sampled, at any token; 0: no limit

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "precision": ("auto", "bf16", "autocast", "fp32"),
        "backend": ("auto", "eager", "cpu", "triton", "cuda"),
        "lr_schedule": ("constant", "linear", "cosine"),
        "on_divergence": ("stop", "skip"),
        "parallel": ("ddp", "fsdp"),
    }
    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = ()
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (
        "seed",
        "steps",
        "micro_batch_size",
        "learning_rate",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "checkpoint_every",
        "eval_every",
        "max_ratio",
    )
    POSITIVE: ClassVar[tuple[str, ...]] = ("adam_eps",)

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            setattr(self, spec.name, _typed(spec.name, getattr(self, spec.name), _default(spec)))
        for owner in [cls for cls in type(self).__mro__ if issubclass(cls, RunConfig)]:
            limits = vars(owner)
            for name, choices in limits.get("CHOICES", {}).items():
                self.wanted(getattr(self, name) in choices, name, "one of " + ", ".join(choices))
            for name in limits.get("AT_LEAST_ONE", ()):
                self.wanted(getattr(self, name) >= 1, name, "at least 1")
            for name in limits.get("NOT_NEGATIVE", ()):
                self.wanted(getattr(self, name) >= 0, name, "0 or more")
            for name in limits.get("POSITIVE", ()):
                self.wanted(getattr(self, name) > 0, name, "more than 0")
        self.wanted(all(0 <= beta < 1 for beta in self.adam_betas), "adam_betas", "two values in [0, 1)")
        if self.precision == "auto":
            self.precision = "bf16" if multiplies_bf16(choose_device(self.device)) else "fp32"

    def wanted(self, holds: bool, name: str, what: str) -> None:
        """Raise ValueError naming the setting unless ``holds``."""
        if not holds:
            raise ValueError(f"config: {name}: wanted {what}, got {getattr(self, name)!r}")


def fill(kind: type[C], path: str | Path | None = None, overrides: Iterable[str] = ()) -> C:
    """A config of ``kind`` from a TOML file (or the defaults), then ``key=value`` and ``table.key=value`` overrides.

    Raises:
        ValueError: an unknown key (naming the nearest one, or all), a value of the wrong type or range, or no TOML.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path}: not a TOML file: {error}") from error
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--set: wanted key=value, got {override!r}")
        table, _, leaf = key.strip().rpartition(".")
        target = values
        if table:
            _check_key(kind, table)
            target = values.setdefault(table, {})
            if not isinstance(target, dict):
                raise ValueError(f"--set {override}: {table} is a value, not a table")
        target[leaf] = _parse(text.strip())
    check_keys(kind, values)
    return kind(**values)


def check_keys(kind: type[RunConfig], keys: Iterable[str]) -> None:
    """Raise ValueError naming the nearest setting of ``kind``, or all, for a key that it does not have."""
    for key in keys:
        _check_key(kind, key)


def _parse(text: str) -> Any:
    """A value as TOML spells it; what is no TOML is a string, so that nobody has to quote twice in a shell."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _check_key(kind: type[RunConfig], key: str) -> None:
    known = [spec.name for spec in dataclasses.fields(kind)]
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1)
        hint = f"the nearest is {nearest[0]!r}" if nearest else f"there are {', '.join(known)}"
        raise ValueError(f"config: unknown key {key!r}; {hint}")


def _default(spec: dataclasses.Field[Any]) -> Any:
    return spec.default_factory() if spec.default_factory is not dataclasses.MISSING else spec.default


def _typed(name: str, value: Any, default: Any) -> Any:
    """``value`` in the type of the default: an int counts as a float, a list as a tuple, nothing else is bent."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        if len(value) != len(default):
            raise ValueError(f"config: {name}: wanted {len(default)} values, got {value!r}")
        return tuple(_typed(name, v, d) for v, d in zip(value, default, strict=True))
    if not isinstance(value, type(default)) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise ValueError(f"config: {name}: wanted {type(default).__name__}, got {value!r}")
    return value
