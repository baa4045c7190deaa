"""The adapters of the peers: each computes its case's formula, or says why it takes no part."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import cases, ops, peers, run, small
from bench.cases import BOTH, FORWARD, Case
from bench.peers import ours
from rl4llm_fast import dispatch

LOGITS = Case("token_logprobs", "token_logprobs", BOTH, torch.float32, (8, 300), ("cpu",))
POLICY = Case("policy_loss", "policy_loss", BOTH, torch.float32, (4, 33), ("cpu",))


def linear(op: str, mode: str, dtype: torch.dtype = torch.float32) -> Case:
    return Case(op, op, mode, dtype, (40, 16, 300), ("cpu",))


def gae(variant: str) -> Case:
    return Case("gae", "gae", FORWARD, torch.float32, (6, 40), ("cpu",), (), variant)


def judged(name: str, case: Case, build: Callable[..., Any] = peers.build) -> dict[str, ops.Error]:
    inputs = ops.make_inputs(case, "cpu")
    outputs = ops.first_run(ops.step(case, build(name, case, "cpu"), inputs, ops.overwrites(case, name)))
    return ops.errors(case, inputs, {name: outputs})[name]


def module(name: str, **attributes: object) -> types.ModuleType:
    made = types.ModuleType(name)
    for key, value in attributes.items():
        setattr(made, key, value)
    return made


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: object) -> None:
    """A package that is not there, with functions of the documented signature; its parents are empty."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, module(parent, __path__=[]))
    made = module(name, **attributes)
    monkeypatch.setitem(sys.modules, name, made)
    if len(parts) > 1:
        monkeypatch.setattr(sys.modules[".".join(parts[:-1])], parts[-1], made, raising=False)


def test_a_backend_asked_for_by_name_is_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    choose = dispatch.choose

    def noted(op: str, tensor: Tensor, backend: str | None = None) -> str:
        taken.append(choose(op, tensor, backend))
        return taken[-1]

    monkeypatch.setattr(dispatch, "choose", noted)
    for backend in ("eager", "cpu"):
        taken.clear()
        found = judged(backend, LOGITS, lambda _, case, device, b=backend: ours.by_name(b, case, device))  # type: ignore[misc]
        assert all(error.within for error in found.values()), found
        assert taken[0] == backend, taken  # what follows is the oracle's
    with pytest.raises(peers.Absent, match="needs a GPU"):
        peers.build("triton", LOGITS, "cpu")
    with pytest.raises(peers.Absent, match="takes cuda tensors"):
        ours.by_name("cuda", LOGITS, "cpu")
    assert set(run._arguments(["--suite", "gpu"]).peers) >= set(peers.BACKENDS)
    assert not set(run._arguments(["--suite", "cpu"]).peers) & set(peers.BACKENDS)


@pytest.mark.parametrize("name", [*peers.BACKENDS, *peers.RIVALS])
def test_every_peer_builds_or_gives_a_reason(name: str) -> None:
    built, reasons = [], []
    for case in cases.CASES:
        try:
            built.append(peers.build(name, case, "cpu"))
        except peers.Absent as reason:
            reasons.append(str(reason))
    assert all(callable(function) for function in built)
    assert all(len(reason) > 10 for reason in reasons)
    assert peers.version(name)
    assert built or name not in ("eager", "chunked", "loop", "compile")


@pytest.mark.parametrize("mode", [FORWARD, BOTH])
@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_policy_loss"])
@pytest.mark.parametrize("name", ["trl", "liger"])
def test_chunked_heads_of_other_libraries_compute_the_same(name: str, op: str, mode: str) -> None:
    pytest.importorskip({"trl": "trl", "liger": "liger_kernel"}[name])
    if (name, op) == ("liger", "linear_token_logprobs"):
        with pytest.raises(peers.Absent, match="upstream gradient" if mode == BOTH else "needs a GPU"):
            peers.build(name, linear(op, mode), "cpu")
        return
    for dtype in (torch.float32, torch.bfloat16):
        found = judged(name, linear(op, mode, dtype))
        assert ("grad_weight" in found) == (mode == BOTH)
        assert all(error.within for error in found.values()), found


@pytest.mark.parametrize("op", [*small.OPS, "policy_loss_gspo"])
def test_ops_of_a_few_numbers_a_token_and_their_formulas_agree(op: str) -> None:
    public = op if op in small.OPS else "policy_loss"
    mode = BOTH if public == "policy_loss" or small.OPS[op].leaf else FORWARD
    case = Case(public, op, mode, torch.float32, (6, 40), ("cpu",))
    inputs = ops.make_inputs(case, "cpu")
    outputs = {
        name: ops.first_run(ops.step(case, peers.build(name, case, "cpu"), inputs)) for name in (peers.OURS, "eager")
    }
    assert outputs["eager"].keys() == outputs[peers.OURS].keys()
    assert any(name.startswith("grad_") for name in outputs["eager"]) == (mode == BOTH)
    for name, found in ops.errors(case, inputs, outputs).items():
        assert found.keys() == outputs[name].keys()
        # both follow the formula; the library's own results also meet the error rule
        assert all(error.within or name == "eager" for error in found.values()), (name, found)
    for key, value in outputs["eager"].items():
        torch.testing.assert_close(value, outputs[peers.OURS][key], atol=1e-5, rtol=1e-4)
    assert case.bytes > 0
    assert case.flops > 0


def test_a_forward_alone_has_one_product_of_three() -> None:
    forward, both = linear("linear_token_logprobs", FORWARD), linear("linear_token_logprobs", BOTH)
    assert (forward.flops, both.flops) == (2 * 40 * 16 * 300, 6 * 40 * 16 * 300)
    assert (forward.bytes, both.bytes) == ((40 + 300) * 16 * 4, 4 * (40 + 300) * 16 * 4)


@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_policy_loss"])
def test_cut_cross_entropy(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def linear_cross_entropy(e: Tensor, c: Tensor, targets: Tensor, *, reduction: str, impl: str) -> Tensor:
        asked.append(impl)
        return torch.nn.functional.cross_entropy((e @ c.T).float(), targets, reduction=reduction)

    stand_in(monkeypatch, "cut_cross_entropy", linear_cross_entropy=linear_cross_entropy)
    found = judged("cce", linear(op, BOTH))
    assert set(asked) == {"torch_compile"}
    assert found.keys() >= {"grad_hidden", "grad_weight"}
    assert all(error.within for error in found.values()), found


@pytest.mark.parametrize("variant", ["padded", "packed"])
def test_torchrl(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def estimate(
        gamma: float, lmbda: float, value: Tensor, following: Tensor, reward: Tensor, done: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tensors (B, T, 1), as documented."""
        running, advantages = torch.zeros_like(value[:, 0]), torch.empty_like(value)
        for t in reversed(range(value.shape[1])):
            live = (~done[:, t]).float()
            delta = reward[:, t] + gamma * live * following[:, t] - value[:, t]
            running = delta + gamma * lmbda * live * running
            advantages[:, t] = running
        return advantages, advantages + value

    stand_in(monkeypatch, "torchrl.objectives.value.functional", vec_generalized_advantage_estimate=estimate)
    found = judged("torchrl", gae(variant))
    assert found.keys() == {"advantages", "returns"}
    assert all(error.within for error in found.values()), found
    with pytest.raises(peers.Absent, match="no mask"):
        peers.build("torchrl", gae(f"{variant} holes zero"), "cpu")


def test_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool) -> Tensor:
        assert not inplace_backward
        return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)

    def entropy_from_logits(logits: Tensor) -> Tensor:
        return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)

    def agg_loss(loss: Tensor, mask: Tensor, mode: str) -> Tensor:
        assert mode == "token-mean"
        return (loss * mask).sum() / mask.sum()

    def kl_penalty(logp: Tensor, ref: Tensor, kind: str) -> Tensor:
        assert kind == "low_var_kl"
        return (ref - logp).exp() - (ref - logp) - 1

    def compute_policy_loss(
        old: Tensor,
        logp: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        cliprange: float,
        clip_ratio_c: float,
        loss_agg_mode: str,
    ) -> tuple[Tensor, ...]:
        ratio = (logp - old).exp()
        plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
        worse = torch.minimum(torch.maximum(plain, clipped), clip_ratio_c * advantages.abs())
        fraction = agg_loss((clipped > plain).float(), mask, loss_agg_mode)
        return agg_loss(worse, mask, loss_agg_mode), fraction, agg_loss(old - logp, mask, loss_agg_mode), fraction * 0

    monkeypatch.setattr("bench.peers.verl.installed", lambda package: "0.0")
    stand_in(
        monkeypatch,
        "verl.utils.torch_functional",
        logprobs_from_logits=logprobs_from_logits,
        entropy_from_logits=entropy_from_logits,
    )
    algorithms = {"agg_loss": agg_loss, "kl_penalty": kl_penalty, "compute_policy_loss": compute_policy_loss}
    stand_in(monkeypatch, "verl.trainer.ppo.core_algos", **algorithms)
    assert judged("verl", LOGITS).keys() == {"logp", "grad_logits"}
    found = judged("verl", POLICY)
    assert {"loss", "grad_logp", "metric clip_fraction", "metric kl_ref", "metric kl_old_k1"} <= found.keys()
    assert all(error.within for error in found.values()), found
    with pytest.raises(peers.Absent, match="whitens"):
        peers.build("verl", gae("padded"), "cpu")


@pytest.mark.parametrize("name", ["quack", "fla"])
def test_peers_that_are_gpu_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def cross_entropy(x: Tensor, target: Tensor, *, reduction: str) -> Tensor:
        return torch.nn.functional.cross_entropy(x, target, reduction=reduction)

    monkeypatch.setattr(f"bench.peers.{name}.installed", lambda package: peers.installed("no-such-package"))
    with pytest.raises(peers.Absent, match="not installed"):
        peers.build(name, LOGITS, "cpu")
    monkeypatch.setattr(f"bench.peers.{name}.installed", lambda package: "0.0")
    with pytest.raises(peers.Absent, match="needs a GPU"):
        peers.build(name, LOGITS, "cpu")
    with pytest.raises(peers.Absent, match="no result a token"):
        peers.build(name, linear("linear_token_logprobs", BOTH), "cuda")
    with pytest.raises(peers.Absent, match="no counterpart"):
        peers.build(name, POLICY, "cuda")
    stand_in(monkeypatch, "quack.cross_entropy", cross_entropy=cross_entropy)
    stand_in(monkeypatch, "fla.modules", FusedCrossEntropyLoss=torch.nn.CrossEntropyLoss)

    def build(name: str, case: Case, device: str) -> Any:
        return peers.build(name, case, "cuda")  # the function knows no device: only the question does

    assert all(error.within for error in judged(name, LOGITS, build).values())
