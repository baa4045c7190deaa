"""Curry-DPO on ranked answers of one's own, in plain Python: a round for each gap in rank, the widest first.

    python examples/curry_custom.py

Printed is the margin of held-out pairs of all gaps.
"""

import calm_answers

from rl4llm_fast.trainer import CurryConfig, train_curry


def main(**changes):
    """``changes`` are further settings, as in ``main(steps=100)``."""
    settings = {
        "steps_per_round": 6, "batch_size": 4, "learning_rate": 2e-5, "eval_every": 6,
        "output_dir": "runs/curry_custom",
    }  # fmt: skip
    rows = calm_answers.ranked()
    return train_curry(CurryConfig(**settings | changes), rows=rows[8:], heldout_rows=rows[:8])


if __name__ == "__main__":
    calm_answers.report(main(), "heldout_margin")
