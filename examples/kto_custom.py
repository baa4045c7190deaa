"""KTO on single answers of one's own, in plain Python: calm ones are desirable, loud ones are not.

    python examples/kto_custom.py

Printed is the margin of desirable held-out answers over undesirable ones.
"""

import calm_answers

from rl4llm_fast.trainer import KTOConfig, train_kto


def main(**changes):
    """``changes`` are further settings, as in ``main(steps=100)``."""
    settings = {
        "steps": 12, "batch_size": 8, "learning_rate": 2e-5, "eval_every": 12,
        "output_dir": "runs/kto_custom",
    }  # fmt: skip
    rows = calm_answers.labelled()
    return train_kto(KTOConfig(**settings | changes), rows=rows[8:], heldout_rows=rows[:8])


if __name__ == "__main__":
    calm_answers.report(main(), "heldout_margin")
