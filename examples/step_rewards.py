"""A task and a step reward of one's own, for examples/grpo_process.toml: sums worked out line by line.

The question "a + b + c" wants two lines, "a + b = s" and "s + c = t", as two answered questions before it show. A line
that is the next of the two earns 1, any other sum -1 (one that is false, or true and not what was asked), a line
without a sum 0. The last line of an answer that is not complete earns -1, whatever it says: without that a model learns
to stop behind its first line, where nothing can go wrong any more. Lines are read with a regular expression, never
executed.
"""

import random
import re

from rl4llm_fast.trainer import Task
from rl4llm_fast.trainer.tasks import last_number

SUM = re.compile(r"\d+ \+ \d+ = \d+")
SHOWN = ((2, 4, 1), (3, 5, 2))


def lines_of(a, b, c):
    return [f"{a} + {b} = {a + b}", f"{a + b} + {c} = {a + b + c}"]


def question(a, b, c):
    """Chat messages: two questions with their answers, then this one."""
    messages = []
    for numbers in SHOWN:
        messages.append({"role": "user", "content": " + ".join(map(str, numbers))})
        messages.append({"role": "assistant", "content": "\n".join(lines_of(*numbers))})
    return [*messages, {"role": "user", "content": f"{a} + {b} + {c}"}]


def sums_in_lines(seed, heldout, size=2048):
    """Sums of three one-digit numbers; the held-out ones are never trained on."""
    draw = random.Random(seed)
    numbers = [(a, b, c) for a in range(1, 10) for b in range(1, 10) for c in range(1, 10)]
    numbers = [n for n in numbers if n not in SHOWN]
    draw.shuffle(numbers)
    rows = [{"prompt": question(*n), "answer": str(sum(n)), "lines": lines_of(*n)} for n in numbers]
    train = [draw.choice(rows[heldout:]) for _ in range(size)]
    return Task(train=train, reward=right, heldout=rows[:heldout], name="sums in lines")


def right(example, completion):
    """1 where the last number is the sum."""
    return float(last_number(completion) == example["answer"])


def true_lines(example, steps):
    """One number a line."""
    wanted, rewards = list(example["lines"]), []
    for step in steps:
        found = SUM.search(step)
        if found is None:
            rewards.append(0.0)
        elif wanted and found.group() == wanted[0]:
            rewards.append(1.0)
            wanted.pop(0)
        else:
            rewards.append(-1.0)
    if wanted and rewards:
        rewards[-1] = -1.0
    return rewards
