"""Sizes that a 16- or 32-bit index would get wrong: large vocabularies, rows × V beyond 2^31, many short rows."""

from __future__ import annotations

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast.testing import assert_as_good_as_eager

if "cpu" not in rf.backends()["token_logprobs"]:
    pytest.skip("the compiled extension is not installed", allow_module_level=True)


def logprobs(logits, ids, backend):
    leaf = logits.detach().clone().requires_grad_()
    logp, entropy = rf.token_logprobs(leaf, ids, temperature=0.7, return_entropy=True, backend=backend)
    (logp - 0.3 * entropy).sum().backward()
    return logp.detach(), entropy.detach(), leaf.grad


def divergence(logits, ref, backend):
    leaf = logits.detach().clone().requires_grad_()
    kl = rf.kl_divergence(leaf, ref, temperature=0.7, backend=backend)
    kl.sum().backward()
    return kl.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(3, 151_936), (3, 262_144), (70_000, 2)])
def test_agrees_with_the_oracle(dtype, rows, vocabulary):
    logits, ref = ((2 * torch.randn(rows, vocabulary)).to(dtype) for _ in range(2))
    ids = torch.randint(vocabulary - 1, vocabulary, (rows,))
    results = [logprobs(logits, ids, "cpu"), logprobs(logits.double(), ids, "eager"), logprobs(logits, ids, "eager")]
    for name, g, o, e in zip(("logp", "entropy", "dlogits"), *results, strict=True):
        assert_as_good_as_eager(g, o, e, name=name)
    wide = divergence(logits.double(), ref.double(), "eager")
    for name, g, o, e in zip(
        ("kl", "dlogits"), divergence(logits, ref, "cpu"), wide, divergence(logits, ref, "eager"), strict=True
    ):
        assert_as_good_as_eager(g, o, e, name=name)


def test_offsets_beyond_2_to_the_31():
    """Rows 2^31 + 16 elements apart; only the pages of two rows are ever touched. The gradient is written there too."""
    apart, vocabulary = 2**31 + 16, 300
    storage = torch.empty(apart + vocabulary, dtype=torch.bfloat16)
    far = storage.as_strided((1, 2, vocabulary), (0, apart, 1))
    near, ids = torch.randn(1, 2, vocabulary).bfloat16(), torch.tensor([7, 299])
    one = torch.ones((), dtype=torch.float64)
    ops = torch.ops.rl4llm_fast
    results = []
    for logits in (near.clone(), far.copy_(near)):
        logp, entropy, row_max, log_sum = ops.token_logprobs_fwd(logits, ids, None, one, None, -100, True)
        kl, *saved = ops.kl_divergence_fwd(logits, logits + 1, None, one, None, "reverse", one)
        dkl = ops.kl_divergence_bwd(logits, logits.flip(1), None, one, None, "reverse", one, *saved, torch.ones(2))
        ops.token_logprobs_bwd_(
            logits, ids, None, one, None, -100, row_max, log_sum, entropy, torch.ones(2), torch.ones(2)
        )
        results.append((logp, entropy, kl, dkl, logits.clone()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
