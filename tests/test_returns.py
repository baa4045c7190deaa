"""Returns and advantages along a sequence: values by hand, the error rule, masks, packing, gradients, bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rl4llm_fast as rf
from rl4llm_fast import dispatch
from rl4llm_fast.testing import assert_as_good_as_eager

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MODES = ["skip", "zero"]
BACKENDS = rf.backends().get("gae", ["eager"])
KERNELS = [b for b in BACKENDS if b != "eager"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_kernel = pytest.mark.parametrize("backend", KERNELS)


def gae(inputs, **options):
    return rf.gae(inputs["rewards"], inputs["values"], gamma=0.97, lam=0.9, **options)


def discounted(inputs, **options):
    return (rf.discounted_returns(inputs["rewards"], gamma=0.97, **options),)


def lambda_returns(inputs, **options):
    return (rf.lambda_returns(inputs["rewards"], inputs["values"], gamma=0.97, lam=0.9, **options),)


def n_step(inputs, **options):
    return (rf.n_step_returns(inputs["rewards"], inputs["values"], 5, gamma=0.97, **options),)


def vtrace(inputs, **options):
    names = ("logp", "rollout_logp", "rewards", "values")
    return rf.vtrace(*(inputs[n] for n in names), gamma=0.97, lam=0.9, rho_max=1.2, c_max=0.9, **options)


OPS = {f.__name__: f for f in (gae, discounted, lambda_returns, n_step, vtrace)}
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def inputs_of(*shape, dtype=torch.float32):
    names = ("rewards", "values", "logp", "rollout_logp")
    return {name: (torch.randn(*shape) * (0.3 if "logp" in name else 1.0)).to(dtype) for name in names}


def random_mask(*shape, live=0.6):
    """Holes, dead ends and dead starts, and a row without a live token."""
    mask = torch.rand(*shape) < live
    if len(shape) == 2 and shape[0] > 2:
        mask[0, shape[1] // 2 :] = False
        mask[1, : shape[1] // 2] = False
        mask[2] = False
    return mask


def pack(rows: torch.Tensor, lengths) -> torch.Tensor:
    return torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])


class TestByHand:
    """r = 1, 2, 3; V = 10, 20, 30; γ = 0.5, λ = 0.5; bootstrap 8."""

    rewards = torch.tensor([[1.0, 2.0, 3.0]])
    values = torch.tensor([[10.0, 20.0, 30.0]])
    bootstrap = torch.tensor([8.0])

    @each_backend
    def test_gae(self, backend):
        # δ = 1 + 10 − 10, 2 + 15 − 20, 3 + 4 − 30 = 1, −3, −23; A_3 = −23, A_2 = −3 − 5.75, A_1 = 1 − 2.1875
        advantages, returns = rf.gae(
            self.rewards, self.values, gamma=0.5, lam=0.5, bootstrap_value=self.bootstrap, backend=backend
        )
        assert advantages.tolist() == [[-1.1875, -8.75, -23.0]]
        assert returns.tolist() == [[8.8125, 11.25, 7.0]]

    @each_backend
    @pytest.mark.parametrize(
        ("mode", "expected"),
        [
            # without the middle token: δ_1 = 1 + 15 − 10 = 6; A_1 = 6 + 0.25·(−23)
            ("skip", [0.25, 0.0, -23.0]),
            # r_2 = V_2 = 0: δ = 1 − 10, 15, −23; A_2 = 15 − 5.75 = 9.25; A_1 = −9 + 2.3125
            ("zero", [-6.6875, 0.0, -23.0]),
        ],
    )
    def test_gae_with_a_hole(self, backend, mode, expected):
        mask = torch.tensor([[1, 0, 1]])
        advantages, returns = rf.gae(
            self.rewards,
            self.values,
            gamma=0.5,
            lam=0.5,
            mask=mask,
            bootstrap_value=self.bootstrap,
            mask_mode=mode,
            backend=backend,
        )
        assert advantages.tolist() == [expected]
        assert returns.tolist() == [[expected[0] + 10, 0.0, 7.0]]

    @each_backend
    def test_the_bootstrap_value_follows_the_last_live_token(self, backend):
        for mode in MODES:
            advantages, _ = rf.gae(
                self.rewards,
                self.values,
                gamma=0.5,
                lam=0.5,
                mask=torch.tensor([[True, True, False]]),
                bootstrap_value=self.bootstrap,
                mask_mode=mode,
                backend=backend,
            )
            assert advantages.tolist() == [[1 - 0.25 * 14, 2 + 4 - 20.0, 0.0]]

    @each_backend
    def test_returns(self, backend):
        given = {"gamma": 0.5, "bootstrap_value": self.bootstrap, "backend": backend}
        assert rf.discounted_returns(self.rewards, **given).tolist() == [[1 + 1 + 0.75 + 1, 2 + 1.5 + 2, 3 + 4]]
        # G_3 = 3 + 4; G_2 = 2 + 0.5·(15 + 3.5); G_1 = 1 + 0.5·(10 + 0.5·11.25)
        assert rf.lambda_returns(self.rewards, self.values, lam=0.5, **given).tolist() == [[8.8125, 11.25, 7.0]]
        assert rf.n_step_returns(self.rewards, self.values, 1, **given).tolist() == [[11.0, 17.0, 7.0]]
        assert rf.n_step_returns(self.rewards, self.values, 2, **given).tolist() == [[1 + 1 + 7.5, 2 + 1.5 + 2, 7.0]]
        assert rf.n_step_returns(self.rewards, self.values, 9, **given).tolist() == [[3.75, 5.5, 7.0]]

    @each_backend
    def test_vtrace(self, backend):
        # π/μ = 2, ½, 1: ρ = 1.5, ½, 1; c = ½·(1, ½, 1)
        logp = torch.tensor([[2.0, 0.5, 1.0]]).log()
        advantages, targets = rf.vtrace(
            logp,
            torch.zeros_like(logp),
            self.rewards,
            self.values,
            gamma=0.5,
            lam=0.5,
            rho_max=1.5,
            bootstrap_value=self.bootstrap,
            backend=backend,
        )
        # v_3 = 30 − 23 = 7; v_2 = 20 − 1.5 + 0.125·(7 − 30) = 15.625; v_1 = 10 + 1.5 + 0.25·(15.625 − 20) = 10.40625
        torch.testing.assert_close(targets, torch.tensor([[10.40625, 15.625, 7.0]]))
        # A = 1.5·(1 + 7.8125 − 10), ½·(2 + 3.5 − 20), 3 + 4 − 30
        torch.testing.assert_close(advantages, torch.tensor([[-1.78125, -7.25, -23.0]]))

    @each_backend
    def test_shaped_rewards_inside_the_scan(self, backend):
        kl = torch.tensor([[0.5, 1.0, 2.0], [1.0, 1.0, 1.0]])
        mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
        scores = torch.tensor([7.0, 9.0])
        shaped = rf.shape_rewards(scores, kl, beta=0.5, mask=mask)
        assert shaped.tolist() == [[-0.25, 6.5, 0.0], [0.0, 0.0, 0.0]]
        values = torch.randn(2, 3)
        inside = rf.gae(scores, values, mask=mask, kl=kl, beta=0.5, backend=backend)
        outside = rf.gae(shaped, values, mask=mask, backend=backend)
        torch.testing.assert_close(inside, outside)


class TestIdentities:
    @each_backend
    def test_lambda_1_is_monte_carlo_less_the_value(self, backend):
        x, last = inputs_of(3, 40), torch.randn(3)
        given = {"mask": random_mask(3, 40), "bootstrap_value": last, "backend": backend}
        advantages, returns = rf.gae(x["rewards"], x["values"], gamma=0.9, lam=1.0, **given)
        monte_carlo = rf.discounted_returns(x["rewards"], gamma=0.9, **given)
        torch.testing.assert_close(returns, monte_carlo)
        torch.testing.assert_close(advantages, (monte_carlo - x["values"]) * given["mask"])

    @each_backend
    def test_lambda_0_is_the_td_error(self, backend):
        x = inputs_of(3, 40)
        advantages, _ = rf.gae(x["rewards"], x["values"], gamma=0.9, lam=0.0, backend=backend)
        following = torch.nn.functional.pad(x["values"], (0, 1))[:, 1:]
        torch.testing.assert_close(advantages, x["rewards"] + 0.9 * following - x["values"])
        one_step = rf.n_step_returns(x["rewards"], x["values"], 1, gamma=0.9, backend=backend)
        torch.testing.assert_close(advantages, one_step - x["values"])

    @each_backend
    def test_gamma_0(self, backend):
        x, mask = inputs_of(4, 33), random_mask(4, 33)
        advantages, _ = rf.gae(x["rewards"], x["values"], gamma=0.0, mask=mask, backend=backend)
        torch.testing.assert_close(advantages, (x["rewards"] - x["values"]) * mask)

    @each_backend
    def test_on_policy_vtrace_is_the_lambda_return(self, backend):
        x, last = inputs_of(4, 33), torch.randn(4)
        common = {"gamma": 0.9, "lam": 0.8, "mask": random_mask(4, 33), "bootstrap_value": last, "backend": backend}
        _, targets = rf.vtrace(x["logp"], x["logp"], x["rewards"], x["values"], **common)
        torch.testing.assert_close(targets, rf.lambda_returns(x["rewards"], x["values"], **common))

    @each_backend
    def test_more_steps_than_tokens_is_monte_carlo(self, backend):
        x, last, mask = inputs_of(4, 33), torch.randn(4), random_mask(4, 33)
        common = {"gamma": 0.9, "mask": mask, "bootstrap_value": last, "backend": backend}
        torch.testing.assert_close(
            rf.n_step_returns(x["rewards"], x["values"], 33, **common),
            rf.discounted_returns(x["rewards"], **common),
        )

    @each_backend
    @each_op
    def test_skip_is_the_same_as_deleting(self, op, backend):
        x, mask, last = inputs_of(6, 150), random_mask(6, 150), torch.randn(6)
        got = op(x, mask=mask, bootstrap_value=last, backend=backend)
        for row in range(6):
            kept = {name: tensor[row, mask[row]][None] for name, tensor in x.items()}
            alone = op(kept, bootstrap_value=last[row : row + 1], backend=backend)
            for a, b in zip(got, alone, strict=True):
                torch.testing.assert_close(a[row, mask[row]][None], b, rtol=1e-5, atol=1e-5)
                assert (a[row, ~mask[row]] == 0).all()

    @each_backend
    @each_op
    def test_zero_is_the_plain_recurrence_over_zeros(self, op, backend):
        x, mask = inputs_of(6, 150), random_mask(6, 150)
        zeroed = {name: tensor * mask for name, tensor in x.items()}
        got = op(x, mask=mask, mask_mode="zero", backend=backend)
        plain = op(zeroed, backend=backend)
        for a, b in zip(got, plain, strict=True):
            torch.testing.assert_close(a, b * mask, rtol=1e-5, atol=1e-5)

    @each_backend
    @each_op
    def test_packed_is_the_same_as_separate_calls(self, op, backend):
        lengths = [3, 0, 70, 1, 0, 129]
        offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        x, last = inputs_of(sum(lengths)), torch.randn(len(lengths))
        mask = random_mask(sum(lengths))
        for mode, live in itertools.product(MODES, [None, mask]):
            got = op(x, cu_seqlens=offsets, bootstrap_value=last, mask=live, mask_mode=mode, backend=backend)
            for i, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
                part = {name: tensor[None, start:end] for name, tensor in x.items()}
                live_part = None if live is None else live[None, start:end]
                alone = op(part, mask=live_part, bootstrap_value=last[i : i + 1], mask_mode=mode, backend=backend)
                for a, b in zip(got, alone, strict=True):
                    assert torch.equal(a[None, start:end], b)


class TestErrorRule:
    @each_kernel
    @each_op
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 100, 1025])
    def test_padded(self, op, dtype, length, backend):
        if dtype == torch.float64 and backend != "cpu":
            pytest.skip("fp64 runs on the eager and CPU backends")
        x, last = inputs_of(5, length, dtype=dtype), torch.randn(5).to(dtype)
        for mode, mask in itertools.product(MODES, [None, random_mask(5, length), random_mask(5, length, live=0.98)]):
            common = {"mask": mask, "mask_mode": mode}
            got = op(x, **common, bootstrap_value=last, backend=backend)
            exact = {name: tensor.double() for name, tensor in x.items()}
            oracle = op(exact, **common, bootstrap_value=last.double(), backend="eager")
            eager = op(x, **common, bootstrap_value=last, backend="eager")
            for a, b, c in zip(got, oracle, eager, strict=True):
                assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert_as_good_as_eager(a, b, c)

    @each_kernel
    @each_op
    def test_packed(self, op, backend):
        lengths = torch.randint(0, 90, (40,)).tolist()
        offsets = torch.tensor([0, *itertools.accumulate(lengths)])
        x, last = inputs_of(sum(lengths)), torch.randn(40)
        for mode, mask in itertools.product(MODES, [None, random_mask(sum(lengths))]):
            common = {"mask": mask, "mask_mode": mode, "cu_seqlens": offsets}
            got = op(x, **common, bootstrap_value=last, backend=backend)
            exact = {name: tensor.double() for name, tensor in x.items()}
            oracle = op(exact, **common, bootstrap_value=last.double(), backend="eager")
            eager = op(x, **common, bootstrap_value=last, backend="eager")
            for a, b, c in zip(got, oracle, eager, strict=True):
                assert_as_good_as_eager(a, b, c)


class TestDeterminism:
    @each_kernel
    @each_op
    def test_a_row_has_the_same_bits_alone_in_a_batch_and_packed(self, op, backend):
        x, mask, last = inputs_of(7, 300), random_mask(7, 300), torch.randn(7)
        got = op(x, mask=mask, bootstrap_value=last, backend=backend)
        flat = {name: tensor.flatten() for name, tensor in x.items()}
        offsets = torch.arange(8, dtype=torch.int32) * 300
        packed = op(flat, mask=mask.flatten(), cu_seqlens=offsets, bootstrap_value=last, backend=backend)
        for a, p in zip(got, packed, strict=True):
            assert torch.equal(a.flatten(), p)
        for row in range(7):
            one = {name: tensor[row : row + 1] for name, tensor in x.items()}
            alone = op(one, mask=mask[row : row + 1], bootstrap_value=last[row : row + 1], backend=backend)
            for a, b in zip(got, alone, strict=True):
                assert torch.equal(a[row : row + 1], b)

    @each_kernel
    @each_op
    def test_strides_do_not_matter(self, op, backend):
        x, mask = inputs_of(20, 70), random_mask(20, 70)
        want = op(x, mask=mask, backend=backend)
        wide = {name: torch.full((20, 200), math.nan) for name in x}
        wide_mask = torch.ones(20, 200, dtype=torch.bool)
        for name, tensor in wide.items():
            tensor[:, 5:145:2] = x[name]
        wide_mask[:, 5:145:2] = mask
        transposed = {name: tensor.t().contiguous().t() for name, tensor in x.items()}
        for strided, live in [
            (transposed, mask.t().contiguous().t()),
            ({name: tensor[:, 5:145:2] for name, tensor in wide.items()}, wide_mask[:, 5:145:2]),
        ]:
            for a, b in zip(op(strided, mask=live, backend=backend), want, strict=True):
                assert torch.equal(a, b)

    @each_kernel
    @each_op
    def test_fresh_memory_is_all_written(self, op, backend, monkeypatch):
        """NaN, which uninitialised memory is filled with here, is left nowhere: masked tokens get their zeros."""
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)
        try:
            x = inputs_of(5, 77)
            for mode in MODES:
                for result in op(x, mask=random_mask(5, 77, live=0.2), mask_mode=mode, backend=backend):
                    assert not result.isnan().any()
        finally:
            torch.use_deterministic_algorithms(False)


class TestLongRows:
    """Rows that a kernel cuts into blocks."""

    @each_kernel
    @pytest.mark.parametrize("length", [32_768, 70_001])
    def test_blocks_are_invisible(self, length, backend):
        x, last = inputs_of(2, length, dtype=torch.float32), torch.randn(2)
        mask = torch.rand(2, length) < 0.7
        mask[0, length // 4 :] = False
        for mode, live in itertools.product(MODES, [None, mask]):
            common = {"mask": live, "mask_mode": mode, "bootstrap_value": last, "backend": backend}
            with_fp64 = {name: tensor.double() for name, tensor in x.items()}
            for gamma, lam in [(1.0, 1.0), (1.0, 0.95), (0.999, 0.9)]:
                got = rf.gae(x["rewards"], x["values"], gamma=gamma, lam=lam, **common)
                oracle = rf.gae(
                    with_fp64["rewards"], with_fp64["values"], gamma=gamma, lam=lam, **{**common, "backend": "cpu"}
                )
                for a, b in zip(got, oracle, strict=True):
                    assert float((a - b).abs().max()) <= 3e-6 * max(1.0, float(b.abs().max()))

    @each_kernel
    @each_op
    def test_few_rows_give_the_bits_of_many(self, op, backend):
        x, mask, last = inputs_of(3, 40_000), torch.rand(3, 40_000) < 0.8, torch.randn(3)
        many = op(x, mask=mask, bootstrap_value=last, backend=backend)
        one = {name: tensor[1:2] for name, tensor in x.items()}
        alone = op(one, mask=mask[1:2], bootstrap_value=last[1:2], backend=backend)
        for a, b in zip(many, alone, strict=True):
            assert torch.equal(a[1:2], b)

    @each_kernel
    def test_a_reward_at_the_end_fades_without_underflow(self, backend):
        """0.95^k leaves fp32 after 2,000 tokens; the outcome reward must neither slow the scan nor turn into NaN."""
        rewards = torch.zeros(1, 100_000)
        rewards[0, -1] = 1.0
        got = rf.discounted_returns(rewards, gamma=0.95, backend=backend)
        want = 0.95 ** torch.arange(99_999, -1, -1, dtype=torch.float64)
        assert float((got[0] - want).abs().max()) < 1e-6


@each_backend
@each_op
def test_dead_tokens_may_hold_anything(op, backend):
    x, mask = inputs_of(4, 50), random_mask(4, 50)
    poisoned = {name: tensor.masked_fill(~mask, math.nan) for name, tensor in x.items()}
    for mode in MODES:
        clean = op(x, mask=mask, mask_mode=mode, backend=backend)
        for a, b in zip(op(poisoned, mask=mask, mask_mode=mode, backend=backend), clean, strict=True):
            assert torch.equal(a, b)


@each_backend
@each_op
def test_nan_stays_in_its_sequence(op, backend):
    x = inputs_of(3, 40)
    x["rewards"][1, 20] = math.nan
    flat = {name: tensor.flatten() for name, tensor in x.items()}
    offsets = torch.tensor([0, 40, 80, 120])
    for result in (*op(x, backend=backend), *(r.view(3, 40) for r in op(flat, cu_seqlens=offsets, backend=backend))):
        assert not result[[0, 2]].isnan().any()
        assert not result[1, 21:].isnan().any()
        assert result[1, 20].isnan()
        # n steps see a NaN n tokens ahead; the others for ever
        assert result[1, :16].isnan().all() != (op is n_step)


@each_backend
@each_op
def test_empty(op, backend):
    for shape in [(0, 5), (3, 0), (0, 0)]:
        for result in op(inputs_of(*shape), backend=backend):
            assert result.shape == shape
    for offsets in ([0], [0, 0, 0]):
        for result in op(inputs_of(0), cu_seqlens=torch.tensor(offsets), backend=backend):
            assert result.shape == (0,)


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


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=6),
    seed=st.integers(0, 2**30),
    live=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    mode=st.sampled_from(MODES),
    name=st.sampled_from(sorted(OPS)),
)
@pytest.mark.skipif(not KERNELS, reason="no kernel to compare")
def test_any_layout(lengths, seed, live, mode, name):
    """Packed, right-padded and left-padded: the same numbers, those of the oracle."""
    torch.manual_seed(seed)
    op, backend = OPS[name], KERNELS[0]
    x = inputs_of(sum(lengths), dtype=torch.float64)
    mask, last = torch.rand(sum(lengths)) < live, torch.randn(len(lengths), dtype=torch.float64)
    offsets = [0, *itertools.accumulate(lengths)]
    oracle = op(x, cu_seqlens=torch.tensor(offsets), mask=mask, mask_mode=mode, bootstrap_value=last, backend="eager")
    got = op(
        x,
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        mask=mask,
        mask_mode=mode,
        bootstrap_value=last,
        backend=backend,
    )
    width = max(lengths) + 3
    for left in (False, True):
        padded = {key: torch.full((len(lengths), width), math.nan, dtype=torch.float64) for key in x}
        padded_mask = torch.zeros(len(lengths), width, dtype=torch.bool)
        places = []
        for i, (start, end) in enumerate(itertools.pairwise(offsets)):
            place = (i, slice(width - (end - start), width) if left else slice(0, end - start))
            places.append(place)
            padded_mask[place] = mask[start:end]
            for key, tensor in x.items():
                padded[key][place] = tensor[start:end]
        there = op(padded, mask=padded_mask, mask_mode=mode, bootstrap_value=last, backend=backend)
        for result, exact, packed in zip(there, oracle, got, strict=True):
            flat = torch.cat([result[place] for place in places])
            torch.testing.assert_close(flat, exact, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(packed, exact, rtol=1e-12, atol=1e-12)


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


GOOD = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3)}
PACKED = {"rewards": torch.zeros(6), "values": torch.zeros(6)}


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "rewards", {**GOOD, "rewards": torch.zeros(2, 3, dtype=torch.long)}),
        (TypeError, "rewards", {**GOOD, "rewards": [1.0]}),
        (ValueError, "rewards", {**GOOD, "rewards": torch.zeros(2, 4)}),
        (ValueError, "cu_seqlens", PACKED),
        (ValueError, "values", {"rewards": torch.zeros(1, 2, 3), "values": torch.zeros(1, 2, 3)}),
        (ValueError, "cu_seqlens", {**GOOD, "cu_seqlens": torch.tensor([0, 6])}),
        (ValueError, "cu_seqlens", {**PACKED, "cu_seqlens": torch.tensor([1, 6])}),
        (ValueError, "cu_seqlens", {**PACKED, "cu_seqlens": torch.tensor([0, 5])}),
        (ValueError, "cu_seqlens", {**PACKED, "cu_seqlens": torch.tensor([0, 4, 3, 6])}),
        (ValueError, "cu_seqlens", {**PACKED, "cu_seqlens": torch.tensor([[0, 6]])}),
        (TypeError, "cu_seqlens", {**PACKED, "cu_seqlens": torch.tensor([0.0, 6.0])}),
        (TypeError, "cu_seqlens", {**PACKED, "cu_seqlens": [0, 6]}),
        (ValueError, "mask", {**GOOD, "mask": torch.ones(2, 4, dtype=torch.bool)}),
        (TypeError, "mask", {**GOOD, "mask": torch.ones(2, 3)}),
        (ValueError, "bootstrap_value", {**GOOD, "bootstrap_value": torch.zeros(3)}),
        (TypeError, "bootstrap_value", {**GOOD, "bootstrap_value": 1.0}),
        (ValueError, "mask_mode", {**GOOD, "mask_mode": "hold"}),
        (TypeError, "gamma", {**GOOD, "gamma": None}),
        (ValueError, "lam", {**GOOD, "lam": torch.zeros(2)}),
        (ValueError, "beta", {**GOOD, "beta": 0.1}),
        (ValueError, "scores", {**GOOD, "rewards": torch.zeros(3), "kl": torch.zeros(2, 3), "beta": 0.1}),
        (ValueError, "backend", {**GOOD, "backend": "tpu"}),
    ],
)
def test_bad_input(error, name, arguments):
    with pytest.raises(error, match=name):
        rf.gae(**arguments)


def test_bad_input_of_the_others():
    r, v = GOOD.values()
    with pytest.raises(ValueError, match="n: wanted"):
        rf.n_step_returns(r, v, 0, gamma=1.0)
    with pytest.raises(TypeError, match="n: wanted"):
        rf.n_step_returns(r, v, 1.5, gamma=1.0)
    with pytest.raises(ValueError, match="rho_max"):
        rf.vtrace(r, r, r, v, gamma=1.0, lam=1.0, rho_max=0.5)
    with pytest.raises(ValueError, match="rollout_logp"):
        rf.vtrace(r, r[:1], r, v, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="scores"):
        rf.shape_rewards(torch.zeros(3), r, beta=0.1)
    with pytest.raises(TypeError, match="kl"):
        rf.shape_rewards(torch.zeros(2), None, beta=0.1)


def test_every_returns_op_has_a_cpu_kernel():
    if dispatch.extension is None:
        pytest.skip("the C++ extension is not built here")
    for op in ("gae", "discounted_returns", "lambda_returns", "n_step_returns", "vtrace"):
        assert "cpu" in rf.backends()[op]
