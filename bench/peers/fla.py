"""flash-linear-attention's cross entropy without reduction, in Triton: the negative log-probability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..cases import Case
from . import NO_COUNTERPART, Absent, installed, needs_gpu


def version() -> str:
    return installed("flash-linear-attention")


def build(case: Case, device: str) -> Callable[..., Any]:
    installed("flash-linear-attention")
    if case.op.startswith("linear_"):
        raise Absent("its linear cross entropy has no result a token")
    if case.call != "token_logprobs":
        raise Absent(NO_COUNTERPART)
    needs_gpu(device)
    from fla.modules import FusedCrossEntropyLoss

    loss = FusedCrossEntropyLoss(reduction="none")

    def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
        return -loss(logits, token_ids)

    return token_logprobs
