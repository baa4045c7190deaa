"""Random shapes, strides, masks, −inf patterns, offsets, temperatures: the vocabulary ops against the fp64 oracle."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rl4llm_fast as rf
from rl4llm_fast import tiles
from rl4llm_fast.testing import assert_as_good_as_eager

# In Triton's interpreter (tests/test_triton_interpret.py) the ops on logits are held to the oracle by the same tests.
BACKEND = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "cpu"
on_backend = pytest.mark.parametrize("backend", [BACKEND])
pytestmark = pytest.mark.skipif(
    BACKEND not in rf.backends()["token_logprobs"], reason="the C++ extension is not built here"
)
CHEAP = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@st.composite
def logits(draw, scales=(1e-3, 1.0, 20.0)):
    """A function () -> logits (B, T, V): normal at some scale and offset, with −inf, in some dtype and layout."""
    seed = draw(st.integers(0, 2**31))
    shape = draw(st.integers(0, 3)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 31, 33, 127, 513, 2049]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    scale, offset = draw(st.sampled_from(scales)), draw(st.sampled_from([0.0, 0.0, 1e4, -1e4]))
    pattern = draw(st.sampled_from(["none", "random", "head", "tail"]))
    layout = draw(st.sampled_from(["contiguous", "slice", "transposed", "strided"]))

    def make(generator_offset: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + generator_offset)
        b, t, v = shape
        storage = {"contiguous": (b, t, v), "slice": (b, t + 1, v), "transposed": (t, b, v), "strided": (b, t, 2 * v)}
        values = torch.randn(storage[layout], generator=generator) * scale + offset
        view = values.to(dtype)
        if layout == "slice":
            view = view[:, :-1]
        elif layout == "transposed":
            view = view.transpose(0, 1)
        elif layout == "strided":
            view = view[..., ::2]
        hidden = {"random": torch.rand(v, generator=generator) < 0.5, "head": torch.arange(v) < v // 2}
        hidden["tail"] = ~hidden["head"]
        if pattern != "none" and not bool(hidden[pattern].all()):
            view[..., hidden[pattern]] = -math.inf
        return view

    return make


TEMPERATURES = st.sampled_from([1e-3, 0.3, 1.0, 2.0, 1e3, "rows"])
SOFTCAPS = st.sampled_from([None, None, 5.0, 30.0])


def temperature_of(choice, lead, generator):
    return torch.rand(lead, generator=generator) + 0.25 if choice == "rows" else choice


def gradients(op, leaf, upstream):
    leaf = leaf.detach().requires_grad_()
    out = op(leaf)
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outs, [g.to(o) for g, o in zip(upstream, outs, strict=True)])
    return [o.detach() for o in outs] + [leaf.grad]


def compare(op, leaf, upstream, backend, names):
    """``op(leaf, wide, backend)`` against eager in fp64 and in the same dtype."""
    got = gradients(lambda x: op(x, False, backend), leaf, upstream)
    oracle = gradients(lambda x: op(x, True, "eager"), leaf.double(), upstream)
    eager = gradients(lambda x: op(x, False, "eager"), leaf, upstream)
    for name, g, o, e in zip(names, got, oracle, eager, strict=True):
        assert_as_good_as_eager(g, o, e, name=name)


@given(
    make=logits(),
    tau=TEMPERATURES,
    softcap=SOFTCAPS,
    k=st.sampled_from([None, 0, 1, 3]),
    mask=st.booleans(),
    seed=st.integers(0, 99),
)
@on_backend
@CHEAP
def test_token_logprobs(backend, make, tau, softcap, k, mask, seed):
    z = make()
    generator = torch.Generator().manual_seed(seed)
    lead, vocabulary = z.shape[:-1], z.shape[-1]
    ids = torch.randint(vocabulary, lead if k is None else (*lead, k), generator=generator)
    live = torch.rand(lead, generator=generator) > 0.3 if mask else None
    temperature = temperature_of(tau, lead, generator)
    if live is not None and z.numel():
        z[~live] = math.nan  # whatever a masked row holds
    # A chosen token of −inf has logp −inf: keep the upstream gradient finite, its own gradient is tested elsewhere.
    upstream = [torch.randn(ids.shape, generator=generator), torch.randn(lead, generator=generator)]

    def op(x, wide, backend):
        options = {"temperature": temperature, "softcap": softcap, "mask": live, "backend": backend}
        return rf.token_logprobs(x, ids, return_entropy=True, **options)

    compare(op, z, upstream, backend, ("logp", "entropy", "dlogits"))


@given(
    make=logits(),
    tau=TEMPERATURES,
    softcap=SOFTCAPS,
    direction=st.sampled_from(["reverse", "forward", "jsd"]),
    mask=st.booleans(),
    seed=st.integers(0, 99),
)
@on_backend
@CHEAP
def test_kl_divergence(backend, make, tau, softcap, direction, mask, seed):
    z, ref = make(), make(1).contiguous()
    ref[z == -math.inf] = -math.inf  # the same tokens masked out on both sides: the KL is finite
    z[ref == -math.inf] = -math.inf
    generator = torch.Generator().manual_seed(seed)
    lead = z.shape[:-1]
    live = torch.rand(lead, generator=generator) > 0.3 if mask else None
    temperature = temperature_of(tau, lead, generator)
    if live is not None and z.numel():
        z[~live] = math.nan
        ref[~live] = math.inf
    all_hidden = (z == -math.inf).all(-1)
    if bool(all_hidden.any()):
        return

    def op(x, wide, backend):
        other = ref.double() if wide else ref
        options = {"temperature": temperature, "softcap": softcap, "mask": live, "backend": backend}
        return rf.kl_divergence(x, other, direction=direction, **options)

    compare(op, z, [torch.randn(lead, generator=generator)], backend, ("kl", "dlogits"))


# Temperatures of 1e-3 are for the ops on logits, above: here they only blow up how the products round.
@st.composite
def heads(draw):
    """(hidden (N, D), weight (V, D), bias (V,) with some −inf or None, live (N,) or None, generator)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, width = draw(st.sampled_from([0, 1, 7, 23])), draw(st.sampled_from([1, 8, 33]))
    vocabulary, scale = draw(st.sampled_from([1, 31, 127, 513])), draw(st.sampled_from([0.03, 0.3, 1.0]))
    hidden = torch.randn(rows, width, generator=generator) * scale
    bias = torch.randn(vocabulary, generator=generator)
    bias[1:][torch.rand(vocabulary - 1, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.97]))] = -math.inf
    live = torch.rand(rows, generator=generator) > 0.4 if draw(st.booleans()) else None
    if live is not None:
        hidden[~live] = math.nan
    return hidden, torch.randn(vocabulary, width, generator=generator), bias, live, generator


def factor_gradients(op, hidden, weight, bias, upstream, dtype):
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (hidden, weight, bias)]
    out = op(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outs, [g.to(o) for g, o in zip(upstream, outs, strict=True)])
    return [o.detach() for o in outs] + [leaf.grad for leaf in leaves]


CHUNKS = st.sampled_from([None, "slices", 1, 5])


def compare_factors(op, factors, upstream, dtype, chunk, names):
    """``op(hidden, weight, bias, backend, chunk_tokens)``; "slices": by tiles of 4 tokens and 32 logits."""
    with pytest.MonkeyPatch.context() as patch:
        if chunk == "slices":
            patch.setattr(tiles, "chunk_rule", lambda *_: 1)
            patch.setattr(tiles, "_SLICED_TOKENS", 4)
            patch.setattr(tiles, "_SLICED_WORKSPACE", 4 * 4 * 32)
        size = None if chunk == "slices" else chunk
        got = factor_gradients(lambda *t: op(*t, "cpu", size), *factors, upstream, dtype)
    oracle = factor_gradients(lambda *t: op(*t, "eager", None), *factors, upstream, torch.float64)
    eager = factor_gradients(lambda *t: op(*t, "eager", None), *factors, upstream, dtype)
    for name, g, o, e in zip(names, got, oracle, eager, strict=True):
        assert_as_good_as_eager(g, o, e, dtype=dtype, name=name)


@given(
    head=heads(),
    tau=st.sampled_from([1.0, 1e3, "rows"]),
    softcap=SOFTCAPS,
    k=st.sampled_from([None, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    chunk=CHUNKS,
)
@CHEAP
def test_linear_token_logprobs(head, tau, softcap, k, dtype, chunk):
    hidden, weight, bias, live, generator = head
    rows = hidden.shape[0]
    ids = torch.zeros((rows,) if k is None else (rows, k), dtype=torch.long)  # the one token that all can draw
    temperature = temperature_of(tau, (rows,), generator)
    upstream = [torch.randn(ids.shape, generator=generator), torch.randn(rows, generator=generator)]

    def op(hidden, weight, bias, backend, chunk_tokens):
        options = {"temperature": temperature, "softcap": softcap, "mask": live, "backend": backend}
        return rf.linear_token_logprobs(
            hidden, weight, ids, bias, return_entropy=True, chunk_tokens=chunk_tokens, **options
        )

    compare_factors(op, (hidden, weight, bias), upstream, dtype, chunk, ("logp", "entropy", "dx", "dW", "db"))


@given(
    head=heads(),
    tau=st.sampled_from([0.3, 1.0, 1e3, "rows"]),
    direction=st.sampled_from(["reverse", "forward", "jsd"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    chunk=st.sampled_from([None, 1, 5]),
)
@CHEAP
def test_linear_kl_divergence(head, tau, direction, dtype, chunk):
    hidden, weight, bias, live, generator = head
    rows = hidden.shape[0]
    ref_hidden = torch.randn(rows, 5, generator=generator).to(dtype)
    ref_weight = torch.randn(weight.shape[0], 5, generator=generator).to(dtype)
    temperature = temperature_of(tau, (rows,), generator)

    def op(hidden, weight, bias, backend, chunk_tokens):
        ref = [t.to(hidden.dtype) for t in (ref_hidden, ref_weight, bias.detach())]
        options = {"temperature": temperature, "direction": direction, "mask": live, "backend": backend}
        return rf.linear_kl_divergence(
            hidden, weight, ref[0], ref[1], bias, ref[2], chunk_tokens=chunk_tokens, **options
        )

    upstream = [torch.randn(rows, generator=generator)]
    compare_factors(op, (hidden, weight, bias), upstream, dtype, chunk, ("kl", "dx", "dW", "db"))


@given(
    seed=st.integers(0, 2**31),
    groups=st.integers(1, 9),
    count=st.integers(0, 60),
    scale=st.sampled_from([None, "group", "batch"]),
)
@CHEAP
def test_group_advantages_do_not_depend_on_order(seed, groups, count, scale):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(-3, 4, (count,), generator=generator).float()
    ids = torch.randint(groups, (count,), generator=generator)
    shuffle = torch.randperm(count, generator=generator)
    whole = rf.group_advantages(rewards, group_ids=ids, scale=scale, backend="cpu")
    shuffled = rf.group_advantages(rewards[shuffle], group_ids=ids[shuffle], scale=scale, backend="cpu")
    torch.testing.assert_close(shuffled, whole[shuffle], rtol=1e-6, atol=1e-6)
    for group in ids.unique():
        members = rewards[ids == group]
        if bool((members == members[0]).all()):
            assert (whole[ids == group] == 0).all()
