"""Checkers of final answers: 1 where a text gives the wanted answer, else 0. They read and compare, nothing more."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from .data import numbered_rows, usable
from .tasks import Example, Task, last_number

Checker = Callable[[str, str], bool]  # (completion, wanted)

_NUMBER = re.compile(r"([-+]?)\$?(\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:\s*/\s*(\d+))?\s*(%?)")
_CHOICE = [re.compile(r"\(([A-Z])\)"), re.compile(r"\b(?i:answer|option|choice)(?:\s+is)?\s*:?\s*\**([A-Z])\b")]


def number_of(text: str) -> Fraction | None:
    """The last number in ``text``, exactly: 1,234 · −0.5 · 3/4 · 20%; None without one."""
    text = text.replace("\N{MINUS SIGN}", "-")
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    last = found[-1]
    sign, digits, divisor, percent = last.groups()
    before = text[last.start() - 1 : last.start()]
    if sign and (before.isalnum() or before == ")"):
        sign = ""  # "4-3": a difference, whose last number is 3
    try:
        value = Fraction(digits.replace(",", "")) / (int(divisor) if divisor else 1)
    except (ValueError, ZeroDivisionError):  # more digits than Python converts; a division by zero
        return None
    return (-value if sign == "-" else value) / (100 if percent else 1)


def same_number(completion: str, wanted: str) -> bool:
    """Whether the last numbers of the two are equal as numbers: 0.50, 1/2 and 50% are."""
    value = number_of(completion)
    return value is not None and value == number_of(wanted)


def choice_of(text: str) -> str | None:
    """The letter that ``text`` chooses: alone ("B", "b."), in brackets ("(B)"), or after "answer", "option", "choice".

    The last one counts. A letter within a sentence ("A train leaves") is no choice.
    """
    alone = text.strip().strip("().:*\"' \n")
    if len(alone) == 1 and alone.isascii() and alone.isalpha():
        return alone.upper()
    found = [(match.start(), match.group(1).upper()) for form in _CHOICE for match in form.finditer(text)]
    return max(found)[1] if found else None


def same_choice(completion: str, wanted: str) -> bool:
    choice = choice_of(completion)
    return choice is not None and choice == choice_of(wanted)


def same_text(completion: str, wanted: str) -> bool:
    """Whether the two are the same words: case, white space and punctuation at the ends of words do not count."""
    words = [[word.strip(".,;:!?\"'()*") for word in text.casefold().split()] for text in (completion, wanted)]
    return [w for w in words[0] if w] == [w for w in words[1] if w]


CHECKERS: dict[str, Checker] = {"number": same_number, "choice": same_choice, "text": same_text}


def jsonl_task(path: str, *, seed: int = 0, heldout: int = 64, checker: str = "auto", strict: bool = False) -> Task:
    """Questions of one's own: a JSONL file of {"prompt": text, "answer": text}, ``heldout`` prompts of it held out.

    Args:
        checker: number, choice or text; auto: number where every answer is one, else text.
        strict: stop at a line without the two, in place of leaving it out with a report.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown checker, too few distinct prompts, under ``strict`` a line that cannot be used.
    """
    if checker not in ("auto", *CHECKERS):
        raise ValueError(f"task_options.checker: wanted auto, {', '.join(CHECKERS)}, got {checker!r}")

    def question(row: Any) -> Example:
        given = row if isinstance(row, dict) else {}
        answer = str(given.get("answer", ""))
        if not isinstance(given.get("prompt"), str) or not given["prompt"].strip() or not answer.strip():
            raise ValueError(f'wanted {{"prompt": text, "answer": text}}, got {str(row)[:80]}')
        return {**given, "answer": answer}

    rows: dict[str, Example] = {}
    for row in usable(numbered_rows(path, setting="task"), path, question, strict):
        rows.setdefault(row["prompt"], row)  # a question that comes twice is one
    if len(rows) <= heldout:
        raise ValueError(
            f"{path}: {len(rows)} distinct prompts, too few to hold {heldout} of them out (eval_prompts, "
            "or heldout of train ppo)"
        )
    examples = list(rows.values())
    order = np.random.default_rng([seed, 1]).permutation(len(examples)).tolist()
    held, train = ([examples[i] for i in sorted(part)] for part in (order[:heldout], order[heldout:]))
    if checker == "auto":
        numeric = all(
            last_number(e["answer"]) == e["answer"].strip() and number_of(e["answer"]) is not None for e in examples
        )
        checker = "number" if numeric else "text"
    same = CHECKERS[checker]
    return Task(
        train=train,
        reward=lambda example, completion: float(same(completion, example["answer"])),
        heldout=held,
        name=Path(path).stem,
    )
