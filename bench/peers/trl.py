"""TRL's functions as its trainers call them; on a GPU they choose TRL's own Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..cases import Case
from . import eager, installed, pick

# Columns of the vocabulary at a time, as its trainers ask for.
_COLUMNS = 32_768


def version() -> str:
    return installed("trl")


def _linear_token_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    # bias, temperature, columns, softcap, scale of the logits, further outputs
    logp, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, token_ids, 1.0, _COLUMNS, None, 1.0, ())
    return logp


def build(case: Case, device: str) -> Callable[..., Any]:
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    def token_logprobs_entropy(logits: Tensor, token_ids: Tensor) -> Any:
        return selective_log_softmax_and_entropy(logits, token_ids, entropy_requires_grad=True)

    functions = {
        "token_logprobs": selective_log_softmax,
        "token_logprobs_entropy": token_logprobs_entropy,
        "linear_token_logprobs": _linear_token_logprobs,
        "linear_policy_loss": eager.grpo_from(_linear_token_logprobs),
    }
    return pick(functions, case, "no public function: the loss is a method of its trainer")
