"""GRPO (Shao et al. 2024; survey §6.3 and (82)): sample, score, compare within the group, take a step. Repeat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rl4llm_fast as rf

from .attempts import Attempts
from .batch import Batch, PerAnswer, joined, packed
from .config import GRPOConfig, silent_at_zero
from .data import answerable, listed
from .devices import host_backend, to_device
from .layout import Layout
from .metrics import Averages, History, Phases, plot_rewards
from .named import named_function
from .objective import Head, check_objective, objective
from .optimizer import learning_rate
from .policy import Policy
from .preflight import check_callable, check_sampler, check_type, checked
from .rewards import Rewards, Sample, make_rewards, of_function, r1_zero_task, trace_means
from .run import TrainResult
from .sampler import Sampler, SamplingTrainer
from .sampling import Evaluation, Rollout, completion_of, evaluate
from .steps import StepReward, Steps
from .steps import advantages as step_advantages
from .steps import score as score_steps
from .tasks import Example, Reward, Task, examples_of_step, load_task, prompt_token_ids


def train_grpo(
    config: GRPOConfig | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    task: Task | None = None,
    prompts: Sequence[Example] | None = None,
    reward: Reward | None = None,
    step_reward: StepReward | None = None,
    sampler: Sampler | None = None,
) -> TrainResult:
    """Train a causal language model with GRPO; see ``GRPOConfig`` for every setting.

    Args:
        model: a built model of transformers, trained in place; None loads ``config.model``. Give a run that goes on
            the model it began with: its weights come from the checkpoint, but it is the reference of ``kl_coef``.
        tokenizer: its tokenizer; None is fine for prompts of token ids, and rewards then get token ids.
        task: what to learn; or ``prompts`` and ``reward``, a function (example, completion) -> number; or neither,
            for ``config.task``.
        step_reward: (example, texts of an answer's steps) -> one number a step, for ``supervision = "process"``.
        sampler: an inference engine that answers the prompts; see ``Sampler``.

    An interrupted run goes on from the last checkpoint in ``config.output_dir`` when it is started again.
    """
    trainer = GRPOTrainer(
        config, model=model, tokenizer=tokenizer, task=task, prompts=prompts, reward=reward, step_reward=step_reward,
        sampler=sampler,
    )  # fmt: skip
    try:
        return trainer.run()
    finally:
        trainer.optimizer.close()


class GRPOTrainer(SamplingTrainer):
    """The loop behind ``train_grpo``."""

    name = "GRPO"
    many_processes = True
    config: GRPOConfig

    def __init__(
        self,
        config: GRPOConfig | None = None,
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        task: Task | None = None,
        prompts: Sequence[Example] | None = None,
        reward: Reward | None = None,
        step_reward: StepReward | None = None,
        rewards: Rewards | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        self.config = c = checked(GRPOConfig, config, model)
        check_sampler(c, sampler)
        check_type("task", task, Task, "a name goes into config.task")
        check_callable(reward=reward, step_reward=step_reward)
        check_objective(c)  # a wrong setting shows before the work
        if rewards is None and c.rewards:  # a wrong name or weight too
            rewards = make_rewards(c.rewards, c.reward_options, self.correct, max_new_tokens=c.max_new_tokens)
        if c.supervision == "process" and step_reward is None:
            c.wanted(bool(c.step_reward), "step_reward", 'a function, for supervision = "process"')
            step_reward = named_function(c.step_reward, "step_reward")
        self.step_reward = step_reward if c.supervision == "process" else None
        self.traced = rewards is not None
        if (prompts is None) != (reward is None) or (prompts is not None and task is not None):
            raise ValueError("prompts, reward: wanted both, or a task, or none of them")
        if prompts is not None and reward is not None:
            task = Task(train=listed("prompts", prompts), reward=reward)
        self.task = task or load_task(c.task, seed=c.seed, heldout=c.eval_prompts, strict=c.strict, **c.task_options)
        if len(self.task.train) == 0:
            raise ValueError("prompts: none to train on")
        self.rewards = rewards or of_function(self.task.reward)
        super().__init__(c, model, tokenizer)
        if self.step_reward and self.tokenizer is None:
            raise ValueError("tokenizer: supervision = 'process' cuts texts into steps and needs one")
        if c.template == "r1_zero":
            self.task = r1_zero_task(self.task, self.tokenizer, c.template_example)
        self.task = replace(self.task, train=self.usable(self.task.train), heldout=self.usable(self.task.heldout))
        self.samples: History | None = None
        self.policy = Policy(self.model, autocast=c.precision == "autocast", layout=c.layout)
        self.reference = self.policy.frozen_copy() if c.kl_coef > 0 else None
        self.set_up_sampling(sampler)
        if c.overlap:
            self.set_up_ahead(lambda step: self.prompts(self.examples(step)), c.group_size)
        self.optimizer = self.make_optimizer(self.model)

    def usable(self, examples: Sequence[Example]) -> list[Example]:
        """Those whose prompt can be read and leaves room for an answer."""
        c = self.config
        return answerable(examples, "prompts", self.tokenizer, self.limits, c.max_new_tokens, c.strict)

    def heldout_row(self) -> dict[str, float]:
        if not self.task.heldout:
            return {}
        result = self.evaluate()
        row = {"heldout_accuracy": result.accuracy, "heldout_reward": result.reward}
        if self.traced:
            _, traces = self.score(self.task.heldout, result.rollout)
            row |= {f"heldout_{name}": value for name, value in trace_means(traces).items() if name != "accuracy"}
        return row

    def before_first_step(self) -> dict[str, float]:
        return self.heldout_row()

    def correct(self, example: Example, completion: Any) -> float:
        """What the rule accuracy asks: the task's own reward."""
        return self.task.reward(example, completion)

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
                ranks=self.ranks,
            )  # fmt: skip

    def step(self, step: int) -> dict[str, Any]:
        """One step, counted from 1: its row of metrics."""
        self.phases = Phases(self.policy.device)
        batch = self.collect(step)
        if self.ahead is not None and (step < self.config.steps or self.config.checkpoint_every):
            self.begin(step + 1)  # also behind the last step: a run that is made longer goes on with it
        metrics = self.update(batch, step)
        rollout, seconds = batch.rollout, self.phases.seconds
        lengths = [len(answer) for answer in rollout.answers]
        self.log_samples(step, batch)
        sampled = [value for answer in rollout.logprobs for value in answer]
        return {
            "step": step,
            "reward_mean": float(np.mean(batch.rewards)),
            "reward_std": float(np.std(batch.rewards)),
            **batch.measures,
            "silent_answers": 1 - float(batch.is_live().float().mean()),
            "answer_tokens": sum(lengths),
            "answer_length": sum(lengths) / len(lengths),
            "ended": sum(rollout.ended) / len(rollout.ended),
            "rollout_logp": float(np.mean(sampled)),  # the sampler's own, a token
            "entropy_sampled": -float(np.mean(sampled)),  # −log p of what was drawn: unbiased for the entropy
            **metrics,
            "seconds": sum(seconds.values()),
            **{f"seconds_{phase}": value for phase, value in seconds.items()},
        }

    def collect(self, step: int) -> Batch:
        """Sample and score the answers of one step; further prompts where groups without spread are to be replaced."""
        c = self.config
        batch = Batch(Rollout([], c.group_size, [], [], []), [], torch.empty(0))
        steps: list[Steps] = []
        for turn in range(1 + c.resample_rounds * (c.groups_without_spread == "resample")):
            new = self.examples(step, turn)
            begun = self.ahead is not None and turn == 0
            rollout = self.drawn(step) if begun else self.draw(self.prompts(new), c.group_size)
            self.phases.mark("sample")
            rewards, traces = self.score(new, rollout)
            if self.step_reward:
                steps += self.score_steps(new, rollout)
            batch.rollout = joined(batch.rollout, rollout)
            batch.rewards += rewards
            batch.traces += traces
            batch.advantages = self.advantages(batch.rewards, steps)
            spread = batch.is_live().unflatten(0, (-1, c.group_size)).any(1)
            if c.groups_without_spread != "keep":
                batch.groups = spread.nonzero().flatten().tolist()[: c.prompts_per_step]
            self.phases.mark("reward")
            if len(batch.groups or ()) == c.prompts_per_step:
                break
        batch.measures = {"groups_without_spread": 1 - float(spread.float().mean())}
        if self.traced:
            batch.measures |= {f"reward_{name}": value for name, value in trace_means(batch.traces).items()}
        if steps:
            batch.measures["steps"] = float(np.mean([len(s.ends) for s in steps]))
            batch.measures["step_reward_mean"] = float(np.mean([value for s in steps for value in s.rewards]))
        return batch

    def examples(self, step: int, turn: int = 0) -> list[Example]:
        c = self.config
        return examples_of_step(self.task.train, step, c.prompts_per_step, c.seed + 1_000_003 * turn)

    def prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        return [prompt_token_ids(example, self.tokenizer) for example in examples]

    def score(self, examples: Sequence[Example], rollout: Rollout) -> tuple[list[float], list[dict[str, float]]]:
        """The reward of each answer, and what each rule gave to it."""

        def one(i: int) -> Sample:
            answer = rollout.answers[i]
            completion = completion_of(answer, self.end_ids, self.tokenizer)
            return Sample(examples[i // rollout.group_size], completion, len(answer), rollout.ended[i])

        own = [one(i) for i in self.ranks.share(range(len(rollout.answers)))]
        found = self.ranks.gather(self.rewards.score_all(own))
        self.rewards.attempts.report(self.ranks)
        return [total for total, _ in found], [trace for _, trace in found]

    def score_steps(self, examples: Sequence[Example], rollout: Rollout) -> list[Steps]:
        """The steps of each answer with their rewards."""
        judge, separator = self.step_reward, self.config.step_separator
        assert judge is not None

        def one(i: int) -> Steps:
            example = examples[i // rollout.group_size]
            return score_steps(judge, example, rollout.answers[i], self.tokenizer, separator, self.end_ids, attempts)

        attempts = Attempts()
        steps = self.ranks.map(one, range(len(rollout.answers)))
        attempts.report(self.ranks)
        return steps

    def advantages(self, rewards: list[float], steps: Sequence[Steps]) -> Tensor:
        """From the answers' rewards, (B,), or from those of their steps, (B, T)."""
        c = self.config
        if steps:
            return step_advantages(steps, c.group_size, host_backend("process_advantages", c.backend))
        return rf.group_advantages(
            torch.tensor(rewards),
            group_size=c.group_size,
            scale=None if c.advantage_scale == "none" else c.advantage_scale,  # type: ignore[arg-type]
            baseline=c.advantage_baseline,  # type: ignore[arg-type]
            backend=host_backend("group_advantages", c.backend),
        )

    def log_samples(self, step: int, batch: Batch) -> None:
        """The first answers of the step into ``samples.jsonl``."""
        if not self.config.log_samples:
            return
        if self.samples is None:
            path = Path(self.config.output_dir) / "samples.jsonl"
            self.samples = History(path, keep_steps=step - 1, write=self.ranks.first)
        for row in batch.samples(self.config.log_samples, self.tokenizer, self.end_ids):
            self.samples.add({"step": step, **row})

    def update(self, batch: Batch, step: int) -> dict[str, float]:
        """The optimizer steps on one batch: ``epochs`` passes of ``minibatches`` steps each."""
        c = self.config
        size = c.group_size
        groups = list(range(len(batch.rollout.answers) // size)) if batch.groups is None else batch.groups
        used = [i for g in groups for i in range(g * size, (g + 1) * size) if self._counts(batch, i)]
        old: PerAnswer = None
        sampler = [torch.tensor(values) for values in batch.rollout.logprobs]
        if c.old_logprobs == "sampler":
            old = sampler
        elif c.epochs * c.minibatches > 1:
            old = self._logprobs_without_grad(self.policy, batch, used)
        reference = self._logprobs_without_grad(self.reference, batch, used) if self.reference else None
        taught = batch.is_live().tolist() if silent_at_zero(c) else [True] * len(batch.rollout.answers)
        averages, norms = Averages(), []
        for _ in range(c.epochs):
            order = groups
            if c.epochs * c.minibatches > 1:
                order = [groups[place] for place in torch.randperm(len(groups), generator=self.generator).tolist()]
            for part in np.array_split(order, c.minibatches):
                index = [i for g in part for i in range(int(g) * size, (int(g) + 1) * size) if self._counts(batch, i)]
                loss, own = 0.0, Averages()
                if any(taught[i] for i in index):  # else nothing to learn from: no step, not even of the momentum
                    loss = self._accumulate(batch, index, old, reference, sampler, own)
                    metrics = {"loss": loss, "ratio_max": max(self.ranks.gather([own.largest("ratio_max")]))}
                    norms.append(self.update_weights(step, metrics, {"answers": index, **vars(batch)}))
                if index:
                    averages.join(own)
                    averages.add({"loss": torch.tensor(loss)}, 1)
        result = averages.result(self.ranks)
        skipped = sum(not math.isfinite(norm) for norm in norms)
        return {**result, "grad_norm": float(np.mean(norms)) if norms else 0.0, "updates_skipped": float(skipped),
                "learning_rate": learning_rate(c, step)}  # fmt: skip

    def _counts(self, batch: Batch, answer: int) -> bool:
        """Whether an answer takes part in the loss."""
        return self.config.overlong == "keep" or batch.rollout.ended[answer]

    def _accumulate(
        self,
        batch: Batch,
        index: list[int],
        old: PerAnswer,
        reference: PerAnswer,
        sampler: list[Tensor],
        averages: Averages,
    ) -> float:
        """Gradients of one minibatch, micro-batch by micro-batch, normalised by the tokens of all of it."""
        c, answers = self.config, batch.rollout.answers
        num_tokens, num_sequences = sum(len(answers[i]) for i in index), len(index)
        if silent_at_zero(c):
            live = batch.is_live()
            index = [i for i in index if live[i]]
        device = self.policy.device
        total = torch.zeros((), dtype=torch.float64, device=device)  # read once: a minibatch waits for its GPU no more
        for micro in self.micro_batches(index):
            lengths = [len(answers[i]) for i in micro]
            sampled = packed(sampler, micro, device)
            with self.chosen_backend():
                layout = self._layout(self.policy, batch, micro)
                source: Tensor | Head
                if self.from_hidden:
                    source, entropy = self._head(layout), None
                else:
                    source, entropy = self.policy.token_logprobs(
                        layout, temperature=c.temperature, return_entropy=c.entropy_coef != 0, mark=self.phases.mark
                    )
                with self.policy.precision():
                    loss, metrics, logp = objective(
                        c, source, packed(old, micro, device), to_device(batch.advantages_of(micro), device), lengths,
                        num_tokens, num_sequences, ref_logp=packed(reference, micro, device), entropy=entropy,
                        sampled=sampled,
                    )  # fmt: skip
                self.phases.mark("loss")
                loss.backward()
            self.phases.mark("backward")
            averages.add(metrics, sum(lengths))
            assert sampled is not None  # what bf16 and the cache make of the same weights:
            averages.add({"sampler_gap": (logp - sampled).abs().mean()}, sum(lengths))
            total += loss.detach()
        return self.ranks.sum(total)

    @property
    def from_hidden(self) -> bool:
        """Whether the loss is made from hidden states, chunk by chunk; ``head`` "auto": where the head is linear."""
        return self.config.head == "hidden" or (self.config.head == "auto" and self.policy.has_linear_head)

    def _head(self, layout: Layout) -> Head:
        with self.policy.precision():
            hidden, weight, bias = self.policy.head_inputs(layout)
        self.phases.mark("forward")
        of_answers = layout.of_answers
        return Head(of_answers(hidden), weight, bias, of_answers(layout.token_ids), self.policy.softcap)

    def _layout(self, policy: Policy, batch: Batch, index: list[int]) -> Layout:
        rollout = batch.rollout
        groups = [i // rollout.group_size for i in index]
        return policy.choose_layout([rollout.prompts[g] for g in groups], [rollout.answers[i] for i in index], groups)

    @torch.no_grad()
    def _logprobs_without_grad(self, policy: Policy, batch: Batch, index: list[int]) -> list[Tensor]:
        """Log-probabilities of the tokens of the answers in ``index`` under ``policy`` as it is now; none of others."""
        found, lengths = [torch.empty(0)] * len(batch.rollout.answers), list(map(len, batch.rollout.answers))
        own: list[Tensor] = []
        for micro in self.micro_batches(index):
            with self.chosen_backend():
                layout = self._layout(policy, batch, micro)
                logp, _ = policy.token_logprobs(
                    layout, temperature=self.config.temperature, from_hidden=self.from_hidden
                )
            own.append(logp)
        if self.ranks.size > 1:
            own = self.ranks.gather([torch.cat(own).cpu()] if own else [])
        if own:
            for i, logp in zip(index, torch.cat(own).split([lengths[i] for i in index]), strict=True):
                found[i] = logp
        self.phases.mark("logprobs")
        return found
