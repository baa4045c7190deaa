"""GRPO with prompts and a reward of one's own, in plain Python.

    python examples/grpo_custom.py

SmolLM2-135M-Instruct learns to answer in few words: three at most earn a reward of 1, more earn less.
"""

from rl4llm_fast.trainer import GRPOConfig, train_grpo

PROMPTS = [f"Tell me about {what}." for what in ("the sea", "rain", "bread", "music", "snow", "trees", "ants", "light")]


def short(example: str, completion: str) -> float:
    words = len(completion.split())
    return 0.0 if words == 0 else min(1.0, 3 / words)


def main(**changes):
    """``changes`` are further settings, as in ``main(steps=100)``."""
    settings = {
        "steps": 15, "prompts_per_step": 4, "group_size": 8, "max_new_tokens": 24, "learning_rate": 2e-5,
        "output_dir": "runs/grpo_custom",
    }  # fmt: skip
    return train_grpo(GRPOConfig(**settings | changes), prompts=PROMPTS, reward=short)


def report(result) -> None:
    """Print the mean reward of the first and of the last step."""
    first, last = result.history[0], result.history[-1]
    print(f"mean reward {first['reward_mean']:.2f} -> {last['reward_mean']:.2f}; files in {result.output_dir}")


if __name__ == "__main__":
    report(main())
