"""Apple's cut cross entropy: its kernels on a GPU, on the CPU its implementation for machines without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..cases import Case
from . import eager, installed, pick


def version() -> str:
    return installed("cut-cross-entropy")


def build(case: Case, device: str) -> Callable[..., Any]:
    from cut_cross_entropy import linear_cross_entropy

    implementation = "torch_compile" if device == "cpu" else "cce"

    def linear_token_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, token_ids, reduction="none", impl=implementation)

    functions: dict[str, Callable[..., Any]] = {
        "linear_token_logprobs": linear_token_logprobs,
        "linear_policy_loss": eager.grpo_from(linear_token_logprobs),
    }
    return pick(functions, case)
