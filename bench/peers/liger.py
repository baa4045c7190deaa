"""Liger's cross entropy without reduction, the negative log-probability, and its chunked losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cases import FORWARD, Case
from . import Absent, installed, needs_gpu, pick


def version() -> str:
    return installed("liger-kernel")


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
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_fused_linear_cross_entropy

    def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
        return -liger_cross_entropy(logits, token_ids, reduction="none")

    def linear_token_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
        return -liger_fused_linear_cross_entropy(hidden, weight, token_ids, reduction="none")

    functions = {"token_logprobs": token_logprobs, "linear_token_logprobs": linear_token_logprobs}
    function = pick(functions, case)
    if case.op == "linear_token_logprobs" and case.mode != FORWARD:
        raise Absent("its gradients are made in the forward pass, before a token's upstream gradient is known")
    needs_gpu(device)
    return function
