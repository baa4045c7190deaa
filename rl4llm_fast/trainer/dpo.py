"""DPO and its family (survey §5; math.md section 7): pairs of answers, the better one made likelier than the worse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import rl4llm_fast as rf

from .data import Parts, Row, answer_token_ids, check_length, digest, encode_rows, prompt_of, read_rows
from .devices import to_device
from .layout import starts_of
from .metrics import plot_curves
from .preflight import check_loss, checked
from .reference_run import ReferenceConfig, ReferenceTrainer, Texts
from .run import TrainResult
from .two_dimensional import Segmenter, Segments, segment_metrics, segment_tensors

_WITHOUT_REFERENCE = ("cpo", "simpo", "orpo")


@dataclass
class DPOConfig(ReferenceConfig):
    """Everything that ``train_dpo`` can be told; a row is {"prompt", "chosen", "rejected"}, and maybe "prob"."""

    loss: str = "dpo"  # a kind of rf.preference_loss
    loss_options: dict[str, Any] = field(default_factory=dict)  # the kind's knobs, e.g. label_smoothing = 0.1
    average: bool = False  # means over an answer's tokens in place of sums
    segment_scores: str = "row"  # 2d_dpo: of the row | a file .jsonl | package.module.function; see two_dimensional.py
    aspect_weights: list[Any] = field(default_factory=list)  # 2d_dpo: one number an aspect; empty: their mean
    score_max: float = 0.0  # 2d_dpo, > 0: scores are how good a segment is; a rejected one weighs score_max − score
    output_dir: str = "runs/dpo"

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "loss": ("dpo", "robust", "ipo", "hinge", "cpo", "simpo", "orpo", "2d_dpo"),
    }
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = ("score_max",)

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.over_all_tokens
        self.wanted(not whole or self.micro_batch_size == 0, "micro_batch_size", f"0 for {self.loss} over tokens")
        numbers = all(isinstance(w, (int, float)) and not isinstance(w, bool) for w in self.aspect_weights)
        self.wanted(numbers and all(map(math.isfinite, self.aspect_weights)), "aspect_weights", "numbers")
        if self.loss == "2d_dpo":
            self.wanted(not self.average, "average", "false for 2d_dpo, whose segments are sums")
            self.wanted(not self.loss_options, "loss_options", "none for 2d_dpo, whose segments are data")
        else:
            self.wanted(self.segment_scores == "row", "segment_scores", f"'row' for {self.loss}, which has no segments")
            self.wanted(not self.aspect_weights, "aspect_weights", f"none for {self.loss}, which has no segments")
            self.wanted(self.score_max == 0, "score_max", f"0 for {self.loss}, which has no segments")

    def ops(self) -> tuple[str, ...]:
        return ("preference_loss",)

    @property
    def over_all_tokens(self) -> bool:
        """Whether the likelihood term is a mean over the tokens of the whole batch, which its parts do not know."""
        return self.loss == "orpo" or (self.loss == "cpo" and self.loss_options.get("nll") == "token")


@dataclass
class Pair:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    prob: float | None = None  # that the chosen answer is preferred, where it is known
    segments: tuple[Segments, Segments] | None = None  # of both answers, for 2d_dpo
    reference: tuple[Tensor, ...] | None = None  # log-probabilities of both answers' tokens under the reference


def train_dpo(
    config: DPOConfig | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    rows: Sequence[Row] | None = None,
    heldout_rows: Sequence[Row] | None = None,
) -> TrainResult:
    """Train a causal language model on pairs of answers with any pair loss of ``rf.preference_loss``.

    Args:
        model: a built model of transformers, trained in place, and as it comes the reference; None loads
            ``config.model``. Give a run that goes on the model it began with: its weights come from the checkpoint.
        tokenizer: its tokenizer; None is fine for prompts and answers of token ids.
        rows, heldout_rows: {"prompt", "chosen", "rejected"} each, text or token ids (a prompt also chat messages), and
            for dpo and ipo "prob" in [0, 1], in all rows or none; None reads ``config.data``. For 2d_dpo the answers
            have segments and scores, which ``two_dimensional.py`` describes.

    An interrupted run goes on from the last checkpoint in ``config.output_dir`` when it is started again.
    """
    trainer = DPOTrainer(config, model=model, tokenizer=tokenizer, rows=rows, heldout_rows=heldout_rows)
    try:
        return trainer.run()
    finally:
        trainer.optimizer.close()


class DPOTrainer(ReferenceTrainer):
    """The loop behind ``train_dpo``."""

    name = "DPO"
    file = "dpo"
    fields: tuple[str, ...] = ("prompt", "chosen", "rejected")  # of a row

    def __init__(
        self,
        config: DPOConfig | None = None,
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        rows: Sequence[Row] | None = None,
        heldout_rows: Sequence[Row] | None = None,
    ) -> None:
        self.config = c = checked(DPOConfig, config, model)
        self.with_reference = c.loss not in _WITHOUT_REFERENCE
        one, segment = torch.zeros(2), Segments([[0, 1]], [1.0])
        pair = Pair([0], [0], [0], segments=(segment, segment))
        check_loss(c, lambda: self._pair_loss([pair], one, one if self.with_reference else None))
        parts = read_rows(c, rows, heldout_rows, lambda row: self.fields)
        if c.loss == "2d_dpo":
            self.segmenter = Segmenter(tokenizer, c.segment_scores, c.aspect_weights, c.score_max)
        super().__init__(c, model, tokenizer)
        c.wanted(self.ranks.size == 1 or not c.over_all_tokens, "loss", "a mean over pairs, with several processes")
        if c.loss == "2d_dpo":
            self.segmenter.tokenizer = self.tokenizer
        self.encode_parts(parts)
        self.set_up(with_reference=self.with_reference)

    def encode_parts(self, parts: Parts) -> None:
        """Fill ``train``, ``heldout`` and ``data_key``."""
        self.train, self.heldout = encode_rows(self.config, parts, self.encode)
        self.data_key = digest(*map(asdict, self.train))
        known = {pair.prob is not None for pair in self.train + self.heldout}
        if len(known) > 1:
            raise ValueError("prob: wanted in all rows or in none")

    def texts(self, rows: Sequence[Pair]) -> Texts:
        """Both answers of every pair, neighbours."""
        return Texts(
            [pair.prompt for pair in rows for _ in range(2)],
            [answer for pair in rows for answer in (pair.chosen, pair.rejected)],
            [i for i in range(len(rows)) for _ in range(2)],
        )

    def encode(self, row: Row) -> Pair:
        prompt = prompt_of(row, self.tokenizer)
        segments: tuple[Segments, Segments] | None = None
        if self.config.loss == "2d_dpo":
            (chosen, first), (rejected, second) = (self.segmenter.read(row, name) for name in ("chosen", "rejected"))
            segments = (first, second)
        else:
            chosen, rejected = (answer_token_ids(row, name, self.tokenizer) for name in ("chosen", "rejected"))
        check_length(prompt, [chosen, rejected], self.config.max_length, self.limits)
        if chosen == rejected:
            raise ValueError("chosen, rejected: the same answer")
        prob = row.get("prob")
        if prob is not None:
            if self.config.loss not in ("dpo", "ipo"):
                raise ValueError(f"prob: {self.config.loss} has none, only dpo and ipo have")
            if isinstance(prob, bool) or not isinstance(prob, (int, float)) or not 0 <= prob <= 1:
                raise ValueError(f"prob: wanted a number in [0, 1], got {prob!r}")
        return Pair(prompt, chosen, rejected, prob, segments)

    def loss(self, pairs: Sequence[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of ``pairs``, and the metrics of ``rf.preference_loss``."""
        texts = self.texts(pairs)
        reference: Tensor | None = None
        with self.chosen_backend():
            if self.with_reference:
                reference = self.reference_logprobs(texts, [logp for pair in pairs for logp in pair.reference or ()])
            logp = self.logprobs(texts)
            return self._pair_loss(pairs, logp, reference)

    def _pair_loss(
        self, pairs: Sequence[Pair], logp: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``rf.preference_loss`` of log-probabilities (N,): pair after pair, the chosen answer before the rejected."""
        c, device = self.config, logp.device
        lengths = [len(answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
        first, second = _split(logp, lengths)
        ref_first, ref_second = (None, None) if reference is None else _split(reference, lengths)
        starts = [starts_of(part, device) for part in (lengths[::2], lengths[1::2])]
        options = dict(c.loss_options)
        if prob := [pair.prob for pair in pairs if pair.prob is not None]:
            options["prob"] = to_device(torch.tensor(prob), device)
        if c.loss == "2d_dpo":
            given = segment_tensors([pair.segments for pair in pairs if pair.segments is not None], device)
            (segments, weights), (other_segments, other_weights) = given
            options |= {"segments_chosen": segments, "segments_rejected": other_segments}
            options |= {"weights_chosen": weights, "weights_rejected": other_weights}
        loss, metrics = rf.preference_loss(
            first, second, ref_first, ref_second, kind=c.loss, beta=c.beta, average=c.average,
            cu_seqlens_chosen=starts[0], cu_seqlens_rejected=starts[1], **options,
        )  # fmt: skip
        if c.loss == "2d_dpo" and ref_first is not None and ref_second is not None:
            sides = ((first, ref_first, starts[0]), (second, ref_second, starts[1]))
            metrics |= segment_metrics(c.beta, sides, given)
        return loss, metrics

    def brief(self, row: dict[str, Any]) -> str:
        return f"loss {row['loss']:.3f}  margin {row['margin']:.2f}"

    def plot(self, rows: list[dict[str, Any]], folder: Path) -> None:
        panels = {
            "loss": {"loss": "batch", "heldout_loss": "held out"},
            "reward": {"heldout_reward_chosen": "chosen", "heldout_reward_rejected": "rejected"},
            "margin": {"margin": "batch", "heldout_margin": "held out"},
            "accuracy": {"accuracy": "batch", "heldout_accuracy": "held out"},
            "KL to the first model": {"heldout_kl": "a held-out token"},
        }
        if self.config.loss == "2d_dpo":
            panels["segment reward"] = {
                "heldout_segment_reward_chosen": "chosen",
                "heldout_segment_reward_rejected": "rejected",
            }
        plot_curves(rows, folder / f"{self.file}.png", f"{self.name}: {self.config.loss} on pairs of answers", panels)


def _split(packed: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Every other answer: the chosen ones, the rejected ones."""
    parts = packed.split(lengths)
    return torch.cat(parts[::2]), torch.cat(parts[1::2])
