"""Returns and advantages along a sequence: values by hand, the error rule, determinism, long rows, dead tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast.testing import assert_as_good_as_eager
from tests.returns_cases import DTYPES, MODES, each_backend, each_kernel, each_op, inputs_of, n_step, random_mask


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

    @pytest.mark.parametrize(
        ("offsets", "mask", "expected"),
        [
            ([0, 0, 3, 4], None, [0, 0, 20, 30]),
            ([0, 0, 0, 4], None, [0, 0, 0, 30]),
            ([0, 0, 3, 4], [1, 0, 0, 1], [20, 0, 0, 30]),
            ([0, 3, 3, 4], None, [0, 0, 10, 30]),
            ([0, 3, 4, 4], [0, 0, 0, 1], [0, 0, 0, 20]),
        ],
    )
    def test_the_score_of_an_empty_sequence_goes_nowhere(self, offsets, mask, expected):
        mask, offsets = None if mask is None else torch.tensor(mask), torch.tensor(offsets)
        scores = torch.tensor([10.0, 20.0, 30.0])
        assert rf.shape_rewards(scores, torch.zeros(4), beta=0.1, mask=mask, cu_seqlens=offsets).tolist() == expected


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
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_time_as_the_outer_dimension(self, op, dtype, backend):
        """Longer than a block, more rows than are taken together, each with an end of its own; one input as it was."""
        x, last = inputs_of(19, 16_500, dtype=dtype), torch.randn(19).to(dtype)
        mask = random_mask(19, 16_500)
        mask[3:6, 16_300:], mask[6:9, 4000:] = False, False
        for live in (None, mask):
            columns = {name: tensor.t().contiguous().t() for name, tensor in x.items()} | {"values": x["values"]}
            got = op(columns, mask=None if live is None else live.t().contiguous().t(), bootstrap_value=last,
                     backend=backend)  # fmt: skip
            for a, b in zip(got, op(x, mask=live, bootstrap_value=last, backend=backend), strict=True):
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
