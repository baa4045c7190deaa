"""The settings of a GRPO run: one flat dataclass, filled from Python, from TOML, and from ``--set key=value``."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:  # the extra `trainer` brings it
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

_CHOICES = {
    "precision": ("bf16", "autocast", "fp32"),
    "layout": ("auto", "shared", "plain"),
    "backend": ("auto", "eager", "cpu", "triton", "cuda"),
    "advantage_scale": ("group", "batch", "none"),
    "advantage_baseline": ("mean", "leave_one_out"),
    "old_logprobs": ("policy", "sampler"),
    "rollout_correction": ("none", "truncate", "mask"),
    "lr_schedule": ("constant", "linear", "cosine"),
}
_AT_LEAST_ONE = ("prompts_per_step", "group_size", "max_new_tokens", "epochs", "minibatches")
_NOT_NEGATIVE = (
    "seed",
    "steps",
    "top_k",
    "sampling_batch_size",
    "micro_batch_size",
    "kl_coef",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "checkpoint_every",
    "eval_every",
    "eval_prompts",
)
_POSITIVE = ("temperature", "top_p", "adam_eps", "rollout_cap")


@dataclass
class GRPOConfig:
    """Everything that ``train_grpo`` can be told. Tables of options (``*_options``) go on as keyword arguments."""

    # What learns, and from what
    model: str = "smollm2-135m-instruct"  # that name, or anything AutoModelForCausalLM.from_pretrained takes
    precision: str = "bf16"  # bf16: bf16 weights over an fp32 master | autocast: fp32 weights | fp32
    task: str = "chain_sum"  # a task of reasoning-gym
    task_options: dict[str, Any] = field(default_factory=dict)

    # Sampling: prompts_per_step x group_size answers a step
    prompts_per_step: int = 4
    group_size: int = 8
    max_new_tokens: int = 12
    temperature: float = 1.0
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    sampling_batch_size: int = 0  # prompts sampled at a time; 0: all of them

    # Advantages and loss
    loss: str = "grpo"  # a kind of rf.policy_loss
    loss_options: dict[str, Any] = field(default_factory=dict)  # its knobs, e.g. eps_high = 0.28
    aggregation: str = "token_mean"
    advantage_scale: str = "group"
    advantage_baseline: str = "mean"
    kl_coef: float = 0.0  # > 0: a frozen copy of the first model is the reference
    kl_estimator: str = "k3"
    kl_gradient: str = "value"
    entropy_coef: float = 0.0
    old_logprobs: str = "policy"  # policy: the model's before its first update on the batch | sampler: the sampler's
    rollout_correction: str = "none"  # weights for what the sampler and the training forward disagree on
    rollout_cap: float = 2.0

    # Optimisation
    steps: int = 40
    epochs: int = 1  # passes over each batch
    minibatches: int = 1  # optimizer steps a pass
    micro_batch_size: int = 0  # answers a forward; 0: the whole minibatch
    layout: str = "auto"  # shared: one copy of every prefix that answers share | plain: one row an answer
    learning_rate: float = 1e-5
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping

    # The run
    seed: int = 0
    device: str = "auto"
    backend: str = "auto"  # of every op of the library; eager: plain PyTorch
    output_dir: str = "runs/grpo"
    resume: bool = True  # go on from the checkpoint in output_dir, where there is one
    checkpoint_every: int = 20  # steps; 0: never
    save_model: bool = True  # at the end, as a folder that from_pretrained takes
    eval_every: int = 0  # steps; 0: never
    eval_prompts: int = 64
    progress: bool = True

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            setattr(self, spec.name, _typed(spec.name, getattr(self, spec.name), _default(spec)))
        for name, choices in _CHOICES.items():
            _wanted(getattr(self, name) in choices, name, self, "one of " + ", ".join(choices))
        for name in _AT_LEAST_ONE:
            _wanted(getattr(self, name) >= 1, name, self, "at least 1")
        for name in _NOT_NEGATIVE:
            _wanted(getattr(self, name) >= 0, name, self, "0 or more")
        for name in _POSITIVE:
            _wanted(getattr(self, name) > 0, name, self, "more than 0")
        _wanted(self.top_p <= 1, "top_p", self, "at most 1")
        _wanted(all(0 <= beta < 1 for beta in self.adam_betas), "adam_betas", self, "two values in [0, 1)")
        _wanted(self.minibatches <= self.prompts_per_step, "minibatches", self, "at most prompts_per_step")


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> GRPOConfig:
    """A config from a TOML file (or the defaults), then ``key=value`` and ``table.key=value`` overrides.

    Raises:
        ValueError: an unknown key (naming the nearest one), a value of the wrong type or range, or no TOML.
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
            _check_key(table)
            target = values.setdefault(table, {})
            if not isinstance(target, dict):
                raise ValueError(f"--set {override}: {table} is a value, not a table")
        target[leaf] = _parse(text.strip())
    for key in values:
        _check_key(key)
    return GRPOConfig(**values)


def _parse(text: str) -> Any:
    """A value as TOML spells it; what is no TOML is a string, so that nobody has to quote twice in a shell."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _check_key(key: str) -> None:
    known = [spec.name for spec in dataclasses.fields(GRPOConfig)]
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"config: unknown key {key!r}; the nearest is {nearest!r}")


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


def _wanted(holds: bool, name: str, config: GRPOConfig, what: str) -> None:
    if not holds:
        raise ValueError(f"config: {name}: wanted {what}, got {getattr(config, name)!r}")
