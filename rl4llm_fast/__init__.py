"""Fused ops for reinforcement learning on language models. ``import rl4llm_fast as rf``; docs in README.md."""

from __future__ import annotations

import pathlib as _pathlib

from ._version import __version__

# In a checkout that is not installed (PYTHONPATH=.), rl4llm_fast.kernels is the folder `kernels` beside this one.
_root = _pathlib.Path(__file__).resolve().parent.parent
if (_root / "kernels" / "__init__.py").is_file() and (_root / "csrc").is_dir():
    __path__.append(str(_root))
del _pathlib, _root

from . import compat
from .advantages import group_advantages, process_advantages, whiten
from .dispatch import backends, use_backend
from .divergence import kl_divergence, linear_kl_divergence, linear_kl_estimate
from .errors import BackendError
from .fused import linear_policy_loss, linear_sft_loss
from .fused_preference import linear_preference_loss
from .info import info
from .kl import AdaptiveKLController, kl_estimate, trust_region_exceeded
from .logprobs import linear_token_logprobs, token_entropy, token_logprobs
from .losses import policy_loss
from .preference import kto_loss, preference_loss, ranked_reward_loss, reward_model_loss
from .returns import discounted_returns, gae, lambda_returns, n_step_returns, shape_rewards, vtrace
from .user_losses import token_loss
from .value import sft_loss, value_loss

__all__ = [
    "AdaptiveKLController",
    "BackendError",
    "__version__",
    "backends",
    "compat",
    "discounted_returns",
    "gae",
    "group_advantages",
    "info",
    "kl_divergence",
    "kl_estimate",
    "kto_loss",
    "lambda_returns",
    "linear_kl_divergence",
    "linear_kl_estimate",
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_sft_loss",
    "linear_token_logprobs",
    "n_step_returns",
    "policy_loss",
    "preference_loss",
    "process_advantages",
    "ranked_reward_loss",
    "reward_model_loss",
    "sft_loss",
    "shape_rewards",
    "token_entropy",
    "token_logprobs",
    "token_loss",
    "trust_region_exceeded",
    "use_backend",
    "value_loss",
    "vtrace",
    "whiten",
]
