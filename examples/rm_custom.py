"""A reward model from pairs of one's own, in plain Python.

    python examples/rm_custom.py

Calm answers are better than loud ones; printed is the share of held-out pairs that it puts in order.
"""

import calm_answers

from rl4llm_fast.trainer import RMConfig, train_rm


def main(**changes):
    """``changes`` are further settings, as in ``main(steps=100)``."""
    settings = {
        "steps": 12, "batch_size": 4, "learning_rate": 2e-5, "eval_every": 12,
        "output_dir": "runs/rm_custom",
    }  # fmt: skip
    rows = calm_answers.pairs()
    return train_rm(RMConfig(**settings | changes), rows=rows[8:], heldout_rows=rows[:8])


if __name__ == "__main__":
    calm_answers.report(main(), "heldout_accuracy")
