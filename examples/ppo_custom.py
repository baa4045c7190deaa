"""PPO with prompts and a reward of one's own, in plain Python: no reward model, values by a head on the policy's trunk.

    python examples/ppo_custom.py

SmolLM2-135M-Instruct learns to write commas: three in a short answer earn a reward of 1.
"""

from grpo_custom import PROMPTS, report

from rl4llm_fast.trainer import PPOConfig, train_ppo


def commas(example: dict, completion: str) -> float:
    return min(1.0, completion.count(",") / 3)


def main(**changes):
    """``changes`` are further settings, as in ``main(steps=100)``."""
    settings = {
        "steps": 10, "batch_size": 16, "max_new_tokens": 24, "epochs": 2, "minibatches": 1, "learning_rate": 2e-5,
        "kl_coef": 0.02, "lam": 1.0, "value": "shared", "heldout": 0, "output_dir": "runs/ppo_custom",
    }  # fmt: skip
    rows = [{"prompt": text} for text in PROMPTS * 2]  # two answers to each prompt a step
    return train_ppo(PPOConfig(**settings | changes), prompts=rows, reward=commas)


if __name__ == "__main__":
    report(main())
