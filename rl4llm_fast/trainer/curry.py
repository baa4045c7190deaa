"""Curry-DPO (survey §5.3.4, (80); Pattnaik et al. 2024): ranked answers as pairs, easy ones first, in rounds of DPO."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from .data import Parts, Row, check_length, digest, encode_rows, prompt_of, ranked_answers
from .dpo import DPOConfig, DPOTrainer, Pair
from .preflight import config_of
from .run import TrainResult
from .tasks import examples_of_step


@dataclass
class CurryConfig(DPOConfig):
    """Everything that ``train_curry`` can be told; a row is {"prompt", "answers", "ranks"}."""

    pairs: str = "best"  # best: the best answers against each other one | all: every answer against every worse one
    rounds: int = 0  # the gaps between ranks are dealt out to as many rounds, the widest first; 0: one round a gap
    steps_per_round: int = 20
    steps: int = 0  # where to stop; 0: behind the last round
    output_dir: str = "runs/curry"

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "loss": ("dpo", "robust", "ipo", "hinge"),
        "reference": ("precomputed",),
        "pairs": ("best", "all"),
    }
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = ("rounds",)
    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = ("steps_per_round",)


@dataclass
class Ranking:
    prompt: list[int]
    answers: list[list[int]]
    ranks: list[int]  # 0 is best

    def pairs(self, which: str) -> list[tuple[int, Pair]]:
        """The gap between the ranks of each pair, and the pair."""
        best = min(self.ranks)
        return [
            (worse - better, Pair(self.prompt, self.answers[i], self.answers[j]))
            for i, better in enumerate(self.ranks)
            for j, worse in enumerate(self.ranks)
            if worse > better and (which == "all" or better == best)
        ]


def train_curry(
    config: CurryConfig | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    rows: Sequence[Row] | None = None,
    heldout_rows: Sequence[Row] | None = None,
) -> TrainResult:
    r"""Train a causal language model on ranked answers: rounds of ``train_dpo``, from the widest rank gap down.

    The reference of a round is the policy that the round before it left (80); the first one's is the model as it came.
    Optimiser, learning rate schedule and seed go on through all rounds. Held-out measures are against the model as it
    came throughout, so that those of different rounds compare.

    Args:
        model: a built model of transformers, trained in place; None loads ``config.model``. Give a run that goes on the
            model it began with: its weights come from the checkpoint.
        tokenizer: its tokenizer; None is fine for prompts and answers of token ids.
        rows, heldout_rows: {"prompt", "answers", "ranks"}: K answers, text or token ids, and an integer each, 0 the
            best; equal ranks make no pair. None reads ``config.data``.

    An interrupted run goes on from the last checkpoint in ``config.output_dir`` when it is started again, also inside
    of a round: the checkpoint holds the round's reference log-probabilities.
    """
    trainer = CurryTrainer(config, model=model, tokenizer=tokenizer, rows=rows, heldout_rows=heldout_rows)
    try:
        return trainer.run()
    finally:
        trainer.optimizer.close()


class CurryTrainer(DPOTrainer):
    """The loop behind ``train_curry``."""

    name = "Curry-DPO"
    can_shard = False  # each round's reference is computed by shares, whose forward passes are not as many everywhere
    file = "curry"
    fields = ("prompt", "answers", "ranks")
    config: CurryConfig
    rounds: list[list[Pair]]
    round = 0

    def __init__(self, config: CurryConfig | None = None, **given: Any) -> None:
        super().__init__(config_of(CurryConfig, config), **given)

    def encode_parts(self, parts: Parts) -> None:
        c = self.config
        train, heldout = encode_rows(c, parts, self.encode_ranking)
        self.data_key = digest(*map(asdict, train))
        self.rounds = in_rounds([pair for ranking in train for pair in ranking.pairs(c.pairs)], c.rounds)
        self.train = [pair for part in self.rounds for pair in part]
        self.heldout = [pair for ranking in heldout for _, pair in ranking.pairs(c.pairs)]
        whole = len(self.rounds) * c.steps_per_round
        c.wanted(c.steps <= whole, "steps", f"at most {len(self.rounds)} rounds of {c.steps_per_round} steps")
        self.config = self.run_config = dataclasses.replace(c, steps=c.steps or whole)

    def encode_ranking(self, row: Row) -> Ranking:
        prompt = prompt_of(row, self.tokenizer)
        answers, ranks = ranked_answers(row, self.tokenizer)
        check_length(prompt, answers, self.config.max_length, self.limits)
        return Ranking(prompt, answers, ranks)

    def round_of(self, step: int) -> int:
        return (step - 1) // self.config.steps_per_round

    def batch(self, step: int) -> list[Pair]:
        c, number = self.config, self.round_of(step)
        return examples_of_step(self.rounds[number], step - number * c.steps_per_round, c.batch_size, c.seed)

    def drawn(self) -> list[Pair]:
        """The pairs that the steps of this round read, in the order of the data."""
        first = self.round * self.config.steps_per_round + 1
        ids = {id(pair) for step in range(first, first + self.config.steps_per_round) for pair in self.batch(step)}
        return [pair for pair in self.rounds[self.round] if id(pair) in ids]

    def step(self, step: int) -> dict[str, Any]:
        if self.round_of(step) != self.round:
            self.round = self.round_of(step)
            self.precompute(self.drawn())  # under the policy as the last round left it
        return {**super().step(step), "round": self.round + 1}

    def state(self) -> dict[str, Any]:
        kept = [logp for pair in self.drawn() for logp in pair.reference or ()]
        return {"policy": super().state(), "round": self.round, "reference": torch.cat(kept)}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state["policy"])
        self.round = state["round"]
        pairs = self.drawn()
        found = state["reference"].split([len(answer) for pair in pairs for answer in (pair.chosen, pair.rejected)])
        for i, pair in enumerate(pairs):
            pair.reference = (found[2 * i], found[2 * i + 1])

    def brief(self, row: dict[str, Any]) -> str:
        return f"round {row['round']}/{len(self.rounds)}  {super().brief(row)}"


def in_rounds(pairs: Sequence[tuple[int, Pair]], rounds: int) -> list[list[Pair]]:
    """Pairs from the widest gap to the narrowest: a round for each gap, or the gaps dealt out to ``rounds`` of them.

    Raises:
        ValueError: fewer gaps than rounds.
    """
    gaps = sorted({gap for gap, _ in pairs}, reverse=True)
    if rounds > len(gaps):
        raise ValueError(f"config: rounds: wanted at most {len(gaps)}, as many as there are rank gaps, got {rounds}")
    return [
        [pair for gap in part.tolist() for own, pair in pairs if own == gap]
        for part in np.array_split(np.asarray(gaps), rounds or len(gaps))
    ]
