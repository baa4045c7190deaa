"""Ops inside what users wrap around them: checkpointing, autocast, torch.func, shared logits, fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import rl4llm_fast as rf
from rl4llm_fast import checks

N, D, V = 6, 16, 301
BACKENDS = [b for b in ("eager", "cpu") if b in rf.backends()["token_logprobs"]]


def inputs():
    hidden = torch.randn(N, D, requires_grad=True)
    weight = (torch.randn(V, D) / 4).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,)), torch.randn(N, D), torch.randn(V, D) / 4


def from_logits(hidden, weight, ids, ref_hidden, ref_weight, backend):
    logits, ref = hidden @ weight.t(), ref_hidden @ ref_weight.t()
    logp, entropy = rf.token_logprobs(logits, ids, return_entropy=True, backend=backend)
    return logp + entropy * rf.kl_divergence(logits, ref, backend=backend)


def from_hidden(hidden, weight, ids, ref_hidden, ref_weight, backend):
    logp, entropy = rf.linear_token_logprobs(hidden, weight, ids, return_entropy=True, chunk_tokens=4, backend=backend)
    return logp + entropy * rf.linear_kl_divergence(
        hidden, weight, ref_hidden, ref_weight, chunk_tokens=4, backend=backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [from_logits, from_hidden])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(function, reentrant, backend):
    arguments = inputs()
    plain = function(*arguments, backend)
    upstream = torch.randn_like(plain)
    wanted = torch.autograd.grad((plain * upstream).sum(), arguments[:2])
    again = checkpoint(function, *arguments, backend, use_reentrant=reentrant)
    for tensor in arguments[:2]:
        tensor.grad = None
    (again * upstream).sum().backward()
    assert torch.equal(again, plain)
    for tensor, gradient in zip(arguments[:2], wanted, strict=True):
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled extension is not installed")
@pytest.mark.parametrize("function", [from_logits, from_hidden])
def test_torch_func_is_refused_in_words(function):
    hidden, weight, *rest = inputs()

    def loss(h):
        return function(h, weight, *rest, "cpu").sum()

    with pytest.raises(RuntimeError, match=r"functorch transforms|setup_context"):
        torch.func.grad(loss)(hidden.detach())
    with pytest.raises(RuntimeError, match=r"functorch transforms|setup_context|vmap"):
        torch.func.vmap(loss)(hidden.detach().expand(2, N, D))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_runs_products_in_its_dtype_and_returns_fp32(backend):
    hidden, weight, ids, *_ = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = rf.linear_token_logprobs(hidden, weight, ids, backend=backend)
    by_hand = rf.token_logprobs(hidden.bfloat16() @ weight.bfloat16().t(), ids, backend=backend)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, by_hand)
    logp.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled extension is not installed")
def test_logits_overwritten_in_place_cannot_reach_another_consumer():
    hidden, weight, ids, *_ = inputs()
    logits = hidden @ weight.t()
    other = logits.exp().sum()  # saves exp(logits): unharmed
    squared = logits.pow(2).sum()  # saves the logits themselves
    logp = rf.token_logprobs(logits, ids, inplace_backward=True, backend="cpu")
    logp.sum().backward(retain_graph=True)
    other.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


def test_hyperparameters_are_made_once_and_survive_every_mode():
    with FakeTensorMode():
        loss, _ = rf.policy_loss(torch.zeros(2, 3, requires_grad=True), None, torch.ones(2), eps_low=0.123)
        assert isinstance(loss, FakeTensor)
    with torch.inference_mode():
        rf.policy_loss(torch.zeros(2, 3), None, torch.ones(2), eps_low=0.123)
    for _ in range(2):
        logp = torch.zeros(2, 3, requires_grad=True)
        rf.policy_loss(logp, None, torch.ones(2), eps_low=0.123)[0].backward()
        torch.testing.assert_close(logp.grad, torch.full((2, 3), -1 / 6))
    one, two = (checks.numbers({"a": 0.5, "b": 2}, 4, logp) for _ in range(2))
    assert one is two
    assert one.tolist() == [0.5, 2.0, 0.0, 0.0]
    assert checks.numbers({"a": 0.5, "b": 3}, 4, logp).tolist() == [0.5, 3.0, 0.0, 0.0]
