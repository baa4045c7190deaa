"""This library with its Triton kernels, asked for by name: beside CUDA C++ and beside what it chooses by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..cases import Case
from . import needs_gpu, ours

version = ours.version


def build(case: Case, device: str) -> Callable[..., Any]:
    needs_gpu(device)
    return ours.by_name("triton", case, device)
