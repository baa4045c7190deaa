"""kl_divergence, linear_kl_divergence, linear_kl_estimate: the oracle, −inf, golden values, chunks, bad input."""

from __future__ import annotations

import math
import os

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast.testing import assert_as_good_as_eager
from tests.kl_cases import KINDS, hard_rows

INF = math.inf
# In Triton's interpreter (tests/test_triton_interpret.py) the same tests hold the Triton kernels to the oracle.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else [b for b in rf.backends()["kl_divergence"] if b in ("eager", "cpu")]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, *([] if INTERPRETED else [torch.float64])]
DIRECTIONS = [{"direction": "reverse"}, {"direction": "forward"}, {"direction": "jsd", "beta": 0.3}]
compiled_backend = pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled backend here")


def run(logits, ref, *, grad, backend, **options):
    leaf = logits.detach().clone().requires_grad_()
    kl = rf.kl_divergence(leaf * 1, ref, backend=backend, **options)
    kl.backward(grad.to(kl))
    return kl.detach(), leaf.grad


def check(logits, ref, *, backend, **options):
    grad = torch.randn(logits.shape[:-1])
    kl, dlogits = run(logits, ref, grad=grad, backend=backend, **options)
    oracle = run(logits.double(), ref.double(), grad=grad, backend="eager", **options)
    eager = run(logits, ref, grad=grad, backend="eager", **options)
    assert_as_good_as_eager(kl, oracle[0], eager[0], name="kl")
    assert dlogits.dtype == logits.dtype
    assert_as_good_as_eager(dlogits, oracle[1], eager[1], name="dlogits")
    return kl, dlogits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", DIRECTIONS, ids=lambda o: o["direction"])
@pytest.mark.parametrize("vocabulary", [1, 127, 4097, 50257])
def test_agrees_with_the_oracle(backend, dtype, options, vocabulary):
    logits, ref = ((2 * torch.randn(5, vocabulary)).to(dtype) for _ in range(2))
    check(logits, ref, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", DIRECTIONS, ids=lambda o: o["direction"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_options_and_mixed_dtypes(backend, options, dtypes):
    logits, ref = ((3 * torch.randn(3, 4, 517)).to(dtype) for dtype in dtypes)
    mask = torch.rand(3, 4) > 0.4
    for more in ({"temperature": 0.7}, {"temperature": torch.rand(3, 4) + 0.5, "softcap": 5.0}, {"mask": mask}):
        check(logits, ref, backend=backend, **options, **more)
    check(logits[:, :-1], ref[:, 1:], backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(), (3,), (0,), (2, 1, 3)])
def test_leading_shapes(backend, lead):
    kl, _ = check(torch.randn(*lead, 33), torch.randn(*lead, 33), backend=backend)
    assert kl.shape == lead


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_values(backend):
    """p = (1/2, 1/2), q = (1/4, 3/4), by hand."""
    logits, ref = torch.tensor([[1.0, 1.0]]).log(), torch.tensor([[1.0, 3.0]]).log()

    def kl(**options):
        return rf.kl_divergence(logits, ref, backend=backend, **options).item()

    # ½ ln 2 + ½ ln(2/3) = ½ ln(4/3);   ¼ ln(1/2) + ¾ ln(3/2)
    assert kl() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-5)
    assert kl(direction="forward") == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-5)
    # m = (3/8, 5/8): ½ KL(q‖m) + ½ KL(p‖m)
    q_m = 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
    p_m = 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)
    assert kl(direction="jsd") == pytest.approx(0.5 * (q_m + p_m), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", DIRECTIONS, ids=lambda o: o["direction"])
def test_minus_infinity(backend, options):
    logits, ref = torch.randn(5, 3000), torch.randn(5, 3000)
    logits[0, :2500] = ref[0, :2500] = -INF  # masked in both: those terms are 0, and the first blocks hold nothing
    logits[1, 7] = -INF
    ref[2, 9] = -INF
    logits[3, 1:] = ref[3, 1:] = -INF
    kl, grad = run(logits, ref, grad=torch.ones(5), backend=backend, **options)
    oracle, oracle_grad = run(logits.double(), ref.double(), grad=torch.ones(5), backend="eager", **options)
    expected_inf = {"reverse": [2], "forward": [1], "jsd": []}[options["direction"]]
    assert kl.isinf().nonzero().flatten().tolist() == expected_inf
    assert abs(kl[3]) < 1e-6
    finite = torch.isfinite(oracle)
    torch.testing.assert_close(kl[finite], oracle[finite].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad[finite], oracle_grad[finite].float(), rtol=1e-5, atol=1e-7)
    assert (grad[finite][logits[finite] == -INF] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", DIRECTIONS, ids=lambda o: o["direction"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bad_rows_stay_alone_and_masked_rows_are_zero(backend, options, softcap):
    logits, ref = torch.randn(6, 700), torch.randn(6, 700)
    logits[0, 3] = ref[1, 3] = math.nan
    logits[2, 600] = INF
    logits[3] = -INF
    kl, _ = run(logits, ref, grad=torch.ones(6), backend=backend, softcap=softcap, **options)
    assert kl.isnan().tolist() == [True, True, True, True, False, False]
    mask = torch.tensor([0, 0, 0, 0, 1, 0], dtype=torch.bool)
    kl, grad = run(logits, ref, grad=torch.ones(6), backend=backend, softcap=softcap, mask=mask, **options)
    assert (kl[~mask] == 0).all()
    assert (grad[~mask] == 0).all()
    assert kl[4] > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", DIRECTIONS, ids=lambda o: o["direction"])
def test_gradcheck(backend, options):
    logits = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(3, 9, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: rf.kl_divergence(x, ref, temperature=0.8, softcap=4.0, backend=backend, **options), (logits,)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", DIRECTIONS, ids=lambda o: o["direction"])
def test_large_offsets_cancel(backend, options):
    check(torch.randn(4, 2048) + 1e4, torch.randn(4, 2048) - 1e4, backend=backend, **options)
    near = torch.randn(4, 2048)
    check(near, near + 1e-3 * torch.randn(4, 2048), backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", DIRECTIONS, ids=lambda o: o["direction"])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_lowest_finite_logit_is_no_minus_infinity(backend, options, temperature):
    """Libraries mask with finfo.min: its weight is 0, and 0·(−inf) must not come of it; both sides masked alike."""
    lowest = torch.finfo(torch.float32).min
    logits, ref = torch.randn(3, 3000), torch.randn(3, 3000)
    logits[0, :2500] = ref[0, :2500] = lowest
    logits[1, 100:] = ref[1, 200:] = lowest
    kl, grad = run(logits, ref, grad=torch.ones(3), backend=backend, temperature=temperature, **options)
    rows = [0, 2] if options["direction"] == "forward" else [0, 1, 2]  # the forward KL of row 1 is about 1e38
    expected = logits.double(), ref.double()
    oracle, oracle_grad = run(*expected, grad=torch.ones(3), backend="eager", temperature=temperature, **options)
    torch.testing.assert_close(kl[rows], oracle[rows].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad[rows], oracle_grad[rows].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", DIRECTIONS, ids=lambda o: o["direction"])
@pytest.mark.parametrize("kind", KINDS)
def test_hard_rows(backend, options, kind):
    for seed in range(3 if INTERPRETED else 12):
        generator = torch.Generator().manual_seed(seed)
        for vocabulary in (127, 1500):
            logits, ref, temperature = hard_rows(kind, vocabulary, generator)
            options = {**options, "backend": backend, "temperature": temperature}
            check(logits, ref, **options)


@compiled_backend
def test_same_bits_whatever_stands_beside():
    logits, ref = torch.randn(37, 70_001, dtype=torch.bfloat16), torch.randn(37, 70_001)
    whole = run(logits, ref, grad=torch.ones(37), backend="cpu")
    for rows in (slice(0, 1), slice(30, 37)):
        part = run(logits[rows], ref[rows], grad=torch.ones(37)[rows], backend="cpu")
        assert torch.equal(whole[0][rows], part[0])
        assert torch.equal(whole[1][rows], part[1])


@compiled_backend
def test_opcheck():
    one, half = torch.ones((), dtype=torch.float64), torch.full((), 0.5, dtype=torch.float64)
    logits, ref = torch.randn(2, 3, 17, dtype=torch.bfloat16), torch.randn(2, 3, 17)
    ops = torch.ops.rl4llm_fast
    for direction in ("reverse", "forward", "jsd"):
        inputs = (logits, ref, torch.tensor([1, 0, 1, 1, 1, 1], dtype=torch.bool), one, None, direction, half)
        torch.library.opcheck(ops.kl_divergence_fwd.default, inputs)
        _, *saved = ops.kl_divergence_fwd(*inputs)
        torch.library.opcheck(ops.kl_divergence_bwd.default, (*inputs, *saved, torch.randn(6)))
        torch.library.opcheck(ops.kl_divergence_bwd_.default, (*inputs, *saved, torch.randn(6)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", DIRECTIONS, ids=lambda o: o["direction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_from_hidden_states(backend, options, dtype, chunk_tokens):
    policy = [t.to(dtype) for t in (torch.randn(3, 5, 24), torch.randn(211, 24) / 3, torch.randn(211))]
    ref = [t.to(dtype) for t in (torch.randn(3, 5, 16), torch.randn(211, 16) / 3, torch.randn(211))]
    mask = torch.rand(3, 5) > 0.3
    grad = torch.randn(3, 5)

    def both(to, backend, chunk_tokens):
        leaves = [t.to(to).clone().requires_grad_() for t in policy]
        other = [t.to(to) for t in ref]
        kl = rf.linear_kl_divergence(
            leaves[0], leaves[1], other[0], other[1], leaves[2], other[2],
            mask=mask, temperature=0.9, chunk_tokens=chunk_tokens, backend=backend, **options,
        )  # fmt: skip
        kl.backward(grad.to(kl))
        return [kl.detach()] + [leaf.grad for leaf in leaves]

    got, oracle = both(dtype, backend, chunk_tokens), both(torch.float64, "eager", None)
    eager = both(dtype, "eager", None)
    for name, g, o, e in zip(("kl", "dhidden", "dweight", "dbias"), got, oracle, eager, strict=True):
        assert_as_good_as_eager(g, o, e, dtype=dtype, name=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_from_hidden_states_compiles_and_ignores_masked_nan(backend):
    hidden, weight = torch.randn(4, 8), torch.randn(31, 8)
    mask = torch.tensor([1, 0, 1, 1], dtype=torch.bool)
    dirty = hidden.clone()
    dirty[1] = math.nan

    def loss(x, w, other):
        return rf.linear_kl_divergence(x, w, other, weight * 0.5, mask=mask, chunk_tokens=2, backend=backend).sum()

    results = []
    for f, x in ((loss, hidden), (loss, dirty), (torch.compile(loss, fullgraph=True), dirty)):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        f(*leaves, x).backward()
        results.append([leaf.grad for leaf in leaves])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_kl_estimate_is_the_estimate_of_the_logprobs(backend):
    hidden, weight, ids = torch.randn(2, 3, 8), torch.randn(31, 8), torch.randint(31, (2, 3))
    other = torch.randn(2, 3, 5), torch.randn(31, 5)
    got = rf.linear_kl_estimate(hidden, weight, *other, ids, "k2", temperature=0.7, backend=backend)
    logp = rf.linear_token_logprobs(hidden, weight, ids, temperature=0.7, backend=backend)
    ref = rf.linear_token_logprobs(*other, ids, temperature=0.7, backend=backend)
    assert torch.equal(got, rf.kl_estimate(logp, ref, "k2", backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_linear_kl_estimate_does_not_look_at_ignored_ids(backend, k, masked):
    weight, ids = torch.randn(31, 8), torch.randint(31, (2, 3) if k is None else (2, 3, k))
    ids[(0, 1) if k is None else (0, 1, 0)] = -100
    live, mask = ids != -100, None
    if masked:
        mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
        live = live & (mask == 1 if k is None else (mask == 1).unsqueeze(-1))
    old = torch.where(live, torch.randn(ids.shape), math.nan)
    hidden = torch.randn(2, 3, 8, requires_grad=True)
    options = {"gradient": "importance", "old_logp": old, "mask": mask, "backend": backend}
    kl = rf.linear_kl_estimate(hidden, weight, 2 * hidden, weight, ids, **options)
    kl.sum().backward()
    assert (kl[~live] == 0).all()
    assert (kl[live] > 0).all()
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (ValueError, "ref_logits", {"ref_logits": torch.zeros(2, 4)}),
        (TypeError, "ref_logits", {"ref_logits": torch.zeros(2, 3, dtype=torch.long)}),
        (ValueError, "direction", {"direction": "sideways"}),
        (ValueError, "beta", {"direction": "jsd", "beta": 0.0}),
        (ValueError, "beta", {"direction": "jsd", "beta": torch.tensor(1.0)}),
        (ValueError, "temperature", {"temperature": 0.0}),
        (ValueError, "mask", {"mask": torch.ones(3, dtype=torch.bool)}),
        (ValueError, "logits", {"logits": torch.zeros(2, 0), "ref_logits": torch.zeros(2, 0)}),
    ],
)
def test_bad_input(error, name, arguments):
    with pytest.raises(error, match=name):
        rf.kl_divergence(**{"logits": torch.randn(2, 3), "ref_logits": torch.randn(2, 3), **arguments})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ref_hidden", {"ref_hidden": torch.zeros(3, 5)}),
        ("ref_weight", {"ref_weight": torch.zeros(8, 5)}),
        ("ref_weight", {"ref_weight": torch.zeros(7, 4)}),
        ("ref_bias", {"ref_bias": torch.zeros(3)}),
        ("chunk_tokens", {"chunk_tokens": 0}),
    ],
)
def test_bad_input_from_hidden_states(name, arguments):
    good = {
        "hidden": torch.randn(2, 4), "weight": torch.randn(7, 4),
        "ref_hidden": torch.randn(2, 5), "ref_weight": torch.randn(7, 5),
    }  # fmt: skip
    with pytest.raises(ValueError, match=rf"^{name}"):
        rf.linear_kl_divergence(**{**good, **arguments})
    with pytest.raises(ValueError, match=rf"^{name}"):
        rf.linear_kl_estimate(**{**good, **arguments}, token_ids=torch.zeros(2, dtype=torch.long))
