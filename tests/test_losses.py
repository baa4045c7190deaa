"""policy_loss: every backend that runs here against the fp64 oracle, golden values, edge cases."""

from __future__ import annotations

import math
import os

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast import dispatch, formulas, losses
from rl4llm_fast.testing import assert_as_good_as_eager

INF, NAN = math.inf, math.nan
# tests/test_token_loss_gpu.py runs this file once more in Triton's interpreter.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else [b for b in rf.backends()["policy_loss"] if b in ("eager", "cpu")]
FUSED = [b for b in BACKENDS if b != "eager"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16] + ([] if INTERPRETED else [torch.float64])
# Of the built-in formulas: another file of the same process may have registered its own by now.
KINDS = [k for k in formulas.KINDS if k not in formulas.FORMULAS or formulas.FORMULAS[k].builtin]
AGGREGATIONS = [*rf.weights.AGGREGATIONS, "none"]
GPU = [pytest.param(b, marks=pytest.mark.gpu) for b in ("triton", "cuda")]


def sample(B, T, dtype=torch.float32):
    """Tensors of a call, all exact in ``dtype``."""
    logp = -3 * torch.rand(B, T)
    tensors = {
        "logp": logp,
        "old_logp": logp + 0.3 * torch.randn(B, T),
        "advantages": torch.randn(B, T),
        "ref_logp": logp + 0.3 * torch.randn(B, T),
        "entropy": torch.rand(B, T),
    }
    mask = torch.rand(B, T) > 0.3
    if B > 1:
        mask[1] = False  # a sequence without a live token
    return {name: t.to(dtype) for name, t in tensors.items()} | {"mask": mask}


def cast(value, dtype=None, device=None):
    if not isinstance(value, torch.Tensor):
        return value
    value = value.to(device) if device else value
    return value.to(dtype) if dtype and value.is_floating_point() else value


def run(arguments, backend, dtype=None, device=None):
    """{name: loss, dlogp, dentropy and every metric} on the CPU."""
    arguments = {name: cast(value, dtype, device) for name, value in arguments.items()}
    leaves = {n: arguments[n].detach().clone().requires_grad_() for n in ("logp", "entropy") if n in arguments}
    arguments |= leaves
    logp, old, adv = (arguments.pop(n) for n in ("logp", "old_logp", "advantages"))
    loss, metrics = rf.policy_loss(logp, old, adv, backend=backend, **arguments)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    loss.backward(upstream if loss.dim() else None)
    found = {"loss": loss.detach(), **metrics} | {f"d{n}": leaf.grad for n, leaf in leaves.items()}
    return {name: value.cpu() for name, value in found.items()}


def check(arguments, backend, device=None):
    got = run(arguments, backend, device=device)
    oracle = run(arguments, "eager", torch.float64)
    eager = run(arguments, "eager")
    assert got.keys() == oracle.keys()
    for name, value in got.items():
        assert_as_good_as_eager(value, oracle[name], eager[name], name=name)
        if name.startswith("d") and "mask" in arguments:
            assert torch.all(value[~arguments["mask"]] == 0), f"{name} at masked tokens"
    return got


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(backend, dtype, kind):
    for T in (1, 37, 1500):
        check({**sample(4, T, dtype), "kind": kind, "kl_coef": 0.1, "entropy_coef": 0.01}, backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("per_sequence", [False, True])
def test_every_aggregation(backend, aggregation, per_sequence):
    arguments = {**sample(5, 70), "kind": "grpo", "kl_coef": 0.1, "aggregation": aggregation, "dp_size": 2}
    arguments["token_weights"] = torch.rand(5, 70)
    if per_sequence:
        arguments["advantages"] = torch.randn(5)
    check(arguments, backend)
    check(arguments | {"num_tokens": 1000, "num_sequences": 16, "max_length": 512}, backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("gradient", ["value", "straight_through", "importance"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_every_kl(backend, estimator, gradient, clamp):
    kl = {"kl_coef": 0.1, "kl_estimator": estimator, "kl_gradient": gradient, "kl_clamp": clamp}
    check({**sample(3, 50), "kind": "cpi", **kl}, backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(
    ("kind", "knobs"),
    [
        ("ppo_clip", {"eps_low": 0.1, "eps_high": 0.28, "dual_clip": 1.2}),
        ("grpo", {"delta": 1.3}),
        ("gspo", {"eps_low": 0.02, "eps_high": 0.03}),
        ("cispo", {"eps_high": 0.1}),
        ("cispo", {"cap": 1.1}),
        ("sapo", {"tau_pos": 2.0, "tau_neg": 0.5}),
        ("kl_pen", {"beta": 0.5}),
    ],
)
def test_knobs(backend, kind, knobs):
    arguments = {**sample(4, 60), "kind": kind, **knobs}
    as_numbers = check(arguments, backend)
    as_tensors = run(arguments | {name: torch.tensor(value) for name, value in knobs.items()}, backend)
    # A 0-d fp32 tensor holds the number rounded to fp32; nothing else may differ.
    for name, value in as_numbers.items():
        torch.testing.assert_close(as_tensors[name], value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_packed_is_padded(backend, kind, aggregation):
    """The same tokens packed give the same loss, metrics and gradients as padded ones."""
    lengths = [3, 0, 5, 1]
    padded = sample(4, 5) | {"kind": kind, "aggregation": aggregation, "kl_coef": 0.1}
    inside = torch.arange(5) < torch.tensor(lengths)[:, None]
    padded["mask"] = inside & (torch.rand(4, 5) > 0.2)
    padded |= {"rollout_logp": padded["old_logp"] + 0.1, "rollout_correction": "truncate", "rollout_level": "sequence"}
    for adv in (padded["advantages"], torch.randn(4)):
        padded["advantages"] = adv
        packed = {
            name: value[inside] if isinstance(value, torch.Tensor) and value.dim() == 2 else value
            for name, value in padded.items()
        }
        packed["cu_seqlens"] = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
        wanted, got = run(padded, backend), run(packed, backend)
        for name, value in got.items():
            if aggregation == "none" and name.startswith("d"):
                continue  # run() gives every token another upstream gradient there
            other = wanted[name][inside] if wanted[name].dim() == 2 else wanted[name]
            torch.testing.assert_close(value, other, msg=name, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend):
    """Two sequences of two tokens, one token masked; ρ = 2, 1, ½; A = 1 and −2; by hand."""
    ln2 = math.log(2)
    logp = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-1.0 - ln2, -1.0], [-1.0 + ln2, NAN]])
    mask = torch.tensor([[1, 1], [1, 0]])
    adv = torch.tensor([1.0, -2.0])
    loss, metrics = rf.policy_loss(logp, old, adv, mask=mask, backend=backend)
    loss.backward()
    # losses −1.2 (clipped above), −1, 1.6 (clipped below: 0.8·2); mean −0.2; gradient −ρA/3 at the unclipped one
    assert loss.item() == pytest.approx(-0.2, abs=1e-6)
    assert logp.grad.flatten().tolist() == pytest.approx([0.0, -1 / 3, 0.0, 0.0], abs=1e-6)
    k3 = (2 - 1 - ln2) + 0 + (0.5 - 1 + ln2)
    wanted = {
        "clip_fraction": 2 / 3,
        "clip_fraction_low": 1 / 3,
        "clip_fraction_high": 1 / 3,
        "ratio_mean": 3.5 / 3,
        "ratio_min": 0.5,
        "ratio_max": 2.0,
        "kl_old_k1": 0.0,  # −ln 2 + 0 + ln 2
        "kl_old_k3": k3 / 3,
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(wanted, abs=1e-6)
    # seq_mean_token_mean: (½·(−1.2 − 1) + 1·1.6)/2
    loss, _ = rf.policy_loss(logp, old, adv, mask=mask, aggregation="seq_mean_token_mean", backend=backend)
    assert loss.item() == pytest.approx(0.25, abs=1e-6)
    # (−1.2 − 1 + 1.6)/(B·L_max) = −0.6/(2·10), times the world size
    how = {"aggregation": "seq_mean_token_sum_norm", "max_length": 10, "dp_size": 4}
    loss, _ = rf.policy_loss(logp, old, adv, mask=mask, backend=backend, **how)
    assert loss.item() == pytest.approx(-0.12, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_at_masked_tokens_changes_nothing(backend, kind):
    clean = sample(3, 40) | {"kind": kind, "kl_coef": 0.1, "entropy_coef": 0.1, "token_weights": torch.rand(3, 40)}
    clean |= {"rollout_logp": clean["old_logp"] + 0.1, "rollout_correction": "mask"}
    dirty = dict(clean)
    for i, (name, value) in enumerate(clean.items()):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            dirty[name] = value.masked_fill(~clean["mask"], [NAN, INF, -INF][i % 3])
    wanted, got = run(clean, backend), run(dirty, backend)
    for name, value in wanted.items():
        assert torch.equal(value, got[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_at_a_live_token_is_not_hidden(backend):
    for name in ("logp", "old_logp", "advantages"):
        arguments = sample(2, 9) | {"aggregation": "none"}
        arguments["mask"][0, 4] = True
        arguments[name][0, 4] = NAN
        got = run(arguments, backend)
        assert got["loss"][0, 4].isnan()
        assert got["dlogp"][0, 4].isnan()
        assert torch.isfinite(got["loss"]).sum() == 17
        if name != "advantages":
            assert got["ratio_mean"].isnan()
            assert got["ratio_min"].isnan()
            assert got["ratio_max"].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 3)])
def test_no_live_token(backend, aggregation, shape):
    arguments = sample(*shape) | {"mask": torch.zeros(shape, dtype=torch.bool), "kl_coef": 0.1, "entropy_coef": 0.1}
    got = run(arguments | {"aggregation": aggregation, "kind": "gspo"}, backend)
    ratios = {"ratio_mean", "ratio_min", "ratio_max"}
    for name, value in got.items():
        assert torch.all(value == (1.0 if name in ratios else 0.0)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_policy(backend):
    """old_logp=None is the detached logp: ρ = 1 and the full gradient −A."""
    arguments = sample(3, 8) | {"old_logp": None, "mask": torch.ones(3, 8, dtype=torch.bool), "kind": "grpo"}
    got = run(arguments, backend)
    torch.testing.assert_close(got["dlogp"], -arguments["advantages"] / 24)
    assert got["ratio_min"] == got["ratio_max"] == 1
    assert got["clip_fraction"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties(backend, monkeypatch):
    """Where clip(ρ) = ρ the gradient is full; dual clip at ρ = c: half; a log ratio of exactly 20: kept."""
    logp = torch.zeros(1, 1)
    assert run({"logp": logp, "old_logp": logp, "advantages": logp + 1, "eps_low": 0.0, "eps_high": 0.0}, backend)[
        "dlogp"
    ].item() == pytest.approx(-1)
    two = {"logp": logp, "old_logp": logp, "advantages": logp - 3, "eps_low": 0.2, "eps_high": 0.2}
    monkeypatch.delitem(losses._MORE_THAN, "dual_clip")  # c > 1 otherwise, where ρ = c would hang on a rounding
    # ρ = 1 = c: min(ppo, c·3) ties, half of −ρA = 3
    assert run(two | {"dual_clip": 1.0}, backend)["dlogp"].item() == pytest.approx(1.5)
    edge = {"logp": logp + 20, "old_logp": logp, "advantages": logp - 1, "kind": "cpi"}
    assert run(edge, backend)["dlogp"].item() == pytest.approx(math.exp(20), rel=1e-6)
    assert run(edge | {"logp": logp + 20.5}, backend)["dlogp"].item() == 0
    assert run(edge | {"logp": logp + 500}, backend)["loss"].item() == pytest.approx(math.exp(20), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overflowing_kl_with_coefficient_0_is_a_metric_only(backend):
    arguments = {"logp": torch.full((1, 2), -200.0), "old_logp": None, "advantages": torch.ones(1, 2)}
    got = run(arguments | {"ref_logp": torch.zeros(1, 2), "kind": "pg"}, "cpu" if backend == "eager" else backend)
    assert got["kl_ref"] == INF
    assert got["loss"] == 200.0
    assert torch.equal(got["dlogp"], torch.full((1, 2), -0.5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_rollout_correction(backend, correction, level):
    """ω weighs the policy term alone: never the KL, never the entropy."""
    arguments = sample(3, 6) | {"kind": "cpi", "kl_coef": 0.3, "entropy_coef": 0.2, "aggregation": "none"}
    rollout = arguments["old_logp"] - 0.5 * torch.randn(3, 6)
    floor = 0.6 if correction == "mask" else 0.0
    more = {"rollout_correction": correction, "rollout_level": level, "rollout_cap": 1.5, "rollout_floor": floor}
    got = run(arguments | {"rollout_logp": rollout} | more, backend)["loss"]
    mask, old = arguments["mask"], arguments["old_logp"]
    log_omega = torch.where(mask, old - rollout, 0.0)
    omega = (log_omega if level == "token" else log_omega.sum(-1, keepdim=True).expand(3, 6)).exp()
    kept = torch.where((omega >= floor) & (omega <= 1.5), omega, 0.0)
    omega = omega.clamp(max=1.5) if correction == "truncate" else kept
    policy = -(arguments["logp"] - old).exp() * arguments["advantages"]
    d = arguments["ref_logp"] - arguments["logp"]
    wanted = omega * policy + 0.3 * (d.exp() - d - 1) - 0.2 * arguments["entropy"]
    torch.testing.assert_close(got, torch.where(mask, wanted, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulation_is_the_big_batch(backend):
    """Micro-batches with the global counts add up to the whole batch."""
    whole = sample(6, 11) | {"kind": "grpo", "kl_coef": 0.1}
    for aggregation in AGGREGATIONS[:4]:
        wanted = run(whole | {"aggregation": aggregation}, backend)
        counts = {"num_tokens": int(whole["mask"].sum()), "num_sequences": 6, "aggregation": aggregation}
        parts = []
        for rows in (slice(0, 2), slice(2, 6)):
            part = {n: v[rows] if isinstance(v, torch.Tensor) else v for n, v in whole.items()}
            parts.append(run(part | counts, backend))
        torch.testing.assert_close(parts[0]["loss"] + parts[1]["loss"], wanted["loss"])
        torch.testing.assert_close(torch.cat([p["dlogp"] for p in parts]), wanted["dlogp"])


@pytest.mark.parametrize("backend", FUSED)
def test_strided_inputs(backend):
    dense = sample(4, 10) | {"kind": "grpo", "kl_coef": 0.1}
    strided = {
        n: v.t().contiguous().t() if isinstance(v, torch.Tensor) and v.dim() == 2 else v for n, v in dense.items()
    }
    wanted, got = run(dense, backend), run(strided, backend)
    for name, value in wanted.items():
        assert torch.equal(value, got[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("gspo", "cispo")])  # their gradient is no derivative
def test_finite_differences(backend, kind):
    if backend == "triton":
        pytest.skip("fp64 is for the CPU")
    arguments = sample(2, 5, torch.float64)
    others = {n: arguments[n] for n in ("ref_logp", "mask")}

    def loss(logp, entropy):
        options = {"kind": kind, "kl_coef": 0.1, "entropy_coef": 0.1, "aggregation": "seq_mean_token_mean"}
        old, adv = arguments["old_logp"], arguments["advantages"]
        return rf.policy_loss(logp, old, adv, entropy=entropy, backend=backend, **options, **others)[0]

    leaves = tuple(arguments[n].requires_grad_() for n in ("logp", "entropy"))
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("backend", FUSED)
def test_same_bits(backend):
    """Run to run, and whatever rows are around: the derivative per row is that of the row alone."""
    arguments = sample(6, 1030) | {"kind": "grpo", "kl_coef": 0.1, "aggregation": "seq_mean_token_sum"}
    first, again = run(arguments, backend), run(arguments, backend)
    alone = run({n: v[4:5] if isinstance(v, torch.Tensor) else v for n, v in arguments.items()} | {"num_sequences": 6},
                backend)  # fmt: skip
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert torch.equal(first["dlogp"][4:5], alone["dlogp"])


# On a GPU.


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(backend, kind):
    if dispatch.why_not("policy_loss", backend, "cuda"):
        pytest.skip(str(dispatch.why_not("policy_loss", backend, "cuda")))
    for B, T in ((4, 1), (4, 37), (3, 1500), (2, 70_000), (3000, 5)):
        for aggregation in AGGREGATIONS:
            arguments = sample(B, T) | {"kind": kind, "aggregation": aggregation, "kl_coef": 0.1, "entropy_coef": 0.1}
            # Of both signs a sum cancels, and an ulp of the GPU's e^x in each term is more than eager's error of it.
            arguments["advantages"] = arguments["advantages"].abs()
            check(arguments | {"token_weights": torch.rand(B, T)}, backend, device="cuda")


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("how", [{"kind": "gspo"}, {"rollout_level": "sequence", "rollout_correction": "mask"}])
@pytest.mark.parametrize("packed", [False, True])
def test_whole_sequences_on_a_gpu(backend, how, packed):
    if dispatch.why_not("policy_loss", backend, "cuda"):
        pytest.skip(str(dispatch.why_not("policy_loss", backend, "cuda")))
    for dtype, aggregation in zip([torch.float32, torch.bfloat16] * 3, AGGREGATIONS, strict=True):
        s = sample(3, 1500, dtype) | how | {"aggregation": aggregation, "kl_coef": 0.1, "entropy_coef": 0.1}
        if "rollout_level" in how:
            s["rollout_logp"] = (s["old_logp"].float() + 0.001 * torch.randn(3, 1500)).to(dtype)
        if packed:
            s = {n: v.reshape(-1) if isinstance(v, torch.Tensor) else v for n, v in s.items()}
            s["cu_seqlens"] = torch.tensor([0, 1200, 1200, 1203, 4500], dtype=torch.int32)
        s["advantages"] = s["advantages"].abs()  # as above
        check(s, backend, device="cuda")
        check(s | {"advantages": torch.rand(4 if packed else 3).to(dtype)}, backend, device="cuda")


@pytest.mark.parametrize("backend", GPU)
def test_cuda_graph_and_device_knobs(backend):
    """Three launches, captured; a 0-d tensor on the device is read at replay; no synchronisation anywhere."""
    if dispatch.why_not("policy_loss", backend, "cuda"):
        pytest.skip(str(dispatch.why_not("policy_loss", backend, "cuda")))
    s = {n: v.cuda() for n, v in sample(4, 2000).items()}
    leaf, eps = s["logp"].clone().requires_grad_(), torch.tensor(0.2, device="cuda")

    def step():
        loss, metrics = rf.policy_loss(
            leaf, s["old_logp"], s["advantages"], mask=s["mask"], kind="grpo", eps_high=eps, ref_logp=s["ref_logp"],
            kl_coef=0.1, backend=backend,
        )  # fmt: skip
        return loss, metrics["clip_fraction"], *torch.autograd.grad(loss, leaf)

    torch.cuda.set_sync_debug_mode("error")
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for value in (0.2, 0.05):
        eps.fill_(value)
        graph.replay()
        for got, wanted in zip(captured, step(), strict=True):
            assert torch.equal(got, wanted)
