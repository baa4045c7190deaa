"""preference_loss, kto_loss and the reward-model losses: every backend that runs here against the fp64 oracle."""

from __future__ import annotations

import math
import os

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast.testing import assert_as_good_as_eager

INF, NAN = math.inf, math.nan
# tests/test_preference_triton.py runs this file once more in Triton's interpreter.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else [b for b in rf.backends()["preference_loss"] if b in ("eager", "cpu")]
FUSED = [b for b in BACKENDS if b != "eager"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16] + ([] if INTERPRETED else [torch.float64])
SEGMENTS = torch.tensor([[0, 4], [4, 11], [-1, -1]])
KINDS = [
    ("dpo", {}),
    ("dpo", {"label_smoothing": 0.2}),
    ("dpo", {"prob": True}),
    ("robust", {"label_smoothing": 0.3}),
    ("ipo", {}),
    ("ipo", {"prob": True}),
    ("hinge", {}),
    ("cpo", {"alpha": 0.5}),
    ("cpo", {"nll": "token"}),
    ("simpo", {"beta": 2.0}),
    ("orpo", {"lam": 0.3}),
    ("2d_dpo", {"segments": True}),
    ("bradley_terry", {"margin": 0.3}),
]
IDS = [f"{kind}-{'-'.join(knobs)}" for kind, knobs in KINDS]
NO_REFERENCE = ("cpo", "simpo", "orpo", "bradley_terry")


def sample(kind, knobs, pairs=4, chosen=12, rejected=17, dtype=torch.float32):
    """The arguments of a call; one rejected answer has no live token."""
    lengths = {"chosen": chosen, "rejected": rejected}
    found = {"kind": kind, **knobs}
    for side, T in lengths.items():
        logp = -0.6 * torch.rand(pairs, T)
        found[f"logp_{side}"] = logp.to(dtype)
        if kind not in NO_REFERENCE:
            found[f"ref_{side}"] = (logp + 0.3 * torch.randn(pairs, T)).to(dtype)
        found[f"mask_{side}"] = torch.rand(pairs, T) > 0.3
    if pairs > 1:
        found["mask_rejected"][1] = False
    if found.pop("segments", False):
        found |= {f"segments_{side}": SEGMENTS.expand(pairs, 3, 2) for side in lengths}
        found |= {f"weights_{side}": torch.rand(pairs, 3) + 0.5 for side in lengths}
    if found.pop("prob", False):
        found["prob"] = torch.rand(pairs)
    return found


def run(arguments, backend, dtype=None, device=None):
    """{name: loss, metrics, gradients} on the CPU."""

    def cast(value):
        if not isinstance(value, torch.Tensor):
            return value
        value = value.to(device) if device else value
        return value.to(dtype) if dtype and value.is_floating_point() and value.dim() else value

    arguments = {name: cast(value) for name, value in arguments.items()}
    leaves = {n: arguments[n].detach().clone().requires_grad_() for n in ("logp_chosen", "logp_rejected")}
    loss, metrics = rf.preference_loss(**(arguments | leaves), backend=backend)
    (loss * 1.5).backward()
    found = {"loss": loss.detach(), **metrics} | {f"d{n}": leaf.grad for n, leaf in leaves.items()}
    return {name: value.cpu() for name, value in found.items()}


def check(arguments, backend, device=None):
    got, oracle = run(arguments, backend, device=device), run(arguments, "eager", torch.float64)
    eager = run(arguments, "eager")
    for name, value in got.items():
        assert_as_good_as_eager(value, oracle[name], eager[name], name=name)
    for side in ("chosen", "rejected"):
        if f"mask_{side}" in arguments:
            assert torch.all(got[f"dlogp_{side}"][~arguments[f"mask_{side}"]] == 0)
    return got


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kind", "knobs"), KINDS, ids=IDS)
def test_every_kind(backend, dtype, kind, knobs):
    check(sample(kind, knobs, dtype=dtype), backend)
    check(sample(kind, knobs, dtype=dtype) | {"average": kind != "2d_dpo"}, backend)
    check(sample(kind, knobs, pairs=1, chosen=1500, rejected=11, dtype=dtype), backend)


@pytest.mark.skipif(INTERPRETED, reason="fp64")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "knobs"), KINDS, ids=IDS)
def test_gradcheck(backend, kind, knobs):
    arguments = sample(kind, knobs, pairs=2, chosen=11, rejected=11, dtype=torch.float64)
    logps = [arguments.pop(f"logp_{side}").requires_grad_() for side in ("chosen", "rejected")]
    torch.autograd.gradcheck(lambda *a: rf.preference_loss(*a, backend=backend, **arguments)[0], logps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "knobs"), KINDS, ids=IDS)
def test_nan_at_masked_tokens_changes_nothing(backend, kind, knobs):
    clean = sample(kind, knobs)
    dirty = dict(clean)
    for side in ("chosen", "rejected"):
        for i, name in enumerate((f"logp_{side}", f"ref_{side}")):
            if name in clean:
                dirty[name] = clean[name].masked_fill(~clean[f"mask_{side}"], [NAN, INF][i])
    wanted, got = run(clean, backend), run(dirty, backend)
    for name, value in wanted.items():
        assert torch.equal(value, got[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "knobs"), KINDS, ids=IDS)
def test_packed_is_padded(backend, kind, knobs):
    padded = sample(kind, knobs, chosen=12, rejected=12)
    offsets = torch.tensor([0, 12, 24, 36, 48], dtype=torch.int32)
    per_token = [f"{n}_{side}" for n in ("logp", "ref", "mask") for side in ("chosen", "rejected")]
    packed = {n: v.flatten() if n in per_token else v for n, v in padded.items()}
    packed |= {"cu_seqlens_chosen": offsets, "cu_seqlens_rejected": offsets}
    wanted, got = run(padded, backend), run(packed, backend)
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name].reshape(value.shape), msg=name, rtol=2e-6, atol=1e-6)
    # Padding is not there at all in a pack; an empty answer is fine.
    keep = {side: padded[f"mask_{side}"] for side in ("chosen", "rejected")}
    if kind == "2d_dpo":
        return  # its segments count positions
    tight = {n: v[keep[n.split("_")[1]]] if n in per_token else v for n, v in padded.items()}
    for side, mask in keep.items():
        tight.pop(f"mask_{side}")
        tight[f"cu_seqlens_{side}"] = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    got = run(tight, backend)
    for name, value in got.items():
        expected = wanted[name][keep[name.split("_")[1]]] if value.dim() else wanted[name]
        torch.testing.assert_close(value, expected, msg=name, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_answers_are_used_as_they_are(backend):
    for kind, knobs in KINDS:
        if kind == "2d_dpo":
            continue
        per_token = sample(kind, knobs)
        average = kind in ("simpo", "orpo")
        sums = {n: v for n, v in per_token.items() if not n.startswith("mask")}
        for side in ("chosen", "rejected"):
            live = per_token[f"mask_{side}"]
            for name in (f"logp_{side}", f"ref_{side}"):
                if name in sums:
                    total = torch.where(live, sums[name], 0.0).sum(1)
                    sums[name] = total / live.sum(1).clamp(min=1) if average else total
        wanted, got = run(per_token, backend), run(sums, backend)
        for name in ("reward_chosen", "reward_rejected", "accuracy", "margin"):
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-6)
        if kind not in ("cpo", "orpo"):  # whose token NLL needs lengths
            torch.testing.assert_close(got["loss"], wanted["loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", FUSED)
def test_strided_input_and_mixed_dtypes(backend):
    arguments = sample("dpo", {})
    wide = torch.stack([arguments["ref_chosen"], arguments["ref_rejected"][:, :12]], -1)
    strided = arguments | {"ref_chosen": wide[..., 0], "logp_rejected": arguments["logp_rejected"].double().float()}
    plain = run(arguments, backend)
    assert all(torch.equal(v, plain[n]) for n, v in run(strided, backend).items())
    mixed = arguments | {
        "logp_chosen": arguments["logp_chosen"].bfloat16(),
        "ref_rejected": arguments["ref_rejected"].half(),
    }
    got, oracle = run(mixed, backend), run(mixed, "eager", torch.float64)
    assert got["dlogp_chosen"].dtype == torch.bfloat16
    assert got["loss"].dtype == torch.float32
    torch.testing.assert_close(got["loss"].double(), oracle["loss"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    for shape in ((0, 5), (0, 0), (3, 0), (0,)):
        logp = [torch.zeros(shape, requires_grad=True) for _ in range(2)]
        for kind in ("dpo", "cpo", "orpo"):
            refs = (None, None) if kind in NO_REFERENCE else (torch.zeros(shape),) * 2
            loss, metrics = rf.preference_loss(*logp, *refs, kind=kind, backend=backend)
            loss.backward()
            assert all(torch.equal(x.grad, torch.zeros(shape)) for x in logp)
            assert all(value == 0 for value in metrics.values())
            if shape[0] == 0:
                assert loss == 0
            elif kind == "dpo":
                assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "knobs"), KINDS, ids=IDS)
def test_packed_without_an_answer(backend, kind, knobs):
    logp = [torch.zeros(0, requires_grad=True) for _ in range(2)]
    refs = (None, None) if kind in NO_REFERENCE else (torch.zeros(0),) * 2
    packed = dict.fromkeys(("cu_seqlens_chosen", "cu_seqlens_rejected"), torch.zeros(1, dtype=torch.int32))
    knobs = {name: value for name, value in knobs.items() if name not in ("prob", "segments", "margin")}
    if kind == "2d_dpo":
        knobs |= dict.fromkeys(("segments_chosen", "segments_rejected"), torch.zeros(0, 1, 2, dtype=torch.long))
    if kind == "bradley_terry":
        packed = {}  # rewards, one an answer
    loss, metrics = rf.preference_loss(*logp, *refs, kind=kind, backend=backend, **packed, **knobs)
    loss.backward()
    assert loss == 0
    assert all(value == 0 for value in metrics.values())
    assert all(torch.equal(x.grad, torch.zeros(0)) for x in logp)


@pytest.mark.parametrize("backend", FUSED)
def test_bits_do_not_depend_on_the_batch(backend):
    arguments = sample("ipo", {}, pairs=6, chosen=300, rejected=200)
    alone = {n: v[2:3] if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    # Six copies of one pair have its loss, and a sixth of its gradient each.
    copies = {n: v.expand(8, -1) if isinstance(v, torch.Tensor) else v for n, v in alone.items()}
    one, many = run(alone, backend), run(copies, backend)
    assert torch.equal(one["loss"], many["loss"])
    assert torch.equal(one["dlogp_chosen"], 8 * many["dlogp_chosen"][3:4])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize(("kind", "knobs"), KINDS, ids=IDS)
def test_on_a_gpu(backend, kind, knobs):
    for pairs, chosen, rejected in ((4, 12, 17), (300, 2500, 100)):
        arguments = sample(kind, knobs, pairs, chosen, rejected)
        check(arguments, backend, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton"])
def test_kto_on_a_gpu_reads_its_numbers_there(backend):
    logp, ref, desirable = -torch.rand(300, 70), -torch.rand(300, 70), torch.rand(300) > 0.5
    wanted, _ = rf.kto_loss(logp, ref, desirable, kl=0.25, backend="eager")
    on_gpu = [t.cuda() for t in (logp, ref, desirable)]
    kl = torch.full((), 0.25, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = rf.kto_loss(*on_gpu, kl=kl, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.cpu(), wanted)


def test_kto():
    """βx − z = ln 3 for a desirable answer and −ln 3 for an undesirable one: 1 − v = ¼ for both."""
    for backend in BACKENDS:
        z, l3 = 0.5, math.log(3)
        logp = torch.tensor([[10 * (z + l3), 0.0], [4.0, 10 * (z - l3) - 4.0], [5.0, NAN]], requires_grad=True)
        mask = torch.tensor([[1, 1], [1, 1], [1, 0]])
        desirable = torch.tensor([True, False, True])
        loss, metrics = rf.kto_loss(
            logp, torch.zeros(3, 2), desirable, kl=z, lambda_d=2.0, lambda_u=3.0, mask=mask, backend=backend
        )
        loss.backward()
        # the third has r = z: 1 − v = ½
        assert loss.item() == pytest.approx((2 / 4 + 3 / 4 + 2 / 2) / 3, abs=1e-6)
        # λ·β·v(1 − v)/B
        slopes = [-2 * 0.1 * 3 / 16 / 3, 3 * 0.1 * 3 / 16 / 3, -2 * 0.1 / 4 / 3]
        wanted = [slopes[0], slopes[0], slopes[1], slopes[1], slopes[2], 0.0]
        assert logp.grad.flatten().tolist() == pytest.approx(wanted, abs=1e-7)
        chosen, rejected = (z + l3 + z) / 2, z - l3
        numbers = {
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "accuracy": 2 / 3,
            "margin": chosen - rejected,
            "weight_ratio": 2 * 2 / 3,
        }
        assert {k: v.item() for k, v in metrics.items()} == pytest.approx(numbers, abs=1e-6)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_kto_against_the_oracle(backend, dtype):
    logp, ref = (-torch.rand(5, 40).to(dtype) for _ in range(2))
    mask, desirable = torch.rand(5, 40) > 0.4, torch.tensor([1, 0, 0, 1, 0])
    found = []
    for name, kind in ((backend, dtype), ("eager", torch.float64), ("eager", dtype)):
        leaf = logp.to(kind, copy=True).requires_grad_()
        kl = torch.tensor(0.2, dtype=torch.float64)
        loss, metrics = rf.kto_loss(leaf, ref.to(kind), desirable, kl=kl, mask=mask, lambda_d=1.3, backend=name)
        loss.backward()
        found.append({"loss": loss.detach(), "dlogp": leaf.grad, **metrics})
    for name, value in found[0].items():
        assert_as_good_as_eager(value, found[1][name], found[2][name], name=name)


def test_reward_model_loss():
    for backend in BACKENDS:
        chosen, rejected = torch.tensor([2.0, 0.0], requires_grad=True), torch.tensor([1.0, 0.0])
        loss = rf.reward_model_loss(chosen, rejected, backend=backend)
        loss.backward()
        assert loss.item() == pytest.approx((math.log1p(math.exp(-1)) + math.log(2)) / 2, abs=1e-6)
        assert chosen.grad.tolist() == pytest.approx([-0.5 / (1 + math.e), -0.25], abs=1e-6)
        with_margin = rf.reward_model_loss(chosen, rejected, margin=torch.tensor([1.0, 0.0]), backend=backend)
        assert with_margin.item() == pytest.approx(math.log(2), abs=1e-6)
        assert rf.reward_model_loss(chosen, rejected, margin=1.0, backend=backend) > with_margin
