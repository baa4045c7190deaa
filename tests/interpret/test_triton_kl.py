"""What the kernels of kl_divergence do beyond tests/test_kl_divergence.py: parts, bits, strides, the launchers."""

from __future__ import annotations

import math

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast.testing import assert_as_good_as_eager

INF = math.inf
DIRECTIONS = ["reverse", "forward", "jsd"]
ops = torch.ops.rl4llm_fast_triton
ONE = torch.ones((), dtype=torch.float64)
HALF = torch.full((), 0.5, dtype=torch.float64)


def forward_and_backward(logits, ref, backend, **options):
    leaf = logits.detach().clone().requires_grad_()
    kl = rf.kl_divergence(leaf, ref, backend=backend, **options)
    kl.backward(torch.linspace(0.5, 1.5, len(kl)).to(kl))
    return kl.detach(), leaf.grad


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_in_parts_with_empty_parts(direction):
    V = 70_000  # three parts
    logits, ref = torch.randn(5, V), torch.randn(5, V)
    logits[0, :40_000] = ref[0, :40_000] = -INF  # a whole part of −inf, and then some
    logits[1, 30_000:] = ref[1, 30_000:] = -INF
    logits[2, 5] = -INF  # the forward KL is inf
    ref[3, 69_999] = -INF  # the reverse KL is inf
    ref[4, 40_000] = math.nan
    options = {"direction": direction, "temperature": 0.8}
    kl, grad = forward_and_backward(logits, ref, "triton", **options)
    oracle, oracle_grad = forward_and_backward(logits.double(), ref.double(), "eager", **options)
    eager, eager_grad = forward_and_backward(logits, ref, "eager", **options)
    assert_as_good_as_eager(kl, oracle, eager, name="kl")
    rows = torch.isfinite(oracle)
    assert_as_good_as_eager(grad[rows], oracle_grad[rows], eager_grad[rows], name="dlogits")
    assert (grad[:4][logits[:4] == -INF] == 0).all()
    assert grad[4].isnan().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bits_do_not_depend_on_the_batch(direction):
    V = 33_000  # two parts
    logits, ref = torch.randn(3, V).bfloat16(), torch.randn(3, V)
    whole = ops.kl_divergence_fwd(logits[None], ref[None], None, ONE, None, direction, HALF)
    alone = ops.kl_divergence_fwd(logits[None, 1:2], ref[None, 1:2], None, ONE, None, direction, HALF)
    for a, b in zip(whole, alone, strict=True):
        assert torch.equal(a[1:2], b)
    grad = torch.ones(3)
    dlogits = ops.kl_divergence_bwd(logits[None], ref[None], None, ONE, None, direction, HALF, *whole[1:], grad)
    one = ops.kl_divergence_bwd(
        logits[None, 1:2], ref[None, 1:2], None, ONE, None, direction, HALF, *alone[1:], grad[1:2]
    )
    assert torch.equal(dlogits[:, 1:2], one)


def test_strided_rows_and_offsets_beyond_2_to_the_31():
    """Rows 2^31 + 16 elements apart, unlike the reference's: an offset in 32 bits would land elsewhere."""
    apart, V = 2**31 + 16, 300
    storage = torch.empty(apart + V, dtype=torch.bfloat16)  # address space; only the pages of two rows are touched
    rows = storage.as_strided((1, 2, V), (0, apart, 1))
    rows.copy_(torch.randn(1, 2, V))
    dense, ref = rows.clone(), torch.randn(1, 2, V + 3)[..., 1:-2]
    options = (None, ONE, None, "reverse", ONE)
    far = ops.kl_divergence_fwd(rows, ref, *options)
    near = ops.kl_divergence_fwd(dense, ref, *options)
    for a, b in zip(far, near, strict=True):
        assert torch.equal(a, b)
    grads = (*near[1:], torch.ones(2))
    expected = ops.kl_divergence_bwd(dense, ref, *options, *grads)
    assert torch.equal(ops.kl_divergence_bwd(rows, ref, *options, *grads), expected)
    ops.kl_divergence_bwd_(rows, ref, *options, *grads)
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("shift", [1, 3, 4, 7])
def test_every_alignment_of_both_sides(shift):
    """Rows that start anywhere between two multiples of 16 bytes, and end anywhere."""
    for dtype, ref_dtype in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)):
        logits, ref = torch.randn(2, 1_051).to(dtype)[:, shift:-1], torch.randn(2, 1_051).to(ref_dtype)[:, : -1 - shift]
        for direction in DIRECTIONS:
            kl, grad = forward_and_backward(logits, ref, "triton", direction=direction)
            oracle, oracle_grad = forward_and_backward(logits.double(), ref.double(), "eager", direction=direction)
            eager, eager_grad = forward_and_backward(logits, ref, "eager", direction=direction)
            assert_as_good_as_eager(kl, oracle, eager, name="kl")
            assert_as_good_as_eager(grad, oracle_grad, eager_grad, name="dlogits")


def test_hyperparameters_on_the_device():
    """Tensors are read by the kernel; a value out of range is NaN for its row, a dead row is 0 all the same."""
    logits, ref = torch.randn(1, 4, 90), torch.randn(1, 4, 90)
    mask = torch.tensor([True, True, True, False])
    temperature, cap = torch.tensor([0.5, -1.0, 0.0, -1.0]), torch.tensor([3.0])
    kl, *saved = ops.kl_divergence_fwd(logits, ref, mask, temperature, cap, "reverse", ONE)
    expected = rf.kl_divergence(
        logits[0, :1].double(), ref[0, :1].double(), temperature=0.5, softcap=3.0, backend="eager"
    )
    assert abs(kl[0] - expected[0]) < 1e-6
    assert kl[1:3].isnan().all()
    assert not any(result[3].any() for result in (kl, *saved))
    grad = ops.kl_divergence_bwd(logits, ref, mask, temperature, cap, "reverse", ONE, *saved, torch.ones(4))
    assert (grad[0, 3] == 0).all()
    assert grad[0, 1:3].isnan().all()
    for beta, bad in ((0.3, False), (1.0, True), (0.0, True)):
        kl, inner, *_ = ops.kl_divergence_fwd(logits, ref, mask, ONE, None, "jsd", torch.tensor(beta))
        assert kl.isnan().tolist() == [bad, bad, bad, False]
        assert inner[:, 0].isnan().tolist() == [bad, bad, bad, False]


def test_equal_distributions_have_no_divergence():
    logits = 5 * torch.randn(3, 2_000)
    for direction in DIRECTIONS:
        kl, grad = forward_and_backward(logits, logits + 100.0, "triton", direction=direction)
        assert kl.abs().max() < 1e-4  # the offset rounds the logits
        assert grad.abs().max() < 1e-5
        kl, _ = forward_and_backward(logits, logits, "triton", direction=direction)
        assert kl.abs().max() < 1e-6


def test_launchers_refuse_what_they_cannot_address():
    good, arguments = torch.zeros(1, 2, 4), (None, ONE, None, "reverse", ONE)
    with pytest.raises(TypeError, match=r"ref_logits.*float64"):
        ops.kl_divergence_fwd(good, good.double(), *arguments)
    with pytest.raises(ValueError, match="last stride of 1"):
        ops.kl_divergence_fwd(torch.zeros(1, 4, 2).mT, good, *arguments)
    with pytest.raises(ValueError, match="ref_logits"):
        ops.kl_divergence_fwd(good, torch.zeros(2, 1, 4), *arguments)
