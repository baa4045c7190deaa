"""Prompts and rewards: a task is a list of examples to train on, one to test on, and a function that scores answers."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .extras import require
from .named import named_function

Example = Any  # a prompt (text, chat messages or token ids), or a mapping with the key "prompt" and whatever else
Reward = Callable[[Example, Any], float]  # (example, completion): the text, or token ids where there is no tokenizer


@dataclass
class Task:
    """What ``train_grpo`` learns: ``reward(example, completion)`` is a finite number, higher is better."""

    train: Sequence[Example]
    reward: Reward
    heldout: Sequence[Example] = field(default_factory=list)
    name: str = "task"


_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
_SIZE = 4096


def last_number(text: str) -> str:
    """The last number in ``text``, the whole text if there is none: "The answer is 7." -> "7"."""
    found = _NUMBER.findall(text)
    return found[-1] if found else text.strip()


def load_task(
    name: str,
    *,
    seed: int = 0,
    heldout: int = 64,
    strict: bool = False,
    size: int = _SIZE,
    answer: str = "auto",
    **options: Any,
) -> Task:
    """A task of reasoning-gym by name, e.g. ``load_task("chain_sum", min_terms=2, max_terms=2)``.

    A name that ends in ``.jsonl`` is a file of one's own: see ``checkers.jsonl_task``. One like ``module:function`` is
    a function of one's own that returns a ``Task``; it is called with ``seed``, ``heldout`` and the options.

    The questions of ``heldout`` are distinct, drawn with a seed of their own, and none of them is among ``train``:
    small tasks repeat questions, so other seeds alone would not keep them apart.

    Args:
        strict: stop at a line of a file that cannot be used, in place of leaving it out with a report.
        size: how many questions are drawn to train on (before held-out ones are taken out).
        answer: what is scored: the whole "text", or the "last_number" in it; "auto": the latter where the task's
            answers are numbers, since scorers count "The answer is 7." as wrong.
        options: go to ``reasoning_gym.create_dataset``.

    Raises:
        ImportError: reasoning-gym is missing.
        ValueError: an unknown task, or too few distinct questions.
    """
    own = options | ({} if size == _SIZE else {"size": size}) | ({} if answer == "auto" else {"answer": answer})
    if name.endswith(".jsonl"):
        from .checkers import jsonl_task

        return jsonl_task(name, seed=seed, heldout=heldout, strict=strict, **own)
    if ":" in name:
        made = named_function(name, "task")(seed=seed, heldout=heldout, **own)
        if not isinstance(made, Task):
            raise ValueError(f"config: task: wanted a function that returns a Task, {name!r} returned {made!r}")
        return made
    require("reasoning_gym", extra="demo")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"task_options.size: wanted a whole number of at least 1, got {size!r}")
    if answer not in ("auto", "text", "last_number"):
        raise ValueError(f"task_options.answer: wanted auto, text or last_number, got {answer!r}")
    import reasoning_gym

    try:
        test_set = reasoning_gym.create_dataset(name, size=50 * heldout + 1, seed=seed + 1_000_003, **options)
        train_set = reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"task: reasoning-gym cannot make {name!r} with {options}: {error}") from error

    held: dict[str, Example] = {}
    for index in range(len(test_set)):
        if len(held) == heldout:
            break
        entry = test_set[index]
        held.setdefault(entry["question"], {"prompt": entry["question"], "entry": entry})
    train = [
        {"prompt": entry["question"], "entry": entry}
        for entry in (train_set[index] for index in range(size))
        if entry["question"] not in held
    ]
    if len(held) < heldout or not train:
        raise ValueError(f"task: {name!r} with {options} has too few distinct questions to hold {heldout} of them out")

    numeric = answer == "auto" and all(_NUMBER.fullmatch(str(e["entry"]["answer"])) for e in train)
    find = last_number if numeric or answer == "last_number" else str.strip

    def reward(example: Example, completion: str) -> float:
        # Some scorers raise on nonsense. An answer that cannot be scored is a wrong answer.
        with contextlib.suppress(Exception):
            score = float(train_set.score_answer(find(completion), example["entry"]))
            if math.isfinite(score):
                return score
        return 0.0

    return Task(train=train, reward=reward, heldout=list(held.values()), name=name)


def examples_of_step(train: Sequence[Example], step: int, count: int, seed: int) -> list[Example]:
    """The ``count`` examples of a step, counted from 1: a new permutation each pass, known from seed and step alone."""
    chosen = []
    for position in range((step - 1) * count, step * count):
        epoch, place = divmod(position, len(train))
        chosen.append(train[int(_order(seed, epoch, len(train))[place])])
    return chosen


@functools.lru_cache(maxsize=4)  # PPO's prompts and its pre-training rows, each also where a pass ends within a step
def _order(seed: int, epoch: int, count: int) -> np.ndarray[Any, Any]:
    """The order of a pass over the data. Of a million rows it takes as long as a small model's step."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def prompt_token_ids(example: Example, tokenizer: Any) -> list[int]:
    """The token ids of an example's prompt; text and messages go through the tokenizer's chat template if it has one.

    Messages that end with the assistant's are to be continued: nothing closes the last one.

    Raises:
        TypeError, ValueError: a prompt that is neither text, messages nor token ids, an empty one, or text without a
            tokenizer.
    """
    prompt = example["prompt"] if isinstance(example, dict) and "prompt" in example else example
    if isinstance(prompt, str) or (isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], dict)):
        if tokenizer is None:
            raise ValueError("tokenizer: prompts that are text need one")
        if isinstance(prompt, str) and not getattr(tokenizer, "chat_template", None):
            ids = tokenizer(prompt)["input_ids"]
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            if not all(isinstance(message, dict) for message in messages):
                raise TypeError("prompt: wanted chat messages, each a mapping with a role and a content")
            begun = messages[-1].get("role") == "assistant"
            try:
                text = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=not begun, continue_final_message=begun, tokenize=False
                )
            except Exception as error:  # what it raises depends on the template
                raise ValueError(f"prompt: the chat template does not take these messages: {error}") from error
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    elif isinstance(prompt, (list, tuple)) and all(
        isinstance(token, int) and not isinstance(token, bool) for token in prompt
    ):
        ids = prompt
    else:
        raise TypeError(f"prompt: wanted text, chat messages or token ids, got {type(prompt).__name__}")
    if not ids:
        raise ValueError("prompt: empty, nothing to continue from")
    return list(ids)
