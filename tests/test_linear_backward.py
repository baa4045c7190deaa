"""The backward of linear_policy_loss: its products, the gradients it hands on, once more, and never differentiated."""

from __future__ import annotations

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast import chunked_losses

pytestmark = pytest.mark.skipif(
    "cpu" not in rf.backends()["linear_policy_loss"], reason="the C++ extension is not built here"
)

B, T, D, V = 3, 7, 12, 53


def inputs():
    """Hidden states, head, bias, sampled tokens, and the log-probabilities of an older policy."""
    factors = [torch.randn(B, T, D), torch.randn(V, D) / D**0.5, torch.randn(V)]
    return *factors, torch.randint(V, (B, T)), -4 - torch.rand(B, T)


@pytest.mark.parametrize("kind", ["ppo_clip", "gspo"])
def test_backward_twice(kind):
    *factors, ids, old = inputs()
    leaves = [f.requires_grad_() for f in factors]
    loss, _ = rf.linear_policy_loss(leaves[0], leaves[1], ids, old, torch.randn(B, T), leaves[2], kind=kind)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for scale in (2.0, 1.0):
        again = torch.autograd.grad(loss, leaves, torch.tensor(scale), retain_graph=True)
        for got, wanted in zip(again, first, strict=True):
            torch.testing.assert_close(got, scale * wanted, rtol=1e-5, atol=1e-6)
    loss.backward(retain_graph=True)
    kept = [leaf.grad.clone() for leaf in leaves]
    loss.backward()
    for leaf, once in zip(leaves, kept, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * once)  # .grad is no alias of what the graph keeps


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_last_backward_takes_no_second_copy(scale):
    """It hands on what the forward made, scaled where it stands; one that keeps the graph leaves that alone."""
    *factors, ids, old = inputs()
    leaves = [f.requires_grad_() for f in factors]
    loss, _ = rf.linear_policy_loss(leaves[0], leaves[1], ids, old, torch.randn(B, T), leaves[2])
    saved = loss.grad_fn.saved_tensors[3:]
    made, places = [t.clone() for t in saved], {t.data_ptr() for t in saved}
    first = torch.autograd.grad(loss, leaves, torch.tensor(scale), retain_graph=True)
    for got, once, kept in zip(first, made, saved, strict=True):
        torch.testing.assert_close(got, scale * once.view_as(got))
        assert torch.equal(kept, once)
    del saved, kept
    (scale * loss).backward()
    for got, once in zip(first, made, strict=True):
        torch.testing.assert_close(got, scale * once.view_as(got))
    for leaf, once in zip(leaves, made, strict=True):
        torch.testing.assert_close(leaf.grad, scale * once.view_as(leaf))
    assert {leaf.grad.data_ptr() for leaf in leaves} == places
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scaling_in_blocks_rounds_once(dtype, monkeypatch):
    """What a GPU takes, where a 0-d factor of 1/3 would be rounded to 16 bits before it multiplies."""
    monkeypatch.setattr(chunked_losses, "_BLOCK", 1_000)
    gradient, factor = torch.randn(70, 41).to(dtype), torch.tensor(1 / 3)
    out = torch.empty_like(gradient)
    chunked_losses.scale_blocks(gradient, factor, out)
    assert torch.equal(out, (gradient.float() * factor).to(dtype))
    chunked_losses.scale_blocks(gradient, factor, gradient)
    assert torch.equal(out, gradient)


def test_three_products_and_none_for_frozen_factors(monkeypatch):
    *factors, ids, old = inputs()
    products = []
    original = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(a[0].shape) or original(*a, **k))
    for frozen, wanted in (((), 3), ((0,), 2), ((1,), 2), ((0, 1), 1)):
        products.clear()
        leaves = [f.detach().requires_grad_(i not in frozen) for i, f in enumerate(factors[:2])]
        loss, _ = rf.linear_policy_loss(leaves[0], leaves[1], ids, old, torch.randn(B, T))
        if len(frozen) < 2:
            loss.backward()
        assert len(products) == wanted
        assert [leaf.grad is None for leaf in leaves] == [i in frozen for i in range(2)]
    products.clear()
    with torch.no_grad():
        rf.linear_policy_loss(factors[0], factors[1].requires_grad_(), ids, old, torch.randn(B, T))
    assert len(products) == 1


def test_double_backward_raises():
    *factors, ids, old = inputs()
    leaf = factors[0].requires_grad_()
    loss, _ = rf.linear_policy_loss(leaf, factors[1], ids, old, torch.randn(B, T))
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()
