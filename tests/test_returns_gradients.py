"""Gradients of the returns, and the ops as torch.compile and opcheck see them."""

from __future__ import annotations

import math

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast.testing import assert_as_good_as_eager
from tests.returns_cases import BACKENDS, DTYPES, MODES, each_backend, inputs_of, random_mask


@each_backend
class TestGradients:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("packed", [False, True])
    def test_gradcheck(self, backend, mode, packed):
        if backend not in ("eager", "cpu"):
            pytest.skip("fp64 runs on the eager and CPU backends")
        shape, count = ((11,), 3) if packed else ((3, 9), 3)
        offsets = torch.tensor([0, 4, 4, 11]) if packed else None
        rewards, values = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
        last = torch.randn(count, dtype=torch.float64, requires_grad=True)
        for mask in (None, random_mask(*shape)):
            common = {"mask": mask, "cu_seqlens": offsets, "mask_mode": mode, "backend": backend}

            def both(r, v, b, common=common):
                return rf.gae(r, v, gamma=0.9, lam=0.8, bootstrap_value=b, **common)

            def returns(r, v, b, common=common):
                return rf.lambda_returns(r, v, gamma=0.9, lam=0.8, bootstrap_value=b, **common)

            def discounted(r, b, common=common):
                return rf.discounted_returns(r, gamma=0.9, bootstrap_value=b, **common)

            torch.autograd.gradcheck(both, (rewards, values, last))
            torch.autograd.gradcheck(lambda *a, both=both: both(*a)[0], (rewards, values, last))
            torch.autograd.gradcheck(returns, (rewards, values, last))
            torch.autograd.gradcheck(discounted, (rewards, last))

    @pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
    def test_error_rule(self, backend, dtype):
        x = inputs_of(3, 700, dtype=dtype)
        mask, last = random_mask(3, 700), torch.randn(3).to(dtype)
        grads = torch.randn(2, 3, 700)

        def gradients(backend, dtype):
            leaves = [t.detach().to(dtype).clone().requires_grad_() for t in (x["rewards"], x["values"], last)]
            outs = rf.gae(*leaves[:2], gamma=0.99, bootstrap_value=leaves[2], mask=mask, backend=backend)
            torch.autograd.backward(outs, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)])
            return [leaf.grad for leaf in leaves]

        got, oracle = gradients(backend, dtype), gradients("eager", torch.float64)
        for a, b, c in zip(got, oracle, gradients("eager", dtype), strict=True):
            assert_as_good_as_eager(a, b, c)

    def test_masked_tokens_get_zero(self, backend):
        x, mask = inputs_of(3, 30), random_mask(3, 30)
        leaves = [x[n].masked_fill(~mask, math.nan).requires_grad_() for n in ("rewards", "values")]
        sum(r.sum() for r in rf.gae(*leaves, mask=mask, backend=backend)).backward()
        for leaf in leaves:
            assert (leaf.grad[~mask] == 0).all()
            assert not leaf.grad.isnan().any()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built here")
class TestRegistration:
    @pytest.mark.parametrize("packed", [False, True])
    def test_opcheck(self, packed):
        ops = torch.ops.rl4llm_fast
        shape, count = ((9,), 2) if packed else ((2, 9), 2)
        offsets = torch.tensor([0, 4, 9]) if packed else None
        r, v, logp, mu = (torch.randn(shape) for _ in range(4))
        mask, last = torch.rand(shape) < 0.7, torch.randn(count)
        number = torch.tensor(0.9, dtype=torch.float64)
        common = (mask, offsets, last)
        for kl, wanted in [(None, True), (torch.randn(shape), False)]:
            torch.library.opcheck(ops.gae_fwd.default, (r, v, *common, kl, number, number, number, "skip", wanted))
        torch.library.opcheck(ops.gae_bwd.default, (r, v, mask, offsets, number, number, "zero"))
        torch.library.opcheck(ops.vtrace.default, (logp, mu, r, v, *common, number, number, number, number, "skip"))
        torch.library.opcheck(ops.n_step_returns.default, (r, v, *common, 3, number, "zero"))

    def test_double_backward_raises(self):
        rewards, values = (torch.randn(2, 5, requires_grad=True) for _ in range(2))
        advantages, _ = rf.gae(rewards, values, backend="cpu")
        (grad,) = torch.autograd.grad((advantages * values).sum(), values, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            grad.sum().backward()

    def test_compiles_without_graph_breaks(self):
        def loss(rewards, values, mask, offsets, gamma):
            advantages, returns = rf.gae(rewards, values, gamma=gamma, mask=mask, cu_seqlens=offsets, backend="cpu")
            return (advantages.square() + returns).sum()

        offsets = torch.tensor([0, 7, 20], dtype=torch.int32)
        mask, gamma = torch.rand(20) < 0.7, torch.tensor(0.9)
        leaves = [torch.randn(20).requires_grad_() for _ in range(2)]
        want = loss(*leaves, mask, offsets, gamma)
        want_grads = torch.autograd.grad(want, leaves)
        got = torch.compile(loss, fullgraph=True)(*leaves, mask, offsets, gamma)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, leaves), want_grads)


@each_backend
@pytest.mark.parametrize("op", ["gae", "discounted_returns"])
def test_forward_mode_is_right_or_refused(backend, op):
    """Never a tangent of 0."""
    x, values = torch.ones(1, 3), torch.zeros(1, 3)

    def function(rewards):
        if op == "gae":
            return rf.gae(rewards, values, gamma=0.5, lam=1.0, backend=backend)[1]
        return rf.discounted_returns(rewards, gamma=0.5, backend=backend)

    if backend == "eager":
        _, tangent = torch.func.jvp(function, (x,), (x,))
        assert tangent.tolist() == [[1.75, 1.5, 1.0]]
        return
    with pytest.raises(RuntimeError):
        torch.func.jvp(function, (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError):
        function(torch.autograd.forward_ad.make_dual(x, x))
