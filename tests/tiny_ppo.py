"""A tiny PPO run: a random Llama, a reward that counts sevens."""

from __future__ import annotations

from tiny_data import settings
from tiny_llama import PROMPTS, count_sevens, tiny_model

from rl4llm_fast.trainer import PPOConfig, train_ppo
from rl4llm_fast.trainer.ppo import PPOTrainer
from rl4llm_fast.trainer.reward_model import RewardModel

ROWS = [{"prompt": prompt} for prompt in PROMPTS]


def sevens(example, answer: list[int]) -> float:
    return count_sevens(example, answer)


def config(tmp_path, **changes) -> PPOConfig:
    usual = {"steps": 4, "batch_size": 16, "heldout": 0, "max_new_tokens": 4, "learning_rate": 3e-3, "kl_coef": 0.01}
    return PPOConfig(**settings(tmp_path, **{**usual, **changes}))


def sources(**changes) -> dict:
    if "reward_model" not in changes and "reward" not in changes:
        changes["reward"] = sevens
    return {"model": tiny_model(), "prompts": ROWS, **changes}


def run(tmp_path, given=None, **changes):
    return train_ppo(config(tmp_path, **changes), **(given or sources()))


def trainer_of(tmp_path, given=None, **changes) -> PPOTrainer:
    return PPOTrainer(config(tmp_path, **changes), **(given or sources()))


def reward_model(seed: int = 3, **changes) -> RewardModel:
    return RewardModel.of(tiny_model(seed, **changes), seed=seed).eval()
