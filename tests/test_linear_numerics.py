"""logits_dtype and grad_weight_dtype of the ops from hidden states: what they change, what they leave, bad input."""

from __future__ import annotations

import math

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast import heads, products, tiles
from rl4llm_fast.testing import assert_as_good_as_eager

BACKENDS = [b for b in rf.backends()["linear_policy_loss"] if b in ("eager", "cpu")]
compiled_backend = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built here")

B, T, D, V = 2, 9, 24, 61
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def products_in_16_bits(monkeypatch):
    """Whatever this machine's CPU can: the tests below are of what such products round."""
    monkeypatch.setattr(heads, "_SLOW_ON_CPU", frozenset())


def inputs(dtype=BF16, length=T):
    hidden, weight, bias = torch.randn(B, length, D) * 2, torch.randn(V, D), torch.randn(V)
    return [t.to(dtype) for t in (hidden, weight, bias)], torch.randint(V, (B, length))


def logprobs(x, w, b, ids, **options):
    return rf.linear_token_logprobs(x, w, ids, b, **options).sum()


def policy(x, w, b, ids, **options):
    return rf.linear_policy_loss(x, w, ids, None, torch.linspace(-1, 1, B), b, kind="pg", **options)[0]


def gspo(x, w, b, ids, **options):
    return rf.linear_policy_loss(x, w, ids, None, torch.linspace(-1, 1, B), b, kind="gspo", **options)[0]


def sft(x, w, b, ids, **options):
    return rf.linear_sft_loss(x, w, ids, b, **options)


def preference(x, w, b, ids, **options):
    return rf.linear_preference_loss(x, w, ids, b, kind="simpo", **options)[0]


def against_reference(x, w, b, ids, **options):
    reference = {"ref_hidden": x.detach() * 0.5, "ref_weight": w.detach()}
    return rf.linear_policy_loss(x, w, ids, None, torch.linspace(-1, 1, B), b, kl_coef=0.5, **reference, **options)[0]


def divergence(x, w, b, ids, **options):
    return rf.linear_kl_divergence(x, w, x.detach() * 0.5, w.detach(), b, **options).sum()


def estimate(x, w, b, ids, **options):
    return rf.linear_kl_estimate(x, w, x.detach() * 0.5, w.detach(), ids, bias=b, **options).sum()


OPS = [logprobs, policy, gspo, sft, preference, against_reference, divergence, estimate]


def run(op, factors, ids, **options):
    leaves = [t.detach().clone().requires_grad_() for t in factors]
    loss = op(*leaves, ids, **options)
    loss.backward()
    return {"loss": loss.detach(), **{f"d{n}": leaf.grad for n, leaf in zip("xwb", leaves, strict=True)}}


def assert_only_factors_are_rounded(got, op, factors, ids):
    """The loss is that of fp32 factors, and the gradients are rounded once, to the factors' dtype."""
    exact = run(op, [f.double() for f in factors], ids, backend="eager")
    in_fp32 = run(op, [f.float() for f in factors], ids, backend="eager")
    assert_as_good_as_eager(got["loss"], exact["loss"], in_fp32["loss"], dtype=FP32, name="loss")
    eager = run(op, factors, ids, logits_dtype=FP32, backend="eager")
    for name in ("dx", "dw", "db"):
        assert got[name].dtype == BF16
        assert_as_good_as_eager(got[name], exact[name], eager[name], dtype=BF16, name=name)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_logits_are_not_rounded(op, backend):
    """With fp32 logits only the factors are bf16: the value is that of fp32 factors, the gradients are rounded once."""
    factors, ids = inputs()
    got = run(op, factors, ids, logits_dtype=FP32, backend=backend, chunk_tokens=4)
    assert_only_factors_are_rounded(got, op, factors, ids)


@compiled_backend
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_what_rounded_logits_cost(dtype):
    """Logits of about ten carry 2^-6 of error in bf16; with fp32 logits nothing of that is left."""
    factors, ids = inputs(dtype)
    exact = rf.linear_token_logprobs(factors[0].double(), factors[1].double(), ids)
    error = {
        wide: (rf.linear_token_logprobs(*factors[:2], ids, logits_dtype=wide) - exact).abs().max().item()
        for wide in (None, dtype, FP32)
    }
    assert error[None] == error[dtype]
    assert error[None] > 100 * error[FP32]
    assert error[FP32] < 1e-4


@compiled_backend
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_products_on_a_cpu_without_16_bit_instructions(op, chunk_tokens, monkeypatch):
    """They run in fp32: the loss is that of fp32 factors, and gradients are rounded once, to the factors' dtype."""
    monkeypatch.setattr(heads, "_SLOW_ON_CPU", frozenset((BF16, FP16)))
    monkeypatch.setattr(tiles, "MIB", 64)  # so that vocabulary and tokens are cut even here
    monkeypatch.setattr(tiles, "_SLICED_WORKSPACE", 32 * 16 * 4)
    monkeypatch.setattr(tiles, "_SLICED_TOKENS", 8)
    factors, ids = inputs()
    widened = []
    monkeypatch.setattr(torch, "mm", lambda a, b, *, out=None, mm=torch.mm: (widened.append(b), mm(a, b, out=out))[1])
    got = run(op, factors, ids, chunk_tokens=chunk_tokens)
    assert widened
    assert all(factor.dtype == FP32 for factor in widened)
    assert_only_factors_are_rounded(got, op, factors, ids)


@compiled_backend
def test_logits_asked_for_in_16_bits_are_rounded_on_every_cpu(monkeypatch):
    factors, ids = inputs()
    wanted = run(logprobs, factors, ids, logits_dtype=BF16)
    monkeypatch.setattr(heads, "_SLOW_ON_CPU", frozenset((BF16, FP16)))
    got = run(logprobs, factors, ids, logits_dtype=BF16)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert not torch.equal(run(logprobs, factors, ids)["loss"], wanted["loss"])


@compiled_backend
@pytest.mark.parametrize("op", [logprobs, policy, sft, preference])
def test_narrow_accumulation_rounds_at_every_chunk(op):
    factors, ids = inputs(length=150)
    exact = run(op, [f.double() for f in factors], ids, backend="eager")["dw"]
    found = {wide: run(op, factors, ids, grad_weight_dtype=wide, chunk_tokens=1) for wide in (None, FP32, BF16)}
    for name in ("loss", "dx", "db"):
        assert torch.equal(found[BF16][name], found[FP32][name])
    assert torch.equal(found[None]["dw"], found[FP32]["dw"])
    error = {wide: (f["dw"] - exact).norm().item() for wide, f in found.items()}
    assert error[FP32] < error[BF16] < exact.norm().item() / 20


@compiled_backend
def test_narrow_accumulation_is_the_products_own():
    x, w = torch.randn(6, D).bfloat16(), torch.empty(V, D, dtype=BF16)
    pieces = torch.randn(6, V).bfloat16().split(2)
    total = products.WeightGradient(w, BF16, 3, BF16)
    wanted = torch.zeros(V, D, dtype=BF16)
    for dz, part in zip(pieces, x.split(2), strict=True):
        total.add(dz, part)
        wanted.addmm_(dz.t(), part)
    assert total.total.dtype == BF16
    assert torch.equal(total.result(), wanted)


@compiled_backend
def test_under_autocast():
    factors, ids = inputs(FP32)
    rounded = [f.bfloat16() for f in factors]
    for backend in BACKENDS:
        with torch.autocast("cpu", BF16):
            got = rf.linear_token_logprobs(*factors[:2], ids, factors[2], logits_dtype=FP32, backend=backend)
        wanted = rf.linear_token_logprobs(*rounded[:2], ids, rounded[2], logits_dtype=FP32, backend=backend)
        assert torch.equal(got, wanted)


@compiled_backend
@pytest.mark.parametrize("op", [policy, preference, divergence])
def test_compiles(op):
    factors, ids = inputs()
    options = {"logits_dtype": FP32, "grad_weight_dtype": BF16, "chunk_tokens": 4}
    wanted = run(op, factors, ids, **options)
    got = run(torch.compile(op, fullgraph=True, backend="aot_eager"), factors, ids, **options)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name])


@compiled_backend
def test_kept_logits_are_those(monkeypatch):
    """In one chunk the wide logits are kept for the backward: two products more, not three."""
    factors, ids = inputs()
    leaves = [f.requires_grad_() for f in factors[:2]]
    logp = rf.linear_token_logprobs(*leaves, ids, logits_dtype=FP32)
    products = []
    original = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(a[0].dtype) or original(*a, **k))
    logp.sum().backward()
    assert products == [BF16, BF16]


def test_the_workspace_keeps_its_bound():
    for vocabulary in (127, 49_152, 151_936):
        tokens = tiles.chunk_rule(vocabulary, BF16, "cuda", FP32)
        assert 1 <= tokens * vocabulary * (4 + 2) <= 512 * 2**20
        assert tiles.chunk_rule(vocabulary, BF16, "cuda", BF16) == tiles.chunk_rule(vocabulary, BF16, "cuda")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "logits_dtype: wanted torch.bfloat16 or torch.float32", {"logits_dtype": torch.float64}),
        (TypeError, "logits_dtype: wanted a torch.dtype", {"logits_dtype": "float32"}),
        (ValueError, "grad_weight_dtype: wanted torch.bfloat16 or", {"grad_weight_dtype": FP16}),
        (TypeError, "grad_weight_dtype: wanted a torch.dtype", {"grad_weight_dtype": 32}),
        (ValueError, "chunk_tokens: wanted at least 1, got 0", {"chunk_tokens": 0}),
        (TypeError, "chunk_tokens: wanted an int", {"chunk_tokens": 2.5}),
    ],
)
def test_bad_input(op, error, message, options):
    factors, ids = inputs()
    with pytest.raises(error, match=message):
        op(*factors, ids, **options)
    factors, ids = inputs(FP32)
    with pytest.raises(ValueError, match=r"logits_dtype: wanted torch.float32 or None"):
        op(*factors, ids, logits_dtype=BF16)
    assert math.isfinite(op(*factors, ids, logits_dtype=FP32, grad_weight_dtype=FP32))
