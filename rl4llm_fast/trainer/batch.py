"""One step's sampled answers, scored, and what of them a loss takes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .devices import to_device
from .sampling import Rollout, completion_of

PerAnswer: TypeAlias = "list[Tensor] | None"  # one tensor an answer, as long as the answer


@dataclass
class Batch:
    """One step's answers with their scores."""

    rollout: Rollout
    rewards: list[float]
    advantages: Tensor  # (B,) fp32, CPU; (B, T) under process supervision
    groups: list[int] | None = None  # that are learned from; None: all
    traces: list[dict[str, float]] = field(default_factory=list)  # what each rule gave to each answer
    measures: dict[str, float] = field(default_factory=dict)  # more for the step's row

    def advantages_of(self, index: list[int]) -> Tensor:
        """What rf.policy_loss takes for these answers: one number each, or packed one a token."""
        if self.advantages.dim() == 1:
            return self.advantages[index]
        return torch.cat([self.advantages[i, : len(self.rollout.answers[i])] for i in index])

    def samples(self, count: int, tokenizer: Any, end_ids: Collection[int]) -> list[dict[str, Any]]:
        """The first ``count`` answers, with what each rule gave to them, to be read."""
        r = self.rollout
        prompts = [prompt if tokenizer is None else tokenizer.decode(prompt) for prompt in r.prompts]
        return [
            {
                "prompt": prompts[i // r.group_size],
                "completion": completion_of(answer, end_ids, tokenizer),
                "tokens": len(answer),
                "ended": r.ended[i],
                "reward": self.rewards[i],
                "rules": self.traces[i],
            }
            for i, answer in enumerate(r.answers[:count])
        ]

    def is_live(self) -> Tensor:
        """(B,) whether an answer has any advantage."""
        return self.advantages.flatten(1).ne(0).any(1) if self.advantages.dim() > 1 else self.advantages.ne(0)


def packed(values: PerAnswer, index: list[int], device: torch.device) -> Tensor | None:
    """Per-answer tensors, the chosen ones, one behind the other."""
    return None if values is None else to_device(torch.cat([values[i] for i in index]), device)


def joined(one: Rollout, other: Rollout) -> Rollout:
    """The answers of both, those of ``one`` first."""
    return Rollout(
        one.prompts + other.prompts, one.group_size, one.answers + other.answers, one.logprobs + other.logprobs,
        one.ended + other.ended,
    )  # fmt: skip
