"""Distillation (survey §6.7.5) and rejection sampling (§6.7.3): SFT on a teacher's right and readable answers.

With the checkpoint of a run of reinforcement learning as the teacher this is R1's third stage; with a larger model, its
distillation.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from .attempts import Attempts
from .data import Limits, Part, Parts, Row, answerable, check_fields, check_files, digest, hold_out, part_of
from .devices import choose_device
from .distributed import only_one
from .metrics import History
from .model import end_token_ids, load_model
from .policy import Policy
from .preflight import check_model, check_type, checked, config_of
from .rewards import (
    SCRIPTS,
    Sample,
    language_share,
    name_of,
    parts,
    r1_zero_example,
    r1_zero_task,
    repetition_rule,
    thought_of,
)
from .run import TrainResult
from .sampling import completion_of, evaluate, sample
from .sft import Example as EncodedRow
from .sft import SFTConfig, SFTTrainer
from .tasks import Example, Task, load_task, prompt_token_ids


@dataclass
class DistillConfig(SFTConfig):
    """Everything that ``train_distill`` can be told; ``data`` are rows of other domains, learned beside the sampled."""

    teacher: str = ""  # a name or folder, as ``model``; "": the model itself
    task: str = "chain_sum"
    task_options: dict[str, Any] = field(default_factory=dict)
    template: str = "r1_zero"  # none: the question as it is
    template_example: str = ""

    # Sampling
    prompts: int = 64  # distinct questions of the task that the teacher answers
    samples: int = 8  # answers to each
    keep: int = 2  # of them at most, distinct
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    sampling_batch_size: int = 8  # questions at a time

    # What is readable
    language: str = "en"
    min_language: float = 0.9  # share of words in it, of the thought
    max_repetition: float = 0.2  # share of runs of four words that came before

    heldout: int = 0
    eval_prompts: int = 64
    output_dir: str = "runs/distill"

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"template": ("r1_zero", "none"), "language": tuple(SCRIPTS)}
    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = ("prompts", "samples", "keep", "max_new_tokens", "sampling_batch_size")
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = ("eval_prompts", "min_language", "max_repetition")
    POSITIVE: ClassVar[tuple[str, ...]] = ("temperature", "top_p")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.wanted(self.top_p <= 1, "top_p", "at most 1")
        self.wanted(self.min_language <= 1, "min_language", "a share in [0, 1]")


def train_distill(
    config: DistillConfig | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    teacher: nn.Module | None = None,
    task: Task | None = None,
    rows: Sequence[Row] | None = None,
) -> TrainResult:
    """Sample a teacher's answers, keep those that are right and readable, and fine-tune a model on them.

    Args:
        model, tokenizer: the student; None loads ``config.model``.
        teacher: a built model with the student's tokenizer; None loads ``config.teacher`` with its own.
        task: questions, and a reward that is 1 for a right answer; None makes ``config.task``.
        rows: {"prompt", "answer"} of other domains, learned beside the sampled answers; None reads ``config.data``.

    What was kept lies in ``rows.jsonl``, which ``train sft`` takes too. A run that was cut off goes on where it was, in
    the sampling as in the training.

    Raises:
        ValueError: no answer of the teacher was right and readable.
    """
    only_one("train distill")
    c = config_of(DistillConfig, config)
    by_name = teacher is None and bool(c.teacher)
    checked(DistillConfig, c, model, loads=by_name)
    if by_name:
        check_model("teacher", c.teacher)
    check_type("task", task, Task, "a name goes into config.task")
    others, heldout = read_others(c, rows)
    task = task or load_task(c.task, seed=c.seed, heldout=c.eval_prompts, strict=c.strict, **c.task_options)
    if model is None:
        model, loaded = load_model(c.model, precision=c.precision, device=choose_device(c.device))
        tokenizer = tokenizer or loaded
    kept = sampled_rows(c, task, teacher or model if teacher is not None or not c.teacher else None, tokenizer)
    made = [encoded_row(row, c, tokenizer) for row in kept]
    trainer = DistillTrainer(c, model, tokenizer, framed(task, c, tokenizer), made, others, heldout)
    try:
        return trainer.run()
    finally:
        trainer.optimizer.close()


def question_of(example: Example) -> Any:
    return example["prompt"] if isinstance(example, dict) else example


def framed(task: Task, c: DistillConfig, tokenizer: Any) -> Task:
    """``task`` in the template of the config."""
    return r1_zero_task(task, tokenizer, c.template_example) if c.template == "r1_zero" else task


def encoded_row(row: Row, c: DistillConfig, tokenizer: Any) -> Row:
    """A row of questions and answers for SFT: the question in the template."""
    return r1_zero_example(row, tokenizer, c.template_example) if c.template == "r1_zero" else row


def read_others(c: DistillConfig, rows: Sequence[Row] | None) -> tuple[Part | None, Part | None]:
    """The rows of other domains and the held-out ones, where there are some.

    Raises:
        TypeError, FileNotFoundError, ValueError, ImportError: see ``data.read_rows``.
    """
    check_files(c, rows is None)
    found = part_of(rows, "rows", c.data, "data", c.split, c.columns) if rows is not None or c.data else None
    if found is not None and rows is not None and not found.numbered:
        found = None  # none are needed
    heldout: Part | None = None
    if c.heldout_data or c.heldout_split:
        setting, split = "heldout_data" if c.heldout_data else "data", c.heldout_split or c.split
        heldout = part_of(None, "", c.heldout_data or c.data, setting, split, c.columns)
    check_fields((found, heldout), lambda row: ("prompt", "answer"), c)
    return found, heldout


def text_rows(source: str, rows: Sequence[Row] | None, name: str, strict: bool) -> list[Row]:
    """{"prompt", "answer"}, both text, of ``rows`` or of a file or data set; others are counted and reported.

    The user knows the two as ``name`` with _rows and _data behind it.

    Raises:
        TypeError, FileNotFoundError, ValueError: see ``data.usable``, ``data.listed`` and ``data.numbered_rows``.
    """

    def check(row: Row) -> Row:
        pair = [row.get(key) if isinstance(row, dict) else None for key in ("prompt", "answer")]
        if not all(isinstance(text, str) and text.strip() for text in pair):
            raise ValueError(f'wanted {{"prompt": text, "answer": text}}, got {str(row)[:80]}')
        return {"prompt": pair[0], "answer": pair[1]}

    return part_of(rows, f"{name}_rows", source, f"{name}_data").usable(check, strict)


def why_not(answer: str, ended: bool, c: DistillConfig) -> str:
    """Why an answer is not fit to be learned from, right or not; "" if it is."""
    if not ended:
        return "cut off"
    thought = answer
    if c.template == "r1_zero":
        found = parts(answer)
        if found is None or not all(part.strip() for part in found):
            return "not in the form"
        thought = thought_of(answer)
    if language_share(thought, c.language) < c.min_language:
        return "in several languages"
    if -repetition_rule(Sample(None, answer)) > c.max_repetition:
        return "repeating itself"
    return ""


def sampled_rows(c: DistillConfig, task: Task, teacher: nn.Module | None, tokenizer: Any) -> list[Row]:
    """{"prompt", "answer"} of right and readable answers, from ``sampled.jsonl`` as far as it goes, and into it.

    Each batch of questions is a line of the file and draws from a generator of its own, so a run that was cut off goes
    on with the next batch and gets the same rows.
    """
    folder = Path(c.output_dir)
    questions = list({str(question_of(example)): example for example in task.train}.values())[: c.prompts]
    wanted = [c.teacher, c.template, c.template_example, c.samples, c.keep, c.temperature, c.top_p, c.max_new_tokens,
              c.sampling_batch_size, c.language, c.min_language, c.max_repetition, c.seed]  # fmt: skip
    key = digest(wanted, [str(question) for question in questions])
    starts = range(0, len(questions), c.sampling_batch_size)
    history = History(folder / "sampled.jsonl", keep_steps=len(starts) if c.resume else 0)
    if any(line["key"] != key for line in history.rows):
        raise ValueError(f"{history.path}: sampled with other settings; use resume=false or another output_dir")
    if len(history.rows) < len(starts):
        _sample_rest(c, task, questions, teacher, tokenizer, history, key)
    rows = [row for line in history.rows for row in line["rows"]]
    counts = sum((Counter(line["counts"]) for line in history.rows), Counter())
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    if c.progress:
        print(f"kept {len(rows)} of {counts.total()} answers to {len(questions)} questions ({reasons})")
    if not rows:
        raise ValueError(f"teacher: none of its {counts.total()} answers can be learned from ({reasons})")
    partial = folder / "rows.partial"
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(folder / "rows.jsonl")
    return rows


@torch.no_grad()
def _sample_rest(
    c: DistillConfig,
    task: Task,
    questions: Sequence[Example],
    teacher: nn.Module | None,
    tokenizer: Any,
    history: History,
    key: str,
) -> None:
    from tqdm.auto import tqdm

    if teacher is None:
        teacher, tokenizer = load_model(c.teacher, precision=c.precision, device=choose_device(c.device))
    policy = Policy(teacher.eval(), autocast=c.precision == "autocast", layout="plain")  # it only samples
    end_ids = end_token_ids(teacher, tokenizer)
    asked = framed(Task(train=questions, reward=task.reward), c, tokenizer)
    fit = answerable(asked.train, "questions", tokenizer, Limits.of(teacher), c.max_new_tokens, c.strict)
    known, size = set(map(id, fit)), c.sampling_batch_size
    pairs = list(zip(asked.train, questions, strict=True))
    bar = tqdm(total=len(questions), desc="sampling", unit="question", disable=not c.progress, ncols=90)
    for number, start in enumerate(range(0, len(questions), size), 1):
        batch = pairs[start : start + size]
        bar.update(len(batch))
        if number <= len(history.rows):
            continue
        part = [pair for pair in batch if id(pair[0]) in known]
        generator = torch.Generator().manual_seed(c.seed + 1_000_003 * number)
        rollout = sample(
            policy, [prompt_token_ids(e, tokenizer) for e, _ in part], group_size=c.samples, end_ids=end_ids,
            max_new_tokens=c.max_new_tokens, temperature=c.temperature, top_p=c.top_p, generator=generator,
            backend=None if c.backend == "auto" else c.backend,
        )  # fmt: skip
        rows: list[Row] = []
        counts: Counter[str] = Counter()
        attempts = Attempts()
        for i, (example, question) in enumerate(part):
            answers: dict[str, None] = {}
            for g in range(i * c.samples, (i + 1) * c.samples):
                text = completion_of(rollout.answers[g], end_ids, tokenizer)
                right = float(attempts.call(name_of(task.reward), 0.0, asked.reward, example, text)) >= 1
                reason = "wrong" if not right else why_not(text, rollout.ended[g], c)
                text = text.strip()
                if not reason and (text in answers or len(answers) == c.keep):
                    reason = "more of the same"
                counts[reason or "kept"] += 1
                if not reason:
                    answers[text] = None
            rows += [{"prompt": question_of(question), "answer": answer} for answer in answers]
        attempts.report()
        history.add({"step": number, "key": key, "rows": rows, "counts": dict(counts)})
    bar.close()


class DistillTrainer(SFTTrainer):
    """SFT whose held-out measure is the task's."""

    name = "distill"

    def __init__(
        self,
        c: DistillConfig,
        model: nn.Module,
        tokenizer: Any,
        task: Task,
        rows: Sequence[Row],
        others: Part | None = None,
        heldout: Part | None = None,
    ) -> None:
        self.others, self.measured = others, heldout
        super().__init__(c, model=model, tokenizer=tokenizer, rows=rows)
        asked = answerable(task.heldout, "held-out questions", tokenizer, self.limits, c.max_new_tokens, c.strict)
        self.task, self.max_new_tokens = replace(task, heldout=asked), c.max_new_tokens

    def read(self, rows: Sequence[Row] | None, heldout_rows: Sequence[Row] | None) -> Parts:
        return part_of(rows, "rows", "", ""), self.measured

    def encode_parts(self, parts: Parts) -> tuple[list[EncodedRow], list[EncodedRow]]:
        """The sampled rows and those of other domains, each with its own lines where one cannot be used."""
        c, (sampled, heldout) = self.config, parts
        train = sampled.usable(self.encode, c.strict)
        if self.others is not None:
            train += self.others.usable(self.encode, c.strict)
        return hold_out(train, c) if heldout is None else (train, heldout.usable(self.encode, c.strict))

    def heldout_row(self) -> dict[str, float]:
        """The accuracy of greedy answers, beside the loss of held-out rows."""
        if not self.task.heldout:
            return super().heldout_row()
        with self.chosen_backend():
            found = evaluate(
                self.policy, self.task.heldout, self.task.reward, tokenizer=self.tokenizer,
                end_ids=end_token_ids(self.model, self.tokenizer), max_new_tokens=self.max_new_tokens,
            )  # fmt: skip
        return super().heldout_row() | {"heldout_accuracy": found.accuracy}
