"""DPO on pairs of one's own, in plain Python.

    python examples/dpo_custom.py

SmolLM2-135M-Instruct learns to prefer calm answers to loud ones; printed is the margin of held-out pairs.
"""

import calm_answers

from rl4llm_fast.trainer import DPOConfig, train_dpo


def main(**changes):
    """``changes`` are further settings, as in ``main(steps=100)``."""
    settings = {
        "steps": 12, "batch_size": 4, "learning_rate": 2e-5, "eval_every": 12,
        "output_dir": "runs/dpo_custom",
    }  # fmt: skip
    rows = calm_answers.pairs()
    return train_dpo(DPOConfig(**settings | changes), rows=rows[8:], heldout_rows=rows[:8])


if __name__ == "__main__":
    calm_answers.report(main(), "heldout_margin")
