"""Losses of whole sequences and pairs from hidden states: three products where each fits a chunk, else four."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import rl4llm_fast as rf
from rl4llm_fast.chunked_losses import whole_units

pytestmark = pytest.mark.skipif(
    "cpu" not in rf.backends()["linear_policy_loss"], reason="the C++ extension is not built here"
)

B, T, D, V = 4, 7, 6, 29
OFFSETS = torch.tensor([0, 5, 5, 20, B * T])


def inputs(packed):
    factors = [torch.randn(B, T, D).double(), torch.randn(V, D).double(), torch.randn(V).double()]
    tokens = {"ids": torch.randint(V, (B, T)), "mask": torch.rand(B, T) > 0.3, "other": -3 - torch.rand(B, T).double()}
    tokens["mask"][1] = False
    if packed:
        factors[0] = factors[0].flatten(0, 1)
        tokens = {name: t.flatten() for name, t in tokens.items()}
    return factors, tokens, {"cu_seqlens": OFFSETS} if packed else {}


def gspo(x, w, b, s, **options):
    options |= {"kind": "gspo", "eps_low": 0.5, "eps_high": 0.5, "entropy_coef": 0.1, "mask": s["mask"]}
    advantages = torch.linspace(-1, 1, B).double()
    return rf.linear_policy_loss(
        x, w, s["ids"], s["other"], advantages, b, aggregation="seq_mean_token_mean", **options
    )


def rollout(x, w, b, s, **options):
    options |= {"rollout_correction": "truncate", "rollout_level": "sequence", "rollout_logp": s["other"]}
    advantages = torch.linspace(-1, 1, B).double()
    return rf.linear_policy_loss(x, w, s["ids"], None, advantages, b, mask=s["mask"], temperature=0.7, **options)


def preference(kind, **knobs):
    def loss(x, w, b, s, **options):
        if kind == "2d_dpo":
            for side in ("chosen", "rejected"):
                options[f"segments_{side}"] = torch.tensor([[[0, 2], [3, 5]]] * (B // 2))
        if kind not in ("cpo", "simpo", "orpo"):
            options["ref_logp"] = s["other"]
        return rf.linear_preference_loss(x, w, s["ids"], b, mask=s["mask"], kind=kind, softcap=9.0, **knobs, **options)

    return loss


LOSSES = {
    "gspo": gspo,
    "rollout": rollout,
    **{kind: preference(kind) for kind in ("dpo", "ipo", "2d_dpo", "simpo", "orpo")},
    "cpo": preference("cpo", nll="token"),
}


def run(loss, factors, tokens, **options):
    leaves = [f.clone().requires_grad_() for f in factors]
    value, metrics = loss(*leaves, tokens, **options)
    (1.7 * value).backward()
    return [value.detach(), *metrics.values(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("chunk_tokens", "three"), [(None, True), (15, True), (3, False)])
def test_three_products_where_units_fit(name, packed, chunk_tokens, three, monkeypatch):
    if packed and name == "2d_dpo":
        pytest.skip("its segments are counted in rows")
    factors, tokens, layout = inputs(packed)
    wanted = run(LOSSES[name], factors, tokens, backend="eager", **layout)
    products = []
    mm, addmm = torch.mm, torch.addmm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append("mm") or mm(*a, **k))
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: products.append("logits") or addmm(*a, **k))
    got = run(LOSSES[name], factors, tokens, chunk_tokens=chunk_tokens, **layout)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    chunks = products.count("logits")
    if three:
        assert chunks == (1 if chunk_tokens is None else 2)
    else:
        live = int(tokens["mask"].sum())
        assert chunks == 2 * math.ceil(live / 3) - 1  # made twice, but for the last, which the forward leaves behind


def test_no_unit_is_cut():
    """In order, none left out, none over the limit, and half full on average; dead tokens take no room."""
    for _ in range(50):
        counts = torch.randint(0, 9, (12,)).tolist()
        total, limit = sum(counts), int(torch.randint(8, 20, ()))
        shuffled = torch.arange(12).repeat_interleave(torch.tensor(counts))[torch.randperm(total)]
        live = torch.rand(total) > 0.2
        for unit in (None, shuffled):
            units = whole_units(unit, counts, live, limit)
            order = torch.arange(total) if units.order is None else units.order
            assert sorted(order.tolist()) == live.nonzero().flatten().tolist()
            ids = (shuffled.sort().values if unit is None else unit)[order]
            assert torch.equal(ids, ids.sort().values)
            pieces = [ids[part].unique().tolist() for part in units.parts]
            assert [i for piece in pieces for i in piece] == ids.unique().tolist()
            lengths = [part.stop - part.start for part in units.parts]
            assert sum(lengths) == len(order)
            assert max(lengths) <= limit
            assert len(lengths) <= 2 * len(order) / limit + 1
    assert whole_units(None, [3, 9], torch.ones(12, dtype=torch.bool), 8) is None
    assert whole_units(None, [], torch.ones(0, dtype=torch.bool), 8).parts == []


@pytest.mark.parametrize("name", ["gspo", "dpo"])
def test_backward_twice_and_frozen(name):
    factors, tokens, _ = inputs(False)
    leaves = [f.clone().requires_grad_(i != 1) for i, f in enumerate(factors)]
    loss, _ = LOSSES[name](*leaves, tokens, chunk_tokens=15)
    needing = [leaves[0], leaves[2]]
    first = torch.autograd.grad(loss, needing, retain_graph=True)
    for got, wanted in zip(torch.autograd.grad(2 * loss, needing), first, strict=True):
        torch.testing.assert_close(got, 2 * wanted)
    assert not loss.isnan()
    with torch.no_grad():
        torch.testing.assert_close(LOSSES[name](*leaves, tokens)[0], loss.detach())


@pytest.mark.parametrize("name", ["gspo", "rollout", "dpo"])
def test_under_activation_checkpointing(name):
    factors, tokens, _ = inputs(False)
    results = []
    for again in (False, True):
        leaves = [f.clone().requires_grad_() for f in factors]

        def loss(*leaves):
            return 3 * LOSSES[name](*leaves, tokens, chunk_tokens=15)[0]

        (checkpoint(loss, *leaves, use_reentrant=False) if again else loss(*leaves)).backward()
        results.append([leaf.grad for leaf in leaves])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["gspo", "dpo"])
def test_nothing_live_and_nothing_at_all(name):
    factors, tokens, _ = inputs(False)
    tokens["mask"][:] = False
    assert all((leaf == 0).all() for leaf in run(LOSSES[name], factors, tokens)[-3:])
    factors[0], tokens = factors[0][:, :0], {key: t[:, :0] for key, t in tokens.items()}
    for backend in ("eager", "cpu"):
        got = run(LOSSES[name], factors, tokens, backend=backend)
        assert all((grad == 0).all() for grad in got[-3:])


@pytest.mark.parametrize("name", ["gspo", "dpo"])
def test_dead_tokens_may_hold_anything(name):
    factors, tokens, _ = inputs(False)
    clean = run(LOSSES[name], factors, tokens, chunk_tokens=15)
    dead = ~tokens["mask"]
    factors[0][dead], tokens["other"][dead], tokens["ids"][dead] = math.nan, math.nan, 10**9
    for a, b in zip(run(LOSSES[name], factors, tokens, chunk_tokens=15), clean, strict=True):
        assert torch.equal(a, b)
