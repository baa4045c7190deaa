"""Liger's cross entropy without reduction: the negative log-probability. It makes the gradient in the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ..cases import Case
from . import Absent, pick


def version() -> str:
    try:
        return metadata.version("liger-kernel")
    except metadata.PackageNotFoundError as error:
        raise ImportError("liger-kernel") from error


def _linear_policy_loss(hidden: Tensor, weight: Tensor, token_ids: Tensor, ref_logp: Tensor, advantages: Tensor) -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    # One sequence a token, so that its chunks, of sequences, are chunks of tokens like ours.
    grpo = LigerFusedLinearGRPOLoss(beta=0.04, use_ref_model=True, compiled=False, chunk_size=256, loss_type="dapo")
    columns = (t.unsqueeze(1) for t in (hidden, token_ids, ref_logp))
    states, ids, ref = columns
    loss, _ = grpo(states, weight, ids, torch.ones_like(ref), advantages, ref_per_token_logps=ref)
    return loss


def build(case: Case, device: str) -> Callable[..., Any]:
    if case.op == "linear_policy_loss":
        return _linear_policy_loss
    from liger_kernel.transformers.functional import liger_cross_entropy

    def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
        return -liger_cross_entropy(logits, token_ids, reduction="none")

    function = pick({"token_logprobs": token_logprobs}, case)
    if device == "cpu":
        raise Absent("its counterpart is a Triton kernel: needs a GPU")
    return function
