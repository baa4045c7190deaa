"""value_loss and sft_loss: every backend that runs here against the fp64 oracle, golden values, compositions."""

from __future__ import annotations

import math
import os

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast.testing import assert_as_good_as_eager

NAN = math.nan
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else [b for b in rf.backends()["value_loss"] if b in ("eager", "cpu")]
FUSED = [b for b in BACKENDS if b != "eager"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16] + ([] if INTERPRETED else [torch.float64])
AGGREGATIONS = [*rf.weights.AGGREGATIONS, "none"]


def sample(B, T, dtype=torch.float32):
    values = torch.randn(B, T)
    found = {"values": values, "returns": values + torch.randn(B, T), "old_values": values + 0.3 * torch.randn(B, T)}
    mask = torch.rand(B, T) > 0.3
    mask[0] = False
    return {n: t.to(dtype) for n, t in found.items()} | {"mask": mask, "clip": 0.2}


def run(arguments, backend, dtype=None):
    arguments = {
        n: v.to(dtype) if dtype and isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in arguments.items()
    }
    leaf = arguments["values"].detach().clone().requires_grad_()
    loss, metrics = rf.value_loss(**(arguments | {"values": leaf}), backend=backend)
    loss.sum().backward()
    return {"loss": loss.detach(), "dvalues": leaf.grad, **metrics}


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("clip", [False, True])
def test_against_the_oracle(backend, dtype, clip):
    for aggregation in AGGREGATIONS:
        arguments = sample(4, 50, dtype) | {"aggregation": aggregation, "half": aggregation != "none"}
        if not clip:
            arguments |= {"clip": None, "old_values": None}
        got, oracle = run(arguments, backend), run(arguments, "eager", torch.float64)
        eager = run(arguments, "eager")
        for name, value in got.items():
            assert_as_good_as_eager(value, oracle[name], eager[name], name=name)
        assert torch.all(got["dvalues"][~arguments["mask"]] == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_at_masked_tokens_changes_nothing(backend):
    clean = sample(3, 20)
    dirty = {
        n: v.masked_fill(~clean["mask"], NAN) if n.endswith(("values", "returns")) else v for n, v in clean.items()
    }
    wanted, got = run(clean, backend), run(dirty, backend)
    assert all(torch.equal(value, got[name]) for name, value in wanted.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_packed_is_padded(backend, aggregation):
    padded = sample(3, 5) | {"aggregation": aggregation}
    packed = {n: v.flatten() if isinstance(v, torch.Tensor) else v for n, v in padded.items()}
    packed["cu_seqlens"] = torch.tensor([0, 5, 10, 15])
    wanted, got = run(padded, backend), run(packed, backend)
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name].reshape(value.shape), rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend):
    """Unclipped square, clipped square, the tie at V_old + ε; by hand."""
    values = torch.tensor([[1.0, 2.0, 1.5, NAN]], requires_grad=True)
    returns = torch.tensor([[3.0, 0.0, 0.0, NAN]])
    mask = torch.tensor([[1, 1, 1, 0]])
    loss, metrics = rf.value_loss(values, returns, mask=mask, backend=backend)
    loss.backward()
    assert loss.item() == pytest.approx((4 + 4 + 2.25) / 6)
    assert values.grad[0].tolist() == pytest.approx([-2 / 3, 2 / 3, 0.5, 0])
    # R = 3, 0, 0: variance ×3 = 6; R − V = 2, −2, −1.5: mean −½, squares 6.25 + 2.25 + 1
    assert metrics["explained_variance"].item() == pytest.approx(1 - 9.5 / 6, abs=1e-6)
    assert metrics["clip_fraction"] == 0
    values.grad = None
    # V_old = 0.5, 3, 1 with ε = ½: clip(V) = 1 (on the edge), 2.5 and 1.5 (on the edge): squares 4, 6.25 (> 4), 2.25
    old = torch.tensor([[0.5, 3.0, 1.0, NAN]])
    loss, metrics = rf.value_loss(values, returns, old_values=old, clip=0.5, half=False, mask=mask, backend=backend)
    loss.backward()
    assert loss.item() == pytest.approx((4 + 6.25 + 2.25) / 3)
    # The full gradient 2(V − R) on either edge, none where the clipped square is the larger one
    assert values.grad[0].tolist() == pytest.approx([-4 / 3, 0, 1, 0], abs=1e-6)
    assert metrics["clip_fraction"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_live_token(backend):
    for values in (torch.randn(2, 3), torch.zeros(0, 3), torch.zeros(2, 0)):
        leaf = values.requires_grad_()
        dead = torch.zeros(values.shape, dtype=torch.bool)
        loss, metrics = rf.value_loss(leaf, torch.zeros_like(values), mask=dead, backend=backend)
        loss.backward()
        assert loss == 0
        assert torch.equal(leaf.grad, torch.zeros_like(values))
        assert all(value == 0 for value in metrics.values())
        assert rf.sft_loss(leaf, dead, backend=backend) == 0


@pytest.mark.skipif(INTERPRETED, reason="fp64")
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    s = sample(3, 6, torch.float64)
    values = s.pop("values").requires_grad_()
    torch.autograd.gradcheck(lambda v: rf.value_loss(v, backend=backend, **s)[0], values)
    torch.autograd.gradcheck(lambda v: rf.sft_loss(v, s["mask"], backend=backend), values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sft_is_the_weighted_negative_log_likelihood(backend):
    logp = torch.tensor([[-1.0, -3.0], [-2.0, NAN]], requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0]])
    loss = rf.sft_loss(logp, mask, backend=backend)
    loss.backward()
    assert loss.item() == 2.0
    assert logp.grad.flatten().tolist() == pytest.approx([-1 / 3, -1 / 3, -1 / 3, 0])
    assert rf.sft_loss(logp, mask, aggregation="seq_mean_token_mean", backend=backend).item() == 2.0
    assert rf.sft_loss(logp, mask, num_tokens=12, dp_size=2, backend=backend).item() == 1.0
    packed = torch.tensor([-1.0, -3.0, -2.0])
    assert rf.sft_loss(packed, backend=backend).item() == 2.0
    offsets = torch.tensor([0, 2, 3])
    how = {"cu_seqlens": offsets, "aggregation": "seq_mean_token_sum", "backend": backend}
    assert rf.sft_loss(packed, **how).item() == 3.0


def test_compositions():
    """PPO-ptx (14) and the unified objective (33) are sums of losses: by hand, with ρ = 1 and one token each."""
    logp, values = torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[2.0]], requires_grad=True)
    entropy, pretraining = torch.tensor([[0.7]], requires_grad=True), torch.tensor([[-3.0]], requires_grad=True)
    adv, returns = torch.tensor([[0.5]]), torch.tensor([[1.0]])
    policy, _ = rf.policy_loss(logp, None, adv, entropy=entropy, entropy_coef=0.1)
    value, _ = rf.value_loss(values, returns, half=False)
    unified = policy + 0.5 * value
    assert unified.item() == pytest.approx(-0.5 + 0.5 * 1.0 - 0.1 * 0.7)
    ptx = rf.policy_loss(logp, None, adv)[0] + 0.2 * rf.sft_loss(pretraining)
    assert ptx.item() == pytest.approx(-0.5 + 0.2 * 3.0)
    (unified + ptx).backward()
    grads = [t.grad.item() for t in (logp, values, entropy, pretraining)]
    assert grads == pytest.approx([-1.0, 1.0, -0.1, -0.2])


def test_errors():
    values = torch.randn(2, 3)
    with pytest.raises(ValueError, match="old_values"):
        rf.value_loss(values, values, clip=0.2)
    with pytest.raises(ValueError, match="clip"):
        rf.value_loss(values, values, old_values=values)
    with pytest.raises(ValueError, match="clip: wanted a number > 0"):
        rf.value_loss(values, values, old_values=values, clip=-1.0)
    for name in ("num_tokens", "num_sequences", "dp_size"):
        with pytest.raises(ValueError, match=f"{name}: wanted a number >= 0, got -2"):
            rf.value_loss(values, values, **{name: -2})
    with pytest.raises(ValueError, match="clip: wanted a number > 0"):
        rf.value_loss(values, values, old_values=values, clip=torch.tensor(0.0))
    with pytest.raises(TypeError, match="half: wanted a bool, got str"):
        rf.value_loss(values, values, half="no")
    with pytest.raises(ValueError, match="returns"):
        rf.value_loss(values, values[:1])
    with pytest.raises(ValueError, match="values: wanted"):
        rf.value_loss(values[None], values[None])
    with pytest.raises(ValueError, match="cu_seqlens"):
        rf.value_loss(values[0], values[0], aggregation="seq_mean_token_mean")
    with pytest.raises(TypeError, match="logp"):
        rf.sft_loss(torch.ones(2, dtype=torch.long))
    with pytest.raises(ValueError, match="built-in"):
        rf.token_loss("value_mse")(lambda m, logp, adv: -logp * adv)


def test_checks_of_numbers_break_no_graph():
    values = torch.randn(2, 3)

    def losses(x, number):
        value = rf.value_loss(x, values, old_values=values, clip=number, num_tokens=number * 6)[0]
        policy = rf.policy_loss(x, None, values, kind="cispo", cap=number, num_sequences=number)[0]
        return value + policy

    compiled = torch.compile(losses, fullgraph=True, backend="eager")
    for number in (torch.tensor(0.4), 0.4, 0.5):
        torch.testing.assert_close(compiled(values + 1, number), losses(values + 1, number))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_a_live_old_value_shows(backend):
    """In eager and in the kernels: a comparison with a NaN bound would let the value pass."""
    values = torch.tensor([[1.0, 2.0]], requires_grad=True)
    old = torch.tensor([[NAN, 2.0]])
    loss, _ = rf.value_loss(values, torch.zeros(1, 2), old_values=old, clip=0.2, aggregation="none", backend=backend)
    assert loss.isnan().tolist() == [[True, False]]
