"""The eager backend of returns and advantages: textbook recurrences, one position at a time (docs/math.md section 4).

A position is *active* where the recurrence takes a step: "skip" steps over live tokens only, "zero" over every token up
to the last live one of its sequence, with r = V = 0 at those that are not live. Tokens come as (B, T), or packed (N,)
with cu_seqlens (B+1,) int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .schemas import accumulation_dtype
from .sequences import Sequences, sequences

State = tuple[Tensor, ...]


def gae(
    rewards: Tensor,
    values: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    kl: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
    beta: Tensor,
    mask_mode: str,
) -> tuple[Tensor, Tensor]:
    """A_t = δ_t + γλ·A_{t+1}, δ_t = r_t + γ·V_{t+1} − V_t (19, 25, 28), and A_t + V_t. Without values: G_t (15)."""
    tokens = rewards if kl is None else kl
    if cu_seqlens is not None and tokens.shape[0] and not torch.compiler.is_compiling():
        # As rows, where the lengths may be looked at: a loop over T steps instead of N.
        position = torch.arange(int(cu_seqlens.diff().max()), device=tokens.device)
        there = position < cu_seqlens.diff()[:, None]
        index = (cu_seqlens[:-1, None] + position).clamp(max=tokens.shape[0] - 1)
        live = there if mask is None else there & mask[index]
        scores = rewards if rewards.shape != tokens.shape else rewards[index]
        others = [None if x is None else x[index] for x in (values, kl)]
        rows = gae(scores, others[0], live, None, bootstrap, others[1], gamma, lam, beta, mask_mode)
        return rows[0][there], rows[1][there]
    if kl is not None:
        rewards = shape_rewards(rewards, kl, beta, mask, cu_seqlens)
    layout, live, active = token_layout(rewards, mask, cu_seqlens, mask_mode)
    r = _rows(layout, rewards, live)
    last = _bootstrap(layout, bootstrap, r)
    discount, decay = gamma.to(r.dtype), (gamma * lam).to(r.dtype)  # numbers stay on the host, without a copy
    if values is None:
        (following,) = _walk(layout, active, (last,), lambda t, x: (r[:, t] + discount * x[0],))
        returns = r + discount * following
        advantages = returns
    else:
        v = _rows(layout, values, live)

        def step(t: int, state: State) -> State:
            advantage, value = state
            return r[:, t] + discount * value - v[:, t] + decay * advantage, v[:, t]

        next_advantage, next_value = _walk(layout, active, (torch.zeros_like(last), last), step)
        advantages = r + discount * next_value - v + decay * next_advantage
        returns = advantages + v
    return _masked(layout, live, advantages), _masked(layout, live, returns)


def vtrace(
    logp: Tensor,
    rollout_logp: Tensor,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
    rho_max: Tensor,
    c_max: Tensor,
    mask_mode: str,
) -> tuple[Tensor, Tensor]:
    """A_t = ρ_t(r_t + γ·v_{t+1} − V_t), v_t = V_t + ρ_t(r_t + γ·V_{t+1} − V_t) + γ·c_t(v_{t+1} − V_{t+1})."""
    layout, live, active = token_layout(rewards, mask, cu_seqlens, mask_mode)
    r, v = _rows(layout, rewards, live), _rows(layout, values, live)
    ratio = (_rows(layout, logp, live) - _rows(layout, rollout_logp, live)).exp()  # 1 where a token is not live
    rho = torch.minimum(rho_max.to(r.dtype), ratio)
    c = lam.to(r.dtype) * torch.minimum(c_max.to(r.dtype), ratio)
    discount = gamma.to(r.dtype)
    last = _bootstrap(layout, bootstrap, r)

    def step(t: int, state: State) -> State:
        target, value = state
        delta = rho[:, t] * (r[:, t] + discount * value - v[:, t])
        return v[:, t] + delta + discount * c[:, t] * (target - value), v[:, t]

    next_target, next_value = _walk(layout, active, (last, last), step)
    targets = v + rho * (r + discount * next_value - v) + discount * c * (next_target - next_value)
    advantages = rho * (r + discount * next_target - v)
    return _masked(layout, live, advantages), _masked(layout, live, targets)


def n_step_returns(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    n: int,
    gamma: Tensor,
    mask_mode: str,
) -> Tensor:
    """G^(n)_t = r_t + γ·G^(n−1)_{t+1} with G^(0) = V (21, 24); the bootstrap value follows the last live token."""
    layout, live, active = token_layout(rewards, mask, cu_seqlens, mask_mode)
    r, result = _rows(layout, rewards, live), _rows(layout, values, live)
    last = _bootstrap(layout, bootstrap, r)
    # The active position after each, or `length` where the sequence has none: then the bootstrap value follows.
    length = layout.rows[1]
    position = torch.arange(length, device=r.device)
    there = torch.where(active, position, length)
    following = torch.nn.functional.pad(there.flip(1).cummin(1).values.flip(1), (0, 1), value=length)[:, 1:]
    if layout.cu_seqlens is not None:
        following = following.masked_fill(following >= layout.cu_seqlens[1:][layout.index], length)
    ends = following == length
    tail = layout.spread(last).expand(layout.rows)
    for _ in range(min(n, length)):
        after = result.gather(1, following.clamp(max=max(length - 1, 0)))
        result = r + gamma.to(r.dtype) * torch.where(ends, tail, after)
    return _masked(layout, live, result)


def shape_rewards(scores: Tensor, kl: Tensor, beta: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """r_t = −β·kl_t, plus the score of its prefix (81), or at the last live token that of the sequence (7)."""
    layout, live, _ = token_layout(kl, mask, cu_seqlens, "skip")
    penalty = _rows(layout, kl, live)
    shaped = 0.0 - beta.to(penalty.dtype) * penalty  # 0 where a token is not live, and stays so
    if scores.shape == kl.shape:
        shaped = shaped + _rows(layout, scores, live)
    elif live.numel():
        last = _last_live(layout, live)
        score = torch.where(last >= 0, scores.to(shaped.dtype), torch.zeros((), dtype=shaped.dtype, device=kl.device))
        shaped = shaped.reshape(-1).scatter_add(0, last.clamp(min=0), score).reshape(layout.rows)
    return shaped.reshape(layout.shape)


def process_advantages(
    step_rewards: Tensor, step_ends: Tensor, group_ids: Tensor | None, group_size: int, length: int, eps: Tensor
) -> Tensor:
    """r̃ = (r − mean of all step rewards of the group)/(std + ε), A_{i,t} = Σ_{index(j) ≥ t} r̃_j (§6.3): (B, length)."""
    answers, steps = step_rewards.shape
    there = step_ends >= 0
    r = step_rewards.double().masked_fill(~there, 0.0)
    if answers == 0 or steps == 0:
        return r.new_zeros((answers, length), dtype=accumulation_dtype(step_rewards.dtype))
    if group_ids is None:
        group = torch.arange(answers, device=r.device) // group_size
    else:
        group = torch.unique(group_ids, return_inverse=True)[1]
    none = r.new_zeros(answers)  # there are at most as many groups
    size = none.index_add(0, group, there.double().sum(1))
    mean = none.index_add(0, group, r.sum(1)) / size.clamp(min=1)
    centred = (r - mean[group, None]).masked_fill(~there, 0.0)
    spread = none.index_add(0, group, centred.square().sum(1)) / (size - 1).clamp(min=1)
    low = (none + math.inf).scatter_reduce(0, group, r.masked_fill(~there, math.inf).amin(1), "amin")
    high = (none - math.inf).scatter_reduce(0, group, r.masked_fill(~there, -math.inf).amax(1), "amax")
    constant = ((low == high) | (size == 1))[group, None] | ~there
    normalised = (centred / (spread.sqrt() + eps)[group, None]).masked_fill(constant, 0.0)
    suffix = normalised.flip(1).cumsum(1).flip(1)
    # A token belongs to the first step that ends at it or later; after the last one there is nothing.
    ends = step_ends.masked_fill(~there, length)
    position = torch.arange(length, device=r.device).expand(answers, length).contiguous()
    step = torch.searchsorted(ends.contiguous(), position)
    padded = torch.nn.functional.pad(suffix, (0, 1))
    return padded.gather(1, step).to(accumulation_dtype(step_rewards.dtype))


def whiten_stats(x: Tensor, mask: Tensor | None, minus: Tensor | None = None) -> Tensor:
    """(3,) fp64: the number of live tokens, their mean, and Σ (x − mean)²; of x − ``minus``, where that is given."""
    live = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    count = live.double().sum()
    difference = x if minus is None else x - minus
    wide = torch.where(live, difference, torch.zeros((), dtype=x.dtype, device=x.device)).double()
    mean = wide.sum() / count.clamp(min=1)
    squares = torch.where(live, wide - mean, torch.zeros_like(wide)).square().sum()
    return torch.stack([count, mean, squares])


def whiten_apply(x: Tensor, mask: Tensor | None, stats: Tensor, eps: Tensor, shift_mean: bool) -> Tensor:
    """(x − mean)/sqrt(var + ε), with the mean added again unless ``shift_mean``; 0 where a token is not live."""
    live = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    count, mean, squares = stats.unbind()
    normalised = (x.double() - mean) / (squares / (count - 1).clamp(min=1) + eps).sqrt()
    normalised = torch.where(count == 1, torch.zeros_like(normalised), normalised)
    result = normalised if shift_mean else normalised + mean
    return torch.where(live, result, torch.zeros_like(result)).to(accumulation_dtype(x.dtype))


def token_layout(
    tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, mask_mode: str
) -> tuple[Sequences, Tensor, Tensor]:
    """The layout, and which positions are live and which active, as rows."""
    layout = sequences(tokens, cu_seqlens, "rewards")
    live = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    live = layout.as_rows(live)
    return layout, live, live if mask_mode == "skip" else _live_from(layout, live) > 0


def _rows(layout: Sequences, tensor: Tensor, live: Tensor) -> Tensor:
    """Rows in the accumulation dtype, 0 at tokens that are not live: whatever stands there enters no arithmetic."""
    rows = layout.as_rows(tensor.to(accumulation_dtype(tensor.dtype)))
    return torch.where(live, rows, torch.zeros((), dtype=rows.dtype, device=rows.device))


def _masked(layout: Sequences, live: Tensor, rows: Tensor) -> Tensor:
    return torch.where(live, rows, torch.zeros((), dtype=rows.dtype, device=rows.device)).reshape(layout.shape)


def _bootstrap(layout: Sequences, bootstrap: Tensor | None, like: Tensor) -> Tensor:
    """(B,): the value after the last live token."""
    return like.new_zeros(layout.count) if bootstrap is None else bootstrap.to(like.dtype)


def _live_from(layout: Sequences, live: Tensor) -> Tensor:
    """How many live tokens its sequence has from each position on."""
    count = live.long().cumsum(1)
    if layout.cu_seqlens is None:
        return count[:, -1:] - count + live.long()
    total = torch.nn.functional.pad(count[0], (1, 0))[layout.cu_seqlens[1:]]
    return layout.spread(total) - count + live.long()


def _last_live(layout: Sequences, live: Tensor) -> Tensor:
    """(B,) the place of each sequence's last live token among all positions of the rows; negative without one."""
    rows, length = layout.rows
    place = live.int() * torch.arange(1, length + 1, dtype=torch.int32, device=live.device)  # in the row, from 1
    if layout.cu_seqlens is None:
        last, start = place.amax(1).long() - 1, torch.arange(rows, device=live.device) * length
        return torch.where(last >= 0, last + start, -1)
    # By the number of tokens up to each end: no token stands before the end of a leading empty sequence.
    last = torch.nn.functional.pad(place[0].cummax(0).values, (1, 0))[layout.cu_seqlens[1:]].long() - 1
    return torch.where(last >= layout.cu_seqlens[:-1], last, -1)


def _walk(layout: Sequences, active: Tensor, start: State, step: Callable[[int, State], State]) -> State:
    """The state that each position finds, from the last position of every sequence to its first.

    ``start`` (B,) is what a sequence's last position finds; ``step(t, state)`` is what an active position makes of it.
    """
    length = layout.rows[1]
    ends = None
    if layout.cu_seqlens is not None:
        index = layout.index
        start = tuple(s[index] if length else s for s in start)  # per position: (N,)
        marks = torch.zeros(length + 1, dtype=torch.bool, device=active.device)
        ends = marks.index_fill(0, layout.cu_seqlens[1:], True)[1:]
    state = start if ends is None else tuple(s[-1:] for s in start)
    found = []
    for t in reversed(range(length)):
        if ends is not None:
            state = tuple(torch.where(ends[t], s[t : t + 1], x) for s, x in zip(start, state, strict=True))
        found.append(state)
        state = tuple(torch.where(active[:, t], new, old) for new, old in zip(step(t, state), state, strict=True))
    if not found:
        return tuple(s.new_zeros(layout.rows) for s in start)
    return tuple(torch.stack(column[::-1], dim=1) for column in zip(*found, strict=True))
