"""linear_preference_loss: the composition it stands for, padded and packed, references, rivals, bad input."""

from __future__ import annotations

import math

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast.testing import assert_as_good_as_eager

BACKENDS = [b for b in rf.backends()["linear_preference_loss"] if b in ("eager", "cpu")]
B, T, D, V = 3, 6, 10, 41
WITH_REFERENCE = ("dpo", "robust", "ipo", "hinge", "2d_dpo")


def inputs(dtype=torch.float64):
    hidden, weight = torch.randn(2 * B, T, D).to(dtype), (torch.randn(V, D) / math.sqrt(D) * 2).to(dtype)
    ids, mask = torch.randint(V, (2 * B, T)), torch.rand(2 * B, T) > 0.3
    ref = -3 - torch.rand(2 * B, T).to(torch.promote_types(dtype, torch.float32))
    return [hidden, weight, torch.randn(V).to(dtype)], ids, mask, ref


def run(factors, ids, *, composed=False, mask=None, ref_logp=None, **options):
    leaves = [t.detach().clone().requires_grad_() for t in factors]
    if composed:
        options.pop("chunk_tokens", None)
        logp = rf.linear_token_logprobs(leaves[0], leaves[1], ids, leaves[2], mask=mask, backend="eager")
        refs = (None, None) if ref_logp is None else (ref_logp[:B], ref_logp[B:])
        masks = {"mask_chosen": mask[:B], "mask_rejected": mask[B:]}
        loss, metrics = rf.preference_loss(logp[:B], logp[B:], *refs, **masks, **{**options, "backend": "eager"})
    else:
        loss, metrics = rf.linear_preference_loss(
            leaves[0], leaves[1], ids, leaves[2], mask=mask, ref_logp=ref_logp, **options
        )
    loss.backward()
    return {"loss": loss.detach(), **metrics, **{f"d{n}": x.grad for n, x in zip("xwb", leaves, strict=True)}}


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-9, atol=1e-11)


def options_of(kind):
    options = {"beta": 0.3, "kind": kind}
    if kind == "2d_dpo":
        for side in ("chosen", "rejected"):
            options[f"segments_{side}"] = torch.tensor([[[0, 2], [3, 5]]] * B)
    return options


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_tokens", [None, 5])
@pytest.mark.parametrize("kind", [*WITH_REFERENCE, "cpo", "simpo", "orpo"])
def test_is_the_composition(backend, chunk_tokens, kind):
    factors, ids, mask, ref = inputs()
    common = {"mask": mask, "ref_logp": ref if kind in WITH_REFERENCE else None, **options_of(kind)}
    got = run(factors, ids, backend=backend, chunk_tokens=chunk_tokens, **common)
    assert_same(got, run(factors, ids, composed=True, **common))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dpo", "cpo", "orpo"])
def test_packed_answers_are_the_padded_ones(backend, kind):
    factors, ids, _, ref = inputs()
    lengths = torch.tensor([3, 6, 0, 5, 1, 4])
    mask = torch.arange(T) < lengths.unsqueeze(1)
    ref = ref if kind == "dpo" else None
    padded = run(factors, ids, mask=mask, ref_logp=ref, kind=kind, backend=backend)
    packed_factors = [factors[0][mask], *factors[1:]]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    got = run(packed_factors, ids[mask], ref_logp=None if ref is None else ref[mask], kind=kind, backend=backend,
              cu_seqlens=cu_seqlens)  # fmt: skip
    padded["dx"] = padded["dx"][mask]
    assert_same(got, padded)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reference_from_its_own_hidden_states(backend):
    factors, ids, mask, _ = inputs()
    theirs = torch.randn(2 * B, T, 5).double(), torch.randn(V, 5).double(), torch.randn(V).double()
    ref = rf.linear_token_logprobs(theirs[0], theirs[1], ids, theirs[2], mask=mask, backend="eager")
    named = dict(zip(("ref_hidden", "ref_weight", "ref_bias"), theirs, strict=True))
    got = run(factors, ids, mask=mask, backend=backend, chunk_tokens=7, **named)
    assert_same(got, run(factors, ids, mask=mask, ref_logp=ref, composed=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_rule(backend, dtype):
    factors, ids, mask, ref = inputs(dtype)
    got = run(factors, ids, mask=mask, ref_logp=ref, backend=backend, chunk_tokens=5)
    eager = run(factors, ids, mask=mask, ref_logp=ref, composed=True)
    oracle = run([f.double() for f in factors], ids, mask=mask, ref_logp=ref.double(), composed=True)
    for name in ("loss", "dx", "dw", "db", "margin"):
        assert_as_good_as_eager(got[name], oracle[name], eager[name], dtype=dtype, name=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_at_dead_tokens_and_ignored_ids(backend):
    factors, ids, mask, ref = inputs(torch.float32)
    clean = run(factors, ids, mask=mask, ref_logp=ref, backend=backend)
    factors[0][~mask], ref[~mask], ids[~mask] = math.nan, math.nan, -100
    dirty = run(factors, ids, ref_logp=ref, backend=backend)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_empty(backend):
    hidden, weight, bias = (torch.randn(*shape).double().requires_grad_() for shape in ((2, 3, 4), (6, 4), (6,)))
    ids = torch.randint(6, (2, 3))
    assert torch.autograd.gradcheck(
        lambda x, w, b: rf.linear_preference_loss(x, w, ids, b, kind="simpo", chunk_tokens=2, backend=backend)[0],
        (hidden, weight, bias),
    )
    nothing = torch.zeros(0, 3, 4).double().requires_grad_()
    loss, _ = rf.linear_preference_loss(nothing, weight, ids[:0], kind="simpo", backend=backend)
    loss.backward()
    assert loss == 0
    assert nothing.grad.shape == (0, 3, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend):
    factors, ids, mask, ref = inputs(torch.float32)

    def step(hidden, weight):
        return rf.linear_preference_loss(hidden, weight, ids, mask=mask, ref_logp=ref, chunk_tokens=5, backend=backend)

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaves = [f.clone().requires_grad_() for f in factors[:2]]
        loss, metrics = function(*leaves)
        loss.backward()
        results.append((loss, metrics["margin"], *(leaf.grad for leaf in leaves)))
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dpo", "cpo", "simpo", "orpo"])
def test_packed_without_an_answer(backend, kind):
    (_, weight, bias), *_ = inputs()
    leaves = [torch.zeros(0, D).double().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    ids, offsets = torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.int32)
    how = {"cu_seqlens": offsets, "kind": kind, "ref_logp": torch.zeros(0) if kind == "dpo" else None}
    loss, _ = rf.linear_preference_loss(leaves[0], leaves[1], ids, leaves[2], backend=backend, **how)
    loss.backward()
    assert loss == 0
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dpo", "simpo", "cpo", "orpo"])
def test_liger(kind):
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    (hidden, weight, bias), ids, _, _ = inputs(torch.float32)
    ref_hidden = hidden + 0.1 * torch.randn_like(hidden)
    wanted = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    if kind == "dpo":
        theirs = chunked_loss.LigerFusedLinearDPOLoss(beta=0.3, compiled=False, use_ref_model=True)
        expected = theirs(wanted[1], wanted[0], ids, wanted[2], ref_hidden, weight, bias)[0]
        ours = {"ref_hidden": ref_hidden, "ref_weight": weight, "ref_bias": bias}
    elif kind == "simpo":
        theirs = chunked_loss.LigerFusedLinearSimPOLoss(beta=0.3, gamma=0.5, compiled=False, compute_nll_loss=False)
        expected = theirs(wanted[1], wanted[0], ids, wanted[2])[0]
        ours = {"gamma": 0.5}
    elif kind == "cpo":
        theirs = chunked_loss.LigerFusedLinearCPOLoss(beta=0.3, alpha=0.7, compiled=False)
        expected = theirs(wanted[1], wanted[0], ids, wanted[2])[0]
        ours = {"alpha": 0.7, "nll": "token"}
    else:
        theirs = chunked_loss.LigerFusedLinearORPOLoss(beta=0.3, compiled=False)
        expected = theirs(wanted[1], wanted[0], ids, wanted[2])[0]
        ours = {"lam": 0.3}
    expected.backward()
    got = run((hidden, weight, bias), ids, kind=kind, **({} if kind == "orpo" else {"beta": 0.3}), **ours)
    torch.testing.assert_close(got["loss"], expected.detach(), rtol=1e-5, atol=1e-6)
    for name, leaf in zip("xwb", wanted, strict=True):
        torch.testing.assert_close(got[f"d{name}"], leaf.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"hidden: wanted \(2B, T, D\), as", {"hidden": torch.zeros(3, 3, 8), "token_ids": torch.zeros(3, 3).long()}),
        (r"hidden: wanted \(2B, T, D\), or packed", {"hidden": torch.zeros(6, 8), "token_ids": torch.zeros(6).long()}),
        ("cu_seqlens: wanted .* as many", {"hidden": torch.zeros(6, 8), "token_ids": torch.zeros(6).long(),
                                           "cu_seqlens": torch.tensor([0, 6])}),
        ("cu_seqlens: wanted None for kind '2d_dpo'", {"hidden": torch.zeros(6, 8), "kind": "2d_dpo",
                                                       "token_ids": torch.zeros(6).long(),
                                                       "cu_seqlens": torch.tensor([0, 3, 6])}),
        ("kind", {"kind": "grpo"}),
        ("ref_chosen: both answers come in one tensor here; wanted ref_logp", {"ref_chosen": torch.zeros(1, 3)}),
        ("mask_rejected: both answers come in one tensor here; wanted mask", {"mask_rejected": torch.ones(1, 3)}),
        ("ref_logp, ref_hidden: kind 'dpo' wants the reference", {"kind": "dpo"}),
        ("ref_logp: kind 'cpo' wants no reference", {"kind": "cpo", "ref_logp": torch.zeros(2, 3)}),
        ("ref_hidden: kind 'simpo' wants no", {"ref_hidden": torch.zeros(2, 3, 8), "ref_weight": torch.zeros(7, 8)}),
        ("ref_weight: wanted beside", {"ref_hidden": torch.zeros(2, 3, 8)}),
        ("ref_logp: wanted the shape", {"kind": "dpo", "ref_logp": torch.zeros(2, 4)}),
        ("token_ids: wanted", {"token_ids": torch.zeros(2, 4, dtype=torch.long)}),
    ],
)  # fmt: skip
def test_bad_input(message, changes):
    good = {
        "hidden": torch.randn(2, 3, 8),
        "weight": torch.randn(7, 8),
        "token_ids": torch.zeros(2, 3, dtype=torch.long),
        "kind": "simpo",
    }
    with pytest.raises(ValueError, match=message):
        rf.linear_preference_loss(**{**good, **changes})
