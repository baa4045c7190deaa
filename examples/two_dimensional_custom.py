"""2D-DPO on answers of one's own, in plain Python: each sentence has a score for its calm and one for its content.

    python examples/two_dimensional_custom.py

Printed is the margin of held-out pairs.
"""

import calm_answers

from rl4llm_fast.trainer import DPOConfig, train_dpo


def main(**changes):
    """``changes`` are further settings, as in ``main(steps=100)``."""
    settings = {
        "loss": "2d_dpo", "score_max": 1.0, "steps": 12, "batch_size": 4, "learning_rate": 2e-5, "eval_every": 12,
        "output_dir": "runs/two_dimensional_custom",
    }  # fmt: skip
    rows = calm_answers.segmented()
    return train_dpo(DPOConfig(**settings | changes), rows=rows[8:], heldout_rows=rows[:8])


if __name__ == "__main__":
    calm_answers.report(main(), "heldout_margin")
