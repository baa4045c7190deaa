"""Sampling of answers, G to a prompt, with a key-value cache; the log-probabilities of what was drawn are kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rl4llm_fast as rf

from .attempts import Attempts
from .devices import to_device
from .distributed import Ranks
from .policy import Policy
from .rewards import Sample, finite, name_of
from .tasks import Example, Reward, prompt_token_ids


@dataclass
class Rollout:
    """Answers to prompts: answer i belongs to ``prompts[i // group_size]``."""

    prompts: list[list[int]]
    group_size: int
    answers: list[list[int]]  # token ids, the end token included where the answer ended
    logprobs: list[list[float]]  # of each token, by the sampler: at its temperature, before top-p and top-k
    ended: list[bool]  # False: cut off at max_new_tokens


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[list[int]],
    *,
    group_size: int = 1,
    max_new_tokens: int,
    end_ids: Collection[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    greedy: bool = False,
    generator: torch.Generator | None = None,
    batch_size: int = 0,
    ranks: Ranks = Ranks(),  # noqa: B008
    backend: str | None = None,
) -> Rollout:
    """Draw ``group_size`` answers to each prompt (token ids), or with ``greedy`` the likeliest token each time.

    Each prompt is read once; its cache is then copied for its answers. ``batch_size`` prompts at a time, 0: all.
    The draw takes one number per answer and position from ``generator`` (CPU), whoever has ended already. Each of
    several processes answers its share of the prompts, with the numbers that one process would take; all get all.
    ``backend`` makes the log-probabilities; None: the one in force.
    """
    rollout = Rollout(list(map(list, prompts)), group_size, [], [], [])
    step = batch_size or max(len(prompts), 1)
    training = policy.model.training
    policy.model.eval()
    try:
        for start in range(0, len(prompts), step):
            batch = rollout.prompts[start : start + step]
            own, uniforms = ranks.share(batch), _Uniforms(generator, len(batch), group_size, ranks)
            part = Rollout(own, group_size, [], [], [])
            if own:
                with policy.precision():
                    _sample_batch(
                        policy, part, own, max_new_tokens, frozenset(end_ids), 1.0 if greedy else temperature, top_p,
                        top_k, greedy, uniforms, backend,
                    )  # fmt: skip
            uniforms.catch_up(max(ranks.gather([uniforms.taken])))
            rollout.answers += ranks.gather(part.answers)
            rollout.logprobs += ranks.gather(part.logprobs)
            rollout.ended += ranks.gather(part.ended)
    finally:
        policy.model.train(training)
    return rollout


class _Uniforms:
    """Random numbers for a batch of answers, one an answer and position, of which a process keeps its own answers'."""

    def __init__(self, generator: torch.Generator | None, prompts: int, group_size: int, ranks: Ranks) -> None:
        own = ranks.cut(prompts)
        self.generator, self.rows, self.taken = generator, prompts * group_size, 0
        self.own = slice(own.start * group_size, own.stop * group_size)

    def next(self) -> Tensor:
        self.taken += 1
        return torch.rand(self.rows, dtype=torch.float64, generator=self.generator)[self.own]

    def catch_up(self, count: int) -> None:
        """Take what the others have taken, so that all generators stand where that of one process would."""
        while self.taken < count:
            self.next()


def _sample_batch(
    policy: Policy,
    rollout: Rollout,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    end_ids: frozenset[int],
    temperature: float,
    top_p: float,
    top_k: int,
    greedy: bool,
    uniforms: _Uniforms,
    backend: str | None,
) -> None:
    device, group_size = policy.device, rollout.group_size
    rows = len(prompts) * group_size
    width = max(map(len, prompts))
    lengths = torch.tensor([len(p) for p in prompts])
    input_ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])  # padded on the left
    positions = (torch.arange(width) - (width - lengths)[:, None]).clamp_(min=0)
    attention_mask: Tensor | None = None  # without padding no mask: attention takes its fast path
    if (lengths < width).any():
        attention_mask = to_device(torch.arange(width) >= (width - lengths)[:, None], device)
    hidden, cache = policy.hidden(
        input_ids=to_device(input_ids, device), attention_mask=attention_mask,
        position_ids=to_device(positions, device), use_cache=True,
    )  # fmt: skip
    if group_size > 1:
        cache.batch_repeat_interleave(group_size)
    logits = policy.logits(hidden[:, -1]).repeat_interleave(group_size, 0)
    if attention_mask is not None:
        attention_mask = attention_mask.repeat_interleave(group_size, 0)
    position = to_device(lengths.repeat_interleave(group_size), device)
    ends = to_device(torch.tensor(sorted(end_ids), dtype=torch.long), device)

    alive = torch.arange(rows)  # the answers that the cache's rows belong to
    running = torch.ones(rows, dtype=torch.bool, device=device)  # those of them that have not ended
    drawn: list[tuple[Tensor, Tensor, Tensor]] = []  # for each position the answers, their tokens, log-probabilities
    for t in range(max_new_tokens):
        uniform = to_device(uniforms.next()[alive], device)
        chosen = _draw(policy, logits, uniform, temperature, top_p, top_k, greedy)
        logp = rf.token_logprobs(logits, chosen, temperature=temperature, softcap=policy.softcap, backend=backend)
        assert isinstance(logp, Tensor)
        drawn.append((alive, chosen, logp))
        running = running & (chosen[:, None] != ends).all(1)
        still = running.cpu()  # all that a position brings from a GPU: tokens stay there until the end
        if t + 1 == max_new_tokens or not still.any():
            break
        if still.sum() <= 0.75 * len(still):  # answers that have ended leave the batch; not one by one: it costs a copy
            keep = still.nonzero().flatten()
            alive = alive[keep]
            keep = to_device(keep, device)
            cache.batch_select_indices(keep)
            chosen, running, position = chosen[keep], running[keep], position[keep]
            if attention_mask is not None:
                attention_mask = attention_mask[keep]
        if attention_mask is not None:
            attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=True)
        hidden, cache = policy.hidden(
            input_ids=chosen[:, None], attention_mask=attention_mask, position_ids=(position + t)[:, None],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        logits = policy.logits(hidden[:, -1])
    _collect(rollout, drawn, rows, end_ids)


def _collect(
    rollout: Rollout, drawn: Sequence[tuple[Tensor, Tensor, Tensor]], rows: int, end_ids: frozenset[int]
) -> None:
    """Put what was drawn, position by position, into the rollout as answers, each up to its first end token."""
    at = torch.cat([t * rows + alive for t, (alive, _, _) in enumerate(drawn)])
    tokens, logp = (torch.cat([part[which] for part in drawn]).cpu() for which in (1, 2))
    count = len(drawn)
    ids = torch.full((count * rows,), -1).index_put_((at,), tokens).unflatten(0, (count, rows)).T
    values = logp.new_zeros(count * rows).index_put_((at,), logp).unflatten(0, (count, rows)).T
    is_end = torch.isin(ids, torch.tensor(sorted(end_ids), dtype=torch.long))
    ended = is_end.any(1)
    lengths = torch.where(ended, is_end.int().argmax(1) + 1, count).tolist()
    rollout.answers += [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
    rollout.logprobs += [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]
    rollout.ended += ended.tolist()


def _draw(
    policy: Policy, logits: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int, greedy: bool
) -> Tensor:
    """One token a row (R,): the inverse of the cumulative distribution at ``uniform``."""
    if greedy:
        return logits.argmax(-1)
    scores = logits.float()
    if policy.softcap is not None:
        scores = torch.tanh(scores / policy.softcap) * policy.softcap
    probs = torch.softmax(scores / temperature, -1)
    if top_p < 1 or 0 < top_k < probs.shape[-1]:
        ordered, order = torch.sort(probs, dim=-1, descending=True, stable=True)
        drop = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays
        if top_k:
            drop[:, top_k:] = True
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered.masked_fill(drop, 0.0))
    total = probs.cumsum(-1, dtype=torch.float64)
    # right=True finds the first token whose cumulative sum exceeds the target, so one of probability 0 is never drawn.
    target = (uniform[:, None] * total[:, -1:]).clamp(max=total[:, -1:].nextafter(total.new_zeros(())))
    drawn = torch.searchsorted(total, target, right=True).squeeze(-1)
    return drawn.clamp_(max=logits.shape[-1] - 1)  # a row of NaN finds none


@dataclass
class Evaluation:
    """Greedy answers to held-out examples."""

    accuracy: float  # the share with the full reward, 1
    reward: float  # the mean
    completions: list[Any]
    rollout: Rollout


def completion_of(answer: list[int], end_ids: Collection[int], tokenizer: Any) -> Any:
    """What a reward function gets: the text without end tokens, or their ids where there is no tokenizer."""
    kept = answer[:-1] if answer and answer[-1] in end_ids else answer
    return kept if tokenizer is None else tokenizer.decode(kept, skip_special_tokens=True)


def evaluate(
    policy: Policy,
    examples: Sequence[Example],
    reward: Reward,
    *,
    tokenizer: Any,
    end_ids: Collection[int],
    max_new_tokens: int,
    batch_size: int = 0,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> Evaluation:
    """Mean reward and accuracy of greedy answers to ``examples``."""
    if not examples:
        raise ValueError("examples: none to evaluate on")
    prompts = [prompt_token_ids(example, tokenizer) for example in examples]
    rollout = sample(
        policy, prompts, max_new_tokens=max_new_tokens, end_ids=end_ids, greedy=True, batch_size=batch_size,
        ranks=ranks,
    )  # fmt: skip
    completions = [completion_of(answer, end_ids, tokenizer) for answer in rollout.answers]
    name, attempts = name_of(reward), Attempts()

    def one(i: int) -> float:
        value = attempts.call(name, 0.0, reward, examples[i], completions[i])
        return finite(name, value, Sample(examples[i], completions[i]))

    rewards = ranks.map(one, range(len(completions)))
    attempts.report(ranks)
    accuracy = sum(r >= 1 for r in rewards) / len(rewards)
    return Evaluation(accuracy, sum(rewards) / len(rewards), completions, rollout)
