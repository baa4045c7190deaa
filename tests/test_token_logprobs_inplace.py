"""token_logprobs(inplace_backward=True): the same gradient in the logits' own memory, or an error."""

from __future__ import annotations

import pytest
import torch

import rl4llm_fast as rf
from tests.test_token_logprobs import BACKENDS, run


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_gradient(backend):
    logits, ids = torch.randn(2, 5, 301, dtype=torch.bfloat16), torch.randint(301, (2, 5))
    _, expected = run(logits, ids, backend=backend)
    _, got = run(logits, ids, backend=backend, inplace_backward=True)
    assert torch.equal(got, expected)


def test_writes_into_the_logits_storage():
    if "cpu" not in BACKENDS:
        pytest.skip("no compiled backend here")
    leaf = torch.randn(4, 64, requires_grad=True)
    logits = leaf * 1
    before = logits.detach().clone()
    rf.token_logprobs(logits, torch.zeros(4, dtype=torch.long), inplace_backward=True, backend="cpu").sum().backward()
    assert not torch.equal(before, logits)
    assert torch.equal(leaf.grad, logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_a_leaf(backend):
    logits = torch.randn(2, 5, requires_grad=True)
    with pytest.raises(ValueError, match="inplace_backward"):
        rf.token_logprobs(logits, torch.zeros(2, dtype=torch.long), inplace_backward=True, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_a_view_of_a_leaf(backend):
    logits = torch.randn(2, 4, 5, requires_grad=True)
    with pytest.raises(ValueError, match="inplace_backward"):
        rf.token_logprobs(logits[:, :-1], torch.zeros(2, 3, dtype=torch.long), inplace_backward=True, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_of_other_logits_is_fine(backend):
    logits, ids = torch.randn(2, 4, 5, dtype=torch.bfloat16), torch.randint(5, (2, 3))
    grads = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        logp = rf.token_logprobs((leaf * 1)[:, :-1], ids, inplace_backward=inplace, backend=backend)
        grads += torch.autograd.grad(logp.sum(), leaf)
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("size", "view"),
    [
        (17, lambda z: z.unfold(0, 9, 4)),  # rows that share part of their memory
        (21, lambda z: z.as_strided((2, 3, 9), (4, 4, 1))),  # and leading dimensions that do
        (24, lambda z: z.as_strided((2, 3, 8), (0, 8, 1))),
        (48, lambda z: z.as_strided((2, 3, 8), (8, 16, 1))),  # these do not
    ],
)
def test_logits_that_overlap_are_left_alone(backend, size, view):
    values, grads = torch.randn(size), []
    ids = torch.randint(8, view(values).shape[:-1])
    for inplace in (False, True):
        leaf = values.clone().requires_grad_()
        logp = rf.token_logprobs(view(leaf * 1), ids, inplace_backward=inplace, backend=backend)
        grads += torch.autograd.grad(logp.sum(), leaf)
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_overlap_compile(backend):
    def loss(z):
        ids = torch.zeros(3, dtype=torch.long)
        return rf.token_logprobs((z * 1).unfold(0, 9, 4), ids, inplace_backward=True, backend=backend).sum()

    leaf = torch.randn(17, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(leaf), leaf) for f in (loss, compiled)))


def test_second_backward_and_other_consumers_raise():
    if "cpu" not in BACKENDS:
        pytest.skip("no compiled backend here")
    ids = torch.zeros(2, dtype=torch.long)
    logits = torch.randn(2, 5, requires_grad=True) * 1
    loss = rf.token_logprobs(logits, ids, inplace_backward=True, backend="cpu").sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = torch.randn(2, 5, requires_grad=True) * 1
    other = logits.exp().sum() + (logits**2).sum()
    rf.token_logprobs(logits, ids, inplace_backward=True, backend="cpu").sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
