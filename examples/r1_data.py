"""Cold-start data for examples/r1.toml: sums and differences of two one-digit numbers, worked out in words.

    python examples/r1_data.py data/r1

Writes cold_start.jsonl: 48 questions with their answers in the form <think>...</think><answer>...</answer>. The
held-out questions of the recipe are not among them.
"""

import json
import re
import sys
from pathlib import Path

from rl4llm_fast.trainer import load_task

OPTIONS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
TERMS = re.compile(r"(\d+) ([+-]) (\d+)")


def worked(question: str, answer: str) -> str:
    a, sign, b = TERMS.search(question).groups()
    thought = f"Adding {b} to {a} gives {answer}." if sign == "+" else f"Taking {b} from {a} leaves {answer}."
    return f"<think> {thought} </think><answer> {answer} </answer>"


def rows(count: int) -> list[dict]:
    task = load_task("chain_sum", heldout=64, **OPTIONS)
    questions = {example["prompt"]: example["entry"]["answer"] for example in task.train}
    return [{"prompt": q, "answer": " " + worked(q, questions[q])} for q in list(questions)[:count]]


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows(48))
    (folder / "cold_start.jsonl").write_text(lines, encoding="utf-8")
    print(f"{lines.count(chr(10))} rows in {folder / 'cold_start.jsonl'}")
