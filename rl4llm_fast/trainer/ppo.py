"""PPO as in InstructGPT (survey §3, §4; Algorithm 1 of §4.3.8): policy, value, reward and reference model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import rl4llm_fast as rf

from .data import (
    Limits,
    Part,
    Row,
    answer_token_ids,
    check_length,
    digest,
    encode_rows,
    part_of,
    prompt_of,
    read_rows,
    usable,
)
from .devices import to_device
from .layout import starts_of
from .metrics import Averages, Phases, plot_curves
from .named import named_function
from .optimizer import learning_rate
from .ppo_config import PPOConfig
from .ppo_models import Experience, Models
from .preflight import check_callable, check_loss, check_sampler, check_type, checked
from .reward_model import RewardModel, head_of, load_reward_model
from .rewards import name_of
from .run import TrainResult
from .sampler import Sampler, SamplingTrainer
from .sampling import Rollout
from .scorers import Prompt, Scorer, function_scorer, model_scorer
from .tasks import Example, Reward, Task, examples_of_step, load_task, prompt_token_ids

_NAMES = ("prompts", "heldout_prompts")  # what rows are called here


def train_ppo(
    config: PPOConfig | None = None,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    prompts: Sequence[Row] | None = None,
    heldout_prompts: Sequence[Row] | None = None,
    task: Task | None = None,
    reward_model: RewardModel | None = None,
    reward: Reward | None = None,
    heldout_reward: Reward | None = None,
    ptx_rows: Sequence[Row] | None = None,
    sampler: Sampler | None = None,
) -> TrainResult:
    """Train a causal language model with PPO; see ``PPOConfig`` for every setting.

    Args:
        model: a built model of transformers, trained in place, and as it comes the reference; None loads
            ``config.model``. Give a run that goes on the model it began with: its weights come from the checkpoint.
        tokenizer: its tokenizer; None is fine for token ids, and reward functions then get token ids.
        prompts, heldout_prompts: {"prompt"} each, text, chat messages or token ids; messages that end with the
            assistant's are continued. None reads ``config.data``.
        task: prompts and their reward in one, in place of both; or neither, for ``config.task``.
        reward_model: what scores an answer; or ``reward``, a function (example, completion) -> a finite number; or
            neither, for ``config.reward_model`` or ``config.reward``.
        heldout_reward: a second function, which held-out answers are measured with, never trained on.
        ptx_rows: {"prompt", "answer"}, the pre-training batches of PPO-ptx; None reads ``config.ptx_data``.
        sampler: an inference engine that answers the prompts; see ``Sampler``.

    An interrupted run goes on from the last checkpoint in ``config.output_dir`` when it is started again.
    """
    trainer = PPOTrainer(
        config, model=model, tokenizer=tokenizer, prompts=prompts, heldout_prompts=heldout_prompts, task=task,
        reward_model=reward_model, reward=reward, heldout_reward=heldout_reward, ptx_rows=ptx_rows, sampler=sampler,
    )  # fmt: skip
    try:
        return trainer.run()
    finally:
        trainer.close()


class PPOTrainer(SamplingTrainer):
    """The loop behind ``train_ppo``."""

    name = "PPO"
    many_processes = True

    def __init__(
        self,
        config: PPOConfig | None = None,
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        prompts: Sequence[Row] | None = None,
        heldout_prompts: Sequence[Row] | None = None,
        task: Task | None = None,
        reward_model: RewardModel | None = None,
        reward: Reward | None = None,
        heldout_reward: Reward | None = None,
        ptx_rows: Sequence[Row] | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        self.config = c = checked(PPOConfig, config, model)
        check_sampler(c, sampler)
        check_type("task", task, Task, "a name goes into config.task")
        check_type("reward_model", reward_model, RewardModel, "a folder goes into config.reward_model")
        check_callable(reward=reward, heldout_reward=heldout_reward)
        one = torch.zeros(1)
        check_loss(c, lambda: rf.policy_loss(
            one, one, one, kind=c.loss, aggregation=c.aggregation, cu_seqlens=torch.tensor([0, 1]),
            max_length=c.max_new_tokens, **c.loss_options,
        ))  # fmt: skip
        if heldout_reward is None and c.heldout_reward:
            heldout_reward = named_function(c.heldout_reward, "heldout_reward")
        if reward is None and c.reward:
            reward = named_function(c.reward, "reward")
        scored = reward_model is not None or bool(c.reward_model)
        if scored + (reward is not None) + (task is not None or bool(c.task)) != 1:
            raise ValueError("reward_model, reward, task: wanted one of them to score the answers")
        c.wanted(scored or c.value != "reward_model", "value", "policy or shared, without a reward model")
        if reward_model is None and scored:
            head_of(c.reward_model, "config: reward_model")
        if task is None and c.task:
            task = load_task(c.task, seed=c.seed, heldout=c.heldout, strict=c.strict, **c.task_options)
        read = None if task else read_rows(c, prompts, heldout_prompts, lambda row: ("prompt",), names=_NAMES)
        more: Part | None = None
        if c.ptx_coef > 0:
            c.wanted(ptx_rows is not None or bool(c.ptx_data), "ptx_data", "a JSONL file, for ptx_coef > 0")
            more = part_of(ptx_rows, "ptx_rows", c.ptx_data, "ptx_data", c.split, c.columns)
        super().__init__(c, model, tokenizer)

        # The prompts, and what PPO-ptx mixes in
        if read is not None:
            self.train, self.heldout = encode_rows(c, read, self.encode)
        elif task is not None:
            parts = {"task": task.train, "held-out task": task.heldout}
            self.train, self.heldout = (
                usable(enumerate(part, 1), name, self.encode, c.strict) if len(part) else []
                for name, part in parts.items()
            )
        if not self.train:
            raise ValueError("prompts: none to train on")
        self.ptx = [] if more is None else more.usable(self.encode_ptx, c.strict)
        self.data_key = digest([prompt.ids for prompt in self.train], self.ptx)

        # The four models
        if reward_model is None and c.reward_model:
            reward_model = load_reward_model(c.reward_model, device=self.device)
        if reward_model is not None:
            reward_model = reward_model.to(self.device)
            reward_model.autocast = c.precision == "autocast"
            self.check_context(Limits.of(reward_model).context)
        self.models = Models(c, self.model, reward_model, self.ranks)
        self.policy = self.models.policy
        self.set_up_sampling(sampler)
        by_function = partial(function_scorer, tokenizer=self.tokenizer, end_ids=self.end_ids, ranks=self.ranks)
        if reward_model is not None:
            vocabulary = self.policy.config.vocab_size
            self.score = model_scorer(reward_model, c.micro_batch_size, vocabulary=vocabulary, ranks=self.ranks)
        else:
            self.score = by_function(task.reward if task is not None else reward)  # type: ignore[arg-type]  # one is
        self.heldout_scores: dict[str, Scorer] = {"heldout_reward": self.score}
        if heldout_reward is not None:
            self.heldout_scores[f"heldout_{name_of(heldout_reward)}"] = by_function(heldout_reward)

        # What a step changes, and a checkpoint holds
        value_model, beta = self.models.value_model, c.loss_options.get("beta", 0.01)
        self.optimizer = self.make_optimizer(self.models.trained)
        self.value_optimizer = None if value_model is None else self.make_optimizer(value_model)
        self.value_schedule = replace(c, learning_rate=c.value_learning_rate or c.learning_rate)
        self.kl_ref = rf.AdaptiveKLController(c.kl_coef, c.kl_target) if c.kl_target else None
        self.kl_old = rf.AdaptiveKLController(beta, c.kl_old_target) if c.kl_old_target else None

    def encode(self, example: Example) -> Prompt:
        read = prompt_of if isinstance(example, dict) else prompt_token_ids
        prompt = Prompt(example, read(example, self.tokenizer))
        check_length(prompt.ids, [[0] * self.config.max_new_tokens], self.config.max_length, self.limits)
        return prompt

    def encode_ptx(self, row: Row) -> tuple[list[int], list[int]]:
        prompt, answer = prompt_of(row, self.tokenizer), answer_token_ids(row, "answer", self.tokenizer)
        check_length(prompt, [answer], self.config.max_length, self.limits)
        return prompt, answer

    def check_context(self, context: int | None) -> None:
        """Refuse a reward model, whose decoder may be the values' too, that cannot read the longest answer."""
        longest = max(len(prompt.ids) for prompt in [*self.train, *self.heldout]) + self.config.max_new_tokens
        if context is not None and longest > context:
            raise ValueError(
                f"reward_model: its context is {context} tokens, and a prompt with its answer takes up to {longest}; "
                f"max_length = {context} leaves longer ones out"
            )

    # One step: Algorithm 1

    def step(self, step: int) -> dict[str, Any]:
        """One step, counted from 1: its row of metrics."""
        self.phases = Phases(self.device)
        prompts = examples_of_step(self.train, step, self.config.batch_size, self.config.seed)
        with self.chosen_backend():
            rollout = self.sample(prompts, self.generator)
            scores = self.score(prompts, rollout.answers)
            self.phases.mark("reward")
            experience, judged = self.judge(rollout, scores)
            learned = self.update(experience, step)
            learned |= self.adapt(experience, step)
        seconds = self.phases.seconds
        return {
            "step": step,
            "reward_mean": float(np.mean(scores)),
            "reward_std": float(np.std(scores)),
            "answer_length": float(np.mean(experience.lengths)),
            "ended": float(np.mean(rollout.ended)),
            "rollout_logp": float(np.mean([value for answer in rollout.logprobs for value in answer])),
            "entropy_sampled": -float(np.mean([value for answer in rollout.logprobs for value in answer])),
            **judged,
            **learned,
            "learning_rate": learning_rate(self.config, step),
            "seconds": sum(seconds.values()),
            **{f"seconds_{phase}": value for phase, value in seconds.items() if value},
        }

    def sample(self, prompts: Sequence[Prompt], generator: torch.Generator) -> Rollout:
        rollout = self.draw([prompt.ids for prompt in prompts], generator=generator)
        self.phases.mark("sample")
        return rollout

    @torch.no_grad()
    def judge(self, rollout: Rollout, scores: list[float]) -> tuple[Experience, dict[str, float]]:
        """Log-probabilities, values, shaped rewards (7), advantages (25, 28) and returns of the answers."""
        c, e = self.config, Experience(rollout, self.device)
        e.logp, e.ref_logp, e.values = self.models.look(e, self.parts(e))
        self.phases.mark("logprobs")
        kl, beta = e.kl(), self.kl_ref.beta if self.kl_ref else c.kl_coef
        rewards = rf.shape_rewards(to_device(torch.tensor(scores), self.device), kl, beta=beta, cu_seqlens=e.starts)
        e.advantages, e.returns = rf.gae(rewards, e.values, gamma=c.gamma, lam=c.lam, cu_seqlens=e.starts)
        _, fit = rf.value_loss(e.values, e.returns)
        metrics = {
            "shaped_reward_mean": float(rewards.sum()) / len(scores),  # what (14) maximises, less its last term
            "value_mean": float(e.values.mean()),
            "return_mean": float(e.returns.mean()),
            "explained_variance": float(fit["explained_variance"]),
        }
        if e.ref_logp is not None:
            metrics |= {"kl_ref": float(kl.mean()), "kl_ref_answer": float(kl.sum()) / len(scores), "kl_coef": beta}
        if c.whiten:
            e.advantages = rf.whiten(e.advantages)
        self.phases.mark("reward")
        return e, metrics

    def update(self, e: Experience, step: int) -> dict[str, float]:
        """``epochs`` passes over the answers, shuffled into ``minibatches`` updates each (§3.5.2).

        Answers are shuffled, not their tokens: a token's gradient costs the forward pass of all before it.
        """
        c, averages = self.config, Averages()
        norms: list[float] = []
        refused = 0
        for epoch in range(c.epochs):
            order = torch.randperm(len(e.answers), generator=self.generator).tolist()
            for place, index in enumerate(np.array_split(order, c.minibatches)):
                metrics = self.gradients(e, index.tolist())
                outside = c.trust_region and rf.trust_region_exceeded(metrics["kl_old_k3"], c.trust_region)
                if outside and math.isfinite(metrics["loss"]):
                    self.optimizer.discard()  # (9): the weights are outside already, and go no further
                    refused += 1
                else:
                    if self.ptx:
                        number = ((step - 1) * c.epochs + epoch) * c.minibatches + place
                        metrics["ptx_loss"] = self.gradients_ptx(number)
                    both = {**metrics, "loss": metrics["loss"] + c.value_coef * metrics["value_loss"]}
                    norms.append(self.update_weights(step, both, {"index": index.tolist(), **vars(e)}))
                if self.value_optimizer is not None:
                    rate = learning_rate(self.value_schedule, step)
                    metrics["value_grad_norm"] = self.value_optimizer.step(rate, c.max_grad_norm)
                    self.phases.mark("optimizer")
                averages.add({name: torch.tensor(value) for name, value in metrics.items()}, 1)
        skipped = sum(not math.isfinite(norm) for norm in norms)
        return {**averages.result(), "grad_norm": float(np.mean(norms)) if norms else 0.0,
                "updates_skipped": float(skipped), "updates_refused": float(refused)}  # fmt: skip

    def gradients(self, e: Experience, index: list[int]) -> dict[str, float]:
        """Those of one minibatch of answers: (10) with its entropy bonus and (12), (33) in all. Returns its metrics."""
        c, averages = self.config, Averages()
        tokens = sum(e.lengths[i] for i in index)
        options = {**c.loss_options, **({"beta": self.kl_old.beta} if self.kl_old else {})}
        for micro in self.micro_batches(index):
            layout, lengths = e.layout(micro).to(self.device), [e.lengths[i] for i in micro]
            with self.policy.precision():
                hidden, weight, bias = self.policy.head_inputs(layout)
                self.phases.mark("forward")
                loss, metrics = rf.linear_policy_loss(
                    hidden, weight, layout.token_ids, e.part(e.logp, micro), e.part(e.advantages, micro), bias,
                    kind=c.loss, cu_seqlens=starts_of(lengths, self.device), temperature=c.temperature,
                    softcap=self.policy.softcap, entropy_coef=c.entropy_coef, aggregation=c.aggregation,
                    num_tokens=tokens, num_sequences=len(index), max_length=c.max_new_tokens, **options,
                )  # fmt: skip
            self.phases.mark("loss")
            if self.models.value_model is not None:
                loss.backward()  # type: ignore[no-untyped-call]  # and its graph is gone before the next one is built
                self.phases.mark("backward")
            value_loss, fit = rf.value_loss(
                self.models.values(layout, hidden), e.part(e.returns, micro), old_values=e.part(e.values, micro),
                clip=c.value_clip, num_tokens=tokens,
            )  # fmt: skip
            (c.value_coef * value_loss + (loss if self.models.value_model is None else 0.0)).backward()
            self.phases.mark("backward")
            share = tokens / sum(lengths)  # losses are shares of the minibatch's: their mean by tokens becomes a sum
            metrics |= {"loss": loss * share, "value_loss": value_loss * share, "value_clip": fit["clip_fraction"]}
            averages.add(metrics, sum(lengths))
        return averages.result(self.ranks)

    def gradients_ptx(self, number: int) -> float:
        """Those of λ times the supervised loss (3) of the pre-training batch of an update, counted from 0 (14)."""
        c, total = self.config, torch.zeros((), dtype=torch.float64, device=self.device)
        batch = examples_of_step(self.ptx, number + 1, c.ptx_batch_size, c.seed)
        for micro in self.micro_batches(batch):
            loss = self.models.supervised_loss(micro, num_tokens=sum(len(answer) for _, answer in batch))
            self.phases.mark("loss")
            (c.ptx_coef * loss).backward()  # type: ignore[no-untyped-call]
            self.phases.mark("backward")
            total += loss.detach()
        return self.ranks.sum(total)

    @torch.no_grad()
    def adapt(self, e: Experience, step: int) -> dict[str, float]:
        """The controllers of (32), after the updates: of the shaped reward's β, and of kl_pen's."""
        if self.kl_ref is not None and step % self.config.kl_every == 0:
            self.kl_ref.update(e.kl().mean())
        if self.kl_old is None:
            return {}
        now, beta = self.models.logprobs(self.policy, e, self.parts(e)), self.kl_old.beta
        kl = float(rf.kl_estimate(e.logp, now, "k3").mean())
        self.kl_old.update(kl)
        self.phases.mark("logprobs")
        return {"kl_old_after": kl, "kl_pen_beta": beta}

    def parts(self, e: Experience) -> list[list[int]]:
        return self.micro_batches(range(len(e.answers)))

    # The run around it

    @torch.no_grad()
    def heldout_row(self) -> dict[str, float]:
        """Mean scores and KL of answers to the held-out prompts, drawn with the same random numbers each time."""
        if not self.heldout:
            return {}
        with self.chosen_backend():
            rollout = self.sample(self.heldout, torch.Generator().manual_seed(self.config.seed))
            e = Experience(rollout, self.device)
            row = {name: float(np.mean(score(self.heldout, e.answers))) for name, score in self.heldout_scores.items()}
            if self.models.reference is not None:
                both = (self.policy, self.models.reference)
                e.logp, e.ref_logp = (self.models.logprobs(policy, e, self.parts(e)) for policy in both)
                kl = [float(e.kl().mean()), float(e.kl().sum()) / len(e.answers)]
                row |= {"heldout_kl_ref": kl[0], "heldout_kl_ref_answer": kl[1]}
        return {**row, "heldout_ended": float(np.mean(rollout.ended))}

    before_first_step = heldout_row

    def state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._changing().items()}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, part in self._changing().items():
            part.load_state_dict(state[name])

    def _changing(self) -> dict[str, Any]:
        parts = {"policy": self.optimizer, "value": self.value_optimizer, "kl_ref": self.kl_ref, "kl_old": self.kl_old}
        return {name: part for name, part in parts.items() if part is not None}

    def close(self) -> None:
        """Take the optimizers' hooks off the models."""
        self.optimizer.close()
        if self.value_optimizer is not None:
            self.value_optimizer.close()

    def brief(self, row: dict[str, Any]) -> str:
        return f"reward {row['reward_mean']:.2f}" + (f"  KL {row['kl_ref_answer']:.2f}" if "kl_ref" in row else "")

    def plot(self, rows: list[dict[str, Any]], folder: Path) -> None:
        scores = {name: f"{name.removeprefix('heldout_')}, held out" for name in self.heldout_scores}
        panels = {
            "score": {"reward_mean": "the step's answers", **scores},
            "KL to the reference, an answer": {"kl_ref_answer": "the step's", "heldout_kl_ref_answer": "held out"},
            "explained variance": {"explained_variance": "of the returns by the values"},
        }
        plot_curves(rows, folder / "ppo.png", "PPO", panels)
