"""What the Triton kernels do beyond tests/test_token_logprobs.py: parts, huge offsets, bad ids, the launchers."""

from __future__ import annotations

import math

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast.testing import assert_as_good_as_eager

INF = math.inf
ops = torch.ops.rl4llm_fast_triton
ONE = torch.ones((), dtype=torch.float64)


def forward_and_backward(logits, ids, grad, backend, **options):
    leaf = logits.detach().clone().requires_grad_()
    logp, entropy = rf.token_logprobs(leaf, ids, return_entropy=True, backend=backend, **options)
    torch.autograd.backward([logp, entropy], [torch.full_like(logp, grad), torch.full_like(entropy, -0.5)])
    return logp.detach(), entropy.detach(), leaf.grad


def test_a_row_in_parts_with_empty_parts():
    V = 70_000  # three parts
    logits = torch.randn(4, V)
    logits[0, :40_000] = -INF  # a whole part of −inf, and then some
    logits[1, 30_000:] = -INF
    logits[2] = -INF
    logits[3, 69_999] = math.nan
    ids = torch.tensor([69_999, 0, 5, 7])
    got = forward_and_backward(logits, ids, 1.5, "triton", temperature=0.8)
    oracle = forward_and_backward(logits.double(), ids, 1.5, "eager", temperature=0.8)
    eager = forward_and_backward(logits, ids, 1.5, "eager", temperature=0.8)
    for name, g, o, e in zip(("logp", "entropy"), got, oracle, eager, strict=False):
        assert_as_good_as_eager(g, o, e, name=name)
    assert_as_good_as_eager(got[2][:2], oracle[2][:2], eager[2][:2], name="dlogits")
    assert (got[2][logits == -INF] == 0).all()
    assert got[2][3].isnan().all()


def test_bits_do_not_depend_on_the_batch():
    V = 33_000  # two parts
    logits, ids = torch.randn(3, V).bfloat16(), torch.randint(V, (3,))
    whole = forward_and_backward(logits, ids, 1.0, "triton")
    again = forward_and_backward(logits, ids, 1.0, "triton")
    alone = forward_and_backward(logits[1:2], ids[1:2], 1.0, "triton")
    for a, b, c in zip(whole, again, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[1:2], c)


def test_offsets_beyond_2_to_the_31():
    """Rows 2^31 + 16 elements apart: an offset in 32 bits would land elsewhere (or nowhere)."""
    apart, V = 2**31 + 16, 300
    storage = torch.empty(apart + V, dtype=torch.bfloat16)  # address space; only the pages of two rows are touched
    rows = storage.as_strided((1, 2, V), (0, apart, 1))
    rows.copy_(torch.randn(1, 2, V))
    dense, ids = rows.clone(), torch.tensor([7, 299])
    far = ops.token_logprobs_fwd(rows, ids, None, ONE, None, -100, True)
    near = ops.token_logprobs_fwd(dense, ids, None, ONE, None, -100, True)
    for a, b in zip(far, near, strict=True):
        assert torch.equal(a, b)
    logp, entropy, row_max, log_sum = near
    grads = (row_max, log_sum, entropy, torch.ones_like(logp), torch.ones_like(entropy))
    expected = ops.token_logprobs_bwd(dense, ids, None, ONE, None, -100, *grads)
    assert torch.equal(ops.token_logprobs_bwd(rows, ids, None, ONE, None, -100, *grads), expected)
    ops.token_logprobs_bwd_(rows, ids, None, ONE, None, -100, *grads)
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("bad", [64, -1, 10**12, -(2**40)])
def test_a_bad_id_is_nan_for_its_row_alone(bad):
    logits = torch.randn(1, 3, 64)
    ids = torch.tensor([[1, 2], [bad, 3], [4, -100]])
    logp, entropy, row_max, log_sum = ops.token_logprobs_fwd(logits, ids, None, ONE, None, -100, True)
    assert logp.isnan().tolist() == [[False, False], [True, True], [False, False]]
    assert entropy.isnan().tolist() == [False, True, False]
    assert logp[2, 1] == 0
    grad = ops.token_logprobs_bwd(
        logits, ids, None, ONE, None, -100, row_max, log_sum, entropy, torch.ones_like(logp), None
    )
    assert grad.isnan().any(-1).tolist() == [[False, True, False]]


def test_temperature_and_softcap_on_the_device():
    """Tensors are read by the kernel; a value that is not > 0 is NaN for its row, a dead row is 0 all the same."""
    logits, ids = torch.randn(1, 4, 90), torch.tensor([3, 4, 5, 6])
    mask = torch.tensor([True, True, True, False])
    temperature, cap = torch.tensor([0.5, -1.0, 0.0, -1.0]), torch.tensor([3.0])
    logp, entropy, row_max, log_sum = ops.token_logprobs_fwd(logits, ids, mask, temperature, cap, -100, True)
    expected = rf.token_logprobs(logits[0, :1].double(), ids[:1], temperature=0.5, softcap=3.0, backend="eager")
    assert abs(logp[0] - expected[0]) < 1e-6
    assert logp[1:3].isnan().all()
    assert entropy[1:3].isnan().all()
    assert logp[3] == entropy[3] == row_max[3] == log_sum[3] == 0
    grad = ops.token_logprobs_bwd(
        logits, ids, mask, temperature, cap, -100, row_max, log_sum, entropy, torch.ones(4), torch.ones(4)
    )
    assert (grad[0, 3] == 0).all()
    assert grad[0, 1:3].isnan().all()


def test_many_ids_over_several_blocks():
    V = 9_000
    logits, ids = torch.randn(2, V), torch.randint(V, (2, 40))
    ids[0, 1] = ids[0, 0]  # duplicates add up
    ids[1, 5] = -100
    got = forward_and_backward(logits, ids, 0.7, "triton")
    oracle = forward_and_backward(logits.double(), ids, 0.7, "eager")
    eager = forward_and_backward(logits, ids, 0.7, "eager")
    for name, g, o, e in zip(("logp", "entropy", "dlogits"), got, oracle, eager, strict=True):
        assert_as_good_as_eager(g, o, e, name=name)


def test_the_lowest_finite_logit_is_no_minus_infinity():
    """Libraries mask with finfo.min; (min − max)/τ overflows, and 0·(−inf) must not come of it."""
    logits = torch.randn(2, 500)
    logits[0, :300] = torch.finfo(torch.float32).min
    logits[1] = torch.finfo(torch.float32).min
    ids = torch.tensor([400, 3])
    got = forward_and_backward(logits, ids, 1.0, "triton", temperature=0.01)
    assert all(torch.isfinite(g).all() for g in got)
    assert abs(got[0][1] + math.log(500)) < 1e-5


def test_launchers_refuse_what_they_cannot_address():
    with pytest.raises(TypeError, match=r"logits.*float64"):
        ops.token_logprobs_fwd(torch.zeros(1, 1, 4).double(), torch.tensor([0]), None, ONE, None, -100, False)
    with pytest.raises(ValueError, match="last stride of 1"):
        ops.token_logprobs_fwd(torch.zeros(1, 4, 4).mT, torch.zeros(4).long(), None, ONE, None, -100, False)
    with pytest.raises(ValueError, match="token_ids"):
        ops.token_logprobs_fwd(torch.zeros(1, 2, 4), torch.tensor([0]), None, ONE, None, -100, False)
