"""A reward model (survey §4.1.3, (13), (38)): a scalar head on the last token, learned from pairs or ranked answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import rl4llm_fast as rf

from .data import (
    DataConfig,
    Row,
    answer_token_ids,
    check_length,
    digest,
    encode_rows,
    prompt_of,
    ranked_answers,
    read_rows,
)
from .devices import to_device
from .metrics import plot_curves
from .preflight import check_backend, checked, device_of
from .reward_model import RewardModel
from .run import MeanLossTrainer, TrainResult


@dataclass
class RMConfig(DataConfig):
    """Everything that ``train_rm`` can be told; a row is {"prompt", "chosen", "rejected"}, or ranked answers."""

    margin: float = 0.0  # by how much the better of two answers should exceed the worse
    anchors: int = 256  # best answers of training rows whose mean score is made 0 at the end; 0: no shift
    output_dir: str = "runs/rm"

    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = ("margin", "anchors")


@dataclass
class Ranking:
    prompt: list[int]
    answers: list[list[int]]
    ranks: list[int]  # 0 is best

    def best(self) -> list[int]:
        return self.answers[self.ranks.index(min(self.ranks))]


def train_rm(
    config: RMConfig | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    rows: Sequence[Row] | None = None,
    heldout_rows: Sequence[Row] | None = None,
) -> TrainResult:
    """Train a reward model; ``result.model`` is a ``RewardModel``, saved so that ``load_reward_model`` takes it.

    Args:
        model: a built causal language model of transformers, whose decoder is trained in place, or a ``RewardModel``;
            None loads ``config.model``.
        tokenizer: its tokenizer; None is fine for prompts and answers of token ids.
        rows, heldout_rows: {"prompt", "chosen", "rejected"}, or {"prompt", "answers", "ranks"} with K answers and one
            integer each, 0 the best and equal ones no pair; text or token ids; None reads ``config.data``.

    An interrupted run goes on from the last checkpoint in ``config.output_dir`` when it is started again.
    """
    trainer = RMTrainer(config, model=model, tokenizer=tokenizer, rows=rows, heldout_rows=heldout_rows)
    try:
        return trainer.run()
    finally:
        trainer.optimizer.close()


class RMTrainer(MeanLossTrainer):
    """The loop behind ``train_rm``."""

    name = "RM"

    def __init__(
        self,
        config: RMConfig | None = None,
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        rows: Sequence[Row] | None = None,
        heldout_rows: Sequence[Row] | None = None,
    ) -> None:
        self.config = c = checked(RMConfig, config, model)
        parts = read_rows(c, rows, heldout_rows, _fields)
        if not any("answers" in _fields(row) for _, row in parts[0].numbered):  # else a step may have no pair
            check_backend(c, device_of(c, model), "reward_model_loss")
        super().__init__(c, model, tokenizer)
        self.train, self.heldout = encode_rows(c, parts, self.encode)
        self.data_key = digest(*map(asdict, self.train))
        if not isinstance(self.model, RewardModel):
            self.model = RewardModel.of(self.model, seed=c.seed)
        self.model.autocast = c.precision == "autocast"
        self.optimizer = self.make_optimizer(self.model)

    def encode(self, row: Row) -> Ranking:
        prompt = prompt_of(row, self.tokenizer)
        if "answers" in row:
            answers, ranks = ranked_answers(row, self.tokenizer)
            if self.config.margin and len(answers) > 2:
                raise ValueError(f"margin: for pairs; this row has {len(answers)} answers")
        else:
            answers, ranks = [answer_token_ids(row, name, self.tokenizer) for name in ("chosen", "rejected")], [0, 1]
            if answers[0] == answers[1]:
                raise ValueError("chosen, rejected: the same answer")
        check_length(prompt, answers, self.config.max_length, self.limits)
        return Ranking(prompt, answers, ranks)

    def loss(self, rankings: Sequence[Ranking]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of ``rankings``; the mean share of a row's pairs in the right order, and the mean score."""
        sequences = [ranking.prompt + answer for ranking in rankings for answer in ranking.answers]
        prompt_ids = to_device(torch.tensor([i for i, r in enumerate(rankings) for _ in r.answers]), self.device)
        ranks = to_device(torch.tensor([rank for r in rankings for rank in r.ranks]), self.device)
        scores = self.model(sequences)
        self.phases.mark("forward")
        with self.chosen_backend():
            if all(len(r.answers) == 2 for r in rankings):
                pairs = torch.tensor([2 * i + place for i, r in enumerate(rankings) for place in _order(r)])
                better, worse = scores[to_device(pairs, self.device)].unflatten(0, (-1, 2)).unbind(1)
                loss = rf.reward_model_loss(better, worse, margin=self.config.margin or None)
            else:
                loss = rf.ranked_reward_loss(scores, ranks, prompt_ids)
        with torch.no_grad():
            pair = (prompt_ids[:, None] == prompt_ids) & (ranks[:, None] < ranks)
            right = (pair & (scores[:, None] > scores)).sum(1).float()
            counts = [
                part.new_zeros(len(rankings)).index_add(0, prompt_ids, part) for part in (right, pair.sum(1).float())
            ]
        return loss, {"accuracy": (counts[0] / counts[1]).mean(), "score": scores.detach().mean()}

    @torch.no_grad()
    def finish(self) -> None:
        """Shift the scores so that the anchors' mean is 0 (survey §4.1.5): the loss does not see such a shift."""
        anchors = [ranking.prompt + ranking.best() for ranking in self.train[: self.config.anchors]]
        if anchors:
            size = self.config.micro_batch_size or self.config.batch_size
            parts = [self.model(anchors[i : i + size]) for i in range(0, len(anchors), size)]
            self.model.bias -= torch.cat(parts).mean()

    def brief(self, row: dict[str, Any]) -> str:
        return f"loss {row['loss']:.3f}  accuracy {row['accuracy']:.2f}"

    def plot(self, rows: list[dict[str, Any]], folder: Path) -> None:
        panels = {
            "loss": {"loss": "batch", "heldout_loss": "held out"},
            "accuracy of pairs": {"accuracy": "batch", "heldout_accuracy": "held out"},
        }
        plot_curves(rows, folder / "rm.png", "Reward model", panels)


def _fields(row: Any) -> tuple[str, ...]:
    """What a row must have."""
    ranked = isinstance(row, dict) and "answers" in row
    return ("prompt", "answers", "ranks") if ranked else ("prompt", "chosen", "rejected")


def _order(ranking: Ranking) -> tuple[int, int]:
    """The places of the better and the worse of two answers."""
    return (0, 1) if ranking.ranks[0] < ranking.ranks[1] else (1, 0)
