"""Training loops over the fused ops: ``from rl4llm_fast.trainer import GRPOConfig, train_grpo``."""

from __future__ import annotations

from .config import GRPOConfig, load_config
from .grpo import train_grpo
from .run import TrainResult
from .sampling import Rollout, evaluate, sample
from .tasks import Task, load_task

__all__ = [
    "GRPOConfig",
    "Rollout",
    "Task",
    "TrainResult",
    "evaluate",
    "load_config",
    "load_task",
    "sample",
    "train_grpo",
]
