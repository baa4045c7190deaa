"""PPO's policy, reference and value model, and what they say of answers: batched passes without logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import rl4llm_fast as rf

from .distributed import Ranks
from .layout import Layout, plain_layout, starts_of
from .model import recompute_layers
from .policy import Policy
from .ppo_config import PPOConfig
from .reward_model import RewardModel
from .sampling import Rollout
from .value_model import TwoHeads, ValueModel


class Experience:
    """One step's answers and what the models say of them: per-token tensors (N,), one answer behind the other."""

    logp: Tensor  # under the policy that drew them
    ref_logp: Tensor | None  # None: there is no reference
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def __init__(self, rollout: Rollout, device: torch.device) -> None:
        self.prompts, self.answers = rollout.prompts, rollout.answers
        self.lengths = [len(answer) for answer in self.answers]
        self.starts = starts_of(self.lengths, device)

    def kl(self) -> Tensor:
        """log π − log π_ref of each token: its mean is unbiased for KL(π‖π_ref)."""
        if self.ref_logp is None:
            return torch.zeros_like(self.logp)
        return rf.kl_estimate(self.logp, self.ref_logp, "k1")

    def part(self, values: Tensor, index: Sequence[int]) -> Tensor:
        """The tokens of the answers ``index``."""
        pieces = values.split(self.lengths)
        return torch.cat([pieces[i] for i in index])

    def layout(self, index: Sequence[int]) -> Layout:
        return plain_layout([self.prompts[i] for i in index], [self.answers[i] for i in index])


class Models:
    """The policy, its frozen copy as the reference, and the value model: one of its own, or a head on the policy."""

    value_model: ValueModel | None = None

    def __init__(self, config: PPOConfig, model: Any, reward_model: RewardModel | None, ranks: Ranks) -> None:
        self.temperature = config.temperature
        self.ranks = ranks
        autocast = config.precision == "autocast"
        self.policy = Policy(model, autocast=autocast, layout="plain")
        if self.policy.decoder is None:
            raise ValueError("model: wanted a causal language model with a decoder apart from its head")
        self.reference = self.policy.frozen_copy() if config.kl_coef > 0 else None
        self.trained: Any = model  # by the policy's optimizer
        if config.value == "shared":
            self.trained = TwoHeads(model, self.policy.decoder)
        elif reward_model is not None and config.value != "policy":
            dtype = next(model.parameters()).dtype
            self.value_model = ValueModel.of_reward_model(reward_model, dtype, autocast=autocast)
            if config.gradient_checkpointing:  # a copy of the policy does already what the policy does
                recompute_layers(self.value_model)
        else:
            self.value_model = ValueModel.of_policy(self.policy.decoder, autocast=autocast)

    def values(self, layout: Layout, hidden: Tensor) -> Tensor:
        """V (N,); ``hidden`` are the policy's hidden states (N, D), read where both share a trunk."""
        values: Tensor = self.trained.value_head(hidden) if self.value_model is None else self.value_model(layout)
        return values

    @torch.no_grad()
    def look(self, e: Experience, parts: Sequence[list[int]]) -> tuple[Tensor, Tensor | None, Tensor]:
        """log π, log π_ref and V of every token; ``parts``: this process's answers in order, one forward pass each."""
        found: list[Tensor] = []
        for part in parts:
            layout = e.layout(part).to(self.policy.device)
            with self.policy.precision():
                hidden, weight, bias = self.policy.head_inputs(layout)
                logp = self._logprobs(self.policy, layout, hidden, weight, bias)
                ref = logp
                if self.reference is not None:
                    ref = self._logprobs(self.reference, layout, *self.reference.head_inputs(layout))
            found.append(torch.stack([logp, ref, self.values(layout, hidden)]))
        logp, ref, values = self._whole(found)
        return logp, None if self.reference is None else ref, values

    @torch.no_grad()
    def logprobs(self, policy: Policy, e: Experience, parts: Sequence[list[int]]) -> Tensor:
        """log-probabilities (N,) of every token under ``policy`` as it is now; ``parts`` as in ``look``."""
        found: list[Tensor] = []
        for part in parts:
            layout = e.layout(part).to(policy.device)
            with policy.precision():
                found.append(self._logprobs(policy, layout, *policy.head_inputs(layout)))
        return self._whole(found)

    def _whole(self, own: list[Tensor]) -> Tensor:
        """This process's tokens and the others', the last dimension, in the order of the answers."""
        if self.ranks.size > 1:
            own = [tensor.to(self.policy.device) for tensor in self.ranks.gather([tensor.cpu() for tensor in own])]
        return torch.cat(own, -1)

    def supervised_loss(self, rows: Sequence[tuple[list[int], list[int]]], *, num_tokens: int) -> Tensor:
        """The share of ``rows``, prompts and answers, in the mean loss of ``num_tokens`` tokens of answers (3)."""
        layout = plain_layout([prompt for prompt, _ in rows], [answer for _, answer in rows]).to(self.policy.device)
        with self.policy.precision():
            hidden, weight, bias = self.policy.head_inputs(layout)
            return rf.linear_sft_loss(
                hidden, weight, layout.token_ids, bias, num_tokens=num_tokens, softcap=self.policy.softcap
            )

    def _logprobs(self, policy: Policy, layout: Layout, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logp = rf.linear_token_logprobs(
            hidden, weight, layout.token_ids, bias, temperature=self.temperature, softcap=policy.softcap
        )
        assert isinstance(logp, Tensor)
        return logp
