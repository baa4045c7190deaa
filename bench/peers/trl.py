"""TRL's functions as its trainers call them; on a GPU they choose TRL's own Triton kernel."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

from torch import Tensor

from ..cases import Case
from . import pick


def version() -> str:
    try:
        return metadata.version("trl")
    except metadata.PackageNotFoundError as error:
        raise ImportError("trl") from error


def build(case: Case, device: str) -> Callable[..., Any]:
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    def token_logprobs_entropy(logits: Tensor, token_ids: Tensor) -> Any:
        return selective_log_softmax_and_entropy(logits, token_ids, entropy_requires_grad=True)

    functions = {"token_logprobs": selective_log_softmax, "token_logprobs_entropy": token_logprobs_entropy}
    return pick(functions, case, "no public function: the loss is a method of its trainer")
