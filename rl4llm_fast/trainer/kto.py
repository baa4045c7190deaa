"""KTO (survey §5.3.1, (69)-(74); math.md section 7): single answers, each labelled desirable or not, without pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import rl4llm_fast as rf

from .data import Row, answer_token_ids, check_length, digest, encode_rows, field_of, prompt_of, read_rows
from .devices import to_device
from .distributed import say
from .metrics import plot_curves
from .preflight import checked
from .reference_run import ReferenceConfig, ReferenceTrainer, Texts
from .run import TrainResult


@dataclass
class KTOConfig(ReferenceConfig):
    """Everything that ``train_kto`` can be told; a row is {"prompt", "answer", "desirable"}."""

    lambda_d: float = 1.0  # weight of desirable answers
    lambda_u: float = 1.0  # of undesirable ones
    output_dir: str = "runs/kto"

    POSITIVE: ClassVar[tuple[str, ...]] = ("lambda_d", "lambda_u")

    def ops(self) -> tuple[str, ...]:
        return ("kto_loss",)


@dataclass
class Labelled:
    prompt: list[int]
    answer: list[int]
    desirable: bool
    other: list[int]  # an answer to another prompt
    reference: tuple[Tensor, ...] | None = None  # log-probabilities of both under the reference


def train_kto(
    config: KTOConfig | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    rows: Sequence[Row] | None = None,
    heldout_rows: Sequence[Row] | None = None,
) -> TrainResult:
    """Train a causal language model on labelled answers with ``rf.kto_loss``.

    The reference point z (71) of a step is max(0, the mean of β·(log π − log ref) over mismatched pairs): each prompt
    of the batch with the answer of the nearest row before it that has another prompt (of the row before where all
    prompts are one). A row keeps its mismatched answer, so the reference's part is computed once. z is the whole
    batch's, also where a batch is computed in micro-batches, and the held-out set has its own.

    Args:
        model: a built model of transformers, trained in place, and as it comes the reference; None loads
            ``config.model``. Give a run that goes on the model it began with: its weights come from the checkpoint.
        tokenizer: its tokenizer; None is fine for prompts and answers of token ids.
        rows, heldout_rows: {"prompt", "answer", "desirable"} each, text or token ids (a prompt also chat messages), and
            true or false; None reads ``config.data``.

    A warning is printed where λ_D·n_D/(λ_U·n_U) of the training rows is outside of [1, 3/2] (74). An interrupted run
    goes on from the last checkpoint in ``config.output_dir`` when it is started again.
    """
    trainer = KTOTrainer(config, model=model, tokenizer=tokenizer, rows=rows, heldout_rows=heldout_rows)
    try:
        return trainer.run()
    finally:
        trainer.optimizer.close()


class KTOTrainer(ReferenceTrainer):
    """The loop behind ``train_kto``."""

    name = "KTO"

    def __init__(
        self,
        config: KTOConfig | None = None,
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        rows: Sequence[Row] | None = None,
        heldout_rows: Sequence[Row] | None = None,
    ) -> None:
        self.config = c = checked(KTOConfig, config, model)
        parts = read_rows(c, rows, heldout_rows, lambda row: ("prompt", "answer", "desirable"))
        super().__init__(c, model, tokenizer)
        self.train, self.heldout = encode_rows(c, parts, self.encode)
        for part in (self.train, self.heldout):
            _mismatch(part, min(c.max_length, self.limits.context or c.max_length))
        self.data_key = digest(*map(asdict, self.train))
        if warning := weight_warning(self.train, c.lambda_d, c.lambda_u):
            say(warning)
        self.z = torch.zeros((), device=self.device)
        self.share = 1.0  # of the desirable among the rows that ``z`` is of
        self.set_up()

    def encode(self, row: Row) -> Labelled:
        prompt = prompt_of(row, self.tokenizer)
        answer = answer_token_ids(row, "answer", self.tokenizer)
        check_length(prompt, [answer], self.config.max_length, self.limits)
        desirable = field_of(row, "desirable")
        if not isinstance(desirable, bool):
            raise TypeError(f"desirable: wanted true or false, got {desirable!r}")
        return Labelled(prompt, answer, desirable, other=answer)

    def texts(self, rows: Sequence[Labelled]) -> Texts:
        """Every row's answer and the mismatched one."""
        return Texts(
            [row.prompt for row in rows for _ in range(2)],
            [answer for row in rows for answer in (row.answer, row.other)],
            [i for i in range(len(rows)) for _ in range(2)],
        )

    def heldout_texts(self, part: Sequence[Labelled]) -> Texts:
        return self._own(part)

    def _own(self, rows: Sequence[Labelled]) -> Texts:
        return Texts([row.prompt for row in rows], [row.answer for row in rows], list(range(len(rows))))

    def _mismatched(self, rows: Sequence[Labelled]) -> Texts:
        return Texts([row.prompt for row in rows], [row.other for row in rows], list(range(len(rows))))

    @torch.no_grad()
    def before_rows(self, rows: Sequence[Labelled]) -> None:
        """z of ``rows``, and how many of them are desirable."""
        size = self.config.micro_batch_size or self.config.batch_size
        ranks = self.evaluators if rows is self.heldout else self.ranks  # under fsdp forwards must be as many
        own = ranks.share(rows)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self.chosen_backend():
            for start in range(0, len(own), size):
                part = own[start : start + size]
                texts = self._mismatched(part)
                reference = self.reference_logprobs(texts, [row.reference[1] for row in part if row.reference])
                total += (self.logprobs(texts, measured=False) - reference).double().sum()
        z = max(0.0, self.config.beta * ranks.sum(total) / max(len(rows), 1))
        self.z = to_device(torch.tensor(z), self.device)
        self.share = sum(row.desirable for row in rows) / max(len(rows), 1)

    def loss(self, rows: Sequence[Labelled]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of ``rows``, some of those that ``before_rows`` saw, and their part of its metrics."""
        c, texts = self.config, self._own(rows)
        desirable = to_device(torch.tensor([row.desirable for row in rows]), self.device)
        with self.chosen_backend():
            reference = self.reference_logprobs(texts, [row.reference[0] for row in rows if row.reference])
            logp = self.logprobs(texts)
            lengths = [len(row.answer) for row in rows]
            padded, ref = (nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True) for x in (logp, reference))
            live = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
            options = {"beta": c.beta, "kl": self.z, "lambda_d": c.lambda_d, "lambda_u": c.lambda_u}
            loss, found = rf.kto_loss(padded, ref, desirable, mask=to_device(live, self.device), **options)
        # Means over the desirable and over the others: weighted so that the parts' means over rows are the batch's.
        share = desirable.float().mean()
        chosen = found["reward_chosen"] * share / self.share if self.share else torch.zeros_like(loss)
        rejected = found["reward_rejected"] * (1 - share) / (1 - self.share) if self.share < 1 else chosen * 0
        ratio = _ratio(self.share, c.lambda_d, c.lambda_u)
        return loss, {
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "margin": chosen - rejected,
            "accuracy": found["accuracy"],
            "z": self.z,
            "weight_ratio": torch.full_like(chosen, ratio),
        }

    def brief(self, row: dict[str, Any]) -> str:
        return f"loss {row['loss']:.3f}  margin {row['margin']:.2f}"

    def plot(self, rows: list[dict[str, Any]], folder: Path) -> None:
        panels = {
            "loss": {"loss": "batch", "heldout_loss": "held out"},
            "reward": {"heldout_reward_chosen": "desirable", "heldout_reward_rejected": "undesirable"},
            "margin": {"margin": "batch", "heldout_margin": "held out"},
            "accuracy": {"accuracy": "batch", "heldout_accuracy": "held out"},
            "reference point z": {"z": "batch", "heldout_z": "held out"},
            "KL to the first model": {"heldout_kl": "a held-out token"},
        }
        plot_curves(rows, folder / "kto.png", "KTO on labelled answers", panels)


def weight_warning(rows: Sequence[Labelled], lambda_d: float, lambda_u: float) -> str:
    """What to tell the user where λ_D·n_D/(λ_U·n_U) is outside of [1, 3/2] (74); "" where it is inside."""
    good = sum(row.desirable for row in rows)
    bad = len(rows) - good
    if not good or not bad:
        return f"kto: all {len(rows)} answers are {'' if good else 'un'}desirable: there is nothing to tell apart"
    ratio = _ratio(good / len(rows), lambda_d, lambda_u)
    if 1 - 1e-9 <= ratio <= 1.5 + 1e-9:
        return ""
    least, most = lambda_u * bad / good, 1.5 * lambda_u * bad / good
    return (
        f"kto: lambda_d * {good} desirable / (lambda_u * {bad} undesirable) = {ratio:.3g}, outside of [1, 1.5] (74); "
        f"lambda_d between {least:.3g} and {most:.3g} would put it inside"
    )


def _ratio(share: float, lambda_d: float, lambda_u: float) -> float:
    return lambda_d * share / (lambda_u * (1 - share)) if share < 1 else math.inf


def _mismatch(rows: Sequence[Labelled], max_length: int) -> None:
    """Give each row the answer of the nearest row before it, in a circle, whose prompt is another."""
    nearest: list[int] = [-1] * len(rows)
    for lap in range(2 * len(rows)):  # the second time round it is known what stands before the first row
        here, before = lap % len(rows), (lap - 1) % len(rows)
        nearest[here] = before if rows[before].prompt != rows[here].prompt else nearest[before]
    for i, row in enumerate(rows):
        other = rows[nearest[i] if nearest[i] >= 0 else i - 1].answer
        row.other = other[: max_length - len(row.prompt)]
