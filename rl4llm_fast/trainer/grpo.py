"""GRPO (Shao et al. 2024; survey §6.3 and (82)): sample, score, compare within the group, take a step. Repeat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

import rl4llm_fast as rf

from .config import GRPOConfig
from .metrics import Averages, Phases, plot_rewards
from .model import end_token_ids
from .objective import check_objective, objective, silent_at_zero
from .optimizer import learning_rate
from .policy import Policy
from .run import Trainer, TrainResult
from .sampling import Evaluation, Rollout, completion_of, evaluate, sample
from .tasks import Example, Reward, Task, examples_of_step, load_task, prompt_token_ids

PerAnswer: TypeAlias = "list[Tensor] | None"  # one tensor an answer, as long as the answer


@dataclass
class Batch:
    """One step's answers with their scores."""

    rollout: Rollout
    rewards: list[float]
    advantages: Tensor  # (B,) fp32, CPU


def train_grpo(
    config: GRPOConfig | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    task: Task | None = None,
    prompts: Sequence[Example] | None = None,
    reward: Reward | None = None,
) -> TrainResult:
    """Train a causal language model with GRPO; see ``GRPOConfig`` for every setting.

    Args:
        model: a built model of transformers, trained in place; None loads ``config.model``. Give a run that goes on
            the model it began with: its weights come from the checkpoint, but it is the reference of ``kl_coef``.
        tokenizer: its tokenizer; None is fine for prompts of token ids, and rewards then get token ids.
        task: what to learn; or ``prompts`` and ``reward``, a function (example, completion) -> number; or neither,
            for ``config.task``.

    An interrupted run goes on from the last checkpoint in ``config.output_dir`` when it is started again.
    """
    trainer = GRPOTrainer(config, model=model, tokenizer=tokenizer, task=task, prompts=prompts, reward=reward)
    try:
        return trainer.run()
    finally:
        trainer.optimizer.close()


class GRPOTrainer(Trainer):
    """The loop behind ``train_grpo``."""

    name = "GRPO"

    def __init__(
        self,
        config: GRPOConfig | None = None,
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        task: Task | None = None,
        prompts: Sequence[Example] | None = None,
        reward: Reward | None = None,
    ) -> None:
        self.config = c = config or GRPOConfig()
        check_objective(c)  # a wrong setting shows before the work
        if (prompts is None) != (reward is None) or (prompts is not None and task is not None):
            raise ValueError("prompts, reward: wanted both, or a task, or none of them")
        if prompts is not None and reward is not None:
            task = Task(train=prompts, reward=reward)
        self.task = task or load_task(c.task, seed=c.seed, heldout=c.eval_prompts, **c.task_options)
        if len(self.task.train) == 0:
            raise ValueError("prompts: none to train on")
        super().__init__(c, model, tokenizer)
        self.policy = Policy(self.model, autocast=c.precision == "autocast", layout=c.layout)
        self.reference = self.policy.frozen_copy() if c.kl_coef > 0 else None
        self.end_ids = end_token_ids(self.model, self.tokenizer)
        self.optimizer = self.make_optimizer(self.model)

    def heldout_row(self) -> dict[str, float]:
        if not self.task.heldout:
            return {}
        result = self.evaluate()
        return {"heldout_accuracy": result.accuracy, "heldout_reward": result.reward}

    def brief(self, row: dict[str, Any]) -> str:
        return f"reward {row['reward_mean']:.2f}"

    def plot(self, rows: list[dict[str, Any]], folder: Path) -> None:
        plot_rewards(rows, folder / "rewards.png", f"GRPO on {self.task.name}")

    def evaluate(self) -> Evaluation:
        """Greedy answers to the task's held-out examples."""
        with self.chosen_backend():
            return evaluate(
                self.policy, self.task.heldout, self.task.reward, tokenizer=self.tokenizer, end_ids=self.end_ids,
                max_new_tokens=self.config.max_new_tokens, batch_size=self.config.sampling_batch_size,
            )  # fmt: skip

    def step(self, step: int) -> dict[str, Any]:
        """One step, counted from 1: its row of metrics."""
        self.phases = Phases(self.policy.device)
        batch = self.collect(step)
        metrics = self.update(batch, step)
        rollout, seconds = batch.rollout, self.phases.seconds
        lengths = [len(answer) for answer in rollout.answers]
        sampled = [value for answer in rollout.logprobs for value in answer]
        return {
            "step": step,
            "reward_mean": float(np.mean(batch.rewards)),
            "reward_std": float(np.std(batch.rewards)),
            "silent_answers": float((batch.advantages == 0).float().mean()),
            "answer_tokens": sum(lengths),
            "answer_length": sum(lengths) / len(lengths),
            "ended": sum(rollout.ended) / len(rollout.ended),
            "entropy_sampled": -float(np.mean(sampled)),  # −log p of what was drawn: unbiased for the entropy
            **metrics,
            "seconds": sum(seconds.values()),
            **{f"seconds_{phase}": value for phase, value in seconds.items()},
        }

    def collect(self, step: int) -> Batch:
        """Sample and score the answers of one step."""
        c = self.config
        examples = examples_of_step(self.task.train, step, c.prompts_per_step, c.seed)
        prompts = [prompt_token_ids(example, self.tokenizer) for example in examples]
        with self.chosen_backend():
            rollout = sample(
                self.policy, prompts, group_size=c.group_size, max_new_tokens=c.max_new_tokens, end_ids=self.end_ids,
                temperature=c.temperature, top_p=c.top_p, top_k=c.top_k, generator=self.generator,
                batch_size=c.sampling_batch_size,
            )  # fmt: skip
        self.phases.mark("sample")
        rewards = []
        for i, answer in enumerate(rollout.answers):
            example = examples[i // c.group_size]
            value = float(self.task.reward(example, completion_of(answer, self.end_ids, self.tokenizer)))
            if not math.isfinite(value):
                raise ValueError(f"reward: wanted a finite number, got {value} for {example!r}")
            rewards.append(value)
        advantages = rf.group_advantages(
            torch.tensor(rewards),
            group_size=c.group_size,
            scale=None if c.advantage_scale == "none" else c.advantage_scale,  # type: ignore[arg-type]
            baseline=c.advantage_baseline,  # type: ignore[arg-type]
            backend="eager" if c.backend == "eager" else None,
        )
        self.phases.mark("reward")
        return Batch(rollout, rewards, advantages)

    def update(self, batch: Batch, step: int) -> dict[str, float]:
        """The optimizer steps on one batch: ``epochs`` passes of ``minibatches`` steps each."""
        c = self.config
        count = len(batch.rollout.answers)
        old: PerAnswer = None
        if c.old_logprobs == "sampler":
            old = [torch.tensor(values) for values in batch.rollout.logprobs]
        elif c.epochs * c.minibatches > 1:
            old = self._logprobs_without_grad(self.policy, batch)
        reference = self._logprobs_without_grad(self.reference, batch) if self.reference else None
        averages, norms = Averages(), []
        for _ in range(c.epochs):
            prompts = list(range(count // c.group_size))
            if c.epochs * c.minibatches > 1:
                prompts = torch.randperm(len(prompts), generator=self.generator).tolist()
            for part in np.array_split(prompts, c.minibatches):
                index = [int(p) * c.group_size + g for p in part for g in range(c.group_size)]
                loss = self._accumulate(batch, index, old, reference, averages)
                metrics = {"loss": loss, "ratio_max": averages.largest("ratio_max")}
                norms.append(self.update_weights(step, metrics, {"answers": index, **vars(batch)}))
                averages.add({"loss": torch.tensor(loss)}, 1)
        result = averages.result()
        skipped = sum(not math.isfinite(norm) for norm in norms)
        return {**result, "grad_norm": float(np.mean(norms)), "updates_skipped": float(skipped),
                "learning_rate": learning_rate(c, step)}  # fmt: skip

    def _accumulate(
        self, batch: Batch, index: list[int], old: PerAnswer, reference: PerAnswer, averages: Averages
    ) -> float:
        """Gradients of one minibatch, micro-batch by micro-batch, normalised by the tokens of all of it."""
        c, answers = self.config, batch.rollout.answers
        num_tokens, num_sequences = sum(len(answers[i]) for i in index), len(index)
        if silent_at_zero(c):
            index = [i for i in index if batch.advantages[i] != 0]
        sampler = [torch.tensor(values) for values in batch.rollout.logprobs]
        total, device = 0.0, self.policy.device
        for micro in self.micro_batches(index):
            lengths = [len(answers[i]) for i in micro]
            sampled = _packed(sampler, micro, device)
            with self.chosen_backend():
                logp, entropy = self._logprobs(self.policy, batch, micro, entropy=c.entropy_coef != 0)
                loss, metrics = objective(
                    c, logp, _packed(old, micro, device), batch.advantages[micro].to(device), lengths, num_tokens,
                    num_sequences, ref_logp=_packed(reference, micro, device), entropy=entropy, sampled=sampled,
                )  # fmt: skip
                loss.backward()
            self.phases.mark("backward")
            averages.add(metrics, sum(lengths))
            if sampled is not None:  # what bf16 and the cache make of the same weights
                averages.add({"sampler_gap": (logp.detach() - sampled).abs().mean()}, sum(lengths))
            total += float(loss.detach())
        return total

    def _logprobs(
        self, policy: Policy, batch: Batch, index: list[int], *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        rollout = batch.rollout
        groups = [i // rollout.group_size for i in index]
        layout = policy.choose_layout([rollout.prompts[g] for g in groups], [rollout.answers[i] for i in index], groups)
        mark = self.phases.mark
        return policy.token_logprobs(layout, temperature=self.config.temperature, return_entropy=entropy, mark=mark)

    @torch.no_grad()
    def _logprobs_without_grad(self, policy: Policy, batch: Batch) -> list[Tensor]:
        """Log-probabilities of each answer's tokens under ``policy`` as it is now."""
        found: list[Tensor] = []
        for micro in self.micro_batches(list(range(len(batch.rollout.answers)))):
            with self.chosen_backend():
                logp, _ = self._logprobs(policy, batch, micro)
            found.extend(logp.split([len(batch.rollout.answers[i]) for i in micro]))
        self.phases.mark("forward")
        return found


def _packed(values: PerAnswer, index: list[int], device: torch.device) -> Tensor | None:
    """Per-answer tensors, the chosen ones, one behind the other."""
    return None if values is None else torch.cat([values[i] for i in index]).to(device)
