"""Gives the ops of ``rl4llm_fast.schemas`` their Triton implementations. The only module that need import Triton."""

import os

import torch

from rl4llm_fast.schemas import TRITON_NAMESPACE

from . import (
    gae,
    groups,
    kl,
    kl_bwd,
    kl_estimate,
    n_step,
    preference,
    scale,
    token_logprobs,
    token_loss,
    token_loss_sequences,
    vtrace,
    whiten,
)

# op name -> launcher with the signature of schemas.OPS
LAUNCHERS = {
    "token_logprobs_fwd": token_logprobs.token_logprobs_fwd,
    "token_logprobs_bwd": token_logprobs.token_logprobs_bwd,
    "token_logprobs_bwd_": token_logprobs.token_logprobs_bwd_,
    "kl_divergence_fwd": kl.kl_divergence_fwd,
    "kl_divergence_bwd": kl_bwd.kl_divergence_bwd,
    "kl_divergence_bwd_": kl_bwd.kl_divergence_bwd_,
    "policy_loss_fwd": token_loss.policy_loss_fwd,
    "policy_loss_sequences_fwd": token_loss_sequences.policy_loss_sequences_fwd,
    "kl_estimate_fwd": kl_estimate.kl_estimate_fwd,
    "token_loss_bwd": token_loss.token_loss_bwd,
    "preference_loss_fwd": preference.preference_loss_fwd,
    "preference_loss_bwd": preference.preference_loss_bwd,
    "scale_gradient_": scale.scale_gradient_,
    "gae_fwd": gae.gae_fwd,
    "gae_bwd": gae.gae_bwd,
    "vtrace": vtrace.vtrace,
    "n_step_returns": n_step.n_step_returns,
    "group_advantages": groups.group_advantages,
    "process_advantages": groups.process_advantages,
    "whiten_stats": whiten.whiten_stats,
    "whiten_apply": whiten.whiten_apply,
}

# "CUDA" is ROCm's key too. In the interpreter the same launchers take CPU tensors.
KEYS = ("CUDA", "CPU") if os.environ.get("TRITON_INTERPRET") == "1" else ("CUDA",)

_library = torch.library.Library(TRITON_NAMESPACE, "IMPL")  # unregisters its ops when it is collected
for _name, _launcher in LAUNCHERS.items():
    for _key in KEYS:
        _library.impl(_name, _launcher, _key)
