"""Data sets that a tiny Llama learns in seconds, and what the tests of the trainers on data have in common."""

from __future__ import annotations

import numpy as np
import torch
from tiny_llama import END


def settings(tmp_path, **changes) -> dict:
    return {
        "output_dir": str(tmp_path), "precision": "fp32", "device": "cpu", "steps": 20, "batch_size": 8, "heldout": 12,
        "learning_rate": 1e-2, "checkpoint_every": 0, "progress": False, "save_model": False, **changes,
    }  # fmt: skip


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 20, rng.integers(1, 5)).tolist() for _ in range(count)]


def demonstrations(count: int = 60) -> list[dict]:
    """The answer counts up from the prompt's last token."""
    return [{"prompt": p, "answer": [*range(p[-1] + 1, p[-1] + 2 + len(p)), END]} for p in prompts(count)]


def pairs(count: int = 60) -> list[dict]:
    """Sevens are better than eights, whatever stands around them."""
    rng = np.random.default_rng(1)
    rows = []
    for prompt in prompts(count):
        noise = rng.integers(9, 30, 3).tolist()
        rows.append({"prompt": prompt, "chosen": [*noise[:2], 7, END], "rejected": [noise[0], 8, *noise[1:], END]})
    return rows


def timeless(result) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in result.history]


def gradients(trainer, step: int = 1) -> list[torch.Tensor]:
    """Those of one step, which is not taken."""
    trainer.optimizer.step = lambda rate, norm: 0.0
    trainer.step(step)
    return [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


def assert_same_gradients(one, other) -> None:
    assert len(one) == len(other) > 0
    assert any(gradient.abs().max() > 1e-4 for gradient in one)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def labelled(count: int = 60) -> list[dict]:
    """Sevens are desirable, eights are not: either answer of a pair, in turns."""
    return [
        {"prompt": row["prompt"], "answer": row["rejected" if i % 2 else "chosen"], "desirable": i % 2 == 0}
        for i, row in enumerate(pairs(count))
    ]


def segmented(count: int = 60) -> list[dict]:
    """Pairs whose second segment alone says which answer is better: a seven against an eight."""
    rng = np.random.default_rng(2)
    rows = []
    for prompt in prompts(count):
        noise = rng.integers(9, 30, 5).tolist()
        rows.append({
            "prompt": prompt,
            "chosen": [*noise[:2], noise[2], 7, END], "chosen_segments": [[0, 2], [2, 5]],
            "rejected": [noise[3], 8, noise[4], END], "rejected_segments": [[0, 1], [1, 4]],
            "chosen_scores": [0.0, [0.5, 1.5]], "rejected_scores": [0.0, [1.0, 1.0]],
        })  # fmt: skip
    return rows


def ranked(count: int = 60) -> list[dict]:
    """Of four answers the one with the most sevens is the best."""
    rng = np.random.default_rng(3)
    rows = []
    for prompt in prompts(count):
        noise = rng.integers(9, 30, 3).tolist()
        answers = [[*[7] * k, *noise[k:], END] for k in (3, 2, 1, 0)]
        rows.append({"prompt": prompt, "answers": answers, "ranks": [0, 1, 2, 3]})
    return rows
