"""The losses from hidden states over the Triton kernels, in the interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from rl4llm_fast.kernels import configs, scale

import rl4llm_fast as rf
from rl4llm_fast.testing import assert_as_good_as_eager

B, T, D, V = 2, 5, 8, 37


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [1.0, 1.7])
@pytest.mark.parametrize("kind", ["grpo", "gspo", "sft", "simpo"])
def test_losses(dtype, grad, kind):
    factors = [torch.randn(B, T, D), torch.randn(V, D) / D**0.5, torch.randn(V)]
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 0, 0]])
    factors[0][mask == 0] = math.nan
    factors, ids = [f.to(dtype) for f in factors], torch.randint(V, (B, T))
    advantages, ref = torch.randn(B), -3 - torch.rand(B, T)

    def run(dtype, backend):
        leaves = [f.detach().to(dtype).requires_grad_() for f in factors]
        options = {"mask": mask, "backend": backend, "chunk_tokens": 3}
        if kind == "sft":
            loss = rf.linear_sft_loss(*leaves[:2], ids, leaves[2], **options)
        elif kind == "simpo":
            loss, _ = rf.linear_preference_loss(*leaves[:2], ids, leaves[2], kind=kind, **options)
        else:
            regularisers = {"ref_logp": ref, "kl_coef": 0.1, "entropy_coef": 0.05, **options}
            loss, _ = rf.linear_policy_loss(*leaves[:2], ids, None, advantages, leaves[2], kind=kind, **regularisers)
        (grad * loss).backward()
        return loss.detach(), *(leaf.grad for leaf in leaves)

    results = [run(dtype, "triton"), run(torch.float64, "eager"), run(dtype, "eager")]
    for name, got, oracle, eager in zip(("loss", "dx", "dW", "db"), *results, strict=True):
        assert_as_good_as_eager(got, oracle, eager, dtype=dtype, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scaling_in_place(dtype, monkeypatch):
    monkeypatch.setattr(configs, "SCALE_BLOCK", 64)
    gradient = torch.randn(13, 17).to(dtype)
    for factor in (1.0, -2.5, math.nan):
        found = gradient.clone()
        scale.scale_gradient_(found, torch.tensor(factor))
        wanted = (gradient.float() * factor).to(dtype)
        if dtype == torch.bfloat16 and factor != 1:  # the interpreter cuts bf16 off where a GPU rounds
            torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0, equal_nan=True)
        else:
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="contiguous"):
        scale.scale_gradient_(gradient.t(), torch.tensor(2.0))
