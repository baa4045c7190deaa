"""PPO with prompts and a reward of one's own, in plain Python: no reward model, and values that begin at 0.

    python examples/ppo_custom.py

SmolLM2-135M-Instruct learns to answer in few words: three at most earn a reward of 1, more earn less.
"""

from grpo_custom import PROMPTS, report, short

from rl4llm_fast.trainer import PPOConfig, train_ppo


def main(**changes):
    """``changes`` are further settings, as in ``main(steps=100)``."""
    settings = {
        "steps": 10, "batch_size": 8, "max_new_tokens": 24, "epochs": 2, "minibatches": 1, "learning_rate": 2e-5,
        "kl_coef": 0.02, "heldout": 0, "output_dir": "runs/ppo_custom",
    }  # fmt: skip
    return train_ppo(PPOConfig(**settings | changes), prompts=[{"prompt": text} for text in PROMPTS], reward=short)


if __name__ == "__main__":
    report(main())
