"""A task and a step reward of one's own, for examples/grpo_process.toml: sums worked out line by line.

The question asks for a + b + c in two lines, "a + b = s" and "s + c = t". A line that states a true sum earns 1, one
that states a false sum -1, any other line 0; the lines are read with a regular expression, never executed.
"""

import random
import re

from rl4llm_fast.trainer import Task
from rl4llm_fast.trainer.tasks import last_number

SUM = re.compile(r"(\d+) \+ (\d+) = (\d+)")
EXAMPLE = "Add the numbers step by step, one sum a line.\n2 + 4 + 1:\n2 + 4 = 6\n6 + 1 = 7\n"


def sums_in_lines(seed, heldout, size=2048):
    """Sums of three one-digit numbers; the held-out ones are never trained on."""
    draw = random.Random(seed)
    numbers = [(a, b, c) for a in range(1, 10) for b in range(1, 10) for c in range(1, 10)]
    draw.shuffle(numbers)
    rows = [{"prompt": f"{EXAMPLE}{a} + {b} + {c}:\n", "answer": str(a + b + c)} for a, b, c in numbers]
    train = [draw.choice(rows[heldout:]) for _ in range(size)]
    return Task(train=train, reward=right, heldout=rows[:heldout], name="sums in lines")


def right(example, completion):
    """1 where the last number is the sum."""
    return float(last_number(completion) == example["answer"])


def true_lines(example, steps):
    """One number a line."""
    return [line_reward(step) for step in steps]


def line_reward(line):
    found = SUM.search(line)
    if found is None:
        return 0.0
    a, b, total = map(int, found.groups())
    return 1.0 if a + b == total else -1.0
