"""The cases in which other libraries test the like of these functions, asked of ours: shapes, layouts, what must hold.

Each test names the library; what it checks there against a kernel on a GPU is checked here on every backend.
"""

from __future__ import annotations

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast.testing import assert_as_good_as_eager

BACKENDS = [b for b in rf.backends()["linear_token_logprobs"] if b in ("eager", "cpu")]


def log_softmax_and_entropy(logits, ids):
    log_p = logits.double().log_softmax(-1)
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_trl_selective_log_softmax_and_entropy(backend, dtype):
    """TRL: 4 x 32 tokens of 1,024 logits in each dtype; entropies of 1-D to 4-D logits against torch.distributions."""
    logits, ids = torch.randn(4, 32, 1024).to(dtype), torch.randint(1024, (4, 32))
    expected, _ = log_softmax_and_entropy(logits, ids)
    torch.testing.assert_close(rf.token_logprobs(logits, ids, backend=backend).double(), expected, rtol=1e-5, atol=1e-5)
    for shape in ((768,), (32, 768), (8, 16, 768), (2, 4, 8, 768)):
        logits = torch.randn(shape).to(dtype)
        expected = torch.distributions.Categorical(logits=logits.double()).entropy()
        got = rf.token_entropy(logits, backend=backend)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["dense", "strided ids", "strided mask", "broadcast ids", "broadcast mask"])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_liger_independent_strides(backend, layout, id_dtype):
    """Liger: ids and mask each with strides of their own beside logits that are one token longer."""
    batch, length, vocabulary = 3, 7, 2053
    logits = torch.randn(batch, length + 1, vocabulary, dtype=torch.bfloat16)[:, :-1]
    ids = torch.randint(vocabulary, (batch, length), dtype=id_dtype)
    mask = torch.rand(batch, length) > 0.4
    if layout == "strided ids":
        ids = torch.stack([ids, ids * 0 - 9], -1)[..., 0]
    elif layout == "broadcast ids":
        ids = ids[:1].expand(batch, -1)
    elif layout == "strided mask":
        mask = torch.stack([mask, ~mask], -1)[..., 0]
    elif layout == "broadcast mask":
        mask = mask[:1].expand(batch, -1)
    before = ids.clone(), mask.clone()
    got = rf.token_logprobs(logits, ids, temperature=0.7, mask=mask, backend=backend)
    expected, _ = log_softmax_and_entropy(logits.double() / 0.7, ids.long())
    torch.testing.assert_close(got, torch.where(mask, expected, 0.0).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(ids, before[0])
    assert torch.equal(mask, before[1])


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the eager backend is exempt")
def test_megatron_batch_invariance():
    """Megatron: a permuted batch gives the permuted results, to the bit, and so do the gradients."""
    logits, ids, order = torch.randn(4, 7, 1000), torch.randint(1000, (4, 7)), torch.randperm(4)
    results = []
    for z, y in ((logits, ids), (logits[order], ids[order])):
        leaf = z.clone().requires_grad_()
        logp, entropy = rf.token_logprobs(leaf, y, return_entropy=True, backend="cpu")
        (logp + entropy).sum().backward()
        results.append((logp, entropy, leaf.grad))
    for whole, permuted in zip(*results, strict=True):
        assert torch.equal(whole[order], permuted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize(("tokens", "vocabulary", "width"), [(252, 507, 128), (256, 512, 128), (252, 507, 123)])
@pytest.mark.parametrize("invalids", [False, True])
def test_cut_cross_entropy(backend, dtype, softcap, tokens, vocabulary, width, invalids):
    """CCE: sizes that fill no block, ignored targets, softcap; no worse than plain PyTorch in the same dtype."""
    hidden, weight, bias = torch.randn(tokens, width), torch.randn(vocabulary, width), torch.randn(vocabulary) * 0.02
    weight[: min(tokens, vocabulary) // 2] = hidden[: min(tokens, vocabulary) // 2]  # some tokens are certain
    ids = torch.randint(vocabulary, (tokens,))
    if invalids:
        ids[torch.randperm(tokens)[: tokens // 4]] = -100

    def run(to, backend):
        leaves = [(t / width**0.25).to(dtype).to(to).requires_grad_() for t in (hidden, weight, bias)]
        logp = rf.linear_token_logprobs(leaves[0], leaves[1], ids, leaves[2], softcap=softcap, backend=backend)
        return [logp.detach(), *torch.autograd.grad(-logp.sum() / 10, leaves)]

    got, oracle, eager = run(dtype, backend), run(torch.float64, "eager"), run(dtype, "eager")
    assert (got[0][ids == -100] == 0).all()
    for name, g, o, e in zip(("logp", "dx", "dW", "db"), got, oracle, eager, strict=True):
        assert_as_good_as_eager(g, o, e, dtype=dtype, name=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(80, 64, 1521), (169, 37, 2048), (1, 16, 19)])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_verl_linear_cross_entropy(backend, tokens, width, vocabulary, temperature):
    """verl: log-probabilities and entropies of uniform factors at its own tolerances, and both gradients."""
    hidden, weight = torch.rand(tokens, width) - 0.5, torch.rand(vocabulary, width) - 0.5
    ids, upstream = torch.randint(vocabulary, (tokens,)), torch.rand(2, tokens) - 0.5
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    logp, entropy = rf.linear_token_logprobs(*ours, ids, temperature=temperature, return_entropy=True, backend=backend)
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    logits = theirs[0] @ theirs[1].t() / temperature
    expected_entropy = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
    expected = -torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    torch.testing.assert_close(logp, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad((logp, entropy), ours, tuple(upstream))
    wanted = torch.autograd.grad((expected, expected_entropy), theirs, tuple(upstream))
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 4, 511), (9, 7, 41), (3, 423, 1001)])
@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
def test_liger_divergences(backend, shape, direction):
    """Liger: KL and JSD of odd shapes, in its own tolerances, against torch.nn.functional.kl_div of log-softmaxes."""
    logits, ref = torch.randn(shape).requires_grad_(), torch.randn(shape)
    got = rf.kl_divergence(logits, ref, direction=direction, beta=0.1, backend=backend)
    leaf = logits.detach().clone().requires_grad_()
    log_p, log_q = leaf.log_softmax(-1), ref.log_softmax(-1)

    def kl(a, b):  # KL(a‖b)
        return torch.nn.functional.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    log_m = (0.1 * log_q.exp() + 0.9 * log_p.exp()).log()
    wanted = {
        "reverse": lambda: kl(log_p, log_q),
        "forward": lambda: kl(log_q, log_p),
        "jsd": lambda: 0.1 * kl(log_q, log_m) + 0.9 * kl(log_p, log_m),
    }[direction]()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    got.mean().backward()
    wanted.mean().backward()
    torch.testing.assert_close(logits.grad, leaf.grad, rtol=1e-4, atol=1e-7)
