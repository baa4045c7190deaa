"""Segments of answers and their scores over aspects, for 2D-DPO (survey §5.3.3, (79); Li et al. 2024).

A row says what its segments are in one of three ways:

text: the answer is cut into sentences, ``cut_sentences``.
a list of texts: these are the segments; joined, with nothing between them, they are the answer.
token ids: "chosen_segments" and "rejected_segments" hold [first, end) of each, counted from the answer's first token.

A token belongs to the segment that holds its last character, so a space in front of a word goes with the word; the
end token belongs to the last segment. Segment k of the chosen answer stands against segment k of the rejected one (79);
what one answer has more stands against an empty segment.

A score is a number, or a list of numbers, one an aspect; r_{w,k} of (79) is their weighted sum.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import segments as library
from ..sequences import layout_of
from .data import Row, digest, field_of, token_ids_of
from .devices import to_device
from .named import named_function

_END = re.compile(r"[.!?…]+[\"'”’)\]]*\s+|[。！？]+[”’」』）]*\s*|\s*\n\s*")


@dataclass
class Segments:
    """Of one answer: [first, end) among its tokens, and the weight r of each."""

    spans: list[list[int]]
    weights: list[float]


def cut_sentences(text: str) -> list[str]:
    """The sentences of ``text``; joined, they are the text.

    A sentence ends behind . ! ? or …, closing quotes and brackets included, where a space follows and no small letter
    after it ("e.g. this" goes on, "Dr. No" does not); behind 。 ！ or ？; and at the end of a line. The space behind
    belongs to the sentence before it.
    """
    found = [(match.end(), "\n" in match[0]) for match in _END.finditer(text)]
    ends = [end for end, line in found if line or not text[end : end + 1].islower()]
    bounds = [0, *(end for end in ends if text[:end].strip() and text[end:].strip()), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


class Segmenter:
    """Reads an answer of a row with its segments and their weights.

    Args:
        scores: "row": the row's "chosen_scores" and "rejected_scores"; a path that ends in .jsonl: lines {"prompt",
            "answer", "scores"}, prompt and answer as they are in the data; else the dotted name of a function (as
            ``named_function`` finds it) that is called with the prompt, the answer and its segments, texts or token
            ids, and returns their scores.
        aspect_weights: of each aspect; empty: the mean over the aspects.
        score_max: 0: scores are the weights r of (79), which for a rejected answer say how bad a segment is. More than
            0: scores say how good a segment is, from 0 to this, and a rejected answer's weight is ``score_max`` less
            the score.
    """

    def __init__(self, tokenizer: Any, scores: str, aspect_weights: Sequence[float], score_max: float) -> None:
        self.tokenizer = tokenizer
        self.aspect_weights = [float(weight) for weight in aspect_weights]
        self.score_max = score_max
        self.source = scores
        self.kept: dict[str, Any] | None = _read(Path(scores)) if scores.endswith(".jsonl") else None
        self.function: Callable[..., Any] | None = None
        if scores != "row" and self.kept is None:
            self.function = named_function(scores, "segment_scores")

    def read(self, row: Row, name: str) -> tuple[list[int], Segments]:
        """The answer ``name`` (chosen or rejected) of ``row``: its token ids, and its segments."""
        answer = field_of(row, name)
        parts: list[Any]
        if isinstance(answer, str) or (isinstance(answer, list) and answer and isinstance(answer[0], str)):
            parts = cut_sentences(answer) if isinstance(answer, str) else answer
            if not all(isinstance(part, str) for part in parts):
                raise TypeError(f"{name}: wanted a list of texts, or of token ids, got both")
            ids = token_ids_of(name, "".join(parts), self.tokenizer)
            spans = self._spans(name, parts, len(ids))
        else:
            ids = token_ids_of(name, answer, self.tokenizer)
            spans = _given(f"{name}_segments", field_of(row, f"{name}_segments"), len(ids))
            parts = [ids[first:end] for first, end in spans]
        scores = self._scores(row, name, answer, parts)
        if not isinstance(scores, (list, tuple)) or len(scores) != len(spans):
            got = f"{len(scores)}" if isinstance(scores, (list, tuple)) else repr(scores)
            raise ValueError(f"{name}_scores: wanted {len(spans)}, one a segment, got {got}")
        return ids, Segments(spans, [self._weight(name, score) for score in scores])

    def _scores(self, row: Row, name: str, answer: Any, parts: list[Any]) -> Any:
        if self.function is not None:
            return self.function(row.get("prompt"), answer, parts)
        if self.kept is None:
            return field_of(row, f"{name}_scores")
        key = digest(row.get("prompt"), answer)
        if key not in self.kept:
            raise ValueError(f"{name}: {self.source} has no scores for this prompt and answer")
        return self.kept[key]

    def _weight(self, name: str, score: Any) -> float:
        aspects = list(score) if isinstance(score, (list, tuple)) else [score]
        if not aspects or any(isinstance(a, bool) or not isinstance(a, (int, float)) for a in aspects):
            raise TypeError(f"{name}_scores: wanted a number, or a list of them, a segment; got {score!r}")
        weights = self.aspect_weights or [1 / len(aspects)] * len(aspects)
        if len(weights) != len(aspects):
            raise ValueError(f"{name}_scores: wanted {len(weights)} aspects as in aspect_weights, got {len(aspects)}")
        total = float(sum(w * a for w, a in zip(weights, aspects, strict=True)))
        if not math.isfinite(total):
            raise ValueError(f"{name}_scores: wanted finite numbers, got {score!r}")
        if self.score_max and not 0 <= total <= self.score_max:
            raise ValueError(f"{name}_scores: wanted 0 to score_max = {self.score_max}, got {total}")
        return self.score_max - total if self.score_max and name == "rejected" else total

    def _spans(self, name: str, parts: list[str], count: int) -> list[list[int]]:
        """[first, end) of each part among the tokens of the whole text."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(f"{name}: segments of text need a fast tokenizer, which knows where its tokens stand")
        encoded = self.tokenizer("".join(parts), add_special_tokens=False, return_offsets_mapping=True)
        ends = list(accumulate(map(len, parts)))
        # The segment of a token's last character; a token of no character goes with the text before it.
        owner = [min(bisect_right(ends, max(last - 1, 0)), len(parts) - 1) for _, last in encoded["offset_mapping"]]
        owner += [len(parts) - 1] * (count - len(owner))
        firsts = [sum(o < k for o in owner) for k in range(len(parts))]
        return [[first, end] for first, end in zip(firsts, [*firsts[1:], count], strict=True)]


def segment_tensors(
    pairs: Sequence[tuple[Segments, Segments]], device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of the chosen and of the rejected answers: segments (B, K, 2), −1 where a pair has none, and weights (B, K)."""
    most = max((len(side.spans) for pair in pairs for side in pair), default=0)
    found = []
    for which in range(2):
        spans, weights = [], []
        for pair in pairs:
            own, count = pair[which], max(len(side.spans) for side in pair)
            missing, beyond = count - len(own.spans), most - count
            spans.append([*own.spans, *[[0, 0]] * missing, *[[-1, -1]] * beyond])
            weights.append([*own.weights, *[0.0] * (most - len(own.spans))])
        shape = (len(pairs), most)
        segments = torch.tensor(spans, dtype=torch.int32).reshape(*shape, 2)
        found.append((to_device(segments, device), to_device(torch.tensor(weights).reshape(shape), device)))
    return found[0], found[1]


@torch.no_grad()
def segment_metrics(
    beta: float,
    sides: Sequence[tuple[Tensor, Tensor, Tensor]],
    given: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> dict[str, Tensor]:
    """Means over the pairs of the mean over their segments of the segment rewards β·r·Σ(log π − log ref).

    ``sides``: log-probabilities (N,), the reference's and where each answer starts, (B+1,), of both sides. The accuracy
    is the share of segments whose reward exceeds that of the segment that it stands against.
    """
    rewards = []
    for (logp, ref, starts), (segments, weights) in zip(sides, given, strict=True):
        sums, exists = library.segment_sums(
            logp, ref, None, layout_of(logp, starts.long()), "segments", "weights", segments, weights
        )
        rewards.append(beta * sums)
    count = exists.sum(1).clamp(min=1)
    better, worse = rewards
    values = {
        "segment_reward_chosen": better,
        "segment_reward_rejected": worse,
        "segment_accuracy": (better > worse).float(),
    }
    return {name: (torch.where(exists, value, 0.0).sum(1) / count).mean() for name, value in values.items()}


def _given(name: str, spans: Any, length: int) -> list[list[int]]:
    def good(span: Any) -> bool:
        two = isinstance(span, (list, tuple)) and len(span) == 2 and all(type(edge) is int for edge in span)
        return two and 0 <= span[0] <= span[1] <= length

    if not isinstance(spans, (list, tuple)) or not spans or not all(map(good, spans)):
        raise ValueError(f"{name}: wanted [first, end] of each segment, 0 <= first <= end <= {length}, got {spans!r}")
    return [list(span) for span in spans]


def _read(path: Path) -> dict[str, Any]:
    """The scores of a file by the digest of prompt and answer."""
    found = {}
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if text.strip():
            try:
                row = json.loads(text)
                found[digest(row["prompt"], row["answer"])] = row["scores"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {line}: wanted prompt, answer and scores ({error!r})") from error
    return found
