"""What scores whole answers: a reward model, or a function that is named in a config."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .attempts import Attempts
from .distributed import Ranks
from .reward_model import RewardModel, load_reward_model
from .rewards import Sample, finite, name_of
from .sampling import completion_of
from .tasks import Example, Reward, prompt_token_ids

_READ = 16  # answers that a judge reads at a time


@dataclass
class Prompt:
    """An example and the token ids that it begins with."""

    example: Example
    ids: list[int]


# Prompts and answers of a step -> a score each. Of several processes each scores its share, and gets all.
Scorer = Callable[[Sequence[Prompt], Sequence[list[int]]], list[float]]


def function_scorer(function: Reward, *, tokenizer: Any, end_ids: Collection[int], ranks: Ranks) -> Scorer:
    """``function(example, completion)`` of each answer: one finite number, or an error that names both.

    What happens where it raises: see ``Attempts``.
    """
    name, attempts = name_of(function), Attempts()

    def score(prompts: Sequence[Prompt], answers: Sequence[list[int]]) -> list[float]:
        def one(i: int) -> float:
            sample = Sample(prompts[i].example, completion_of(answers[i], end_ids, tokenizer))
            return finite(name, attempts.call(name, 0.0, function, sample.example, sample.completion), sample)

        scores = ranks.map(one, range(len(answers)))
        attempts.report(ranks)
        return scores

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
        parts = [model(sequences[start : start + size]) for start in range(0, len(sequences), size)]
        scores = ranks.gather(torch.cat(parts).tolist() if parts else [])
        bad = next((i for i, value in enumerate(scores) if not math.isfinite(value)), None)
        if bad is not None:
            raise ValueError(f"reward model: wanted a finite score, got {scores[bad]} for {prompts[bad].example!r}")
        return scores

    return score


class Judge:
    """(prompt, text) -> the score of the reward model in ``folder``, which ``train rm`` wrote.

    Its scale does not matter: advantages compare answers to the same prompt. ``view`` is what it sees of a text.
    """

    def __init__(self, folder: str, device: torch.device, view: Callable[[str], str] = str) -> None:
        from transformers import AutoTokenizer

        self.model: RewardModel = load_reward_model(folder, device=device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.view = view
        self.scores: dict[tuple[str, str], float] = {}  # of the answers that were read last

    def __call__(self, prompt: str, text: str) -> float:
        if (prompt, text) not in self.scores:
            self.read([(prompt, text)])
        return self.scores[prompt, text]

    @torch.no_grad()
    def read(self, answers: Sequence[tuple[str, str]]) -> None:
        """Score prompts with their answers, ``_READ`` at a time, and keep the scores."""
        self.scores = {}
        encoded = sorted(
            ((self._encode(*answer), answer) for answer in dict.fromkeys(answers)), key=lambda pair: len(pair[0])
        )
        parts = [encoded[i : i + _READ] for i in range(0, len(encoded), _READ)]  # of about one length: little padding
        found = [self.model([ids for ids, _ in part]) for part in parts]
        if found:
            self.scores = dict(zip((answer for _, answer in encoded), torch.cat(found).tolist(), strict=True))

    def _encode(self, prompt: str, text: str) -> list[int]:
        ids = list(self.tokenizer(self.view(text), add_special_tokens=False)["input_ids"])
        end = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]
        return prompt_token_ids(prompt, self.tokenizer) + ids + end
