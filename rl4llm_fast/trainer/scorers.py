"""What scores whole answers: a reward model, or a function that is named in a config."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .distributed import Ranks, say
from .reward_model import RewardModel
from .rewards import Sample, finite
from .sampling import completion_of
from .tasks import Example, Reward


@dataclass
class Prompt:
    """An example and the token ids that it begins with."""

    example: Example
    ids: list[int]


# Prompts and answers of a step -> a score each. Of several processes each scores its share, and gets all.
Scorer = Callable[[Sequence[Prompt], Sequence[list[int]]], list[float]]


def function_scorer(function: Reward, *, tokenizer: Any, end_ids: Collection[int], ranks: Ranks) -> Scorer:
    """``function(example, completion)`` of each answer: one finite number, or an error that names both.

    An answer on which it raises scores 0 and is reported, unless it raises on all of them.
    """
    name = name_of(function)

    def score(prompts: Sequence[Prompt], answers: Sequence[list[int]]) -> list[float]:
        raised: list[Exception] = []

        def one(i: int) -> tuple[float, str]:
            sample = Sample(prompts[i].example, completion_of(answers[i], end_ids, tokenizer))
            try:
                value = function(sample.example, sample.completion)
            except Exception as error:
                raised.append(error)
                return 0.0, repr(error)
            return finite(name, value, sample), ""

        found = ranks.map(one, range(len(answers)))
        failures = [error for _, error in found if error]
        if failures and len(failures) == len(found):
            cause = raised[0] if raised else None
            raise ValueError(f"reward {name!r}: raised on every answer: {failures[0]}") from cause
        if failures:
            say(f"reward {name!r}: raised on {len(failures)} of {len(found)} answers, which score 0: {failures[0]}")
        return [value for value, _ in found]

    return score


def model_scorer(model: RewardModel, batch_size: int, *, vocabulary: int, ranks: Ranks) -> Scorer:
    """The reward model's scores of prompts with their answers, ``batch_size`` at a time; 0: all.

    Raises:
        ValueError: its vocabulary has another size than the policy's, whose token ids it would misread.
    """
    own = model.decoder.config.get_text_config().vocab_size
    if own != vocabulary:
        raise ValueError(f"reward_model: wanted the policy's vocabulary of {vocabulary} tokens, got {own}")

    @torch.no_grad()
    def score(prompts: Sequence[Prompt], answers: Sequence[list[int]]) -> list[float]:
        sequences = ranks.share([p.ids + answer for p, answer in zip(prompts, answers, strict=True)])
        size = batch_size or max(len(sequences), 1)
        own: list[float] = []
        for start in range(0, len(sequences), size):
            own += model(sequences[start : start + size]).tolist()
        scores = ranks.gather(own)
        bad = next((i for i, value in enumerate(scores) if not math.isfinite(value)), None)
        if bad is not None:
            raise ValueError(f"reward model: wanted a finite score, got {scores[bad]} for {prompts[bad].example!r}")
        return scores

    return score


def name_of(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
