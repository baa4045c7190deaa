"""R1's four stages on a task of one's own, in plain Python, and its answers taught to another model (survey §6.7).

    python examples/r1_custom.py

The task: which of two words comes first in the dictionary. A few dozen worked answers start SmolLM2-135M-Instruct off.
"""

import random

from calm_answers import SUBJECTS, answers

from rl4llm_fast.trainer import DistillConfig, R1Config, Task, train_distill, train_r1


def task() -> Task:
    """Pairs of words; the last dozen are held out."""
    pairs = [(a, b) for a in SUBJECTS for b in SUBJECTS if a != b]
    random.Random(0).shuffle(pairs)
    rows = [{"prompt": f"Which word comes first in the dictionary, {a} or {b}?", "answer": min(a, b)} for a, b in pairs]
    return Task(train=rows[:-12], heldout=rows[-12:], reward=right, name="first word")


def right(example, completion: str) -> float:
    """1 where the answer, read between its tags, is the word."""
    return float(completion.strip().strip(".").lower() == example["answer"])


def worked(example) -> dict:
    """A row of the cold start: the answer in the form that R1's format reward asks for."""
    word = example["answer"]
    thought = f"The first letters decide, and {word} has the earlier ones."
    return {"prompt": example["prompt"], "answer": f" <think> {thought} </think><answer> {word} </answer>"}


def main(**changes):
    """``changes`` are further settings, as in ``main(learning_rate=2e-5)``."""
    words = task()
    settings = {
        "max_new_tokens": 40, "learning_rate": 1e-5, "eval_prompts": 12, "sft_from": "checkpoint",
        "output_dir": "runs/r1_custom",
        "cold_start": {"steps": 12, "learning_rate": 2e-5},
        "reasoning_rl": {"steps": 8, "prompts_per_step": 4, "group_size": 8},
        "rejection_sft": {"prompts": 24, "samples": 4, "keep": 1, "steps": 8},
        "final_rl": {"steps": 6, "prompts_per_step": 4, "group_size": 8},
    }  # fmt: skip
    return train_r1(
        R1Config(**settings | changes), task=words, cold_start_rows=[worked(row) for row in words.train[:40]],
        general_rows=answers(), helpful=calm,
    )  # fmt: skip


def calm(prompt: str, text: str) -> float:
    """What judges answers that no rule can: exclamation marks cost a tenth each."""
    return max(0.0, 1.0 - 0.1 * text.count("!"))


def distill(teacher: str, **changes):
    """The teacher's right and readable answers, learned by the model that R1 began with."""
    settings = {
        "teacher": teacher, "prompts": 40, "samples": 2, "keep": 1, "max_new_tokens": 40, "steps": 10,
        "learning_rate": 2e-5, "eval_every": 10, "eval_prompts": 12, "output_dir": "runs/distill_custom",
    }  # fmt: skip
    return train_distill(DistillConfig(**settings | changes), task=task())


if __name__ == "__main__":
    for row in main().history:
        print(row)
    student = distill("runs/r1_custom/4_final_rl/model")
    print(f"the student: {student.history[-1]}")
