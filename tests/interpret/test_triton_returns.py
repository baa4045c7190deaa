"""The Triton scans in the interpreter: every shape of cut, both mask modes, packed and padded, gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from rl4llm_fast.kernels import configs

import rl4llm_fast as rf
from rl4llm_fast.testing import assert_as_good_as_eager

MODES = ["skip", "zero"]


@pytest.fixture(autouse=True)
def _short_parts(monkeypatch):
    """Parts of 128 tokens and blocks of 64, so that small tensors are cut as large ones are."""
    monkeypatch.setattr(configs, "SCAN_PART", 128)
    monkeypatch.setattr(configs, "SCAN_ROWS", (64, 1))
    monkeypatch.setattr(configs, "SCAN_PACKED", (64, 1))


def holes(*shape):
    mask = torch.rand(*shape) < 0.5
    if len(shape) == 2:
        mask[0, shape[1] // 3 :] = False
        mask[1] = False
    return mask


def gae(x, **options):
    return rf.gae(x[0], x[1], gamma=0.97, lam=0.9, **options)


def returns(x, **options):
    return (rf.discounted_returns(x[0], gamma=0.97, **options),)


def vtrace(x, **options):
    return rf.vtrace(0.3 * x[2], 0.3 * x[3], x[0], x[1], gamma=0.97, lam=0.9, rho_max=1.2, c_max=0.9, **options)


def compare(op, x, mask, **options):
    got = op(x, mask=mask, backend="triton", **options)
    last = options.pop("bootstrap_value", None)
    wide = None if last is None else last.double()
    oracle = op([t.double() for t in x], mask=mask, backend="eager", bootstrap_value=wide, **options)
    eager = op(x, mask=mask, backend="eager", bootstrap_value=last, **options)
    for a, b, c in zip(got, oracle, eager, strict=True):
        assert_as_good_as_eager(a, b, c)
    return got


@pytest.mark.parametrize("op", [gae, returns, vtrace])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [1, 63, 400])
def test_rows(op, dtype, length):
    if dtype != torch.float32 and length != 63:
        pytest.skip("dtypes differ in the loads only")
    x, last = [torch.randn(3, length).to(dtype) for _ in range(4)], torch.randn(3).to(dtype)
    for mode, mask in itertools.product(MODES, [None, holes(3, length)]):
        compare(op, x, mask, mask_mode=mode, bootstrap_value=last)


@pytest.mark.parametrize("op", [gae, returns, vtrace])
def test_packed_gives_the_bits_of_rows_of_its_own(op):
    lengths = [5, 0, 300, 128, 1, 257, 0]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    x, last = [torch.randn(sum(lengths)) for _ in range(4)], torch.randn(len(lengths))
    for mode, mask in itertools.product(MODES, [None, holes(sum(lengths))]):
        got = compare(op, x, mask, mask_mode=mode, cu_seqlens=offsets, bootstrap_value=last)
        for i, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
            if end - start < 64:  # a short row is scanned in a smaller block
                continue
            part = [t[None, start:end] for t in x]
            live = None if mask is None else mask[None, start:end]
            alone = op(part, mask=live, mask_mode=mode, bootstrap_value=last[i : i + 1], backend="triton")
            for a, b in zip(got, alone, strict=True):
                assert torch.equal(a[None, start:end], b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("packed", [False, True])
def test_gradients(mode, packed):
    shape, count = ((400,), 4) if packed else ((3, 300), 3)
    offsets = torch.tensor([0, 150, 150, 390, 400]) if packed else None
    x = [torch.randn(shape), torch.randn(shape), torch.randn(count)]
    mask, grads = holes(*shape), torch.randn(2, *shape)

    def gradients(backend, dtype):
        leaves = [t.detach().to(dtype).clone().requires_grad_() for t in x]
        outs = rf.gae(*leaves[:2], gamma=0.97, mask=mask, mask_mode=mode, cu_seqlens=offsets,
                      bootstrap_value=leaves[2], backend=backend)  # fmt: skip
        torch.autograd.backward(outs, [g.to(dtype) for g in grads])
        return [leaf.grad for leaf in leaves]

    results = (gradients("triton", torch.float32), gradients("eager", torch.float64), gradients("eager", torch.float32))
    for a, b, c in zip(*results, strict=True):
        assert_as_good_as_eager(a, b, c)


def test_shaped_rewards_strides_and_bits():
    kl, values, scores = torch.rand(4, 600)[:, ::2], torch.randn(4, 301)[:, :-1], torch.randn(4)
    mask = torch.rand(300, 4).t() < 0.7
    got = rf.gae(scores, values, kl=kl, beta=0.1, mask=mask, backend="triton")
    want = rf.gae(scores, values, kl=kl, beta=0.1, mask=mask, backend="eager")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    alone = rf.gae(scores[2:3], values[2:3], kl=kl[2:3], beta=0.1, mask=mask[2:3], backend="triton")
    for a, b in zip(got, alone, strict=True):
        assert torch.equal(a[2:3], b)


def test_offsets_that_lie_reach_nothing_out_of_bounds():
    """On a GPU the contents of cu_seqlens are not looked at; here the op is called past the check."""
    tokens, number = torch.randn(300), torch.tensor(0.9, dtype=torch.float64)
    for offsets in ([0, 300, 100, 300], [200, 0, 300, 50]):
        given = torch.tensor(offsets)
        torch.ops.rl4llm_fast_triton.gae_fwd(
            tokens, tokens, None, given, None, None, number, number, number, "skip", True
        )
