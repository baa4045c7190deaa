"""What a run can know of its mistakes before data are read and a model is loaded: both may take minutes."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .. import dispatch
from ..errors import BackendError
from . import checkpoint, smollm2
from .devices import available_device
from .extras import require
from .settings import RunConfig

C = TypeVar("C", bound=RunConfig)

_MODEL_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # name, or owner/name


def checked(kind: type[C], config: C | None, model: nn.Module | None = None, *, loads: bool = False) -> C:
    """The config, or the default one, when all that needs neither data nor a loaded model is right.

    Args:
        kind: the config's class.
        model: what is trained, where it was given.
        loads: whether the run loads models by itself, also where one was given.

    Raises:
        TypeError: a config or a model that is something else.
        ValueError: a device that is not here, an ``output_dir`` that cannot be written to or holds the checkpoint of a
            run with other settings, no model where one should be.
        ImportError: a package that the run needs is missing.
        BackendError: a backend asked for by name that cannot run what the trainer calls.
    """
    c = config_of(kind, config)
    require("transformers", "tqdm", extra="trainer")
    if c.tensorboard:
        require("tensorboard", extra="tensorboard")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a built model, got {model!r}; a name or a folder goes into config.model")
    check_backend(c, device_of(c, None if loads else model), *c.ops())
    if model is None:
        check_model("model", c.model)
    for setting in ("output_dir", "reference_cache"):
        if folder := getattr(c, setting, ""):
            check_folder(setting, folder)
    path = Path(c.output_dir) / "checkpoint.pt"
    if c.resume and path.is_file():
        checkpoint.load(path, c, data_key=None)
    return c


def config_of(kind: type[C], config: C | None) -> C:
    """The config, or the default one.

    Raises:
        TypeError: it is of another class.
    """
    if config is None:
        return kind()
    if not isinstance(config, kind):
        raise TypeError(f"config: wanted a {kind.__name__}, got {type(config).__name__}")
    return config


def device_of(config: RunConfig, model: nn.Module | None) -> torch.device:
    """Where a run computes: the config's device, or that of a model that is given, which stays where it is.

    Raises:
        ValueError: PyTorch has no such device here.
    """
    if model is None:
        return available_device(config.device)
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def check_backend(config: RunConfig, device: torch.device, *ops: str) -> None:
    """Raise BackendError for the first of ``ops`` that the backend in force cannot run on ``device``."""
    asked = None if config.backend == "auto" else config.backend
    here = torch.empty(0, device=device)
    for op in ops:
        try:
            dispatch.choose(op, here, asked)
        except BackendError as error:
            raise BackendError(f"config: {error}" if asked else str(error)) from None


def check_loss(config: RunConfig, compute: Callable[[], tuple[Any, ...]]) -> None:
    """Call a loss on next to nothing, so that a wrong kind or knob is an error before any work.

    Raises:
        TypeError, ValueError: what the loss raised, with the name that the config has for what is wrong.
    """
    try:
        with dispatch.use_backend("eager"):
            loss = compute()[0]
    except (TypeError, ValueError) as error:
        name, colon, what = str(error).partition(": ")
        if not colon:
            raise
        setting = "loss" if name == "kind" else name if hasattr(config, name) else f"loss_options.{name}"
        raise type(error)(f"config: {setting}: {what}") from error
    config.wanted(loss.dim() == 0, "aggregation", "one that makes one number of the tokens")


def check_model(setting: str, name: str) -> None:
    """Raise ValueError for what is neither a folder with a model nor the form of a name; what is behind a name shows
    when it is loaded.
    """
    if name == smollm2.NAME:
        return
    folder = Path(name)
    if folder.is_dir():
        known = ("config.json", "adapter_config.json")
        if not any((folder / file).is_file() for file in known):
            raise ValueError(f"config: {setting}: wanted the folder of a model, {name!r} has no config.json")
    elif folder.exists() or not _MODEL_ID.fullmatch(name):
        raise ValueError(f"config: {setting}: wanted a folder or a name of Hugging Face, there is no folder {name!r}")


def check_folder(setting: str, name: str) -> None:
    """Raise ValueError unless files can be written in the folder ``name``, which need not be there yet."""
    folder = Path(name)
    above = next(part for part in (folder, *folder.absolute().parents) if os.path.lexists(part))
    if not above.is_dir():
        what = "a file" if above.is_file() else "no folder"
        raise ValueError(f"config: {setting}: wanted a folder, {str(above)!r} is {what}")
    try:
        with tempfile.TemporaryFile(dir=above):  # permissions are not all that can stand in the way
            pass
    except OSError as error:
        raise ValueError(f"config: {setting}: cannot write to {str(above)!r}: {error.strerror}") from error


def check_sampler(config: Any, sampler: Any) -> None:
    """Raise ImportError where the config names an engine that is not installed, and none is given."""
    if sampler is None and config.sampler == "vllm":
        require("vllm", extra="vllm")


def check_type(name: str, value: Any, kind: type[Any], hint: str) -> None:
    """Raise TypeError unless ``value`` is None or a ``kind``; ``hint`` says what else the user may have meant."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name}: wanted a {kind.__name__}, got {value!r}; {hint}")


def check_callable(**functions: Any) -> None:
    """Raise TypeError for the first that is neither None nor a function."""
    for name, value in functions.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name}: wanted a function, got {value!r}")
