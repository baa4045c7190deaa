"""Rows of a data set: read from JSONL or given, made into token ids, held out, and what cannot be used counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from .distributed import say
from .settings import RunConfig
from .tasks import prompt_token_ids

Row = Any  # a mapping, as a line of JSON makes one
Encoded = TypeVar("Encoded")


@dataclass
class DataConfig(RunConfig):
    """The settings of a trainer that learns from rows of data."""

    data: str = ""  # a JSONL file, one row a line
    heldout_data: str = ""  # another; without it ``heldout`` rows of ``data`` are held out
    heldout: int = 64
    strict: bool = False  # stop at a row that cannot be used, in place of leaving it out
    max_length: int = 1024  # tokens of prompt and answer; a longer row cannot be used
    batch_size: int = 8  # rows a step

    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = ("batch_size", "max_length")
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = ("heldout",)


def load_rows(
    config: DataConfig,
    rows: Sequence[Row] | None,
    heldout_rows: Sequence[Row] | None,
    encode: Callable[[Row], Encoded],
) -> tuple[list[Encoded], list[Encoded]]:
    """The rows to train on and the held-out ones, encoded: those given, or those of the config's files.

    Raises:
        ValueError: no data, none that can be used, or under ``strict`` the first row that cannot, with its line.
        FileNotFoundError: there is no such file.
    """
    if rows is None and not config.data:
        raise ValueError("config: data: wanted a JSONL file (or rows from Python), got ''")
    train = _encoded(_numbered(rows, config.data), config.data or "rows", encode, config.strict)
    if heldout_rows is not None or config.heldout_data:
        numbered = _numbered(heldout_rows, config.heldout_data)
        return train, _encoded(numbered, config.heldout_data or "heldout_rows", encode, config.strict)
    if config.heldout >= len(train):
        raise ValueError(f"config: heldout: wanted fewer than the {len(train)} rows there are, got {config.heldout}")
    order = np.random.default_rng([config.seed, 1]).permutation(len(train))
    held = set(order[: config.heldout].tolist())
    return (
        [row for i, row in enumerate(train) if i not in held],
        [row for i, row in enumerate(train) if i in held],
    )


def _numbered(rows: Sequence[Row] | None, path: str) -> list[tuple[int, Row | Exception]]:
    if rows is not None:
        return list(enumerate(rows, 1))
    numbered: list[tuple[int, Row | Exception]] = []
    for line, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if text.strip():
            try:
                numbered.append((line, json.loads(text)))
            except json.JSONDecodeError as error:
                numbered.append((line, error))
    return numbered


def _encoded(
    numbered: list[tuple[int, Row | Exception]], name: str, encode: Callable[[Row], Encoded], strict: bool
) -> list[Encoded]:
    found: list[Encoded] = []
    refused: list[str] = []
    for line, row in numbered:
        try:
            if isinstance(row, Exception):
                raise ValueError(f"no JSON: {row}")
            if not isinstance(row, dict):
                raise TypeError(f"wanted an object, got {type(row).__name__}")
            found.append(encode(row))
        except (ValueError, TypeError) as error:
            if strict:
                raise ValueError(f"{name}, line {line}: {error}") from error
            refused.append(f"  line {line}: {error}")
    if refused:
        more = [f"  and {len(refused) - 5} more"] if len(refused) > 5 else []
        say("\n".join([f"{name}: {len(refused)} of {len(numbered)} rows cannot be used", *refused[:5], *more]))
    if not found:
        raise ValueError(f"{name}: none of {len(numbered)} rows can be used" + "".join("\n" + r for r in refused[:5]))
    return found


def field_of(row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"{name}: missing; the row has {', '.join(map(str, row)) or 'nothing'}")
    return row[name]


def answer_token_ids(row: Row, name: str, tokenizer: Any) -> list[int]:
    """The token ids of an answer, its end token behind them where it is text; ids stay as they are."""
    return token_ids_of(name, field_of(row, name), tokenizer)


def token_ids_of(name: str, answer: Any, tokenizer: Any) -> list[int]:
    if isinstance(answer, str):
        if tokenizer is None:
            raise ValueError("tokenizer: answers that are text need one")
        if not answer.strip():
            raise ValueError(f"{name}: empty")
        ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
        return ids if tokenizer.eos_token_id is None else [*ids, int(tokenizer.eos_token_id)]
    if not isinstance(answer, (list, tuple)) or not all(isinstance(token, int) for token in answer):
        raise TypeError(f"{name}: wanted text or token ids, got {type(answer).__name__}")
    if not answer:
        raise ValueError(f"{name}: empty")
    return list(answer)


def ranked_answers(row: Row, tokenizer: Any) -> tuple[list[list[int]], list[int]]:
    """The token ids of a row's "answers" and their "ranks", 0 the best.

    Raises:
        TypeError, ValueError: no two lists of one length; ranks that are ties only; one answer at two ranks.
    """
    given, ranks = field_of(row, "answers"), field_of(row, "ranks")
    if not isinstance(given, (list, tuple)) or not isinstance(ranks, (list, tuple)):
        raise TypeError("answers, ranks: wanted two lists")
    if len(given) != len(ranks) or any(isinstance(r, bool) or not isinstance(r, int) for r in ranks):
        raise ValueError(f"ranks: wanted {len(given)} integers, one an answer, got {ranks!r}")
    if len(set(ranks)) < 2:
        raise ValueError("ranks: no answer is better than another")
    answers = [token_ids_of("answers", answer, tokenizer) for answer in given]
    rank_of: dict[tuple[int, ...], int] = {}
    for answer, rank in zip(answers, ranks, strict=True):
        if rank_of.setdefault(tuple(answer), rank) != rank:
            raise ValueError(f"answers: the same answer at the ranks {rank_of[tuple(answer)]} and {rank}")
    return answers, list(ranks)


def prompt_of(row: Row, tokenizer: Any) -> list[int]:
    field_of(row, "prompt")
    return prompt_token_ids(row, tokenizer)


def check_length(prompt: list[int], answers: Sequence[list[int]], max_length: int) -> None:
    longest = len(prompt) + max(map(len, answers))
    if longest > max_length:
        raise ValueError(
            f"prompt and answer: {longest} tokens ({len(prompt)} of the prompt), more than max_length = {max_length}"
        )


def digest(*parts: Any) -> str:
    """A name for data: the same for the same values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
