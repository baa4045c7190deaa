"""The recipe of DeepSeek-R1 (survey §6.7) in four stages, each a trainer of its own in a folder of its own.

    1 cold_start      SFT on readable reasoning in the form <think>…</think><answer>…</answer> (§6.7.1)
    2 reasoning_rl    GRPO, rewards accuracy and language consistency (§6.7.2)
    3 rejection_sft   the checkpoint's right and readable answers, with data of other domains: SFT (§6.7.3)
    4 final_rl        GRPO on questions and other prompts: rules where there are some, reward models elsewhere (§6.7.4)

A finished stage is not run again; one that was cut off goes on from its own checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from . import checkpoint
from .config import GRPOConfig
from .data import Limits, Row, answerable, digest
from .devices import choose_device
from .distill import DistillConfig, question_of, text_rows, train_distill
from .distributed import only_one
from .grpo import GRPOTrainer
from .model import end_token_ids, load_model
from .objective import check_objective
from .policy import Policy
from .preflight import check_callable, check_type, checked
from .reward_model import head_of
from .rewards import (
    SCRIPTS,
    Rewards,
    Ruled,
    Sample,
    language_rule,
    make_rewards,
    parts,
    r1_zero_example,
    r1_zero_task,
    summary_of,
)
from .run import TrainResult
from .sampling import evaluate
from .scorers import Judge
from .settings import RunConfig, check_keys
from .sft import SFTConfig, train_sft
from .tasks import Example, Reward, Task, load_task, prompt_token_ids

STAGES = ("cold_start", "reasoning_rl", "rejection_sft", "final_rl")
_KINDS: dict[str, type[RunConfig]] = dict(zip(STAGES, (SFTConfig, GRPOConfig, DistillConfig, GRPOConfig), strict=True))
# What the recipe itself decides.
_FIXED = {"model", "teacher", "output_dir", "task", "task_options", "template", "template_example", "data",
          "save_model", "heldout_data", "eval_prompts", "supervision", "step_reward", "resume", "seed",
          "device"}  # fmt: skip


@dataclass
class R1Config(RunConfig):
    """Everything that ``train_r1`` can be told. Settings at the top hold in every stage; a stage's table overrides."""

    task: str = "chain_sum"
    task_options: dict[str, Any] = field(default_factory=dict)
    template_example: str = ""  # an exchange shown before each question
    language: str = "en"
    max_new_tokens: int = 64
    cold_start_data: str = ""  # JSONL of {"prompt", "answer"}, the answers in the form
    general_data: str = ""  # JSONL of {"prompt", "answer"} of other domains
    helpful_model: str = ""  # folder of a reward model that scores what the user reads, behind the thought
    harmless_model: str = ""  # of one that scores the whole output
    general_share: float = 0.5  # of the prompts of final_rl
    sft_from: str = "base"  # what rejection_sft trains: the first model, as R1 did, or the checkpoint

    cold_start: dict[str, Any] = field(default_factory=dict)  # settings of train sft
    reasoning_rl: dict[str, Any] = field(default_factory=dict)  # of train grpo
    rejection_sft: dict[str, Any] = field(default_factory=dict)  # of train distill
    final_rl: dict[str, Any] = field(default_factory=dict)  # of train grpo

    eval_prompts: int = 64
    output_dir: str = "runs/r1"

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"sft_from": ("base", "checkpoint"), "language": tuple(SCRIPTS)}
    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = ("max_new_tokens", "eval_prompts")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.wanted(0 <= self.general_share < 1, "general_share", "a share in [0, 1)")
        for name in STAGES:
            self.stage(name)  # a wrong setting of the last stage shows before the first

    def ops(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(op for name in STAGES for op in self.stage(name).ops()))

    def stage(self, name: str) -> Any:
        """The settings of one stage.

        Raises:
            ValueError: an unknown setting, one that the recipe decides, or a wrong value, naming the stage.
        """
        kind, table = _KINDS[name], getattr(self, name)
        try:
            check_keys(kind, table)
            for key in table:
                if key in _FIXED:
                    raise ValueError(f"config: {key}: the recipe's own, not a stage's")
            known = {spec.name for spec in dataclasses.fields(kind)}
            shared = {spec.name for spec in dataclasses.fields(RunConfig)} | {
                "max_new_tokens",
                "language",
                "eval_prompts",
            }
            values = {key: getattr(self, key) for key in shared & known}
            values |= {
                "output_dir": str(Path(self.output_dir) / f"{1 + STAGES.index(name)}_{name}"),
                "save_model": True,
            }
            if kind is SFTConfig:
                values["heldout"] = 0
            if kind is DistillConfig:
                values |= {
                    "template_example": self.template_example,
                    "task": self.task,
                    "task_options": self.task_options,
                }
            if kind is GRPOConfig:
                defaults = (
                    {"accuracy": 1.0, "language": 1.0} if name == "reasoning_rl" else {"accuracy": 1.0, "format": 1.0}
                )
                values |= {"rewards": defaults, "reward_options": {"language": self.language}}
            return kind(**values | table)
        except ValueError as error:
            raise ValueError(f"{error} (in the table {name})") from error


def train_r1(
    config: R1Config | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    task: Task | None = None,
    cold_start_rows: Sequence[Row] | None = None,
    general_rows: Sequence[Row] | None = None,
    helpful: Reward | None = None,
    harmless: Reward | None = None,
) -> TrainResult:
    """Run the four stages; ``result.history`` has a row of held-out measures for the first model and each stage.

    Args:
        model, tokenizer: what to start from; None loads ``config.model``.
        task: questions that are text, with a reward that is 1 for a right answer; None makes ``config.task``.
        cold_start_rows, general_rows: {"prompt", "answer"}, both text; None reads the config's files.
        helpful, harmless: functions (prompt, text) -> number in place of ``helpful_model`` and ``harmless_model``.
    """
    only_one("train r1")
    config = checked(R1Config, config, model, loads=True)
    check_type("task", task, Task, "a name goes into config.task")
    check_callable(helpful=helpful, harmless=harmless)
    if model is not None and tokenizer is None:
        raise ValueError("tokenizer: wanted one beside the model: its questions are text")
    recipe = R1(config, task, cold_start_rows, general_rows, helpful, harmless)
    return recipe.run(model, tokenizer)


class R1:
    """The recipe behind ``train_r1``."""

    def __init__(
        self,
        config: R1Config,
        task: Task | None = None,
        cold_start_rows: Sequence[Row] | None = None,
        general_rows: Sequence[Row] | None = None,
        helpful: Reward | None = None,
        harmless: Reward | None = None,
    ) -> None:
        self.config = c = config
        self.folder = Path(c.output_dir)
        if cold_start_rows is None:
            c.wanted(bool(c.cold_start_data), "cold_start_data", "a JSONL file (or rows from Python)")
        for name in ("helpful_model", "harmless_model"):
            if folder := getattr(c, name):
                head_of(folder, f"config: {name}")
        self.task = task or load_task(c.task, seed=c.seed, heldout=c.eval_prompts, strict=c.strict, **c.task_options)
        for name in ("reasoning_rl", "final_rl"):  # their loss and rules are not made before the stage
            check_objective(c.stage(name))
            self.rules(c.stage(name), self.task)
        self.general: list[Row] = []
        if general_rows or (general_rows is None and c.general_data):
            self.general = text_rows(c.general_data, general_rows, "general", c.strict)
        self.cold_start = self.usable(text_rows(c.cold_start_data, cold_start_rows, "cold_start", c.strict))
        device = choose_device(c.device)
        self.judges: dict[str, Reward] = {}  # of prompts without rules
        if helpful is not None:
            self.judges["helpful"] = lambda prompt, text: helpful(prompt, summary_of(text))
        elif c.helpful_model:
            self.judges["helpful"] = Judge(c.helpful_model, device, summary_of)
        if harmless or c.harmless_model:
            self.judges["harmless"] = harmless or Judge(c.harmless_model, device)
        if self.general and c.general_share and not self.judges:
            raise ValueError(
                "config: helpful_model, harmless_model: only a reward model can score the prompts of general_data in "
                "final_rl; give one, or general_share = 0"
            )
        self.key = digest(self.cold_start, self.general, [str(example) for example in self.task.train])

    def usable(self, rows: Sequence[Row]) -> list[Row]:
        """The rows of the cold start that are in the form and whose question is not held out."""
        held = {question_of(example) for example in self.task.heldout}
        open_rows = [row for row in rows if row["prompt"] not in held]
        found = [row for row in open_rows if parts(row["answer"])]
        if len(found) < len(rows):
            print(f"cold start: of {len(rows)} rows {len(rows) - len(open_rows)} ask what is held out, "
                  f"{len(open_rows) - len(found)} are not in the form <think>…</think><answer>…</answer>")  # fmt: skip
        if not found:
            raise ValueError(f"cold_start_data: none of {len(rows)} rows can be used")
        return found

    def run(self, model: nn.Module | None = None, tokenizer: Any = None) -> TrainResult:
        """Every stage that is not finished yet."""
        c, base = self.config, self.config.model
        if model is not None:  # every stage loads what it starts from, so a run that goes on needs it on disk
            base = str(self.folder / "base")
            if not (self.folder / "base").is_dir() or not c.resume:
                shutil.rmtree(base, ignore_errors=True)
                partial = self.folder / "base.partial"
                model.save_pretrained(partial)  # type: ignore[operator]
                tokenizer.save_pretrained(partial)
                partial.replace(base)
        rows = [self.finished("base", 0, base, digest(base, self.key, asdict(c)["task_options"]), base)]
        source, key = base, self.key
        for number, name in enumerate(STAGES, 1):
            settings = asdict(c.stage(name))
            kept = {k: v for k, v in settings.items() if k == "steps" or k not in checkpoint.FREE}
            key = digest(key, name, kept, base, c.sft_from, c.general_share)
            rows.append(self.finished(name, number, source, key, base))
            source = str(self.folder / f"{number}_{name}" / "model")
        if c.progress:
            print(table(rows))
        (self.folder / "r1.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        model, tokenizer = self.load(source)
        return TrainResult(model, tokenizer, rows, self.folder)

    def finished(self, name: str, number: int, source: str, key: str, base: str) -> dict[str, Any]:
        """The row of a stage; runs it unless it is finished."""
        folder = self.folder / f"{number}_{name}"
        path = folder / "done.json"
        if path.is_file() and self.config.resume:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if found.pop("key") != key:
                raise ValueError(
                    f"{path}: finished with other settings or data; use another output_dir, or delete {folder} and the "
                    "stages behind it"
                )
            return found
        if self.config.progress:
            print(f"R1, stage {number} of {len(STAGES)}: {name}", flush=True)
        start = time.perf_counter()
        if number:
            getattr(self, f"run_{name}")(source, base)
            gc.collect()  # a model whose layers are computed again refers to itself: it would stay on the GPU
        seconds = time.perf_counter() - start
        measured = self.measure(str(folder / "model") if number else source)
        row = {"step": number, "stage": name, **measured, "seconds": seconds}
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(row | {"key": key}), encoding="utf-8")
        partial.replace(path)
        (folder / "checkpoint.pt").unlink(missing_ok=True)  # several times the model, and no longer needed
        return row

    # The stages

    def run_cold_start(self, source: str, base: str) -> None:
        model, tokenizer = self.load(source)
        rows = [r1_zero_example(row, tokenizer, self.config.template_example) for row in self.cold_start]
        train_sft(self.config.stage("cold_start"), model=model, tokenizer=tokenizer, rows=rows)

    def run_reasoning_rl(self, source: str, base: str) -> None:
        model, tokenizer = self.load(source)
        task = self.framed(tokenizer)
        c = self.config.stage("reasoning_rl")
        self.train_grpo(c, model, tokenizer, task, self.rules(c, task))

    def run_rejection_sft(self, source: str, base: str) -> None:
        teacher, tokenizer = self.load(source)
        model = teacher if self.config.sft_from == "checkpoint" else self.load(base)[0]
        c = self.config.stage("rejection_sft")
        train_distill(c, model=model, tokenizer=tokenizer, teacher=teacher, task=self.task, rows=self.general)

    def run_final_rl(self, source: str, base: str) -> None:
        model, tokenizer = self.load(source)
        task, share = self.framed(tokenizer), self.config.general_share
        questions, prompts = list(task.train), []
        if self.general and share:
            count = max(1, round(len(questions) * share / (1 - share)))
            prompts = [general_example(self.general[i % len(self.general)], tokenizer) for i in range(count)]
        mixed = Task(train=questions + prompts, reward=task.reward, heldout=task.heldout, name=task.name)
        c = self.config.stage("final_rl")
        self.train_grpo(c, model, tokenizer, mixed, MixedRewards(self.rules(c, task), self.judges))

    def train_grpo(self, c: GRPOConfig, model: nn.Module, tokenizer: Any, task: Task, rewards: Rewards) -> None:
        trainer = GRPOTrainer(c, model=model, tokenizer=tokenizer, task=task, rewards=rewards)
        try:
            trainer.run()
        finally:
            trainer.optimizer.close()

    # What they share

    def rules(self, c: GRPOConfig, task: Task) -> Rewards:
        return make_rewards(c.rewards, c.reward_options, task.reward, max_new_tokens=c.max_new_tokens)

    def framed(self, tokenizer: Any) -> Task:
        return r1_zero_task(self.task, tokenizer, self.config.template_example)

    def load(self, source: str) -> tuple[nn.Module, Any]:
        c = self.config
        return load_model(source, precision=c.precision, device=choose_device(c.device))

    def measure(self, source: str) -> dict[str, float]:
        """Accuracy, form and language consistency of greedy answers to the held-out questions."""
        c = self.config
        model, tokenizer = self.load(source)
        task = self.framed(tokenizer)
        policy = Policy(model.eval(), autocast=c.precision == "autocast", layout="plain")  # it only samples
        asked = answerable(task.heldout, "held-out questions", tokenizer, Limits.of(model), c.max_new_tokens, c.strict)
        found = evaluate(
            policy, asked, task.reward, tokenizer=tokenizer, end_ids=end_token_ids(model, tokenizer),
            max_new_tokens=c.max_new_tokens,
        )  # fmt: skip
        samples = [Sample(None, text) for text in found.completions]
        return {
            "heldout_accuracy": found.accuracy,
            "heldout_format": sum(parts(s.text) is not None for s in samples) / len(samples),
            "heldout_language": sum(language_rule(s, language=c.language) for s in samples) / len(samples),
        }


class MixedRewards(Rewards):
    """Rules for the questions of the task, reward models for other prompts."""

    def __init__(self, rules: Rewards, judges: Mapping[str, Reward]) -> None:
        super().__init__(rules.rules)
        self.judged = Rewards({name: (1.0, of_prompt(judge)) for name, judge in judges.items()}, self.attempts)
        self.models = [judge for judge in judges.values() if isinstance(judge, Judge)]

    def score(self, sample: Sample) -> tuple[float, dict[str, float]]:
        return self.judged.score(sample) if "general" in sample.example else super().score(sample)

    def score_all(self, samples: Sequence[Sample]) -> list[tuple[float, dict[str, float]]]:
        general = [(sample.example["general"], sample.text) for sample in samples if "general" in sample.example]
        for model in self.models:
            with contextlib.suppress(Exception):  # answers are then read one by one, and the one at fault scores 0
                model.read(general)
        return super().score_all(samples)


def of_prompt(judge: Reward) -> Ruled:
    """A judge as a rule for the prompts that are no questions of the task."""
    return Ruled(lambda example, text: judge(example["general"], text))


def general_example(row: Row, tokenizer: Any) -> Example:
    return {"prompt": prompt_token_ids(row["prompt"], tokenizer), "general": row["prompt"]}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The held-out measures after each stage."""
    lines = [f"  {'stage':<16}{'accuracy':>10}{'format':>10}{'language':>10}{'seconds':>10}"]
    for row in rows:
        figures = [row[f"heldout_{name}"] for name in ("accuracy", "format", "language")]
        lines.append(
            f"  {row['stage']:<16}" + "".join(f"{value:>10.3f}" for value in figures) + f"{row['seconds']:>10.0f}"
        )
    return "\n".join(lines)
