"""What trainers with a frozen reference share: its log-probabilities, cached or live, and how far the policy went."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import rl4llm_fast as rf

from .data import DataConfig
from .devices import to_device
from .distributed import Ranks
from .layout import Layout
from .policy import Policy
from .reference_cache import answer_logprobs, cached_logprobs
from .run import MeanLossTrainer


class Texts(NamedTuple):
    """Answers with their prompts; neighbours of the same group have the same prompt, so they can share a row."""

    prompts: list[list[int]]
    answers: list[list[int]]
    groups: list[int]


@dataclass
class ReferenceConfig(DataConfig):
    """The settings of a trainer whose loss compares the policy with the model that it began as."""

    beta: float = 0.1  # how far from the reference; τ of ipo
    reference: str = "precomputed"  # precomputed: once, before the first step | live: a frozen copy, each step
    reference_cache: str = ""  # a folder; "": output_dir/reference
    layout: str = "auto"  # shared: a prompt's answers share its tokens | plain: one row an answer | auto: the cheaper
    heldout_kl: bool = True  # measure the KL to the model as it came on held-out answers (keeps a copy of its head)

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "reference": ("precomputed", "live"),
        "layout": ("auto", "shared", "plain"),
    }
    POSITIVE: ClassVar[tuple[str, ...]] = ("beta",)


class ReferenceTrainer(MeanLossTrainer):
    """A trainer on rows that each hold ``reference``, where it is precomputed: one tensor for each of their texts."""

    can_shard = True
    config: Any
    policy: Policy
    reference: Policy | None = None
    drift: Drift | None = None

    def texts(self, rows: Sequence[Any]) -> Texts:
        """All texts of ``rows`` whose reference log-probabilities are needed, as many for every row."""
        raise NotImplementedError

    def drawn(self) -> list[Any]:
        """The training rows that this run reads, in the order of the data: which steps draw them does not matter."""
        c = self.config
        if c.steps * c.batch_size >= len(self.train):
            return self.train
        ids = {id(row) for step in range(1, c.steps + 1) for row in self.batch(step)}
        return [row for row in self.train if id(row) in ids]

    def set_up(self, *, with_reference: bool = True) -> None:
        """The policy, its reference and its optimiser, when model and data are there."""
        c = self.config
        live = with_reference and c.reference == "live" and c.parallel == "fsdp" and self.ranks.size > 1
        c.wanted(not live, "reference", "precomputed under fsdp")
        self.policy = Policy(self.model, autocast=c.precision == "autocast", layout=c.layout)
        if with_reference and c.reference == "live":
            self.reference = self.policy.frozen_copy()
        elif with_reference:
            self.precompute(self.drawn() + self.heldout)
        if c.heldout_kl and c.eval_every and self.heldout:
            self.drift = Drift(self.policy, self.evaluators)
            with self.chosen_backend(), torch.no_grad():
                for part in self.heldout_parts():
                    answer_logprobs(self.policy, *self.heldout_texts(part), tap=self.drift.keep)
        self.optimizer = self.make_optimizer(self.model)

    def precompute(self, rows: Sequence[Any]) -> None:
        """Log-probabilities of the texts of ``rows`` under the model as it is, from the cache where they are there."""
        c = self.config
        folder = Path(c.reference_cache or Path(c.output_dir) / "reference")
        texts = self.texts(rows)
        each = len(texts.answers) // max(len(rows), 1)
        size = each * (c.micro_batch_size or c.batch_size)
        with self.chosen_backend():
            found = cached_logprobs(folder, self.policy, *texts, size, progress=c.progress, ranks=self.ranks)
        for i, row in enumerate(rows):
            row.reference = tuple(found[each * i : each * (i + 1)])

    def logprobs(self, texts: Texts, *, measured: bool = True) -> Tensor:
        """The policy's, (N,): one answer behind the other; where drift is being measured, on these unless told not."""
        tap = self.drift.tap if self.drift is not None and measured else None
        return answer_logprobs(self.policy, *texts, self.phases.mark, tap=tap)

    def reference_logprobs(self, texts: Texts, kept: Sequence[Tensor]) -> Tensor:
        """The reference's, (N,): ``kept`` where precomputed."""
        if self.reference is None:
            return to_device(torch.cat(list(kept)), self.device)
        with torch.no_grad():
            return answer_logprobs(self.reference, *texts)

    def heldout_texts(self, part: Sequence[Any]) -> Texts:
        """Those that ``loss`` asks the policy for: the KL is measured on their tokens, in the forward of the loss."""
        return self.texts(part)

    def heldout_row(self) -> dict[str, float]:
        if self.drift is None:
            return super().heldout_row()
        with self.drift.measuring() as kl:
            row = super().heldout_row()
        return {**row, "heldout_kl": kl()}


class Drift:
    r"""Exact :math:`\mathrm{KL}(\pi \| \pi_0)` a token, over the vocabulary, from the model as it came.

    Kept are the last hidden states of the first model at the held-out answers' tokens and a copy of its head, so a
    measurement costs one product with that head and no second forward. Every pass shows the same texts in the same
    order.
    """

    def __init__(self, policy: Policy, ranks: Ranks) -> None:
        self.ranks = ranks
        self.softcap = policy.softcap
        self.hidden: list[Tensor] = []
        self.head: tuple[Tensor, Tensor | None] | None = None
        self.tap: Callable[..., None] | None = None
        self.at, self.tokens = 0, 0
        self.total: float | Tensor = 0.0

    def keep(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> None:
        if self.head is None:
            self.head = (weight.detach().clone(), None if bias is None else bias.detach().clone())
        self.hidden.append(hidden.detach())

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Callable[[], float]]:
        """Passes within are measured; the function that it gives is their mean."""
        self.at, self.total, self.tokens, self.tap = 0, 0.0, 0, self._add
        try:
            yield lambda: self.ranks.sum(self.total) / max(self.ranks.sum(self.tokens), 1)
        finally:
            self.tap = None

    def _add(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> None:
        assert self.head is not None
        kl = rf.linear_kl_divergence(
            hidden, weight, self.hidden[self.at], self.head[0], bias, self.head[1], softcap=self.softcap
        )
        self.at += 1
        kl = layout.of_answers(kl)
        self.total = self.total + kl.double().sum()  # read at the end, once
        self.tokens += len(kl)
