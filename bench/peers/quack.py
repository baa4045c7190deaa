"""QuACK's cross entropy without reduction, in CuTe: the negative log-probability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..cases import Case
from . import NO_COUNTERPART, Absent, installed, needs_gpu


def version() -> str:
    return installed("quack-kernels")


def build(case: Case, device: str) -> Callable[..., Any]:
    installed("quack-kernels")
    if case.op.startswith("linear_"):
        raise Absent("its linear cross entropy has no result a token")
    if case.call != "token_logprobs":
        raise Absent(NO_COUNTERPART)
    needs_gpu(device)
    from quack.cross_entropy import cross_entropy

    def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
        return -cross_entropy(logits, token_ids, reduction="none")

    return token_logprobs
