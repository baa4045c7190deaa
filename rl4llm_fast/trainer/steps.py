"""Process supervision (survey §6.3): an answer cut into steps, a reward for each, spread over the step's tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rl4llm_fast as rf

from .attempts import Attempts
from .rewards import Sample, finite
from .tasks import Example

StepReward = Callable[[Example, "list[str]"], Sequence[float]]  # (example, the texts of the steps) -> one number a step


@dataclass
class Steps:
    """The steps of one answer: the 0-based place of each one's last token, and its reward."""

    ends: list[int]
    rewards: list[float]


def cut(answer: list[int], tokenizer: Any, separator: str, end_ids: Collection[int]) -> tuple[list[int], list[str]]:
    """Where the steps of an answer end, and their texts.

    A step ends with the token that completes ``separator``; what is left behind the last one is the last step. A piece
    of white space alone belongs to the step before it (the first: to the one after), the end token to the last step.
    Tokens are read one by one, which is exact for separators of ASCII characters.
    """
    kept = answer[:-1] if answer[-1] in end_ids else answer
    breaks, text, searched = [], "", 0
    for place, token in enumerate(kept):
        text += tokenizer.decode([token], skip_special_tokens=True)
        at = text.rfind(separator, searched)
        if at >= 0:
            breaks.append(place)
            searched = at + len(separator)
    ends: list[int] = []
    texts: list[str] = []
    start = 0
    for end in dict.fromkeys([*breaks, len(kept) - 1]):
        piece = tokenizer.decode(kept[start : end + 1], skip_special_tokens=True)
        if piece.strip():
            ends.append(end)
            texts.append(piece.strip())
            start = end + 1
        elif ends:
            ends[-1] = end
            start = end + 1
    if not ends:
        return [len(answer) - 1], [""]
    ends[-1] = len(answer) - 1
    return ends, texts


def score(
    function: StepReward,
    example: Example,
    answer: list[int],
    tokenizer: Any,
    separator: str,
    end_ids: Collection[int],
    attempts: Attempts,
) -> Steps:
    """The steps of ``answer`` with what ``function`` gives them, 0 each where it raises.

    Raises:
        ValueError: not one finite number a step, naming the function and the answer.
    """
    ends, texts = cut(answer, tokenizer, separator, end_ids)
    name = getattr(function, "__name__", "step_reward")
    sample = Sample(example, texts)
    given: Any = attempts.call(name, [0.0] * len(texts), function, example, texts)
    values = list(given) if isinstance(given, Iterable) else [given]
    if len(values) != len(texts):
        raise ValueError(
            f"step reward {name!r}: wanted {len(texts)} numbers, one a step, got {len(values)} for the steps {texts!r} "
            f"of the answer to {example!r}"
        )
    return Steps(ends, [finite(name, value, sample) for value in values])


def advantages(steps: Sequence[Steps], group_size: int, backend: str) -> Tensor:
    """Advantages (B, T) of answers of up to T tokens: normalised over all steps of a group, summed over later steps."""
    width = max(len(s.ends) for s in steps)
    length = max(s.ends[-1] for s in steps) + 1
    rewards, ends = torch.zeros(len(steps), width), torch.full((len(steps), width), -1)
    for row, s in enumerate(steps):
        rewards[row, : len(s.ends)] = torch.tensor(s.rewards)
        ends[row, : len(s.ends)] = torch.tensor(s.ends)
    return rf.process_advantages(rewards, ends, group_size=group_size, length=length, backend=backend)
