"""DPO and its family (survey §5; math.md section 7): pairs of answers, the better one made likelier than the worse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import rl4llm_fast as rf

from .data import Row, answer_token_ids, check_length, digest, load_rows, prompt_of
from .metrics import plot_curves
from .reference_run import ReferenceConfig, ReferenceTrainer, Texts
from .run import TrainResult

_WITHOUT_REFERENCE = ("cpo", "simpo", "orpo")


@dataclass
class DPOConfig(ReferenceConfig):
    """Everything that ``train_dpo`` can be told; a row is {"prompt", "chosen", "rejected"}, and maybe "prob"."""

    loss: str = "dpo"  # a kind of rf.preference_loss
    loss_options: dict[str, Any] = field(default_factory=dict)  # the kind's knobs, e.g. label_smoothing = 0.1
    average: bool = False  # means over an answer's tokens in place of sums
    output_dir: str = "runs/dpo"

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "loss": ("dpo", "robust", "ipo", "hinge", "cpo", "simpo", "orpo"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        # Their likelihood term is a mean over the tokens of the whole batch, which its parts do not know.
        whole = self.loss == "orpo" or (self.loss == "cpo" and self.loss_options.get("nll") == "token")
        self.wanted(not whole or self.micro_batch_size == 0, "micro_batch_size", f"0 for {self.loss} over tokens")


@dataclass
class Pair:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    prob: float | None = None  # that the chosen answer is preferred, where it is known
    reference: tuple[Tensor, ...] | None = None  # log-probabilities of both answers' tokens under the reference


def train_dpo(
    config: DPOConfig | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    rows: Sequence[Row] | None = None,
    heldout_rows: Sequence[Row] | None = None,
) -> TrainResult:
    """Train a causal language model on pairs of answers with any pair loss of ``rf.preference_loss`` but 2d_dpo.

    Args:
        model: a built model of transformers, trained in place, and as it comes the reference; None loads
            ``config.model``. Give a run that goes on the model it began with: its weights come from the checkpoint.
        tokenizer: its tokenizer; None is fine for prompts and answers of token ids.
        rows, heldout_rows: {"prompt", "chosen", "rejected"} each, text or token ids (a prompt also chat messages), and
            for dpo and ipo "prob" in [0, 1], in all rows or none; None reads ``config.data``.

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

    def __init__(
        self,
        config: DPOConfig | None = None,
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        rows: Sequence[Row] | None = None,
        heldout_rows: Sequence[Row] | None = None,
    ) -> None:
        self.config = c = config or DPOConfig()
        self.with_reference = c.loss not in _WITHOUT_REFERENCE
        one = torch.zeros(2)
        self._pair_loss(one, one if self.with_reference else None, [1], [1], None)  # a wrong knob shows before the work
        super().__init__(c, model, tokenizer)
        self.train, self.heldout = load_rows(c, rows, heldout_rows, self.encode)
        self.data_key = digest(*map(asdict, self.train))
        known = {pair.prob is not None for pair in self.train + self.heldout}
        if len(known) > 1:
            raise ValueError("prob: wanted in all rows or in none")
        self.set_up(with_reference=self.with_reference)

    def texts(self, rows: Sequence[Pair]) -> Texts:
        """Both answers of every pair, neighbours."""
        return Texts(
            [pair.prompt for pair in rows for _ in range(2)],
            [answer for pair in rows for answer in (pair.chosen, pair.rejected)],
            [i for i in range(len(rows)) for _ in range(2)],
        )

    def encode(self, row: Row) -> Pair:
        prompt = prompt_of(row, self.tokenizer)
        chosen, rejected = (answer_token_ids(row, name, self.tokenizer) for name in ("chosen", "rejected"))
        check_length(prompt, [chosen, rejected], self.config.max_length)
        if chosen == rejected:
            raise ValueError("chosen, rejected: the same answer")
        prob = row.get("prob")
        if prob is not None:
            if self.config.loss not in ("dpo", "ipo"):
                raise ValueError(f"prob: {self.config.loss} has none, only dpo and ipo have")
            if isinstance(prob, bool) or not isinstance(prob, (int, float)) or not 0 <= prob <= 1:
                raise ValueError(f"prob: wanted a number in [0, 1], got {prob!r}")
        return Pair(prompt, chosen, rejected, prob)

    def loss(self, pairs: Sequence[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of ``pairs``, and the metrics of ``rf.preference_loss``."""
        texts = self.texts(pairs)
        reference: Tensor | None = None
        with self.chosen_backend():
            if self.with_reference:
                reference = self.reference_logprobs(texts, [logp for pair in pairs for logp in pair.reference or ()])
            logp = self.logprobs(texts)
            lengths = ([len(p.chosen) for p in pairs], [len(p.rejected) for p in pairs])
            prob = [p.prob for p in pairs if p.prob is not None]
            return self._pair_loss(logp, reference, *lengths, torch.tensor(prob, device=self.device) if prob else None)

    def _pair_loss(
        self, logp: Tensor, reference: Tensor | None, chosen: list[int], rejected: list[int], prob: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``rf.preference_loss`` of log-probabilities (N,): pair after pair, the chosen answer before the rejected."""
        c = self.config
        lengths = [length for both in zip(chosen, rejected, strict=True) for length in both]
        first, second = _split(logp, lengths)
        ref_first, ref_second = (None, None) if reference is None else _split(reference, lengths)
        starts = [
            torch.tensor([0, *accumulate(part)], dtype=torch.int32, device=logp.device) for part in (chosen, rejected)
        ]
        return rf.preference_loss(
            first, second, ref_first, ref_second, kind=c.loss, beta=c.beta, average=c.average, prob=prob,
            cu_seqlens_chosen=starts[0], cu_seqlens_rejected=starts[1], **c.loss_options,
        )  # fmt: skip

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
        plot_curves(rows, folder / "dpo.png", f"{self.config.loss} on pairs of answers", panels)


def _split(packed: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Every other answer: the chosen ones, the rejected ones."""
    parts = packed.split(lengths)
    return torch.cat(parts[::2]), torch.cat(parts[1::2])
