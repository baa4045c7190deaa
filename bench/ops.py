"""How a case is set up, run and judged: inputs by seed, one step of its mode, and its distance to the fp64 oracle.

A peer's function has the signature of its case's ``call``:

    token_logprobs(logits (N, V), token_ids (N,)) -> logp (N,)
    kl_divergence(logits, ref_logits (N, V)) -> KL(policy‖reference) (N,)
    token_logprobs_entropy(logits, token_ids) -> (logp, entropy), both differentiable
    group_advantages(rewards (B,), group_ids (B,)) -> advantages (B,)
    policy_loss(logp, old_logp, ref_logp (B, T), advantages (B,), mask (B, T)) -> (loss, metrics)
    preference_loss(chosen, rejected, ref_chosen, ref_rejected, mask_chosen, mask_rejected (B, T)) -> (loss, metrics)
    linear_token_logprobs(hidden (N, D), weight (V, D), token_ids (N,)) -> logp (N,)
    linear_policy_loss(hidden, weight, token_ids, ref_logp, advantages (N,)) -> loss; on-policy GRPO with k3, β 0.04
    gae(rewards, values (B, T) or (N,), mask, mask_mode, cu_seqlens (B+1,)) -> (advantages, returns); γ 0.99, λ 0.95

Those of the ops of :mod:`bench.small` stand there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rl4llm_fast as rf
from rl4llm_fast.testing import error_bound

from . import peers, small
from .cases import BACKWARD, BOTH, FORWARD, IN_PLACE, Case
from .peers import ours
from .timing import Step

Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]

HALVED = "halved"  # ends the variant of a loss whose gradient comes in as 1/2

# The oracle sees this many logits at a time, so that its fp64 copies stay small.
_ORACLE_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """The same tensors for everyone, and for every process that asks with the same seed on the same device."""
    generator = torch.Generator(device).manual_seed(seed)
    if case.op == "kl_divergence":
        return {
            "logits": _random_logits(case, generator),
            "ref_logits": _random_logits(case, generator),
            "grad_kl": torch.randn(case.shape[0], generator=generator, device=device),
        }
    if case.op == "token_logprobs":
        rows, vocabulary = case.shape
        return {
            "logits": _random_logits(case, generator),
            "token_ids": torch.randint(vocabulary, (rows,), generator=generator, device=device),
            "grad_logp": torch.randn(rows, generator=generator, device=device),
            "grad_entropy": torch.randn(rows, generator=generator, device=device),
        }
    if case.op == "group_advantages":
        (count,) = case.shape
        sizes = torch.randint(1, 17, (count,), generator=generator, device=device)
        ids = torch.arange(count, device=device).repeat_interleave(sizes)[:count]
        if case.variant == "shuffled":
            ids = ids[torch.randperm(count, generator=generator, device=device)]
        return {"rewards": torch.randn(count, generator=generator, device=device), "group_ids": ids}
    if case.op == "gae":
        return _gae_inputs(case, device, generator)
    if case.op in small.OPS:
        return small.inputs(case.op, case.shape, generator)
    if case.op.startswith("linear_"):
        return _linear_inputs(case, device, generator)
    rows, positions = case.shape
    if case.op == "preference_loss":
        return {k: v for s in ("chosen", "rejected") for k, v in _answer_inputs(s, case.shape, generator).items()}
    logp = -torch.rand(rows, positions, generator=generator, device=device) * 5
    noise = torch.randn(2, rows, positions, generator=generator, device=device) * 0.2
    length = torch.randint(positions // 4, positions + 1, (rows, 1), generator=generator, device=device)
    return {
        "logp": logp,
        "old_logp": logp + noise[0],
        "ref_logp": logp + noise[1],
        "advantages": torch.randn(rows, generator=generator, device=device),
        "mask": torch.arange(positions, device=device) < length,
    }


def _answer_inputs(side: str, shape: tuple[int, ...], generator: torch.Generator) -> Inputs:
    device = generator.device
    logp = -torch.rand(shape, generator=generator, device=device) * 5
    noise = torch.randn(shape, generator=generator, device=device) * 0.2
    length = torch.randint(shape[1] // 4, shape[1] + 1, (shape[0], 1), generator=generator, device=device)
    live = torch.arange(shape[1], device=device) < length
    return {f"logp_{side}": logp, f"ref_{side}": logp + noise, f"mask_{side}": live}


def _linear_inputs(case: Case, device: str, generator: torch.Generator) -> Inputs:
    """Logits of about unit variance; on-policy, so that no ratio stands at a bound where a rounding would decide."""
    rows, width, vocabulary = case.shape
    hidden = torch.randn(rows, width, generator=generator, device=device)
    weight = torch.randn(vocabulary, width, generator=generator, device=device).div_(width**0.5)
    per_row = torch.randn(2, rows, generator=generator, device=device)
    return {
        "hidden": hidden.to(case.dtype),
        "weight": weight.to(case.dtype),
        "token_ids": torch.randint(vocabulary, (rows,), generator=generator, device=device),
        "ref_logp": per_row[0] * 0.2 - math.log(vocabulary) - 0.5,
        "advantages": per_row[1],
    }


def _gae_inputs(case: Case, device: str, generator: torch.Generator) -> Inputs:
    rows, positions = case.shape
    shape = (rows * positions,) if "packed" in case.variant else (rows, positions)
    inputs = {name: torch.randn(shape, generator=generator, device=device) for name in ("rewards", "values")}
    if "holes" in case.variant:
        inputs["mask"] = torch.rand(shape, generator=generator, device=device) < 0.7
    if "packed" in case.variant:
        cuts = torch.randperm(rows * positions - 1, generator=generator, device=device)[: rows - 1] + 1
        ends = cuts.new_tensor([0, rows * positions])
        inputs["cu_seqlens"] = torch.cat([ends[:1], cuts.sort().values, ends[1:]]).int()
    return {name: t.to(case.dtype) if t.is_floating_point() else t for name, t in inputs.items()}


def _random_logits(case: Case, generator: torch.Generator) -> Tensor:
    """About the spread of a language model's; made row-block-wise, so that no fp32 copy is ever whole."""
    logits = torch.empty(case.shape, dtype=case.dtype, device=generator.device)
    for block in logits.split(256):
        block.copy_(torch.randn(block.shape, generator=generator, device=generator.device).mul_(3.0))
    return logits


class _FromHead(torch.autograd.Function):
    """Stands for the layer that made the logits: they are no leaf, and their gradient goes on instead of piling up."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor, received: list[Tensor]) -> Tensor:
        ctx.received = received
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.received.append(grad)
        return None, None, None


def _with_gradient(tensor: Tensor) -> tuple[Tensor, list[Tensor]]:
    received: list[Tensor] = []
    anchor = torch.empty((), device=tensor.device, requires_grad=True)
    return _FromHead.apply(anchor, tensor, received), received


def overwrites(case: Case, peer: str) -> bool:
    """Whether a peer writes its gradient over the logits, so that they must be restored before the next call."""
    return peer == "liger" or (peer in (peers.OURS, *peers.BACKENDS) and case.mode == IN_PLACE)


def step(case: Case, function: Callable[..., Any], inputs: Inputs, restore: bool = False) -> Step:
    """One call of the case's mode. What it returns are the outputs by name, as :func:`errors` judges them."""
    if case.op == "group_advantages":
        return Step(lambda: None, lambda _: {"advantages": function(inputs["rewards"], inputs["group_ids"])})
    if case.op == "policy_loss":
        return _policy_step(case, function, inputs)
    if case.op == "preference_loss":
        return _preference_step(case, function, inputs)
    if case.op.startswith("linear_"):
        return _linear_step(case, function, inputs)
    if case.op == "gae":
        return _gae_step(case, function, inputs)
    if case.op in small.OPS:
        return _small_step(case, function, inputs)
    return _logits_step(case, function, inputs, restore)


def _logits_step(case: Case, function: Callable[..., Any], inputs: Inputs, restore: bool) -> Step:
    kl = case.op == "kl_divergence"
    second = inputs["ref_logits" if kl else "token_ids"]
    names = ("kl",) if kl else ("logp", "entropy") if case.entropy else ("logp",)
    buffer = inputs["logits"].clone() if restore else inputs["logits"]

    def fresh() -> Tensor:
        if restore:
            buffer.copy_(inputs["logits"])
        return buffer

    def outputs(result: Any) -> Outputs:
        return dict(zip(names, result if case.entropy else (result,), strict=True))

    def forward_only(logits: Any) -> Outputs:
        with torch.no_grad():
            return outputs(function(logits, second))

    def forward(logits: Tensor) -> tuple[Outputs, list[Tensor]]:
        leaf, received = _with_gradient(logits)
        return outputs(function(leaf, second)), received

    def backward(state: Any) -> Outputs:
        result, received = state
        gradients = [inputs[f"grad_{name}"].to(result[name].dtype) for name in names]
        torch.autograd.backward([result[name] for name in names], gradients)
        return {**{name: result[name].detach() for name in names}, "grad_logits": received[0]}

    if case.mode == FORWARD:
        return Step(fresh, forward_only)
    if case.mode == BACKWARD:
        return Step(lambda: forward(fresh()), backward)
    assert case.mode in (BOTH, IN_PLACE)
    return Step(fresh, lambda logits: backward(forward(logits)))  # type: ignore[arg-type]


def _policy_step(case: Case, function: Callable[..., Any], inputs: Inputs) -> Step:
    assert case.mode in (FORWARD, BOTH)
    rest = [inputs[name] for name in ("old_logp", "ref_logp", "advantages", "mask")]

    def run(_: object) -> Outputs:
        leaf, received = _with_gradient(inputs["logp"])
        loss, metrics = function(leaf, *rest)
        found = {"loss": loss.detach(), **{f"metric {name}": value for name, value in metrics.items()}}
        if case.mode == BOTH:
            loss.backward()
            found["grad_logp"] = received[0]
        return found

    return Step(lambda: None, run)


def _preference_step(case: Case, function: Callable[..., Any], inputs: Inputs) -> Step:
    assert case.mode == BOTH
    rest = [inputs[f"{name}_{side}"] for name in ("ref", "mask") for side in ("chosen", "rejected")]

    def run(_: object) -> Outputs:
        (chosen, to_chosen), (rejected, to_rejected) = (
            _with_gradient(inputs[f"logp_{side}"]) for side in ("chosen", "rejected")
        )
        loss, metrics = function(chosen, rejected, *rest)
        loss.backward()
        found = {"loss": loss.detach(), **{f"metric {name}": value for name, value in metrics.items()}}
        return found | {"grad_chosen": to_chosen[0], "grad_rejected": to_rejected[0]}

    return Step(lambda: None, run)


def _linear_step(case: Case, function: Callable[..., Any], inputs: Inputs) -> Step:
    assert case.mode in (FORWARD, BOTH)
    loss = case.op == "linear_policy_loss"
    rest = [inputs[name] for name in (("token_ids", "ref_logp", "advantages") if loss else ("token_ids",))]

    def run(_: object) -> Outputs:
        if case.mode == FORWARD:
            with torch.no_grad():
                return {"loss" if loss else "logp": function(inputs["hidden"], inputs["weight"], *rest)}
        leaves = [inputs[name].detach().requires_grad_() for name in ("hidden", "weight")]
        result = function(*leaves, *rest)
        upstream = torch.full_like(result, 0.5) if case.variant.endswith(HALVED) else None  # else 1: nothing to scale
        result.backward(upstream if loss else inputs["advantages"].to(result.dtype))
        gradients = {"grad_hidden": leaves[0].grad, "grad_weight": leaves[1].grad}
        return {"loss" if loss else "logp": result.detach(), **gradients}  # type: ignore[dict-item]

    return Step(lambda: None, run)


def products(case: Case, inputs: Inputs) -> Step | None:
    """The bare matrix products of a case from hidden states, into memory that is there: its floor. None for others."""
    if not case.op.startswith("linear_"):
        return None
    hidden, weight = inputs["hidden"], inputs["weight"]
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run(_: object) -> None:
        torch.mm(hidden, weight.t(), out=logits)
        if case.mode != FORWARD:
            torch.mm(logits, weight, out=grad_hidden)
            torch.mm(logits.t(), hidden, out=grad_weight)

    return Step(lambda: None, run)


def _gae_step(case: Case, function: Callable[..., Any], inputs: Inputs) -> Step:
    assert case.mode == FORWARD
    mode = "zero" if "zero" in case.variant else "skip"
    tensors = [inputs["rewards"], inputs["values"], inputs.get("mask"), mode, inputs.get("cu_seqlens")]
    return Step(lambda: None, lambda _: dict(zip(("advantages", "returns"), function(*tensors), strict=True)))


def _small_step(case: Case, function: Callable[..., Any], inputs: Inputs) -> Step:
    assert case.mode in (FORWARD, BOTH)
    name = small.OPS[case.op].leaf

    def run(_: object) -> Outputs:
        if case.mode == FORWARD or name is None:
            with torch.no_grad():
                return small.call(case.op, function, inputs, None)
        leaf, received = _with_gradient(inputs[name])
        return small.call(case.op, function, inputs, leaf) | {f"grad_{name}": received[0]}

    return Step(lambda: None, run)


@dataclass(frozen=True)
class Error:
    """One output against the fp64 oracle, in the max norm, and what the library's error rule allows it."""

    found: float
    allowed: float

    @property
    def part(self) -> float:
        """How much of the allowance is used; above 1 (or NaN) the result is wrong."""
        return self.found / self.allowed

    @property
    def within(self) -> bool:
        return self.found <= self.allowed


def errors(case: Case, inputs: Inputs, outputs: Mapping[str, Outputs]) -> dict[str, dict[str, Error]]:
    """``{implementation: {output: Error}}`` for the outputs that the oracle knows too, over the whole tensors."""
    found = {name: dict.fromkeys(values, 0.0) for name, values in outputs.items()}
    eager_error: dict[str, float] = {}
    scale: dict[str, float] = {}
    for part, block in _blocks(case, inputs):
        oracle = _reference(case, block, torch.float64)
        eager = _reference(case, block, case.dtype)
        for key, exact in oracle.items():
            scale[key] = _worse(scale.get(key, 0.0), exact)
            eager_error[key] = _worse(eager_error.get(key, 0.0), eager[key] - exact)
            for name, values in outputs.items():
                if key in values:
                    value = values[key][part] if exact.dim() else values[key]
                    found[name][key] = _worse(found[name][key], value - exact)
    return {
        name: {
            key: Error(found[name][key], _allowed(scale[key], eager_error[key], values[key].dtype))
            for key in scale.keys() & values.keys()
        }
        for name, values in outputs.items()
    }


def _worse(known: float, values: Tensor) -> float:
    """The larger of a norm and that of more values; NaN, once there, stays."""
    more = values.abs().max().item()
    return more if not more <= known else known


def _allowed(scale: float, eager_error: float, dtype: torch.dtype) -> float:
    """The rule of ``rl4llm_fast.testing``: it knows tensors by their max norms only, so two numbers stand for them."""
    oracle = torch.tensor([scale, 0.0], dtype=torch.float64)
    return error_bound(oracle, oracle + torch.tensor([0.0, eager_error], dtype=torch.float64), dtype)


def _blocks(case: Case, inputs: Inputs) -> Iterator[tuple[Any, Inputs]]:
    """Rows of logits are independent, so that its oracle never holds the whole in fp64."""
    if "logits" not in inputs:
        yield slice(None), inputs
        return
    rows, vocabulary = case.shape
    block = max(1, _ORACLE_ELEMENTS[inputs["logits"].device.type] // vocabulary)
    for start in range(0, rows, block):
        part = slice(start, start + block)
        yield part, {name: tensor[part] for name, tensor in inputs.items()}


def _reference(case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """The library's eager backend, in ``dtype``, on the same values."""
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    if dtype != torch.float64:  # per-token numbers are fp32 whatever logits and hidden states are
        numbers = {"grad_logp", "grad_entropy", "grad_kl"} if "logits" in inputs else {"ref_logp", "advantages"}
        cast |= {name: inputs[name] for name in inputs.keys() & numbers if "hidden" in inputs or "logits" in inputs}
    with rf.use_backend("eager"):
        plain = ours.build(case, inputs[next(iter(inputs))].device.type)
        made = step(case, plain, cast)
        return {name: value.detach() for name, value in _run(made).items()}


def _run(made: Step) -> Outputs:
    found = made.run(made.prepare())
    assert isinstance(found, dict)
    return found


def first_run(made: Step) -> Outputs:
    """The outputs of one call, in memory of their own: later calls may overwrite what an in-place step returned."""
    return {name: value.detach().clone() for name, value in _run(made).items()}
