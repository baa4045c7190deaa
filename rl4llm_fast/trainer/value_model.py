"""The critic V(s_t) of PPO: a scalar read at every token, from a decoder of its own or from the policy's."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn

from .layout import Layout
from .reward_model import RewardModel


class ValueHead(nn.Module):
    """V = w·h + b in fp32, h the hidden state that predicts the next token.

    Zeros unless given: V = 0 is then the first baseline, in place of noise.
    """

    def __init__(self, weight: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.bias = nn.Parameter(torch.tensor(bias, device=weight.device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (N,) of hidden states (N, D)."""
        values: Tensor = hidden.float() @ self.weight + self.bias
        return values


class ValueModel(nn.Module):
    """A decoder with a ``ValueHead`` at every token (survey §3.5.1)."""

    def __init__(self, decoder: Any, head: ValueHead, *, autocast: bool = False) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = head
        self.autocast = autocast

    @classmethod
    def of_reward_model(cls, model: RewardModel, dtype: torch.dtype, *, autocast: bool = False) -> ValueModel:
        """A copy of a reward model, score head and bias included: InstructGPT's initialisation."""
        decoder = copy.deepcopy(model.decoder).to(dtype).requires_grad_(True)
        return cls(decoder, ValueHead(model.weight, float(model.bias)), autocast=autocast)

    @classmethod
    def of_policy(cls, decoder: Any, *, autocast: bool = False) -> ValueModel:
        """A copy of a policy's decoder, its values 0 to begin with."""
        return cls(copy.deepcopy(decoder), ValueHead(_zeros_like_hidden(decoder)), autocast=autocast)

    def forward(self, layout: Layout) -> Tensor:
        """V (N,) of the states in which the layout's tokens (one row an answer) were chosen."""
        ids = layout.input_ids
        precision: Any = torch.autocast(ids.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()
        with precision:
            positions = layout.position_ids.expand_as(ids)
            hidden = self.decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        values: Tensor = self.head(hidden.flatten(0, 1)[layout.source])
        return values


class TwoHeads(nn.Module):
    """A policy and a value head on the same trunk (survey (33)), as one model for one optimizer."""

    def __init__(self, policy: Any, decoder: Any) -> None:
        super().__init__()
        self.policy = policy
        self.value_head = ValueHead(_zeros_like_hidden(decoder))


def _zeros_like_hidden(decoder: Any) -> Tensor:
    width = decoder.config.get_text_config().hidden_size
    return torch.zeros(width, device=next(decoder.parameters()).device)
