"""Rule rewards (survey §6.6, §6.7): what an answer says and what it looks like, as functions with weights.

Rules read text and compare it. Nothing that a model wrote is ever executed.
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any

from .attempts import Attempts
from .named import named_function
from .tasks import Example, Reward, Task

R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think>...</think> and <answer>...</answer> tags, respectively, i.e., "
    "<think> reasoning process here </think><answer> answer here </answer>.\n{example}User: {prompt} Assistant:"
)  # Table 1 of the survey
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_FORM = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


@dataclass(frozen=True)
class Sample:
    """One answer as rules see it."""

    example: Example
    completion: Any  # text without the end token, or token ids where there is no tokenizer
    tokens: int = 0  # of the answer, the end token included
    ended: bool = True  # False: cut off at max_new_tokens

    @property
    def text(self) -> str:
        if not isinstance(self.completion, str):
            raise TypeError("rewards: rules on text need a tokenizer; this answer is token ids")
        return self.completion


Rule = Callable[[Sample], float]


class Ruled:
    """A reward function (example, completion) as a rule; unlike those of this file it may raise."""

    def __init__(self, function: Reward) -> None:
        self.function = function

    def __call__(self, sample: Sample) -> Any:
        return self.function(sample.example, sample.completion)


# What is in an answer


def parts(text: str) -> tuple[str, str] | None:
    """(thought, answer) of ``<think>…</think><answer>…</answer>``: in that order, once each, nothing else around."""
    if any(text.count(tag) != 1 for tag in TAGS):
        return None
    found = _FORM.fullmatch(text)
    return None if found is None else (found.group(1), found.group(2))


def thought_of(text: str) -> str:
    """What stands between the first ``<think>`` and the ``</think>`` behind it; nothing without the two."""
    return _between(text, "<think>", "</think>")


def answer_of(text: str) -> str:
    """What stands in the one pair of answer tags; nothing where there are several, or none: guesses do not count."""
    return _between(text, "<answer>", "</answer>") if text.count("<answer>") == text.count("</answer>") == 1 else ""


def summary_of(text: str) -> str:
    """What the user reads: the text behind the thought, without answer tags; all of it where there is no thought."""
    behind = text.rpartition("</think>")[2]
    return behind.replace("<answer>", "").replace("</answer>", "").strip()


def _between(text: str, start: str, end: str) -> str:
    behind = text.partition(start)[2]
    inside, found, _ = behind.partition(end)
    return inside.strip() if found else ""


# Rules


def format_rule(sample: Sample) -> float:
    """1 for the form that Table 1 asks for, with something in both tags, else 0 (the format reward of R1-Zero)."""
    found = parts(sample.text)
    return float(found is not None and all(part.strip() for part in found))


def tags_rule(sample: Sample) -> float:
    """The share of the four tags that come exactly once: a slope towards ``format`` for models that never hit it."""
    return sum(sample.text.count(tag) == 1 for tag in TAGS) / len(TAGS)


def ended_rule(sample: Sample) -> float:
    """1 for an answer that ended by itself, 0 for one that was cut off."""
    return float(sample.ended)


def length_rule(sample: Sample, *, limit: int, buffer: int) -> float:
    """0 up to ``limit - buffer`` tokens, then down to −1 at ``limit`` (soft overlong punishment, Yu et al. 2025)."""
    return -min(1.0, max(0.0, (sample.tokens - (limit - buffer)) / buffer))


def repetition_rule(sample: Sample, *, words: int = 4) -> float:
    """Minus the share of runs of ``words`` words that occurred before: 0 for a text that never repeats itself."""
    found = sample.text.split()
    runs = [tuple(found[i : i + words]) for i in range(len(found) - words + 1)]
    return -(1 - len(set(runs)) / len(runs)) if runs else 0.0


def language_rule(sample: Sample, *, language: str = "en") -> float:
    """The share of words in the target language within the thought (R1's language consistency, survey §6.7.2).

    Languages are told apart by their script, which is what mixing English, Chinese and Russian looks like; English and
    French are the same to it. A thought without words, formulas say, mixes nothing: 1; without a thought: 0.
    """
    thought = thought_of(sample.text)
    return 0.0 if not thought else language_share(thought, language)


# The scripts of a language as Unicode names them. In those of _UNSPACED each letter counts as a word.
SCRIPTS = {
    "ar": {"ARABIC"}, "el": {"GREEK"}, "en": {"LATIN"}, "he": {"HEBREW"}, "hi": {"DEVANAGARI"},
    "ja": {"CJK", "HIRAGANA", "KATAKANA"}, "ko": {"HANGUL"}, "ru": {"CYRILLIC"}, "th": {"THAI"}, "zh": {"CJK"},
    **{name: {"LATIN"} for name in ("de", "es", "fr", "it", "nl", "pt", "pl", "sv", "tr", "vi")},
}  # fmt: skip
_UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "THAI"}


@lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    """ "" for what is no letter; a mark on a letter has no script of its own."""
    kind = unicodedata.category(letter)[0]
    return unicodedata.name(letter, "?").split()[0] if kind == "L" else "mark" if kind == "M" else ""


def language_share(text: str, language: str) -> float:
    """The share of the words of ``text`` that are written in the scripts of ``language``; 1 without words."""
    words, last = [], ""
    for letter in text:
        script = _script(letter)
        if script == "mark":
            continue
        if script and (script != last or script in _UNSPACED):
            words.append(script)
        last = script
    return sum(script in SCRIPTS[language] for script in words) / len(words) if words else 1.0


# Their sum


class Rewards:
    """A weighted sum of named rules, with what each of them gave.

    A function of one's own that raises gives 0 to the answer, which ``attempts`` keeps for the report of the step.

    Raises:
        ValueError: from ``score``, naming the rule and the answer: a value that is not one finite number.
    """

    def __init__(self, rules: Mapping[str, tuple[float, Rule]], attempts: Attempts | None = None) -> None:
        self.rules = dict(rules)
        self.attempts = attempts or Attempts()

    def score(self, sample: Sample) -> tuple[float, dict[str, float]]:
        """The sum, and each rule's own value before its weight."""

        def value(name: str, rule: Rule) -> Any:
            return self.attempts.call(name, 0.0, rule, sample) if isinstance(rule, Ruled) else rule(sample)

        trace = {name: finite(name, value(name, rule), sample) for name, (_, rule) in self.rules.items()}
        return sum(self.rules[name][0] * value for name, value in trace.items()), trace

    def score_all(self, samples: Sequence[Sample]) -> list[tuple[float, dict[str, float]]]:
        """``score`` of each."""
        return [self.score(sample) for sample in samples]


def trace_means(traces: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each rule over the answers that it was asked about."""
    names = dict.fromkeys(name for trace in traces for name in trace)
    return {name: fmean(trace[name] for trace in traces if name in trace) for name in names}


def of_function(function: Reward, name: str = "") -> Rewards:
    """Of one function (example, completion)."""
    return Rewards({name or name_of(function): (1.0, Ruled(function))})


def name_of(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def finite(name: str, value: Any, sample: Sample) -> float:
    """``value`` as a finite float, or an error that names the function and what it was given."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"reward {name!r}: wanted one number, got {value!r} {_about(sample)}") from None
    if not math.isfinite(number):
        raise ValueError(f"reward {name!r}: wanted a finite number, got {number} {_about(sample)}")
    return number


def _about(sample: Sample) -> str:
    return f"for the answer {sample.completion!r} to {sample.example!r}"


def make_rewards(
    weights: Mapping[str, Any], options: Mapping[str, Any], correct: Reward, *, max_new_tokens: int
) -> Rewards:
    """The rules of a config: ``{"accuracy": 1.0, "format": 0.5, "package.module.function": 0.2}``.

    Args:
        weights: rules by name, or functions (example, completion) -> number of one's own by dotted name.
        options: ``language`` ("en") of the rule language; ``length_limit`` (max_new_tokens) and ``length_buffer``
            (a quarter of it) of the rule length; ``repetition_words`` (4) of the rule repetition.
        correct: what the rule accuracy asks.

    Raises:
        ValueError: an unknown rule or option, naming the nearest, a weight that is no number, a bad option.
    """
    given = dict(options)
    language = given.pop("language", "en")
    limit = given.pop("length_limit", max_new_tokens)
    buffer = given.pop("length_buffer", max(1, limit // 4 if isinstance(limit, int) else 1))
    words = given.pop("repetition_words", 4)
    if given:
        known = ["language", "length_limit", "length_buffer", "repetition_words"]
        raise ValueError(f"config: reward_options: unknown {_nearest(next(iter(given)), known)}")
    if language not in SCRIPTS:
        raise ValueError(f"config: reward_options.language: wanted one of {', '.join(SCRIPTS)}, got {language!r}")
    numbers = {"length_limit": limit, "length_buffer": buffer, "repetition_words": words}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"config: reward_options.{name}: wanted an integer of at least 1, got {value!r}")
    if buffer > limit:
        raise ValueError(f"config: reward_options.length_buffer: wanted at most length_limit = {limit}, got {buffer}")
    known_rules: dict[str, Rule] = {
        "accuracy": Ruled(correct),
        "format": format_rule,
        "tags": tags_rule,
        "ended": ended_rule,
        "language": lambda sample: language_rule(sample, language=language),
        "length": lambda sample: length_rule(sample, limit=limit, buffer=buffer),
        "repetition": lambda sample: repetition_rule(sample, words=words),
    }
    rules: dict[str, tuple[float, Rule]] = {}
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"config: rewards.{name}: wanted a number, its weight, got {weight!r}")
        if name not in known_rules and "." not in name and ":" not in name:
            raise ValueError(f"config: rewards: unknown rule {_nearest(name, list(known_rules))}")
        rules[name] = (float(weight), known_rules.get(name) or Ruled(named_function(name, "rewards")))
    return Rewards(rules)


def _nearest(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"{name!r}; the nearest is {nearest!r}, all are {', '.join(known)}"


# R1-Zero's template


def r1_zero_prompt(question: str, shown: str = "") -> str:
    """Table 1 of the survey around a question. It is text, not chat: base models continue it.

    ``shown`` is an exchange that stands before the question, for models that never hit the form by themselves.
    """
    question, shown = question.strip(), shown.strip()
    prompt = question if question.endswith((".", "?", "!", ":")) else question + "."
    return R1_ZERO_TEMPLATE.format(prompt=prompt, example=shown + "\n" if shown else "")


def r1_zero_example(example: Example, tokenizer: Any, shown: str = "") -> dict[str, Any]:
    """The example with the template's token ids as its prompt, its ``question``, and itself as ``original``."""
    fields = example if isinstance(example, dict) else {"prompt": example}
    question = fields.get("prompt")
    if not isinstance(question, str):
        raise TypeError(f"template: r1_zero is put around prompts that are text, got {type(question).__name__}")
    if tokenizer is None:
        raise ValueError("template: r1_zero needs a tokenizer")
    ids = list(tokenizer(r1_zero_prompt(question, shown))["input_ids"])
    return {**fields, "prompt": ids, "question": question, "original": example}


def r1_zero_task(task: Task, tokenizer: Any, shown: str = "") -> Task:
    """``task`` in R1-Zero's template; its own reward sees the example as it was, and what is in the answer tags."""

    def reward(example: Example, completion: str) -> float:
        return task.reward(example["original"], answer_of(completion))

    train, heldout = ([r1_zero_example(e, tokenizer, shown) for e in part] for part in (task.train, task.heldout))
    return Task(train=train, reward=reward, heldout=heldout, name=task.name)
