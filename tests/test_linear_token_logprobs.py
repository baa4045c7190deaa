"""linear_token_logprobs and token_entropy: the oracle, chunks, masks, frozen weights, autocast, memory, bad input."""

from __future__ import annotations

import math

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast import tiles
from rl4llm_fast.testing import assert_as_good_as_eager

BACKENDS = [b for b in rf.backends()["linear_token_logprobs"] if b in ("eager", "cpu")]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]  # fp64 is gradcheck's: 4 eps are too few for a matrix product
compiled_backend = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built here")


def inputs(lead=(3, 5), width=24, vocabulary=211, dtype=torch.float32):
    hidden = torch.randn(*lead, width).to(dtype)
    weight = (torch.randn(vocabulary, width) / math.sqrt(width) * 3).to(dtype)
    bias = torch.randn(vocabulary).to(dtype)
    return hidden, weight, bias, torch.randint(vocabulary, lead)


def run(hidden, weight, bias, ids, *, grads, **options):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    out = rf.linear_token_logprobs(leaves[0], leaves[1], ids, leaves[2], **options)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, [g.to(o) for g, o in zip(grads, out, strict=True)])
    return [o.detach() for o in out] + [leaf.grad for leaf in leaves if leaf is not None]


def check(hidden, weight, bias, ids, *, backend, **options):
    grads = [torch.randn(ids.shape)]
    if options.get("return_entropy"):
        grads.append(torch.randn(hidden.shape[:-1]))
    wide = [None if t is None else t.double() for t in (hidden, weight, bias)]
    got = run(hidden, weight, bias, ids, grads=grads, backend=backend, **options)
    eager_options = {k: v for k, v in options.items() if k != "chunk_tokens"}
    oracle = run(*wide, ids, grads=grads, backend="eager", **eager_options)
    eager = run(hidden, weight, bias, ids, grads=grads, backend="eager", **eager_options)
    names = ["logp", "entropy", "dhidden", "dweight", "dbias"]
    if not options.get("return_entropy"):
        names.remove("entropy")
    for name, g, o, e in zip(names, got, oracle, eager, strict=False):
        assert_as_good_as_eager(g, o, e, dtype=hidden.dtype, name=name)
    return got


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("chunk_tokens", [None, 4, 1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_agrees_with_the_oracle(backend, dtype, chunk_tokens, with_bias):
    hidden, weight, bias, ids = inputs(dtype=dtype)
    check(
        hidden,
        weight,
        bias if with_bias else None,
        ids,
        backend=backend,
        chunk_tokens=chunk_tokens,
        return_entropy=True,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "softcap": 5.0},
        {"temperature": torch.rand(3, 5) + 0.5, "mask": torch.rand(3, 5) > 0.5},
        {"mask": torch.zeros(3, 5, dtype=torch.bool)},
        {"ignore_index": 7},
    ],
    ids=["softcap", "row-temperature-mask", "all-masked", "ignore-index"],
)
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_options(backend, options, chunk_tokens):
    hidden, weight, bias, ids = inputs()
    ids[0, :2] = 7
    check(hidden, weight, bias, ids, backend=backend, chunk_tokens=chunk_tokens, return_entropy=True, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(), (7,), (0,), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("k", [None, 3])
def test_leading_shapes_and_k_ids(backend, lead, k):
    hidden, weight, bias, _ = inputs(lead)
    ids = torch.randint(211, lead if k is None else (*lead, k))
    check(hidden, weight, bias, ids, backend=backend, chunk_tokens=5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    hidden, weight, bias, _ = inputs((4, 6), 48, 422)
    hidden, weight, bias = hidden[:, :-1, ::2], weight[::2, ::2], bias[::2]
    check(hidden, weight, bias, torch.randint(211, (4, 5)), backend=backend, chunk_tokens=3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_masked_rows_reaches_nothing(backend):
    hidden, weight, bias, ids = inputs()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    clean = run(hidden, weight, bias, ids, grads=[torch.ones(3, 5)], mask=mask, backend=backend)
    hidden[1] = math.nan
    ids[1] = 10**9
    dirty = run(hidden, weight, bias, ids, grads=[torch.ones(3, 5)], mask=mask, backend=backend)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    assert (dirty[1][1] == 0).all()


@compiled_backend
def test_backward_twice_gives_the_same_gradient_twice():
    hidden, weight, bias, ids = inputs()
    for chunk in (None, 4):  # the logits kept, and made again
        leaf = hidden.clone().requires_grad_()
        logp = rf.linear_token_logprobs(leaf, weight, ids, bias, chunk_tokens=chunk)
        (first,) = torch.autograd.grad(logp.sum(), leaf, retain_graph=True)
        (second,) = torch.autograd.grad(logp.sum(), leaf)
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


@compiled_backend
def test_frozen_factors_get_no_gradient_and_cost_none(monkeypatch):
    hidden, weight, _, ids = inputs()
    products = []
    original = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(a[0].shape) or original(*a, **k))
    leaf = hidden.clone().requires_grad_()
    rf.linear_token_logprobs(leaf, weight, ids, chunk_tokens=64).sum().backward()
    assert len(products) == 2  # the logits, kept; dx; no dW
    products.clear()
    leaf = weight.clone().requires_grad_()
    rf.linear_token_logprobs(hidden, leaf, ids, chunk_tokens=64).sum().backward()
    assert len(products) == 2  # the logits, kept; dW; no dx


@compiled_backend
def test_weight_gradient_accumulates_in_fp32():
    """4,096 chunks of one token whose bf16 running sum would stop growing at 256."""
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.zeros(4096, dtype=torch.long)
    rf.linear_token_logprobs(hidden, weight, ids, chunk_tokens=1).sum().backward()
    assert weight.grad.flatten().tolist() == [2048.0, -2048.0]  # Σ (1 − ½)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    hidden, weight, bias, ids = inputs()
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        logp = rf.linear_token_logprobs(leaves[0], leaves[1], ids, bias, backend=backend)
    logp.sum().backward()
    assert logp.dtype == torch.float32
    assert leaves[0].grad.dtype == leaves[1].grad.dtype == torch.float32
    exact = rf.linear_token_logprobs(hidden, weight, ids, bias, backend=backend)
    assert not torch.equal(logp, exact)  # the products did run in bf16
    torch.testing.assert_close(logp, exact, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    hidden, weight, bias, ids = inputs((3,), 4, 7, torch.float64)
    arguments = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda x, w, b: rf.linear_token_logprobs(
            x, w, ids, b, temperature=0.8, softcap=3.0, return_entropy=True, chunk_tokens=2, backend=backend
        ),
        arguments,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend):
    def loss(hidden, weight, bias, ids):
        logp, entropy = rf.linear_token_logprobs(hidden, weight, ids, bias, return_entropy=True, backend=backend)
        return (logp + 0.1 * entropy).sum()

    hidden, weight, bias, ids = inputs()
    leaves = [[t.clone().requires_grad_() for t in (hidden, weight, bias)] for _ in range(2)]
    loss(*leaves[0], ids).backward()
    torch.compile(loss, fullgraph=True)(*leaves[1], ids).backward()
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(b.grad, a.grad)


@compiled_backend
@pytest.mark.parametrize("mask", [None, torch.tensor([1, 0, 1, 1], dtype=torch.bool)])
def test_opcheck(mask):
    hidden, weight, bias, ids = inputs((4,))
    one = torch.ones((), dtype=torch.float64)
    common = (hidden, weight, bias, ids, mask, one, None, -100)
    ops = torch.ops.rl4llm_fast
    forward = (*common, True, torch.float32, None, 3, False, True, "")
    torch.library.opcheck(ops.linear_token_logprobs_fwd.default, forward)
    torch.library.opcheck(
        ops.linear_token_logprobs_fwd.default, (*common, False, torch.float32, None, 9, mask is None, True, "")
    )
    logp, entropy, row_max, log_sum, _, _ = ops.linear_token_logprobs_fwd(*forward)
    saved = (row_max, log_sum, entropy, torch.ones_like(logp), torch.ones_like(entropy), None, None)
    for needs in [(True, True, True), (True, False, False), (False, True, False)]:
        torch.library.opcheck(
            ops.linear_token_logprobs_bwd.default, (*common, *saved, torch.float32, None, None, 3, *needs, "")
        )


@compiled_backend
def test_double_backward_raises():
    hidden, weight, _, ids = inputs()
    leaf = hidden.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(rf.linear_token_logprobs(leaf, weight, ids).sum(), leaf)
    (grad,) = torch.autograd.grad(rf.linear_token_logprobs(leaf, weight, ids).sum(), leaf, create_graph=True)
    assert torch.equal(grad, wanted)  # the first gradient is there as ever
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


def test_chunk_rule_keeps_its_bound():
    for vocabulary in (1, 127, 49_152, 151_936, 262_144):
        for dtype in (torch.float32, torch.bfloat16):
            for device, bound in (("cpu", 64 if dtype == torch.float32 else 256), ("cuda", 512)):
                tokens = tiles.chunk_rule(vocabulary, dtype, device)
                assert tokens >= 1
                assert tokens * vocabulary * dtype.itemsize <= bound * 2**20


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (ValueError, "weight", {"weight": torch.zeros(7, 9)}),
        (ValueError, "weight", {"weight": torch.zeros(0, 8)}),
        (TypeError, "weight", {"weight": torch.zeros(7, 8, dtype=torch.bfloat16)}),
        (ValueError, "bias", {"bias": torch.zeros(8)}),
        (TypeError, "bias", {"bias": torch.zeros(7, dtype=torch.float64)}),
        (TypeError, "hidden", {"hidden": torch.zeros(2, 3, 8, dtype=torch.long)}),
        (ValueError, "token_ids", {"token_ids": torch.zeros(2, 4, dtype=torch.long)}),
        (IndexError, r"token_ids: 7 at position \(1, 0\)", {"token_ids": torch.tensor([[0, 0, 0], [7, 0, 0]])}),
        (ValueError, "chunk_tokens", {"chunk_tokens": 0}),
        (TypeError, "chunk_tokens", {"chunk_tokens": 1.5}),
        (TypeError, "ignore_index", {"ignore_index": None}),
        (ValueError, "temperature", {"temperature": -1.0}),
        (ValueError, "mask", {"mask": torch.ones(3, 2, dtype=torch.bool)}),
    ],
)
def test_bad_input(error, name, arguments):
    good = {
        "hidden": torch.randn(2, 3, 8),
        "weight": torch.randn(7, 8),
        "token_ids": torch.zeros(2, 3, dtype=torch.long),
    }
    with pytest.raises(error, match=name):
        rf.linear_token_logprobs(**{**good, **arguments})


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_entropy(backend):
    logits = torch.randn(2, 3, 99).requires_grad_()
    entropy = rf.token_entropy(logits, temperature=0.7, mask=torch.tensor([[1, 1, 0], [0, 1, 1]]), backend=backend)
    ids = torch.zeros(2, 3, dtype=torch.long)
    _, expected = rf.token_logprobs(
        logits, ids, temperature=0.7, mask=torch.tensor([[1, 1, 0], [0, 1, 1]]), return_entropy=True, backend=backend
    )
    assert torch.equal(entropy, expected)
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(grad, expected_grad)
