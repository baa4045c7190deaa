"""How prompts and answers become the rows of a forward pass.

plain: one row an answer, prompt and answer behind each other, padded on the right (causal attention never looks there).

shared: one row a prompt. Its answers form a tree: tokens that two answers have in common, the prompt first of all, are
in the row once, each token attends to its ancestors only and stands at the position of its depth. Every token sees what
it would see in a row of its own, so values and gradients are the same mathematics on fewer tokens: 8 short answers to
one question share nearly everything.

packed: several prompts with their answers in a row, one behind the other, each blind to the others.

Rows are made by numpy on the CPU, a million tokens in tenths of a second; the mask, which grows with the square of a
row, is made from one number a token where the model is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .devices import to_device

Array: TypeAlias = np.ndarray[Any, Any]
Shape = tuple[int, int]


@dataclass
class Layout:
    """Inputs of one forward pass over R rows of S tokens, and where in it each answer's tokens are predicted."""

    input_ids: Tensor  # (R, S)
    position_ids: Tensor  # (R, S), or (1, S) where they are the same in all rows
    until: Tensor | None  # (R, S): the columns that attend to column a are a <= c < until[a]; None: plain causal
    source: Tensor  # (M,) flat index in (R, S) of the token that predicts prediction m
    token_ids: Tensor  # (M,) what is predicted there
    prediction: Tensor | None  # (N,) answers' tokens, one answer after the other -> which of the M; None: each its own

    @property
    def shape(self) -> Shape:
        """(R, S)."""
        rows, width = self.input_ids.shape
        return rows, width

    def to(self, device: torch.device) -> Layout:
        return Layout(**{k: to_device(v, device) if isinstance(v, Tensor) else v for k, v in vars(self).items()})

    def of_answers(self, values: Tensor) -> Tensor:
        """Values of the predictions (M, ...) as those of the answers' tokens (N, ...)."""
        return values if self.prediction is None else values[self.prediction]

    def unseen(self) -> Tensor | None:
        """(R, 1, S, S) bool, True: the token of the row does not attend to that of the column; None: plain causal."""
        if self.until is None:
            return None
        column = torch.arange(self.until.shape[1], device=self.until.device)
        return (column[:, None] >= self.until[:, None, :]).logical_or_(column[:, None] < column)[:, None]

    def additive_mask(self, dtype: torch.dtype) -> Tensor | None:
        """The same as (R, 1, S, S) of 0 and the least number of ``dtype``, which all attention with 4-D masks can add.

        Its rows begin at multiples of 16 entries: PyTorch's attention with a mask would else copy it in every layer,
        and keep the copies for the backward pass.
        """
        unseen = self.unseen()
        if unseen is None:
            return None
        rows, _, width, _ = unseen.shape
        mask = torch.zeros(rows, 1, width, -width // 16 * -16, dtype=dtype, device=unseen.device)[..., :width]
        return mask.masked_fill_(unseen, torch.finfo(dtype).min)


def plain_shape(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Shape:
    """(R, S) of ``plain_layout``, without making it."""
    return len(answers), max(len(prompt) + len(answer) - 1 for prompt, answer in zip(prompts, answers, strict=True))


def plain_layout(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Layout:
    """One row an answer; ``prompts[i]`` belongs to ``answers[i]``. Last tokens predict nothing: left out."""
    rows, width = plain_shape(prompts, answers)
    input_ids = _padded([prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)], width, 0)
    first = np.arange(rows) * width + _lengths(prompts) - 1
    return Layout(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.arange(width)[None],
        until=None,
        source=torch.from_numpy(_runs(first, _lengths(answers))),
        token_ids=torch.from_numpy(_flat(answers)),
        prediction=None,
    )


def shared_layout(prompts: Sequence[list[int]], answers: Sequence[list[int]], groups: Sequence[int]) -> Layout:
    """One row for each run of equal ``groups`` (which share a prompt), as a tree of tokens.

    In order of their tokens an answer's neighbour before it shares the most with it, so what is new in an answer stands
    behind the first token in which the two differ. A tree's tokens lie in that order, each with all that follow from it
    behind it: a token is seen until the first new one that is not deeper than it.
    """
    starts = [i for i in range(len(answers)) if i == 0 or groups[i] != groups[i - 1]]
    sizes = np.diff([*starts, len(answers)])
    bounds = pairwise([*starts, len(answers)])
    order = [i for a, b in bounds for i in sorted(range(a, b), key=answers.__getitem__)]
    trunks = [prompts[a] for a in starts]  # (R,) prompts
    row, trunk = np.repeat(np.arange(len(starts)), sizes), _lengths(trunks)  # of an answer, of a row

    # (B, T), in that order: the answers' tokens, which of them are new, and each one's node, counted through all trees
    lengths = _lengths(answers)[order]
    depth = np.arange(lengths.max())
    tokens = _padded([answers[i] for i in order], len(depth), -1)
    live = depth < lengths[:, None]
    same = np.zeros(len(order), dtype=np.int64)
    equal = tokens[1:] == tokens[:-1]
    same[1:] = np.where(equal.all(1), len(depth), equal.argmin(1))
    same[starts] = 0
    new = live & (depth >= same[:, None])
    node = np.maximum.accumulate(np.where(new, np.cumsum(new).reshape(new.shape) - 1, -1), 0)

    # Of each node: its tree, its place in an answer, its parent (−1: the prompt's last token), whether it has children
    answer_of, place = np.nonzero(new)
    tree = row[answer_of]
    parent = np.where(place > 0, node[answer_of, place - 1], -1)
    inner = np.zeros(len(parent), dtype=bool)
    inner[parent[parent >= 0]] = True

    # Those without are predicted but predict nothing, so they are not computed. Columns in a row:
    kept = np.bincount(tree[inner], minlength=len(starts))
    shift = trunk - np.concatenate([[0], np.cumsum(kept)[:-1]])  # from the count through all trees to a row's column
    width = int((trunk + kept).max())
    column = np.cumsum(inner) - 1 + shift[tree]
    source = tree * width + np.where(parent >= 0, column[parent], trunk[tree] - 1)

    # Where what is new in an answer begins, for the tokens that are not above it; from the last answer to the first.
    begins = np.concatenate([[0], np.cumsum(np.bincount(answer_of[inner], minlength=len(order)))])
    closes = np.full((len(order) + 1, len(depth)), begins[-1])
    closes[:-1] = np.where(depth >= same[:, None], begins[:-1, None], begins[-1])
    closes = np.minimum.accumulate(closes[::-1], 0)[::-1][1:]

    input_ids = _padded(trunks, width, 0)
    position_ids = np.where(np.arange(width) < trunk[:, None], np.arange(width), 0)
    until = np.where(np.arange(width) < trunk[:, None], (trunk + kept)[:, None], np.arange(1, width + 1))
    at = tree[inner], column[inner]
    input_ids[at] = tokens[new][inner]
    position_ids[at] = trunk[tree[inner]] + place[inner]
    until[at] = closes[answer_of[inner], place[inner]] + shift[tree[inner]]
    given = np.argsort(order)
    return Layout(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        until=torch.from_numpy(until),
        source=torch.from_numpy(source),
        token_ids=torch.from_numpy(tokens[new]),
        prediction=torch.from_numpy(node[given][live[given]]),
    )


def packed_layout(prompts: Sequence[list[int]], answers: Sequence[list[int]], width: int) -> Layout:
    """As many answers a row as fit into ``width`` tokens, each in the first row with room for it."""
    used: list[int] = []
    places: list[tuple[int, int]] = []  # row and first column of each
    tokens = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    for own in tokens:
        row = next((r for r, end in enumerate(used) if end + len(own) <= width), len(used))
        if row == len(used):
            used.append(0)
        places.append((row, used[row]))
        used[row] += len(own)
    longest = max(used)
    rows, columns = np.asarray(places).T
    lengths = _lengths(tokens)
    at = _runs(rows * longest + columns, lengths)  # in (R, S), flat
    input_ids, position_ids = (np.zeros(len(used) * longest, dtype=np.int64) for _ in range(2))
    until = np.tile(np.arange(1, longest + 1), len(used))  # padding sees itself: no row of a softmax is empty
    input_ids[at] = _flat(tokens)
    position_ids[at] = _runs(np.zeros_like(lengths), lengths)
    until[at] = np.repeat(columns + lengths, lengths)
    shape = len(used), longest
    return Layout(
        input_ids=torch.from_numpy(input_ids).reshape(shape),
        position_ids=torch.from_numpy(position_ids).reshape(shape),
        until=torch.from_numpy(until).reshape(shape),
        source=torch.from_numpy(_runs(rows * longest + columns + _lengths(prompts) - 1, _lengths(answers))),
        token_ids=torch.from_numpy(_flat(answers)),
        prediction=None,
    )


def forward_flops(shape: Shape, attention: float, parameters: int, layers: int, hidden: int) -> float:
    """Multiply-adds of a forward pass over (R, S): the weights for each token, and ``attention`` for each pair of them.

    attention: 1 for plain causal attention, which leaves out half of the pairs, 2 for one that is masked.
    """
    rows, width = shape
    return float(rows * (width * parameters + attention * layers * hidden * width * width))


def starts_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """cu_seqlens of answers one behind the other."""
    return to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


def _lengths(rows: Sequence[list[int]]) -> Array:
    return np.fromiter(map(len, rows), np.int64, len(rows))


def _flat(rows: Sequence[list[int]]) -> Array:
    return np.fromiter(chain.from_iterable(rows), np.int64, sum(map(len, rows)))


def _padded(rows: Sequence[list[int]], width: int, value: int) -> Array:
    """(R, S), padded on the right."""
    padded = np.full((len(rows), width), value)
    padded[np.arange(width) < _lengths(rows)[:, None]] = _flat(rows)
    return padded


def _runs(first: Array, lengths: Array) -> Array:
    """first, first + 1, ... of each, as many as its length, one run behind the other."""
    numbers: Array = np.arange(lengths.sum()) + np.repeat(first - (np.cumsum(lengths) - lengths), lengths)
    return numbers
