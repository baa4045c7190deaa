"""kl_estimate: every backend that runs here against the fp64 oracle, its edges, and the KL controller."""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast import dispatch
from rl4llm_fast.testing import assert_as_good_as_eager

INF, NAN = math.inf, math.nan
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else [b for b in rf.backends()["kl_estimate"] if b in ("eager", "cpu")]
FUSED = [b for b in BACKENDS if b != "eager"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16] + ([] if INTERPRETED else [torch.float64])
ESTIMATORS, GRADIENTS = ["k1", "k2", "k3", "abs"], ["value", "straight_through", "importance"]
GPU = [pytest.param(b, marks=pytest.mark.gpu) for b in ("triton", "cuda")]


def run(logp, ref, upstream, backend, **options):
    leaf = logp.detach().clone().requires_grad_()
    kl = rf.kl_estimate(leaf, ref, backend=backend, **options)
    kl.backward(upstream.to(kl))
    return kl.detach().cpu(), leaf.grad.cpu()


def check(logp, ref, backend, device="cpu", **options):
    upstream = torch.randn(logp.shape)

    def to(dtype=None, where="cpu"):
        move = {n: v.to(where) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
        if dtype and isinstance(move.get("old_logp"), torch.Tensor):
            move["old_logp"] = move["old_logp"].to(dtype)
        return move

    got = run(logp.to(device), ref.to(device), upstream.to(device), backend, **to(where=device))
    oracle = run(logp.double(), ref.double(), upstream, "eager", **to(torch.float64))
    eager = run(logp, ref, upstream, "eager", **to())
    assert got[1].dtype == logp.dtype
    for name, g, o, e in zip(("kl", "dlogp"), got, oracle, eager, strict=True):
        assert_as_good_as_eager(g, o, e, name=name)
    return got


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize(("estimator", "gradient"), itertools.product(ESTIMATORS, GRADIENTS))
def test_every_estimator(backend, dtype, estimator, gradient, clamp):
    for shape in ((1,), (3, 7), (2, 1, 1030)):
        logp = (-2 * torch.rand(shape)).to(dtype)
        ref, old = (logp + 0.5 * torch.randn(shape)).to(dtype), (logp + 0.5 * torch.randn(shape)).to(dtype)
        options = {"estimator": estimator, "gradient": gradient, "clamp": clamp, "mask": torch.rand(shape) > 0.3}
        kl, grad = check(logp, ref, backend, old_logp=old, **options)
        assert torch.all(kl[~options["mask"]] == 0)
        assert torch.all(grad[~options["mask"]] == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend):
    """d = ln 2: k3 = 2 − ln 2 − 1, gradient 1 − 2; the second token is masked and holds NaN."""
    logp = torch.tensor([-1.0, NAN], requires_grad=True)
    kl = rf.kl_estimate(logp, torch.tensor([-1.0 + math.log(2), -INF]), mask=torch.tensor([1, 0]), backend=backend)
    kl.sum().backward()
    assert kl.tolist() == pytest.approx([1 - math.log(2), 0.0], abs=1e-7)
    assert logp.grad.tolist() == pytest.approx([-1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clamp(backend):
    """d to ±20, then the estimate to ±10; no gradient strictly outside, all of it at equality."""
    ref = torch.tensor([25.0, 20.0, 10.0, 2.0, -25.0, -20.0, -10.0])
    logp = torch.zeros(7, requires_grad=True)
    kl = rf.kl_estimate(logp, ref, "k1", clamp=True, backend=backend)
    kl.sum().backward()
    assert kl.tolist() == [-10, -10, -10, -2, 10, 10, 10]
    assert logp.grad.tolist() == [0, 0, 1, 1, 0, 0, 1]
    logp.grad = None
    rf.kl_estimate(logp, ref, "k1", clamp=True, gradient="straight_through", backend=backend).sum().backward()
    assert logp.grad.tolist() == (-ref).tolist()  # −d of the unclamped d


@pytest.mark.parametrize("backend", BACKENDS)
def test_importance_on_policy(backend):
    """old_logp=None: the ratio is 1 and is differentiated: k3's gradient plus k3."""
    logp, ref = torch.tensor([-1.0], requires_grad=True), torch.tensor([-1.0 + math.log(2)])
    kl = rf.kl_estimate(logp, ref, gradient="importance", backend=backend)
    kl.backward()
    assert kl.item() == pytest.approx(1 - math.log(2))
    assert logp.grad.item() == pytest.approx(-1 + 1 - math.log(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_importance_far_from_the_reference(backend, dtype):
    """k3's derivative is −d·ρ exactly: nothing of exp(d), which the product rule would add and take away again."""
    if dtype == torch.float64 and backend not in ("eager", "cpu"):
        pytest.skip("fp64 is for the CPU")
    d = torch.tensor([-60.0, -10.0, 10.0, 20.0, 30.0, 60.0], dtype=dtype)
    logp = torch.full_like(d, -1.0).requires_grad_()
    old = torch.full_like(d, -1.5)
    rf.kl_estimate(logp, logp.detach() + d, gradient="importance", old_logp=old, backend=backend).sum().backward()
    torch.testing.assert_close(logp.grad, -d * math.exp(0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_shapes(backend, shape):
    logp = torch.zeros(shape, requires_grad=True)
    kl = rf.kl_estimate(logp, torch.zeros(shape), backend=backend)
    kl.sum().backward()
    assert kl.shape == shape
    assert logp.grad.shape == shape


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built here")
def test_registration():
    ops, logp = torch.ops.rl4llm_fast, torch.randn(9)
    mask = torch.rand(9) > 0.5
    torch.library.opcheck(ops.kl_estimate_fwd.default, (logp, logp + 1, logp + 0.1, mask, "k3_importance"))
    torch.library.opcheck(ops.kl_estimate_fwd.default, (logp, logp + 1, None, None, "abs_value_clamp"))
    with pytest.raises(ValueError, match="there is no formula"):
        ops.kl_estimate_fwd(logp, logp, None, None, "k4_value")
    leaf = logp.clone().requires_grad_()
    kl = rf.kl_estimate(leaf, logp + 1, backend="cpu")
    (grad,) = torch.autograd.grad(kl.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()
    compiled = torch.compile(lambda x: rf.kl_estimate(x, logp, "k2", mask=mask), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logp + 1), rf.kl_estimate(logp + 1, logp, "k2", mask=mask))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "k4"}, "estimator: wanted one of 'k1'"),
        ({"gradient": "none"}, "gradient: wanted one of 'value'"),
        ({"ref_logp": torch.zeros(4)}, "ref_logp: wanted the shape"),
        ({"ref_logp": torch.zeros(3, dtype=torch.int64)}, "ref_logp: wanted float32"),
        ({"ref_logp": None}, "ref_logp: wanted a"),
        ({"mask": torch.zeros(3)}, "mask: wanted a bool"),
        ({"old_logp": torch.zeros(2)}, "old_logp: wanted the shape"),
        ({"clamp": "yes"}, "clamp: wanted a bool, got str"),
    ],
)
def test_messages(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        rf.kl_estimate(**{"logp": torch.zeros(3), "ref_logp": torch.zeros(3)} | changes)


def test_adaptive_controller():
    """(32): below target/1.5 β halves, above 1.5·target it doubles, between and at the bounds it stays."""
    controller = rf.AdaptiveKLController(beta=0.2, target=3.0)
    assert [controller.update(kl) for kl in (1.9, 2.0, 3.0, 4.5, 4.6)] == [0.1, 0.1, 0.1, 0.1, 0.2]
    assert controller.update(torch.tensor(100.0)) == 0.4
    other = rf.AdaptiveKLController(1.0, 1.0)
    other.load_state_dict(controller.state_dict())
    assert (other.beta, other.target) == (0.4, 3.0)
    for bad in ({"beta": 0.0, "target": 1.0}, {"beta": 1.0, "target": -1.0}):
        with pytest.raises(ValueError, match="wanted a number > 0"):
            rf.AdaptiveKLController(**bad)
    with pytest.raises(TypeError, match="target: wanted a number"):
        rf.AdaptiveKLController(1.0, None)
    with pytest.raises(TypeError, match="kl: wanted a number or a 0-d tensor, got list"):
        controller.update([1])


def test_trust_region():
    assert rf.trust_region_exceeded(torch.tensor(0.02), 0.01)
    assert not rf.trust_region_exceeded(0.01, 0.01)
    assert rf.trust_region_exceeded(NAN, 0.01)
    for arguments, name in (((None, 1.0), "kl"), ((1.0, "1"), "delta"), ((torch.zeros(2), 1.0), "kl")):
        with pytest.raises(TypeError, match=f"{name}: wanted a number"):
            rf.trust_region_exceeded(*arguments)


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize(("estimator", "gradient"), itertools.product(ESTIMATORS, GRADIENTS))
def test_on_a_gpu(backend, estimator, gradient):
    if dispatch.why_not("kl_estimate", backend, "cuda"):
        pytest.skip(str(dispatch.why_not("kl_estimate", backend, "cuda")))
    for shape in ((1,), (3, 7), (2, 5000)):
        logp = -2 * torch.rand(shape)
        ref, old = logp + 0.5 * torch.randn(shape), logp + 0.5 * torch.randn(shape)
        options = {"estimator": estimator, "gradient": gradient, "mask": torch.rand(shape) > 0.3, "old_logp": old}
        check(logp, ref, backend, device="cuda", **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clamped_estimate_is_finite_whatever_its_surrogate_is(backend):
    logp = torch.tensor([[-1.0, -0.5]], requires_grad=True)
    ref = torch.tensor([[-math.inf, -0.4]])
    kl = rf.kl_estimate(logp, ref, "k3", gradient="straight_through", clamp=True, backend=backend)
    assert kl.tolist() == [[10.0, pytest.approx(math.exp(0.1) - 1.1, abs=1e-6)]]
