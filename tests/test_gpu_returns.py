"""Returns and advantages on a GPU, against the fp64 oracle on the CPU. Skipped where there is none."""

from __future__ import annotations

import itertools

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast import dispatch
from rl4llm_fast.testing import assert_as_good_as_eager
from tests.returns_cases import MODES, OPS, inputs_of, random_mask

pytestmark = pytest.mark.gpu
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    return request.param


def needs(op, backend):
    reason = dispatch.why_not(op, backend, "cuda")
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def cuda(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def check(function, tensors, backend, **options):
    """``function(*tensors, **options)`` on the GPU by the error rule; float tensors go to the oracle as fp64."""
    got = function(*map(cuda, tensors), **{k: cuda(v) for k, v in options.items()}, backend=backend)

    def wide(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    oracle = function(*map(wide, tensors), **{k: wide(v) for k, v in options.items()}, backend="eager")
    eager = function(*tensors, **options, backend="eager")
    results = [r if isinstance(r, tuple) else (r,) for r in (got, oracle, eager)]
    for g, o, e in zip(*results, strict=True):
        assert_as_good_as_eager(g.cpu(), o, e)
    return results[0]


PUBLIC = {"discounted": "discounted_returns", "n_step": "n_step_returns"}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [1, 127, 1000, 2048, 4097, 20_000])
def test_rows(name, dtype, length, backend):
    needs(PUBLIC.get(name, name), backend)
    x, last = inputs_of(3, length, dtype=dtype), torch.randn(3).to(dtype)
    for mode, mask in itertools.product(MODES, [None, random_mask(3, length)]):
        options = {"mask": mask, "mask_mode": mode, "bootstrap_value": last}
        check(lambda *values, **o: OPS[name](dict(zip(x, values, strict=True)), **o), x.values(), backend, **options)


@pytest.mark.parametrize("name", OPS)
def test_packed(name, backend):
    needs(PUBLIC.get(name, name), backend)
    lengths = [0, 5, 9000, 1, 0, 700, 4096]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    x, last = inputs_of(sum(lengths)), torch.randn(len(lengths))
    for mode, mask in itertools.product(MODES, [None, random_mask(sum(lengths))]):
        options = {"mask": mask, "mask_mode": mode, "bootstrap_value": last, "cu_seqlens": offsets}
        check(lambda *values, **o: OPS[name](dict(zip(x, values, strict=True)), **o), x.values(), backend, **options)


@pytest.mark.parametrize("length", [50, 3000, 9000])
def test_gradients_and_a_row_alone(length, backend):
    needs("gae", backend)
    x, mask, grads = inputs_of(4, length), random_mask(4, length), torch.randn(2, 4, length)

    def gradients(where, dtype, backend, rows=slice(None)):
        leaves = [x[n][rows].to(where, dtype).requires_grad_() for n in ("rewards", "values")]
        outs = rf.gae(*leaves, gamma=0.97, lam=0.9, mask=mask[rows].to(where), backend=backend)
        torch.autograd.backward(outs, [g[rows].to(where, dtype) for g in grads])
        return [t.detach().cpu() for t in (*outs, *(leaf.grad for leaf in leaves))]

    got = gradients("cuda", torch.float32, backend)
    oracle, eager = (gradients("cpu", dtype, "eager") for dtype in (torch.float64, torch.float32))
    for g, o, e in zip(got, oracle, eager, strict=True):
        assert_as_good_as_eager(g, o, e)
    for many, alone in zip(got, gradients("cuda", torch.float32, backend, slice(0, 1)), strict=True):
        assert torch.equal(many[:1], alone)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "mode", [{}, {"scale": "batch"}, {"scale": None}, {"baseline": "leave_one_out"}, {"unbiased": False}], ids=str
)
def test_group_advantages(mode, dtype, backend):
    needs("group_advantages", backend)
    rewards, ids = torch.randn(5000).to(dtype), torch.randint(700, (5000,)) * 7919 - 10**12
    check(rf.group_advantages, (rewards,), backend, group_ids=ids, **mode)
    check(rf.group_advantages, (rewards,), backend, group_size=8, **mode)
    constant = rf.group_advantages(torch.full((5000,), 0.1).cuda(), group_ids=ids.cuda(), backend=backend, **mode)
    assert (constant == 0).all()


def test_process_advantages_and_whiten(backend):
    needs("process_advantages", backend)
    ends = torch.rand(64, 300).argsort(1)[:, :9].sort(1).values
    ends[torch.arange(9) >= torch.randint(10, (64, 1))] = -1
    check(rf.process_advantages, (torch.randn(64, 9), ends), backend, group_size=8, length=300)
    for shape in [(1,), (9, 1300), (300_000,)]:
        x, mask = torch.randn(shape) * 3 + 50, torch.rand(shape) < 0.6
        for shift_mean, live in itertools.product([True, False], [None, mask]):
            check(rf.whiten, (x, live), backend, shift_mean=shift_mean)


def test_shape_rewards_does_not_wait():
    kl, scores = torch.rand(3, 40, device="cuda"), torch.rand(3, device="cuda")
    rf.shape_rewards(scores, kl, beta=0.1)  # whatever happens once
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = rf.shape_rewards(scores, kl, beta=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), rf.shape_rewards(scores.cpu(), kl.cpu(), beta=0.1))
