"""What scores whole answers: a reward model, or a function that is named in a config."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .reward_model import RewardModel
from .rewards import Sample, finite
from .sampling import completion_of
from .tasks import Example, Reward


@dataclass
class Prompt:
    """An example and the token ids that it begins with."""

    example: Example
    ids: list[int]


Scorer = Callable[[Sequence[Prompt], Sequence[list[int]]], list[float]]  # prompts and answers -> a score each


def function_scorer(function: Reward, *, tokenizer: Any, end_ids: Collection[int]) -> Scorer:
    """``function(example, completion)`` of each answer: one finite number, or an error that names both.

    An answer on which it raises scores 0 and is reported, unless it raises on all of them.
    """
    name = name_of(function)

    def score(prompts: Sequence[Prompt], answers: Sequence[list[int]]) -> list[float]:
        scores: list[float] = []
        failures: list[Exception] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            sample = Sample(prompt.example, completion_of(answer, end_ids, tokenizer))
            try:
                value = function(sample.example, sample.completion)
            except Exception as error:
                failures.append(error)
                value = 0.0
            scores.append(finite(name, value, sample))
        if failures and len(failures) == len(answers):
            raise ValueError(f"reward {name!r}: raised on every answer: {failures[0]!r}") from failures[0]
        if failures:
            print(
                f"reward {name!r}: raised on {len(failures)} of {len(answers)} answers, which score 0: {failures[0]!r}"
            )
        return scores

    return score


def model_scorer(model: RewardModel, batch_size: int, *, vocabulary: int) -> Scorer:
    """The reward model's scores of prompts with their answers, ``batch_size`` at a time; 0: all.

    Raises:
        ValueError: its vocabulary has another size than the policy's, whose token ids it would misread.
    """
    own = model.decoder.config.get_text_config().vocab_size
    if own != vocabulary:
        raise ValueError(f"reward_model: wanted the policy's vocabulary of {vocabulary} tokens, got {own}")

    @torch.no_grad()
    def score(prompts: Sequence[Prompt], answers: Sequence[list[int]]) -> list[float]:
        sequences = [prompt.ids + answer for prompt, answer in zip(prompts, answers, strict=True)]
        size = batch_size or max(len(sequences), 1)
        scores: list[float] = []
        for start in range(0, len(sequences), size):
            scores += model(sequences[start : start + size]).tolist()
        bad = next((i for i, value in enumerate(scores) if not math.isfinite(value)), None)
        if bad is not None:
            raise ValueError(f"reward model: wanted a finite score, got {scores[bad]} for {prompts[bad].example!r}")
        return scores

    return score


def name_of(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
