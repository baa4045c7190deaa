"""The settings of a PPO run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .config import check_stop_tokens
from .data import DataConfig


@dataclass
class PPOConfig(DataConfig):
    """Everything that ``train_ppo`` can be told; a row of ``data`` is {"prompt"}, and whatever a reward function reads.

    ``batch_size`` counts prompts a step, one answer to each; ``micro_batch_size`` answers a forward pass.
    """

    # What scores an answer: one of these
    reward_model: str = ""  # a folder that train rm saved
    reward: str = ""  # package.module:function, (example, completion) -> number; also from the current folder
    task: str = ""  # prompts and reward in one, as train grpo has them: of reasoning-gym, JSONL or one's own
    task_options: dict[str, Any] = field(default_factory=dict)
    heldout_reward: str = ""  # a second function, which held-out answers are measured with

    # Sampling
    max_new_tokens: int = 24
    temperature: float = 1.0  # of sampling, and of log-probabilities throughout
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    sampling_batch_size: int = 0  # prompts sampled at a time; 0: all of them
    stop_tokens: list[Any] = field(default_factory=list)  # that end an answer beside the model's: ids, or their text
    sampler: str = "own"  # own: the model itself | vllm: an engine beside it; or an object from Python
    sampler_options: dict[str, Any] = field(default_factory=dict)  # e.g. gpu_memory_utilization = 0.3

    # Rewards and advantages
    kl_coef: float = 0.05  # β of the shaped reward (7); 0: no reference model
    kl_target: float = 0.0  # > 0: β adapts (32) until a token's mean KL to the reference is near it
    kl_every: int = 10  # steps from one adaptation of β to the next: that KL is slow to answer, and β would run away
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True  # advantages to mean 0 and variance 1 over the step's tokens

    # The policy's loss
    loss: str = "ppo_clip"  # a kind of rf.policy_loss
    loss_options: dict[str, Any] = field(default_factory=dict)  # its knobs, e.g. eps_low = 0.1
    aggregation: str = "token_mean"
    entropy_coef: float = 0.0  # c₂ of (33)
    kl_old_target: float = 0.0  # > 0: the knob beta of kl_pen (31) adapts (32) until KL(old‖now) of a step is near it
    trust_region: float = 0.0  # δ of (9): an update at KL(old‖now) > δ is refused; 0: none is

    # The value model
    value: str = "auto"  # begins as reward_model | policy | shared: a head on the policy's trunk (33) | auto: the first
    value_clip: float = 0.2
    value_coef: float = 0.5  # c₁ of (33), of halved squares
    value_learning_rate: float = 0.0  # of a value model of its own; 0: learning_rate

    # PPO-ptx (14)
    ptx_coef: float = 0.0  # λ, of the mean loss of a token
    ptx_data: str = ""  # JSONL of {"prompt", "answer"}
    ptx_batch_size: int = 8  # rows an update

    # Optimisation
    epochs: int = 2  # passes over a step's answers
    minibatches: int = 2  # updates a pass
    batch_size: int = 16
    output_dir: str = "runs/ppo"

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "value": ("auto", "reward_model", "policy", "shared"),
        "sampler": ("own", "vllm"),
    }
    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = (
        "max_new_tokens",
        "kl_every",
        "ptx_batch_size",
        "epochs",
        "minibatches",
    )
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (
        "top_k",
        "sampling_batch_size",
        "kl_coef",
        "kl_target",
        "kl_old_target",
        "trust_region",
        "entropy_coef",
        "value_coef",
        "value_learning_rate",
        "ptx_coef",
    )
    POSITIVE: ClassVar[tuple[str, ...]] = ("temperature", "top_p", "value_clip")
    INFINITE: ClassVar[tuple[str, ...]] = ("trust_region", "value_clip")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.wanted(self.top_p <= 1, "top_p", "at most 1")
        self.wanted(0 <= self.gamma <= 1, "gamma", "a number in [0, 1]")
        self.wanted(0 <= self.lam <= 1, "lam", "a number in [0, 1]")
        self.wanted(self.minibatches <= self.batch_size, "minibatches", "at most batch_size")
        self.wanted(self.kl_target == 0 or self.kl_coef > 0, "kl_target", "kl_coef > 0 to begin with")
        self.wanted(self.kl_old_target == 0 or self.loss == "kl_pen", "kl_old_target", 'loss = "kl_pen"')
        check_stop_tokens(self)

    def ops(self) -> tuple[str, ...]:
        return "linear_policy_loss", "value_loss", "gae"
