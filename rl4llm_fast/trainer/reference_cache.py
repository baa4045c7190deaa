"""Log-probabilities of answers under a reference that never changes: computed once, kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import rl4llm_fast as rf

from .data import digest
from .distributed import Ranks
from .policy import Policy


def answer_logprobs(
    policy: Policy,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    groups: Sequence[int],
    mark: Callable[[str], None] = lambda phase: None,
    *,
    tap: Callable[..., None] | None = None,
) -> Tensor:
    """Log-probabilities (N,) of the answers' tokens, one answer behind the other, from hidden states: no logits.

    Neighbours of the same group share a prompt. ``mark("forward")`` is called when the hidden states are there, and
    ``tap(hidden, weight, bias, layout)`` sees them.
    """
    layout = policy.choose_layout(prompts, answers, groups)
    with policy.precision():
        hidden, weight, bias = policy.head_inputs(layout)
        mark("forward")
        if tap is not None:
            tap(hidden, weight, bias, layout)
        logp = rf.linear_token_logprobs(hidden, weight, layout.token_ids, bias, softcap=policy.softcap)
    return layout.of_answers(logp)


@torch.no_grad()
def cached_logprobs(
    folder: Path,
    policy: Policy,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    groups: Sequence[int],
    batch_size: int,
    *,
    progress: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> list[Tensor]:
    """One tensor an answer, on the CPU. The file's name is a digest of the weights, the precision and the data.

    A file that is cut short is not there: it gets its name when it is whole. Each of several processes computes its
    share.
    """
    from tqdm.auto import tqdm

    lengths = [len(answer) for answer in answers]
    key = digest(_weights_digest(policy), policy.autocast, list(prompts), list(answers))
    path = folder / f"{key[:32]}.pt"
    if ranks.of_first(path.is_file()):
        packed: Tensor = torch.load(path, weights_only=True)
        return list(packed.split(lengths))
    shown = progress and ranks.first
    with tqdm(total=len(answers), desc="reference", unit="answer", disable=not shown, ncols=90) as bar:

        def batch(start: int) -> Tensor:
            part = slice(start, start + batch_size)
            found = answer_logprobs(policy, prompts[part], answers[part], groups[part]).float().cpu()
            bar.update(len(answers[part]) * ranks.size)
            return found

        packed = torch.cat(ranks.map(batch, range(0, len(answers), batch_size)))
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".partial-{os.getpid()}")
        torch.save(packed, partial)
        partial.replace(path)
    return list(packed.split(lengths))


def _weights_digest(policy: Policy) -> str:
    found = hashlib.sha256()
    for name, parameter in policy.model.named_parameters():
        found.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        found.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
