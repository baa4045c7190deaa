"""How prompts and answers become the rows of a forward pass.

plain: one row an answer, prompt and answer behind each other, padded on the right (causal attention never looks there).

shared: one row a prompt. Its answers form a tree: tokens that two answers have in common, the prompt first of all, are
in the row once, each token attends to its ancestors only and stands at the position of its depth. Every token sees what
it would see in a row of its own, so values and gradients are the same mathematics on fewer tokens: 8 short answers to
one question share nearly everything.

packed: several prompts with their answers in a row, one behind the other, each blind to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Layout:
    """Inputs of one forward pass over R rows of S tokens, and where in it each answer's tokens are predicted."""

    input_ids: Tensor  # (R, S)
    position_ids: Tensor  # (R, S)
    visible: Tensor | None  # (R, 1, S, S) bool, True: attends to; None: plain causal
    source: Tensor  # (M,) flat index in (R, S) of the token that predicts prediction m
    token_ids: Tensor  # (M,) what is predicted there
    prediction: Tensor  # (N,) answers' tokens, one answer after the other -> which of the M predictions

    @property
    def shape(self) -> tuple[int, int]:
        """(R, S)."""
        rows, width = self.input_ids.shape
        return rows, width

    def to(self, device: torch.device) -> Layout:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Layout(**moved)


def plain_layout(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Layout:
    """One row an answer; ``prompts[i]`` belongs to ``answers[i]``. Last tokens predict nothing: left out."""
    rows = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    source: list[int] = []
    for r, (row, prompt, answer) in enumerate(zip(rows, prompts, answers, strict=True)):
        input_ids[r, : len(row)] = torch.tensor(row)
        first = r * width + len(prompt) - 1
        source.extend(range(first, first + len(answer)))
    return Layout(
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(len(rows), width),
        visible=None,
        source=torch.tensor(source),
        token_ids=torch.tensor([token for answer in answers for token in answer]),
        prediction=torch.arange(len(source)),
    )


@dataclass
class _Tree:
    """The tokens of one prompt and its answers, parents before children; the prompt is the trunk."""

    tokens: list[int]
    parents: list[int]
    paths: list[list[int]]  # per answer: the node of each of its tokens


def _grow(prompt: list[int], answers: Sequence[list[int]]) -> _Tree:
    tree = _Tree(list(prompt), list(range(-1, len(prompt) - 1)), [])
    children: dict[tuple[int, int], int] = {}
    for answer in answers:
        node, path = len(prompt) - 1, []
        for token in answer:
            child = children.setdefault((node, token), len(tree.tokens))
            if child == len(tree.tokens):
                tree.tokens.append(token)
                tree.parents.append(node)
            path.append(child)
            node = child
        tree.paths.append(path)
    return tree


@dataclass
class Forest:
    """One tree for each run of equal groups (which share a prompt), the nodes of it that are computed, its prompt's
    length: all of ``shared_layout`` but the mask, which grows with the square of a row."""

    trees: list[_Tree]
    kept: list[np.ndarray[Any, Any]]
    lengths: list[int]

    @property
    def shape(self) -> tuple[int, int]:
        """(R, S) of the layout."""
        return len(self.trees), max(len(nodes) for nodes in self.kept)


def grow_forest(prompts: Sequence[list[int]], answers: Sequence[list[int]], groups: Sequence[int]) -> Forest:
    starts = [i for i in range(len(answers)) if i == 0 or groups[i] != groups[i - 1]]
    bounds = [*starts, len(answers)]
    trees = [_grow(prompts[a], answers[a:b]) for a, b in pairwise(bounds)]
    lengths = [len(prompts[a]) for a in starts]
    # A node without children is predicted but predicts nothing, so it need not be computed.
    kept = [
        np.union1d(np.arange(length), np.asarray(tree.parents[length:], dtype=np.int64))
        for tree, length in zip(trees, lengths, strict=True)
    ]
    return Forest(trees, kept, lengths)


def shared_layout(prompts: Sequence[list[int]], answers: Sequence[list[int]], groups: Sequence[int]) -> Layout:
    """One row for each run of equal ``groups`` (which share a prompt), as a tree of tokens."""
    return layout_of(grow_forest(prompts, answers, groups))


def layout_of(forest: Forest) -> Layout:
    """The trees as rows, with the mask of what each token attends to."""
    trees, kept, lengths = forest.trees, forest.kept, forest.lengths
    _, width = forest.shape
    input_ids = torch.zeros(len(trees), width, dtype=torch.long)
    position_ids = torch.zeros(len(trees), width, dtype=torch.long)
    visible = np.zeros((len(trees), 1, width, width), dtype=bool)
    visible[:, 0, np.arange(width), np.arange(width)] = True  # padding sees itself: no row of a softmax is empty
    source: list[int] = []
    token_ids: list[int] = []
    prediction: list[int] = []
    for r, (tree, nodes, length) in enumerate(zip(trees, kept, lengths, strict=True)):
        column = {int(node): c for c, node in enumerate(nodes)}
        depth = np.zeros(len(nodes), dtype=np.int64)
        sees = visible[r, 0]
        for c, node in enumerate(nodes):
            if tree.parents[node] >= 0:
                up = column[tree.parents[node]]
                depth[c] = depth[up] + 1
                sees[c, : up + 1] |= sees[up, : up + 1]
        input_ids[r, : len(nodes)] = torch.tensor([tree.tokens[node] for node in nodes])
        position_ids[r, : len(nodes)] = torch.from_numpy(depth)
        offset = len(source) - length
        prediction.extend(offset + node for path in tree.paths for node in path)
        source.extend(r * width + column[parent] for parent in tree.parents[length:])
        token_ids.extend(tree.tokens[length:])
    return Layout(
        input_ids=input_ids,
        position_ids=position_ids,
        visible=torch.from_numpy(visible),
        source=torch.tensor(source),
        token_ids=torch.tensor(token_ids),
        prediction=torch.tensor(prediction),
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
    input_ids = torch.zeros(len(used), longest, dtype=torch.long)
    position_ids = torch.zeros(len(used), longest, dtype=torch.long)
    visible = torch.eye(longest, dtype=torch.bool).repeat(len(used), 1, 1, 1)  # padding sees itself
    source: list[int] = []
    for own, prompt, answer, (row, start) in zip(tokens, prompts, answers, places, strict=True):
        part = slice(start, start + len(own))
        input_ids[row, part] = torch.tensor(own)
        position_ids[row, part] = torch.arange(len(own))
        visible[row, 0, part, part] = torch.ones(len(own), len(own), dtype=torch.bool).tril()
        first = row * longest + start + len(prompt) - 1
        source.extend(range(first, first + len(answer)))
    return Layout(
        input_ids=input_ids,
        position_ids=position_ids,
        visible=visible,
        source=torch.tensor(source),
        token_ids=torch.tensor([token for answer in answers for token in answer]),
        prediction=torch.arange(len(source)),
    )


def forward_flops(shape: tuple[int, int], masked: bool, parameters: int, layers: int, hidden: int) -> float:
    """Multiply-adds of a forward pass over (R, S): the weights for each token; attention, causal (half) or masked."""
    rows, width = shape
    attention = layers * hidden * width * width * (2 if masked else 1)
    return float(rows * (width * parameters + attention))
