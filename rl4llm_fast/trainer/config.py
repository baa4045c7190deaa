"""The settings of a GRPO run: one flat dataclass, filled from Python, from TOML, and from ``--set key=value``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .settings import RunConfig, fill

# Kinds whose loss and gradient are exactly 0 where the advantage is 0.
_SILENT_AT_ZERO = {"pg", "cpi", "ppo_clip", "grpo", "gspo", "cispo", "sapo"}


@dataclass
class GRPOConfig(RunConfig):
    """Everything that ``train_grpo`` can be told. Tables of options (``*_options``) go on as keyword arguments."""

    # What it learns from
    task: str = "chain_sum"  # a task of reasoning-gym, a .jsonl file of questions and answers, or module:function
    task_options: dict[str, Any] = field(default_factory=dict)
    template: str = "none"  # r1_zero: Table 1 around the question; only what is in the answer tags is checked
    template_example: str = ""  # an exchange shown before the question, for models that never hit the form
    rewards: dict[str, Any] = field(default_factory=dict)  # weights of rules; see rewards.make_rewards; {}: the task's
    reward_options: dict[str, Any] = field(default_factory=dict)

    # Sampling: prompts_per_step x group_size answers a step
    prompts_per_step: int = 4
    group_size: int = 8
    max_new_tokens: int = 12
    temperature: float = 1.0
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    sampling_batch_size: int = 0  # prompts sampled at a time; 0: all of them
    stop_tokens: list[Any] = field(default_factory=list)  # that end an answer beside the model's: ids, or their text
    sampler: str = "own"  # own: the model itself | vllm: an engine beside it; or an object from Python
    sampler_options: dict[str, Any] = field(default_factory=dict)  # e.g. gpu_memory_utilization = 0.3
    overlap: bool = False  # draw a step's answers during the step before: one more copy of the weights, an update older

    # Advantages and loss
    loss: str = "grpo"  # a kind of rf.policy_loss
    loss_options: dict[str, Any] = field(default_factory=dict)  # its knobs, e.g. eps_high = 0.28
    aggregation: str = "token_mean"
    advantage_scale: str = "group"
    advantage_baseline: str = "mean"
    supervision: str = "outcome"  # process: advantages from the rewards of an answer's steps
    step_reward: str = ""  # by dotted name: (example, texts of the steps) -> one number a step
    step_separator: str = "\n"  # a step ends where this does; see steps.cut
    groups_without_spread: str = "keep"  # drop: do not count them | resample: put others in their place
    resample_rounds: int = 4  # how often at most
    overlong: str = "keep"  # mask: answers cut off at max_new_tokens are in the group's baseline, not in the loss
    kl_coef: float = 0.0  # > 0: a frozen copy of the first model is the reference
    kl_estimator: str = "k3"
    kl_gradient: str = "value"
    entropy_coef: float = 0.0
    old_logprobs: str = "policy"  # policy: the model's before its first update on the batch | sampler: the sampler's
    rollout_correction: str = "none"  # weights for what the sampler and the training forward disagree on
    rollout_cap: float = 2.0
    rollout_floor: float = 0.0
    rollout_level: str = "token"

    # Optimisation; micro_batch_size counts answers
    epochs: int = 1  # passes over each batch
    minibatches: int = 1  # optimizer steps a pass
    layout: str = "auto"  # shared: one copy of every prefix that answers share | plain: one row an answer
    head: str = (
        "auto"  # the loss from hidden states, or from logits | auto: from hidden states where the head is linear
    )

    # The run
    output_dir: str = "runs/grpo"
    eval_prompts: int = 64
    log_samples: int = 0  # answers a step in samples.jsonl, with what each rule gave

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "layout": ("auto", "shared", "plain"),
        "head": ("auto", "hidden", "logits"),
        "advantage_scale": ("group", "batch", "none"),
        "advantage_baseline": ("mean", "leave_one_out"),
        "old_logprobs": ("policy", "sampler"),
        "sampler": ("own", "vllm"),
        "rollout_correction": ("none", "truncate", "mask"),
        "rollout_level": ("token", "sequence"),
        "template": ("none", "r1_zero"),
        "supervision": ("outcome", "process"),
        "groups_without_spread": ("keep", "drop", "resample"),
        "overlong": ("keep", "mask"),
    }
    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = (
        "prompts_per_step",
        "group_size",
        "max_new_tokens",
        "epochs",
        "minibatches",
    )
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (
        "top_k",
        "sampling_batch_size",
        "kl_coef",
        "eval_prompts",
        "rollout_floor",
        "resample_rounds",
        "log_samples",
    )
    POSITIVE: ClassVar[tuple[str, ...]] = ("temperature", "top_p", "rollout_cap")
    INFINITE: ClassVar[tuple[str, ...]] = ("rollout_cap",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.wanted(self.top_p <= 1, "top_p", "at most 1")
        truncated = self.sampler == "vllm" and (self.top_p < 1 or self.top_k > 0)
        floored = self.rollout_floor == 0 or self.rollout_correction != "truncate"
        self.wanted(floored, "rollout_floor", "0 with rollout_correction = truncate, which has none")
        used = self.old_logprobs == "sampler" or self.rollout_correction != "none"
        self.wanted(not (truncated and used), "sampler", "own: the log-probabilities of vLLM are after top-p and top-k")
        self.wanted(used or not self.overlap, "overlap", "old_logprobs = sampler, or a rollout_correction, with true")
        self.wanted(self.minibatches <= self.prompts_per_step, "minibatches", "at most prompts_per_step")
        self.wanted(bool(self.step_separator), "step_separator", "a text")
        learns = self.group_size > 1 or self.supervision == "process" or not silent_at_zero(self)
        self.wanted(learns, "group_size", "at least 2, for the advantage of an answer without others is 0")
        if self.supervision == "process":  # its normalisation is that of §6.3, over all steps of a group
            self.wanted(self.advantage_scale == "group", "advantage_scale", "group under process supervision")
            self.wanted(self.advantage_baseline == "mean", "advantage_baseline", "mean under process supervision")
        check_stop_tokens(self)

    def ops(self) -> tuple[str, ...]:
        return ("linear_policy_loss",) if self.head == "hidden" else ("policy_loss",)  # the first needs all of that


def silent_at_zero(config: GRPOConfig) -> bool:
    """Whether answers of advantage 0 give neither loss nor gradient, so that they need no forward pass."""
    return config.loss in _SILENT_AT_ZERO and config.kl_coef == 0 and config.entropy_coef == 0


def check_stop_tokens(config: Any) -> None:
    """Raise ValueError unless ``stop_tokens`` are token ids and texts; whether a text is one token shows later."""
    known = all(isinstance(token, (int, str)) and not isinstance(token, bool) for token in config.stop_tokens)
    config.wanted(known, "stop_tokens", "token ids, or texts that are one token")


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> GRPOConfig:
    """A GRPO config from a TOML file (or the defaults) and overrides; see ``settings.fill``."""
    return fill(GRPOConfig, path, overrides)
