"""Supervised fine-tuning (survey §3.1, (3)): the answers of prompt and answer pairs, learned token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import rl4llm_fast as rf

from .data import DataConfig, Parts, Row, answer_token_ids, check_length, digest, encode_rows, prompt_of, read_rows
from .layout import packed_layout, plain_layout, starts_of
from .metrics import Phases, plot_curves
from .policy import Policy
from .preflight import checked
from .run import Trainer, TrainResult
from .tasks import examples_of_step


@dataclass
class SFTConfig(DataConfig):
    """Everything that ``train_sft`` can be told; a row is {"prompt": ..., "answer": ...}."""

    aggregation: str = "token_mean"  # of rf.linear_sft_loss
    packing: bool = False  # several examples a row, none of which sees another: less padding, a mask in memory
    output_dir: str = "runs/sft"

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "aggregation": ("token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum"),
    }

    def ops(self) -> tuple[str, ...]:
        return ("linear_sft_loss",)


@dataclass
class Example:
    prompt: list[int]
    answer: list[int]


def train_sft(
    config: SFTConfig | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    rows: Sequence[Row] | None = None,
    heldout_rows: Sequence[Row] | None = None,
) -> TrainResult:
    """Fine-tune a causal language model on answers; the loss of a prompt's tokens is not counted.

    Args:
        model: a built model of transformers, trained in place; None loads ``config.model``.
        tokenizer: its tokenizer; None is fine for prompts and answers of token ids.
        rows, heldout_rows: {"prompt", "answer"} each, text or token ids (a prompt also chat messages); None reads
            ``config.data``. The end token is put behind answers that are text.

    An interrupted run goes on from the last checkpoint in ``config.output_dir`` when it is started again.
    """
    trainer = SFTTrainer(config, model=model, tokenizer=tokenizer, rows=rows, heldout_rows=heldout_rows)
    try:
        return trainer.run()
    finally:
        trainer.optimizer.close()


class SFTTrainer(Trainer):
    """The loop behind ``train_sft``."""

    name = "SFT"
    many_processes = can_shard = True

    def __init__(
        self,
        config: SFTConfig | None = None,
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        rows: Sequence[Row] | None = None,
        heldout_rows: Sequence[Row] | None = None,
    ) -> None:
        self.config = c = checked(SFTConfig, config, model)
        parts = self.read(rows, heldout_rows)
        super().__init__(c, model, tokenizer)
        self.train, self.heldout = self.encode_parts(parts)
        self.data_key = digest(*map(asdict, self.train))
        layout = "shared" if c.packing else "plain"  # packed rows need what shared ones need: a mask of their own
        self.policy = Policy(self.model, autocast=c.precision == "autocast", layout=layout)
        self.optimizer = self.make_optimizer(self.model)

    def read(self, rows: Sequence[Row] | None, heldout_rows: Sequence[Row] | None) -> Parts:
        """The rows to train on and the held-out ones, before the model is there."""
        return read_rows(self.config, rows, heldout_rows, lambda row: ("prompt", "answer"))

    def encode_parts(self, parts: Parts) -> tuple[list[Example], list[Example]]:
        return encode_rows(self.config, parts, self.encode)

    def encode(self, row: Row) -> Example:
        prompt, answer = prompt_of(row, self.tokenizer), answer_token_ids(row, "answer", self.tokenizer)
        check_length(prompt, [answer], self.config.max_length, self.limits)
        return Example(prompt, answer)

    def step(self, step: int) -> dict[str, Any]:
        self.phases = Phases(self.device)
        c = self.config
        batch = examples_of_step(self.train, step, c.batch_size, c.seed)
        tokens = sum(len(example.answer) for example in batch)
        total = torch.zeros((), device=self.device)
        for micro in self.micro_batches(batch):
            # Normalised by the tokens of the whole batch, so the gradients of its parts add up to its own.
            loss = self.loss(micro, c.aggregation, num_tokens=tokens, num_sequences=len(batch))
            self.phases.mark("loss")
            loss.backward()
            self.phases.mark("backward")
            total += loss.detach()
        return self.take_step(step, {"loss": self.ranks.sum(total), "answer_tokens": tokens}, batch)

    def loss(self, examples: Sequence[Example], aggregation: str, *, num_tokens: int, num_sequences: int) -> Tensor:
        """The share of ``examples`` in the loss of a batch of ``num_tokens`` and ``num_sequences``."""
        prompts, answers = [e.prompt for e in examples], [e.answer for e in examples]
        if self.config.packing:
            layout = packed_layout(prompts, answers, self.config.max_length)
        else:
            layout = plain_layout(prompts, answers)
        layout = layout.to(self.device)
        starts = starts_of([len(answer) for answer in answers], self.device)
        with self.chosen_backend(), self.policy.precision():
            hidden, weight, bias = self.policy.head_inputs(layout)
            self.phases.mark("forward")
            return rf.linear_sft_loss(
                hidden, weight, layout.token_ids, bias, cu_seqlens=starts, aggregation=aggregation,
                num_tokens=num_tokens, num_sequences=num_sequences, softcap=self.policy.softcap,
            )  # fmt: skip

    @torch.no_grad()
    def heldout_row(self) -> dict[str, float]:
        """The mean loss of a held-out token, and its exponential."""
        if not self.heldout:
            return {}
        tokens, total = sum(len(e.answer) for e in self.heldout), torch.zeros((), device=self.device)
        size, own = self.config.micro_batch_size or self.config.batch_size, self.evaluators.share(self.heldout)
        for start in range(0, len(own), size):
            part = own[start : start + size]
            total += self.loss(part, "token_mean", num_tokens=tokens, num_sequences=len(self.heldout))
        loss = self.evaluators.sum(total)
        return {"heldout_loss": loss, "heldout_perplexity": math.exp(min(loss, 700.0))}

    def before_first_step(self) -> dict[str, float]:
        return self.heldout_row()

    def brief(self, row: dict[str, Any]) -> str:
        return f"loss {row['loss']:.3f}"

    def plot(self, rows: list[dict[str, Any]], folder: Path) -> None:
        curves = {"loss": "batch", "heldout_loss": "held-out, a token"}
        plot_curves(rows, folder / "sft.png", "Supervised fine-tuning", {"loss": curves})
