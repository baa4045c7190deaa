"""Rows of a data set: read or given, made into token ids, held out, and what cannot be used counted."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from .distributed import say
from .extras import require
from .settings import RunConfig
from .tasks import Example, prompt_token_ids

Row = Any  # a mapping, as a line of JSON makes one
Encoded = TypeVar("Encoded")


@dataclass
class DataConfig(RunConfig):
    """The settings of a trainer that learns from rows of data."""

    data: str = ""  # a JSONL file, one row a line; or a folder or the id of a Hugging Face data set
    split: str = "train"  # of such a data set
    columns: dict[str, Any] = field(default_factory=dict)  # what a field is called in the data: answer = "completion"
    heldout_data: str = ""  # another source; without it ``heldout`` rows of ``data`` are held out
    heldout_split: str = ""  # of ``heldout_data``, or another split of ``data``
    heldout: int = 64
    max_length: int = 1024  # tokens of prompt and answer; a longer row cannot be used
    batch_size: int = 8  # rows a step

    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = ("batch_size", "max_length")
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = ("heldout",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.wanted(all(isinstance(name, str) for name in self.columns.values()), "columns", "names of columns")


@dataclass
class Limits:
    """What a model can take: None where it does not say."""

    context: int | None = None  # tokens
    vocabulary: int | None = None  # token ids are below it

    @classmethod
    def of(cls, model: Any) -> Limits:
        config: Any = getattr(model, "config", None) or getattr(getattr(model, "decoder", None), "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        return cls(getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None))


@dataclass
class Part:
    """Rows as they were read or given, with their lines; what is no JSON has an exception in its place."""

    name: str
    numbered: list[tuple[int, Row | Exception]]
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many can be used at most."""
        return sum(not isinstance(row, Exception) for _, row in self.numbered)

    def usable(self, encode: Callable[[Row], Encoded], strict: bool, *, report: bool = True) -> list[Encoded]:
        """What ``encode`` makes of the rows; see ``usable``."""
        return usable(self.numbered, self.name, lambda row: encode(_object(row, self.columns)), strict, report=report)


Parts = tuple[Part, "Part | None"]  # to train on, held out; None: some of the first


def read_rows(
    config: DataConfig,
    rows: Sequence[Row] | None,
    heldout_rows: Sequence[Row] | None,
    fields: Callable[[Row], Sequence[str]],
    *,
    names: tuple[str, str] = ("rows", "heldout_rows"),
) -> Parts:
    """The rows to train on and the held-out ones, those given or those of the config's files, before a model is there.

    Args:
        fields: what a row must have.
        names: what the caller's user calls ``rows`` and ``heldout_rows``.

    Raises:
        TypeError: rows that are given, and are no rows.
        ValueError: no data, none of it with the fields, or too few rows; under ``strict`` the first row without them.
        FileNotFoundError: there is no such file.
        ImportError: the package datasets is missing, where it takes it.
    """
    if rows is None and not config.data:
        raise ValueError(
            f"config: data: wanted a JSONL file, a data set of Hugging Face (or {names[0]} from Python), got ''"
        )
    check_files(config, rows is None, heldout_rows is None)
    train, heldout = part_of(rows, names[0], config.data, "data", config.split, config.columns), None
    if heldout_rows is not None or config.heldout_data or config.heldout_split:
        setting = "heldout_data" if config.heldout_data else "data"
        source, split = config.heldout_data or config.data, config.heldout_split or config.split
        heldout = part_of(heldout_rows, names[1], source, setting, split, config.columns)
    check_fields((train, heldout), fields, config)
    if heldout is None:
        _check_heldout(config, train.count)
    return train, heldout


def check_fields(parts: Iterable[Part | None], fields: Callable[[Row], Sequence[str]], config: DataConfig) -> None:
    """Look for what a row must have; which rows have it not is reported when they are encoded.

    Raises:
        ValueError: no row has it, or under ``strict`` the first that has it not; a column that is in no row.
    """
    there = [part for part in parts if part is not None]
    for part in there:
        part.usable(lambda row: [field_of(row, name) for name in fields(row)], config.strict, report=False)
    rows = [row for part in there if part.columns for _, row in part.numbered if isinstance(row, dict)]
    wanted = fields(rows[0]) if rows else ()
    for ours, theirs in config.columns.items():
        if ours in wanted and not any(theirs in row for row in rows):
            raise ValueError(f"config: columns.{ours}: no row of the data has a field {theirs!r}")


def part_of(
    rows: Sequence[Row] | None,
    name: str,
    source: str,
    setting: str,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
) -> Part:
    """``rows``, which the user calls ``name``; where there are none those of ``source``, which the config calls
    ``setting``.
    """
    if rows is not None:
        return Part(name, list(enumerate(listed(name, rows), 1)))
    return Part(source, numbered_rows(source, split, setting), columns or {})


def encode_rows(
    config: DataConfig, parts: Parts, encode: Callable[[Row], Encoded]
) -> tuple[list[Encoded], list[Encoded]]:
    """What ``encode`` makes of the rows to train on, and of the held-out ones.

    Raises:
        ValueError: none can be used, or too few; under ``strict`` the first row that cannot, with its line.
    """
    train, heldout = parts
    found = train.usable(encode, config.strict)
    return hold_out(found, config) if heldout is None else (found, heldout.usable(encode, config.strict))


def hold_out(rows: Sequence[Encoded], config: DataConfig) -> tuple[list[Encoded], list[Encoded]]:
    """``rows`` without ``config.heldout`` of them, and those."""
    _check_heldout(config, len(rows))
    order = np.random.default_rng([config.seed, 1]).permutation(len(rows))
    held = set(order[: config.heldout].tolist())
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def _check_heldout(config: DataConfig, count: int) -> None:
    if config.heldout >= count:
        raise ValueError(f"config: heldout: wanted fewer than the {count} rows there are, got {config.heldout}")


def listed(name: str, rows: Any) -> list[Any]:
    """Rows or prompts that are given, as a list.

    Raises:
        TypeError: one row, a text, or what cannot be gone through; ``name`` is what they are called.
    """
    if isinstance(rows, (str, bytes, Path)):
        raise TypeError(f"{name}: wanted a list of rows, got {rows!r}; a file or data set goes into the config")
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise TypeError(f"{name}: wanted a list of rows, got {type(rows).__name__}")
    return list(rows)


def check_files(config: DataConfig, data: bool = True, heldout: bool = True) -> None:
    """Look for the files of the settings ``data`` and ``heldout_data``, where these are read.

    Raises:
        FileNotFoundError: one is neither a file or folder nor has the form of an id.
        ValueError: a split of a file, which has none: its held-out rows would be those to train on.
    """
    for name, is_read in (("data", data), ("heldout_data", heldout)):
        source = getattr(config, name)
        if source and is_read:
            _check_source(source, name)
    source = config.heldout_data or config.data
    if heldout and config.heldout_split and Path(source).is_file():
        raise ValueError(
            f"config: heldout_split: wanted a split of a data set, got {config.heldout_split!r}, and {source!r} is a "
            "file, which has none; heldout_data names another file"
        )


def _check_source(source: str, setting: str) -> None:
    if not source or (not Path(source).exists() and not _DATASET_ID.fullmatch(source)):
        raise FileNotFoundError(f"config: {setting}: there is no file or folder {source!r}")


def numbered_rows(source: str, split: str = "train", setting: str = "data") -> list[tuple[int, Row | Exception]]:
    """The rows of a JSONL file with their lines, an exception in the place of one that is no JSON; or of a data set.

    ``setting`` is what the config calls the source.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package datasets is missing, where it takes it.
        ValueError: datasets cannot load it.
    """
    _check_source(source, setting)
    path = Path(source)
    if not path.is_file():
        return list(enumerate(_data_set(source, split, setting), 1))
    numbered: list[tuple[int, Row | Exception]] = []
    for line, text in enumerate(path.read_bytes().split(b"\n"), 1):  # U+2028 and the like end no line of JSON
        if text.strip():
            try:
                numbered.append((line, json.loads(text)))
            except (ValueError, RecursionError) as error:
                numbered.append((line, error))
    return numbered


_DATASET_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.jsonl)(?<!\.json)")  # owner/name


def _data_set(source: str, split: str, setting: str) -> Any:
    require("datasets", extra="datasets")
    import datasets

    try:
        if any((Path(source) / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            found = datasets.load_from_disk(source)
            return found[split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # what it raises depends on where the data comes from
        raise ValueError(f"config: {setting}: datasets cannot load split {split!r} of {source!r}: {error}") from error


def _object(row: Row, columns: Mapping[str, str]) -> Row:
    """The row, with its fields under the names that trainers know."""
    if not isinstance(row, dict):
        raise TypeError(f"wanted an object, got {type(row).__name__}")
    return row if not columns else row | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def usable(
    numbered: Iterable[tuple[int, Row | Exception]],
    name: str,
    encode: Callable[[Row], Encoded],
    strict: bool,
    *,
    report: bool = True,
) -> list[Encoded]:
    """What ``encode`` makes of the rows; those that it refuses are counted, and with ``report`` printed.

    Raises:
        ValueError: under ``strict`` at the first of them; else if not one row can be used.
    """
    found: list[Encoded] = []
    refused: list[str] = []
    for line, row in numbered:
        try:
            if isinstance(row, Exception):
                raise ValueError(f"no JSON: {row}")
            found.append(encode(row))
        except (ValueError, TypeError) as error:
            if strict:
                raise ValueError(f"{name}, line {line}: {error}") from error
            refused.append(f"  line {line}: {error}")
    count = len(found) + len(refused)
    if refused and report:
        more = [f"  and {len(refused) - 5} more"] if len(refused) > 5 else []
        say("\n".join([f"{name}: {len(refused)} of {count} rows cannot be used", *refused[:5], *more]))
    if not count:
        raise ValueError(f"{name}: wanted rows, there are none")
    if not found:
        raise ValueError(f"{name}: none of {count} rows can be used" + "".join("\n" + r for r in refused[:5]))
    return found


def answerable(
    examples: Sequence[Example], name: str, tokenizer: Any, limits: Limits, max_new_tokens: int, strict: bool
) -> list[Example]:
    """Those whose prompt can be read and leaves room for an answer in the model's context.

    Raises:
        ValueError: see ``usable``.
    """

    def check(example: Example) -> Example:
        prompt = prompt_token_ids(example, tokenizer)
        check_length(prompt, [[0] * max_new_tokens], len(prompt) + max_new_tokens, limits)
        return example

    return usable(enumerate(examples, 1), name, check, strict) if len(examples) else []


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
    numbers = isinstance(answer, (list, tuple)) and all(isinstance(t, int) and not isinstance(t, bool) for t in answer)
    if not numbers:
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


def check_length(prompt: list[int], answers: Sequence[list[int]], max_length: int, limits: Limits) -> None:
    """Refuse a row that is too long for the run or the model, or has token ids that the model does not know.

    Raises:
        ValueError: naming what is too long, and for what.
    """
    longest = len(prompt) + max(map(len, answers))
    if limits.context is not None and len(prompt) >= limits.context:
        raise ValueError(f"prompt: {len(prompt)} tokens leave no room in the model's context of {limits.context}")
    whole = f"prompt and answer: {longest} tokens ({len(prompt)} of the prompt)"
    if longest > max_length:
        raise ValueError(f"{whole}, more than max_length = {max_length}")
    if limits.context is not None and longest > limits.context:
        raise ValueError(f"{whole}, more than the model's context of {limits.context}")
    if limits.vocabulary is not None:
        low, high = (pick(map(pick, [prompt, *answers])) for pick in (min, max))
        if low < 0 or high >= limits.vocabulary:
            raise ValueError(
                f"token ids: {low if low < 0 else high} is outside the vocabulary [0, {limits.vocabulary})"
            )


def digest(*parts: Any) -> str:
    """A name for data: the same for the same values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
