"""One file with all that a run needs to go on as if it had never stopped; it is there whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .settings import RunConfig

# What may differ between the run that wrote a checkpoint and the one that goes on from it.
FREE = {
    "steps", "output_dir", "resume", "checkpoint_every", "save_model", "eval_every", "progress", "on_divergence",
    "max_ratio", "parallel", "gradient_checkpointing", "tensorboard", "log_samples",
}  # fmt: skip


def save(
    path: Path,
    *,
    step: int,
    config: RunConfig,
    data_key: str,
    optimizer: dict[str, Any],
    generator: torch.Generator,
) -> None:
    """Write the state after ``step`` steps. A crash at any moment leaves the previous file or the new one.

    Raises:
        OSError: it cannot be written, as on a full disk; what there was stays.
    """
    kind, keys, *position = np.random.get_state()
    state = {
        "step": step,
        "config": dataclasses.asdict(config),
        "data": data_key,
        "optimizer": optimizer,
        "generator": generator.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *position],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # the latter: torch's own, of a file that it could not end
        partial.unlink(missing_ok=True)
        kept = "; the one before it is still there" if path.is_file() else ""
        raise OSError(f"{path}: the checkpoint of step {step} cannot be written: {error}{kept}") from error
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name too: after a power cut the file is found under it
    finally:
        os.close(folder)


def load(path: Path, config: RunConfig, data_key: str | None = "") -> dict[str, Any]:
    """Read a checkpoint (tensors and plain values only: no code is run). ``data_key`` None: before the data is known.

    Raises:
        ValueError: it is of a run with other settings or data, or no checkpoint of this library.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        written = state["config"]
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint that can be read ({error}); delete it to start over") from error
    now = dataclasses.asdict(config)
    other = [key for key in now if key not in FREE and written.get(key) != now[key]]
    if other:
        changes = ", ".join(f"{key} {written.get(key)!r} -> {now[key]!r}" for key in other)
        raise ValueError(f"{path}: written with other settings ({changes}); use resume=false or another output_dir")
    if data_key is not None and state.get("data", "") != data_key:
        raise ValueError(f"{path}: written with other rows of data; use resume=false or another output_dir")
    return state


def restore_rng(state: dict[str, Any], generator: torch.Generator) -> None:
    """Put every random number generator back to where it was."""
    generator.set_state(state["generator"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *position = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *position))
