"""policy_loss of as many tokens, rows and sequences as the CUDA kernels cut and join in another way."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_losses import check, sample

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_sum"])
def test_triton_a_row_of_more_segments_than_one_thread_joins(aggregation):
    check(sample(2, 34_000) | {"aggregation": aggregation, "kl_coef": 0.1, "entropy_coef": 0.1}, "triton")


@pytest.mark.parametrize("kind", ["gspo", "cispo"])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_sum_norm", "none"])
def test_triton_more_sequences_than_one_thread_joins(kind, aggregation):
    lengths = [int(n) for n in torch.randint(0, 60, (300,))]
    s = {n: v.reshape(-1) for n, v in sample(1, sum(lengths)).items()}
    s |= {"kind": kind, "aggregation": aggregation, "kl_coef": 0.1, "entropy_coef": 0.1}
    s["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)])
    check(s, "triton")
    check(s | {"advantages": torch.randn(300)}, "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gspo", "sapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("packed", [False, True])
def test_triton_sequences_in_every_dtype(dtype, kind, level, packed):
    """What is read as it comes, tensors of other dtypes beside it among them."""
    s = sample(4, 70, dtype) | {"kind": kind, "rollout_correction": "truncate", "rollout_level": level, "kl_coef": 0.1}
    s["rollout_logp"] = (s["old_logp"].float() + 0.01 * torch.randn(4, 70)).to(dtype)
    s |= {"token_weights": torch.rand(4, 70).to(torch.float16), "entropy": s["entropy"].float(), "entropy_coef": 0.1}
    s["advantages"] = torch.randn(4).to(dtype)
    if packed:
        s = {n: v.reshape(-1) if isinstance(v, torch.Tensor) else v for n, v in s.items()}
        s |= {"cu_seqlens": torch.tensor([0, 1, 1, 2, 280]), "aggregation": "seq_mean_token_mean"}
    check(s, "triton")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_triton_offsets_of_every_dtype(dtype):
    s = {n: v.reshape(-1) for n, v in sample(1, 120).items()} | {"aggregation": "seq_mean_token_sum_norm"}
    check(s | {"cu_seqlens": torch.tensor([0, 5, 5, 110, 120], dtype=dtype)}, "triton")


@pytest.mark.parametrize("offsets", [[-7, 3, 500, 20], [50, 40, 2**40, -(2**40)], [100, 100, 100, 100]])
def test_triton_offsets_that_lie_read_nothing_outside(offsets):
    """On a GPU nobody looks at them before the kernels: tokens before and behind hold NaN, which must not be read."""
    from plugin_losses import policy_loss_sequences_fwd

    around = torch.full((300,), float("nan"))
    logp = around[100:200].copy_(-torch.rand(100)).reshape(1, -1)
    params = torch.tensor([-1.0, 3, -1, 1] + [0.0] * 8, dtype=torch.float64)
    given = (None, None, None, None, None, torch.tensor(offsets), params, "gspo", "", "seq_mean_token_sum_norm", "")
    found = policy_loss_sequences_fwd(logp, logp, logp, *given[:5], *given[5:], True, False, False)
    assert torch.isfinite(found[0])
    assert torch.isfinite(found[4]).all()


def test_triton_no_sequence():
    s = {n: v[0, :0] for n, v in sample(1, 4).items()} | {"cu_seqlens": torch.tensor([0]), "kind": "gspo"}
    got = check(s, "triton")
    assert got["loss"] == 0
