"""What every run can be told: the settings all trainers share, and how TOML and ``--set key=value`` fill a config."""

from __future__ import annotations

import dataclasses
import difflib
import math
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
    INFINITE: ClassVar[tuple[str, ...]] = ("max_grad_norm", "max_ratio")  # bounds, of which inf is none

    def __post_init__(self) -> None:
        owners = [cls for cls in type(self).__mro__ if issubclass(cls, RunConfig)]
        unbounded = {name for owner in owners for name in vars(owner).get("INFINITE", ())}
        for spec in dataclasses.fields(self):
            value = _typed(spec.name, getattr(self, spec.name), _default(spec))
            setattr(self, spec.name, value)
            if isinstance(value, float):
                infinite = value == math.inf and spec.name in unbounded
                self.wanted(math.isfinite(value) or infinite, spec.name, "a finite number")
            _no_nan(spec.name, value)
        for owner in owners:
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
        self.wanted(self.seed < 2**63, "seed", "less than 2 ** 63")
        if self.precision == "auto":
            self.precision = "bf16" if multiplies_bf16(choose_device(self.device)) else "fp32"

    def ops(self) -> tuple[str, ...]:
        """Ops of the library that a run calls whatever its model and data: what the backend must be able to run."""
        return ()

    def wanted(self, holds: bool, name: str, what: str) -> None:
        """Raise ValueError naming the setting unless ``holds``."""
        if not holds:
            raise ValueError(f"config: {name}: wanted {what}, got {getattr(self, name)!r}")


def fill(kind: type[C], path: str | Path | None = None, overrides: Iterable[str] = ()) -> C:
    """A config of ``kind`` from a TOML file (or the defaults), then ``key=value`` and ``table.key=value`` overrides.

    Raises:
        ValueError: an unknown key (naming the nearest one, or all), a value of the wrong type or range, or no TOML.
        FileNotFoundError: there is no such file.
    """
    values: dict[str, Any] = {} if path is None else _read(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--set: wanted key=value, got {override!r}")
        *tables, leaf = _path(key.strip(), override)
        target = values
        for table in tables:
            _check_key(kind, tables[0])
            target = target.setdefault(table, {})
            if not isinstance(target, dict):
                raise ValueError(f"--set {override}: {table} is a value, not a table")
        target[leaf] = _parse(text.strip())
        if not tables and not isinstance(target[leaf], str) and isinstance(_defaults(kind).get(leaf), str):
            target[leaf] = text.strip()  # a folder may be called 2024
    check_keys(kind, values)
    return kind(**values)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        hint = "; a setting goes behind --set" if "=" in str(path) else ""
        raise FileNotFoundError(f"config: there is no file {str(path)!r}{hint}")
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a mark first
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from error
    return values


def _path(key: str, override: str) -> list[str]:
    """The tables and the key in them that a dotted key of TOML names."""
    path = []
    try:
        rest: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--set: wanted key=value or table.key=value, got {override!r}") from error
    while isinstance(rest, dict):
        ((name, rest),) = rest.items()
        path.append(name)
    return path


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


def _defaults(kind: type[RunConfig]) -> dict[str, Any]:
    return {spec.name: _default(spec) for spec in dataclasses.fields(kind)}


_KINDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list", dict: "a table",
}  # fmt: skip


def _typed(name: str, value: Any, default: Any) -> Any:
    """``value`` in the type of the default: an int counts as a float, a list as a tuple, nothing else is bent."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, tuple):
        if not isinstance(value, (list, tuple)) or len(value) != len(default):
            raise ValueError(f"config: {name}: wanted {len(default)} values, got {value!r}")
        return tuple(_typed(name, v, d) for v, d in zip(value, default, strict=True))
    if not isinstance(value, type(default)) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise ValueError(f"config: {name}: wanted {_KINDS[type(default)]}, got {value!r}")
    return value


def _no_nan(name: str, value: Any) -> None:
    """Raise ValueError for a NaN in a list or table: whatever it goes on to, it would poison without a word."""
    if isinstance(value, dict):
        for key, item in value.items():
            _no_nan(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _no_nan(name, item)
    elif isinstance(value, float) and math.isnan(value):
        raise ValueError(f"config: {name}: wanted a number, got nan")
