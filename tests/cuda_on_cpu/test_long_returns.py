"""Scans of rows as long as the kernels really cut them: several parts, odd lengths, strides, few and many rows."""

from __future__ import annotations

import itertools

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast.testing import assert_as_good_as_eager


def gae(x, **options):
    return rf.gae(x[0], x[1], gamma=0.99, lam=0.95, **options)


def vtrace(x, **options):
    return rf.vtrace(0.3 * x[2], 0.3 * x[3], x[0], x[1], gamma=0.99, lam=0.95, c_max=0.9, **options)


def n_step(x, n=20, **options):
    return (rf.n_step_returns(x[0], x[1], n, gamma=0.99, **options),)


def holes(*shape):
    mask = torch.rand(*shape) < 0.6
    mask[0, shape[1] // 3 :] = False
    mask[1, : shape[1] // 2] = False
    return mask


@pytest.mark.parametrize("op", [gae, vtrace, n_step])
@pytest.mark.parametrize("length", [129, 512, 513, 1500, 4096, 9001])
def test_triton_rows(op, length):
    x, last = [torch.randn(3, length) for _ in range(4)], torch.randn(3)
    for mode, mask in itertools.product(["skip", "zero"], [None, holes(3, length)]):
        common = {"mask": mask, "mask_mode": mode}
        got = op(x, bootstrap_value=last, backend="triton", **common)
        oracle = op([t.double() for t in x], bootstrap_value=last.double(), backend="cpu", **common)
        eager = op(x, bootstrap_value=last, backend="eager", **common) if length < 2000 else oracle
        for g, o, e in zip(got, oracle, eager, strict=True):
            assert_as_good_as_eager(g, o, e)
        alone = op([t[:1] for t in x], mask=None if mask is None else mask[:1], mask_mode=mode,
                   bootstrap_value=last[:1], backend="triton")  # fmt: skip
        assert all(torch.equal(many[:1], one) for many, one in zip(got, alone, strict=True))


@pytest.mark.parametrize("n", [15, 16, 17, 256, 300, 4097, 2**40])
def test_triton_digits_of_n(n):
    """Sixteen steps a launch: digits of 0, one digit and several, windows over the ends of parts and sequences."""
    lengths = [4300, 0, 1, 300]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    x, last, mask = [torch.randn(sum(lengths)) for _ in range(2)], torch.randn(4), torch.rand(sum(lengths)) < 0.6
    for mode, live in itertools.product(["skip", "zero"], [None, mask]):
        common = {"mask": live, "mask_mode": mode, "cu_seqlens": offsets, "n": n}
        (got,) = n_step(x, bootstrap_value=last, backend="triton", **common)
        (oracle,) = n_step([t.double() for t in x], bootstrap_value=last.double(), backend="cpu", **common)
        assert_as_good_as_eager(got, oracle, oracle)


@pytest.mark.parametrize("op", [gae, vtrace, n_step])
def test_triton_packs(op):
    lengths = [0, 5000, 1, 700, 0, 4096, 8200]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    x, last, mask = [torch.randn(sum(lengths)) for _ in range(4)], torch.randn(7), torch.rand(sum(lengths)) < 0.6
    for mode, live in itertools.product(["skip", "zero"], [None, mask]):
        common = {"mask": live, "mask_mode": mode, "cu_seqlens": offsets}
        got = op(x, bootstrap_value=last, backend="triton", **common)
        oracle = op([t.double() for t in x], bootstrap_value=last.double(), backend="cpu", **common)
        for g, o in zip(got, oracle, strict=True):
            assert_as_good_as_eager(g, o, o)


@pytest.mark.parametrize("mode", ["skip", "zero"])
def test_triton_gradients_scores_and_strides(mode):
    kl, values, scores = torch.rand(9001, 3).t(), torch.randn(3, 9003)[:, 1:-1], torch.randn(3)
    mask, grads = holes(3, 9001), torch.randn(2, 3, 9001)

    def run(dtype, backend):
        leaf, last = values.to(dtype).clone().requires_grad_(), torch.ones(3, dtype=dtype, requires_grad=True)
        outs = rf.gae(scores.to(dtype), leaf, kl=kl.to(dtype), beta=0.1, gamma=0.99, mask=mask, mask_mode=mode,
                      bootstrap_value=last, backend=backend)  # fmt: skip
        torch.autograd.backward(outs, [g.to(dtype) for g in grads])
        return [*outs, leaf.grad, last.grad]

    for g, o in zip(run(torch.float32, "triton"), run(torch.float64, "cpu"), strict=True):
        assert_as_good_as_eager(g.detach(), o.detach(), o.detach())
