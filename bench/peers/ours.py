"""This library, through its public functions, with the backend that it chooses by itself (or the one in force)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import rl4llm_fast as rf
from rl4llm_fast import dispatch

from .. import small
from ..cases import IN_PLACE, Case
from . import Absent


def version() -> str:
    return rf.__version__


def _policy_loss(logp: Any, old_logp: Any, ref_logp: Any, advantages: Any, mask: Any, *, kind: str) -> Any:
    return rf.policy_loss(logp, old_logp, advantages, kind=kind, mask=mask, ref_logp=ref_logp, kl_coef=0.04)


def _gae(rewards: Any, values: Any, mask: Any, mask_mode: Any, cu_seqlens: Any) -> Any:
    return rf.gae(rewards, values, gamma=0.99, lam=0.95, mask=mask, mask_mode=mask_mode, cu_seqlens=cu_seqlens)


def _preference_loss(
    chosen: Any, rejected: Any, ref_chosen: Any, ref_rejected: Any, mask_chosen: Any, mask_rejected: Any
) -> Any:
    masks = {"mask_chosen": mask_chosen, "mask_rejected": mask_rejected}
    return rf.preference_loss(chosen, rejected, ref_chosen, ref_rejected, kind="dpo", beta=0.1, **masks)


def _linear_policy_loss(hidden: Any, weight: Any, token_ids: Any, ref_logp: Any, advantages: Any) -> Any:
    loss, _ = rf.linear_policy_loss(
        hidden, weight, token_ids, None, advantages, kind="grpo", ref_logp=ref_logp, kl_coef=0.04
    )
    return loss


def build(case: Case, device: str) -> Callable[..., Any]:
    if not hasattr(rf, case.op):
        raise Absent(f"rl4llm_fast {rf.__version__} has no {case.op}")
    if case.op == "token_logprobs":
        return functools.partial(rf.token_logprobs, return_entropy=case.entropy, inplace_backward=case.mode == IN_PLACE)
    if case.op == "linear_token_logprobs":
        chunk = case.shape[0] if case.variant == "one chunk" else None
        return functools.partial(rf.linear_token_logprobs, chunk_tokens=chunk)
    if case.op == "linear_policy_loss":
        return _linear_policy_loss
    if case.op == "preference_loss":
        return _preference_loss
    if case.op == "kl_divergence":
        return rf.kl_divergence
    if case.op in small.OPS:
        return small.OPS[case.op].ours
    if case.op == "group_advantages":
        return lambda rewards, group_ids: rf.group_advantages(rewards, group_ids=group_ids)
    return (
        _gae
        if case.op == "gae"
        else functools.partial(_policy_loss, kind="gspo" if case.call.endswith("gspo") else "grpo")
    )


def by_name(backend: str, case: Case, device: str) -> Callable[..., Any]:
    """The same functions on a backend asked for by name. Raises Absent with the reason where it cannot run here."""
    if (reason := dispatch.why_not(case.op, backend, device)) is not None:
        raise Absent(reason)
    function = build(case, device)

    def call(*arguments: Any) -> Any:
        with rf.use_backend(backend):
            return function(*arguments)

    return call
