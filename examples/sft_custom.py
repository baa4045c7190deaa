"""Supervised fine-tuning on answers of one's own, in plain Python.

    python examples/sft_custom.py

SmolLM2-135M-Instruct learns to answer calmly; printed is the loss of a token of held-out answers.
"""

import calm_answers

from rl4llm_fast.trainer import SFTConfig, train_sft


def main(**changes):
    """``changes`` are further settings, as in ``main(steps=100)``."""
    settings = {
        "steps": 15, "batch_size": 8, "learning_rate": 2e-5, "eval_every": 15,
        "output_dir": "runs/sft_custom",
    }  # fmt: skip
    rows = calm_answers.answers()
    return train_sft(SFTConfig(**settings | changes), rows=rows[8:], heldout_rows=rows[:8])


if __name__ == "__main__":
    calm_answers.report(main(), "heldout_loss")
