"""The ops that touch a few numbers a token, each whole: inputs, this library's call, the obvious formula, its traffic.

Everyone's function takes the inputs in their order, the upstream gradient excepted, and returns a tensor, a tuple of
tensors, or a loss with metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rl4llm_fast as rf

UPSTREAM = "upstream"  # the gradient of a result that is no loss
_GAMMA, _LAM, _STEPS, _CLIP, _BETA = 0.99, 0.95, 4, 0.2, 0.1
_REASONING = 8  # steps of an answer that are rewarded


@dataclass(frozen=True)
class Op:
    """names: of the inputs; leaf: the one that takes a gradient. bytes, flops: of a token, forward and backward."""

    names: tuple[str, ...]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    forward_bytes: int
    backward_bytes: int
    flops: int
    results: tuple[str, ...] = ("result",)
    leaf: str | None = None


def _answers(rows: int, positions: int, generator: torch.Generator) -> Tensor:
    """Live tokens: a row's answer, from a quarter of the positions up."""
    device = generator.device
    length = torch.randint(positions // 4, positions + 1, (rows, 1), generator=generator, device=device)
    return torch.arange(positions, device=device) < length


def inputs(op: str, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """By name: log-probabilities that lie near each other, values near returns, a mask of answers."""
    rows, positions = shape
    device = generator.device
    made: dict[str, Tensor] = {"logp": -torch.rand(shape, generator=generator, device=device) * 5}
    for name in OPS[op].names:
        if name in ("ref_logp", "rollout_logp"):
            made[name] = made["logp"] + torch.randn(shape, generator=generator, device=device) * 0.2
        elif name == "old_values":
            made[name] = made["values"] + torch.randn(shape, generator=generator, device=device) * 0.2
        elif name == "mask":
            made[name] = _answers(rows, positions, generator)
        elif name == "step_rewards":
            made[name] = torch.randn((rows, _REASONING), generator=generator, device=device)
        elif name == "step_ends":
            each = positions // _REASONING
            made[name] = torch.arange(1, _REASONING + 1, device=device).mul(each).sub(1).repeat(rows, 1)
        elif name == "desirable":
            made[name] = torch.rand(rows, generator=generator, device=device) < 0.5
        elif name != "logp":
            made[name] = torch.randn(shape, generator=generator, device=device)
    return {name: made[name] for name in OPS[op].names}


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def _kl_estimate(logp: Tensor, ref_logp: Tensor) -> Tensor:
    to_ref = ref_logp - logp
    return to_ref.exp() - to_ref - 1


def _value_loss(values: Tensor, returns: Tensor, old_values: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    plain = (values - returns).square()
    clipped = (old_values + (values - old_values).clamp(-_CLIP, _CLIP) - returns).square()
    loss = 0.5 * _mean(torch.maximum(plain, clipped), mask)
    with torch.no_grad():
        left = _mean((returns - values - _mean(returns - values, mask)).square(), mask)
        total = _mean((returns - _mean(returns, mask)).square(), mask)
        metrics = {"clip_fraction": _mean((clipped > plain).float(), mask), "explained_variance": 1 - left / total}
    return loss, metrics


def _whiten(x: Tensor, mask: Tensor) -> Tensor:
    mean = _mean(x, mask)
    variance = _mean((x - mean).square(), mask) * mask.sum() / (mask.sum() - 1)
    return torch.where(mask, (x - mean) * (variance + 1e-8).rsqrt(), 0.0)


def _vtrace(logp: Tensor, rollout_logp: Tensor, rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    rho = (logp - rollout_logp).exp().clamp(max=1.0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    delta = rho * (rewards + _GAMMA * following - values)
    gap, gaps = torch.zeros_like(values[:, 0]), []
    for t in reversed(range(values.shape[1])):
        gap = delta[:, t] + _GAMMA * _LAM * rho[:, t] * gap
        gaps.append(gap)
    targets = values + torch.stack(gaps[::-1], 1)
    return rho * (rewards + _GAMMA * torch.nn.functional.pad(targets[:, 1:], (0, 1)) - values), targets


def _n_step_returns(rewards: Tensor, values: Tensor) -> Tensor:
    result = values
    for _ in range(_STEPS):
        result = rewards + _GAMMA * torch.nn.functional.pad(result[:, 1:], (0, 1))
    return result


def _group(step_rewards: Tensor) -> int:
    """Answers of a group: eight, or what divides them all."""
    return math.gcd(8, step_rewards.shape[0])


def _process_advantages(step_rewards: Tensor, step_ends: Tensor, logp: Tensor) -> Tensor:
    rewards = step_rewards.view(-1, _group(step_rewards) * _REASONING)
    normed = ((rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-6)).view_as(step_rewards)
    reached = step_ends[:, :, None] >= torch.arange(logp.shape[1], device=logp.device)
    return torch.where(reached, normed[:, :, None], 0.0).sum(1)


def _kto_loss(logp: Tensor, ref_logp: Tensor, desirable: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    reward = _BETA * torch.where(mask, logp - ref_logp, 0.0).sum(-1)
    value = torch.sigmoid(torch.where(desirable, reward, -reward))
    with torch.no_grad():
        good, bad = _mean(reward, desirable), _mean(reward, ~desirable)
        metrics = {
            "reward_chosen": good,
            "reward_rejected": bad,
            "margin": good - bad,
            "accuracy": (value > 0.5).float().mean(),
            "weight_ratio": desirable.sum() / (~desirable).sum(),
        }
    return (1 - value).mean(), metrics


# Bytes: inputs read once a pass, results written once; a loss's backward reads its upstream scalar and writes dlogp.
OPS = {
    "kl_estimate": Op(
        ("logp", "ref_logp", UPSTREAM),
        rf.kl_estimate,
        _kl_estimate,
        forward_bytes=4 + 4 + 4,
        backward_bytes=4 + 4 + 4 + 4,
        flops=8,
        results=("kl",),
        leaf="logp",
    ),
    "value_loss": Op(
        ("values", "returns", "old_values", "mask"),
        lambda values, returns, old, mask: rf.value_loss(values, returns, old_values=old, clip=_CLIP, mask=mask),
        _value_loss,
        forward_bytes=4 + 4 + 4 + 1 + 4,
        backward_bytes=4 + 4,
        flops=20,
        leaf="values",
    ),
    "kto_loss": Op(
        ("logp", "ref_logp", "desirable", "mask"),
        lambda logp, ref, desirable, mask: rf.kto_loss(logp, ref, desirable, beta=_BETA, mask=mask),
        _kto_loss,
        forward_bytes=4 + 4 + 1,
        backward_bytes=1 + 4,
        flops=4,
        leaf="logp",
    ),
    "whiten": Op(("x", "mask"), rf.whiten, _whiten, forward_bytes=2 * (4 + 1) + 4, backward_bytes=0, flops=8),
    "vtrace": Op(
        ("logp", "rollout_logp", "rewards", "values"),
        lambda *tensors: rf.vtrace(*tensors, gamma=_GAMMA, lam=_LAM),
        _vtrace,
        forward_bytes=4 * 4 + 2 * 4,
        backward_bytes=0,
        flops=15,
        results=("advantages", "targets"),
    ),
    "n_step_returns": Op(
        ("rewards", "values"),
        lambda rewards, values: rf.n_step_returns(rewards, values, _STEPS, gamma=_GAMMA),
        _n_step_returns,
        forward_bytes=2 * 4 + 4,
        backward_bytes=0,
        flops=2 * _STEPS,
    ),
    "process_advantages": Op(
        ("step_rewards", "step_ends", "logp"),  # of the last the length alone is used
        lambda rewards, ends, logp: rf.process_advantages(
            rewards, ends, group_size=_group(rewards), length=logp.shape[1]
        ),
        _process_advantages,
        forward_bytes=4,
        backward_bytes=0,
        flops=2,
    ),
}


def call(op: str, function: Callable[..., Any], given: dict[str, Tensor], leaf: Tensor | None) -> dict[str, Tensor]:
    """The outputs by name; with a ``leaf`` in the place of the op's own, also of the backward pass."""
    what = OPS[op]
    tensors = {**given, what.leaf: leaf} if leaf is not None and what.leaf else given
    result = function(*(tensors[name] for name in what.names if name != UPSTREAM))
    if isinstance(result, tuple) and isinstance(result[1], dict):
        loss, metrics = result
        found = {"loss": loss} | {f"metric {name}": value for name, value in metrics.items()}
    else:
        found = dict(zip(what.results, result if isinstance(result, tuple) else (result,), strict=True))
    if leaf is not None:
        first = next(iter(found.values()))
        first.backward(given[UPSTREAM].to(first.dtype) if UPSTREAM in given else None)
    return {name: value.detach() for name, value in found.items()}
