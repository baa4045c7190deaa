"""Training loops over the fused ops: ``from rl4llm_fast.trainer import GRPOConfig, train_grpo``."""

from __future__ import annotations

from .config import GRPOConfig, load_config
from .curry import CurryConfig, train_curry
from .distill import DistillConfig, train_distill
from .dpo import DPOConfig, train_dpo
from .grpo import train_grpo
from .kto import KTOConfig, train_kto
from .ppo import train_ppo
from .ppo_config import PPOConfig
from .r1 import R1Config, train_r1
from .reward_model import RewardModel, load_reward_model
from .rm import RMConfig, train_rm
from .run import TrainResult
from .sampler import Sampler, VLLMSampler
from .sampling import Rollout, evaluate, sample
from .settings import fill
from .sft import SFTConfig, train_sft
from .tasks import Task, load_task

__all__ = [
    "CurryConfig",
    "DPOConfig",
    "DistillConfig",
    "GRPOConfig",
    "KTOConfig",
    "PPOConfig",
    "R1Config",
    "RMConfig",
    "RewardModel",
    "Rollout",
    "SFTConfig",
    "Sampler",
    "Task",
    "TrainResult",
    "VLLMSampler",
    "evaluate",
    "fill",
    "load_config",
    "load_reward_model",
    "load_task",
    "sample",
    "train_curry",
    "train_distill",
    "train_dpo",
    "train_grpo",
    "train_kto",
    "train_ppo",
    "train_r1",
    "train_rm",
    "train_sft",
]
