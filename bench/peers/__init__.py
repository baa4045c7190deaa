"""Everyone that is measured, one small file each, through public functions only.

A peer is a module with ``version()`` and ``build(case, device)``; ``build`` returns a function with the signature of
``case.call`` in ``bench.ops``, or raises :class:`Absent` with the reason, which the table then shows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any

OURS = "rl4llm_fast"
_MODULES = {
    OURS: "ours",
    "triton": "in_triton",
    "cuda": "in_cuda",
    "eager": "eager",
    "chunked": "chunked",
    "loop": "loop",
    "compile": "compiled",
    "trl": "trl",
    "liger": "liger",
    "cce": "cce",
    "torchrl": "torchrl",
    "verl": "verl",
    "quack": "quack",
    "fla": "fla",
}
NAMES = tuple(_MODULES)
BACKENDS = NAMES[1:3]  # this library's on a GPU, side by side
RIVALS = NAMES[3:]
NO_COUNTERPART = "has no counterpart"


class Absent(Exception):
    """A peer that cannot take part here, and why."""


def module(name: str) -> ModuleType:
    return importlib.import_module(f"bench.peers.{_MODULES[name]}")


def build(name: str, case: Any, device: str) -> Callable[..., Any]:
    """The peer's function for a case. Raises Absent with the reason, an import that fails included."""
    try:
        function: Callable[..., Any] = module(name).build(case, device)
    except Absent:
        raise
    except ImportError as error:
        raise Absent(f"not installed: {error}") from error
    return function


def pick(functions: dict[str, Callable[..., Any]], case: Any, why: str = NO_COUNTERPART) -> Callable[..., Any]:
    if case.call not in functions:
        raise Absent(why)
    return functions[case.call]


def needs_gpu(device: str) -> None:
    """For peers that are GPU kernels and nothing else."""
    if device == "cpu":
        raise Absent("its counterpart is a GPU kernel: needs a GPU")


def installed(package: str) -> str:
    """The version of an installed package. Raises ImportError, as importing it would, where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise ImportError(package) from error


def version(name: str) -> str:
    try:
        return str(module(name).version())
    except ImportError:
        return "not installed"
