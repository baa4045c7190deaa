"""Liger's cross entropy without reduction: the negative log-probability. It makes the gradient in the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

from torch import Tensor

from ..cases import Case
from . import Absent, pick


def version() -> str:
    try:
        return metadata.version("liger-kernel")
    except metadata.PackageNotFoundError as error:
        raise ImportError("liger-kernel") from error


def build(case: Case, device: str) -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
        return -liger_cross_entropy(logits, token_ids, reduction="none")

    function = pick({"token_logprobs": token_logprobs}, case)
    if device == "cpu":
        raise Absent("its counterpart is a Triton kernel: needs a GPU")
    return function
