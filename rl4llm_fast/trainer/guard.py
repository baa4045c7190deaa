"""What stops a run before it spoils its weights: a loss or gradient that is not finite, a ratio beyond all measure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class Diverged(RuntimeError):
    """A step whose update would spoil the weights; it was not taken."""


def problem_of(metrics: Mapping[str, float], max_ratio: float) -> str:
    """What is wrong with a loss and its ratios π/π_old, in words; "" if nothing is."""
    if not math.isfinite(metrics["loss"]):
        return f"the loss is {metrics['loss']}"
    ratio = metrics.get("ratio_max", 1.0)
    if max_ratio and not ratio <= max_ratio:
        return f"a token's ratio to the policy that sampled it is {ratio:.4g}, more than max_ratio = {max_ratio:g}"
    return ""


def gradient_problem(norm: float, names: list[str], count: int) -> str:
    """The same for a gradient whose ``norm`` is not finite; ``names`` are the parameters where it is not."""
    if not names:
        return f"the gradient's norm is {norm}, though each of its values is finite"
    more = "" if len(names) == 1 else f" and {len(names) - 1} more"
    return f"the gradient is not finite in {len(names)} of {count} parameters: {names[0]}{more}"


def save_batch(path: Path, step: int, problem: str, metrics: Mapping[str, float], batch: Any) -> None:
    """Write what the step was made of: tensors and plain values, for ``torch.load(path, weights_only=True)``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"step": step, "problem": problem, "metrics": dict(metrics), "batch": _plain(batch)}, path)


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, sequences as lists, numbers and tensors as they are; anything else as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
