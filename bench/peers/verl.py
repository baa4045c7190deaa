"""verl's functions of logits and its policy loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..cases import Case
from . import NO_COUNTERPART, Absent, installed, pick


def version() -> str:
    return installed("verl")


def _policy_loss(
    logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    from verl.trainer.ppo import core_algos

    live = mask.to(logp.dtype)
    each = advantages.unsqueeze(-1).expand_as(logp)
    # Its dual clip is always on: a bound that no ratio reaches switches it off.
    surrogate, clipped, kl_old, _ = core_algos.compute_policy_loss(
        old_logp, logp, each, live, cliprange=0.2, clip_ratio_c=1e9, loss_agg_mode="token-mean"
    )
    kl_ref = core_algos.agg_loss(core_algos.kl_penalty(logp, ref_logp, "low_var_kl"), live, "token-mean")
    metrics = {"clip_fraction": clipped, "kl_old_k1": kl_old, "kl_ref": kl_ref.detach()}
    return surrogate + 0.04 * kl_ref, metrics


def build(case: Case, device: str) -> Callable[..., Any]:
    installed("verl")
    if case.op == "gae":
        raise Absent("its estimate whitens the advantages in the same call")
    if case.op not in ("token_logprobs", "policy_loss"):
        raise Absent(NO_COUNTERPART)
    from verl.utils import torch_functional

    def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
        logp: Tensor = torch_functional.logprobs_from_logits(logits, token_ids, inplace_backward=False)
        return logp

    def token_logprobs_entropy(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(logits, token_ids), torch_functional.entropy_from_logits(logits)

    functions: dict[str, Callable[..., Any]] = {
        "token_logprobs": token_logprobs,
        "token_logprobs_entropy": token_logprobs_entropy,
        "policy_loss": _policy_loss,
    }
    return pick(functions, case)
