"""process_advantages and whiten: values by hand, a loop as the oracle, ranks, bad input."""

from __future__ import annotations

import math
import pathlib
import subprocess
import sys

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast import dispatch, reference_returns
from rl4llm_fast.testing import assert_as_good_as_eager

ROOT = pathlib.Path(__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
process_backend = pytest.mark.parametrize("backend", rf.backends().get("process_advantages", ["eager"]))
whiten_backend = pytest.mark.parametrize("backend", rf.backends().get("whiten", ["eager"]))


def random_steps(answers, steps, length):
    ends = torch.full((answers, steps), -1)
    for row in ends:
        count = int(torch.randint(0, steps + 1, ()))
        row[:count] = torch.randperm(length)[:count].sort().values
    return torch.randn(answers, steps), ends


def loop(rewards, ends, groups, length, eps):
    """§6.3 word for word, in fp64."""
    result = torch.zeros(rewards.shape[0], length, dtype=torch.float64)
    for group in groups.unique():
        members = (groups == group).nonzero().flatten().tolist()
        pool = torch.cat([rewards[i, ends[i] >= 0] for i in members]).double()
        if pool.numel() < 2:
            continue
        for i in members:
            for j in (ends[i] >= 0).nonzero().flatten().tolist():
                normalised = (rewards[i, j].double() - pool.mean()) / (pool.std() + eps)
                result[i, : int(ends[i, j]) + 1] += normalised
    return result


@process_backend
def test_values_by_hand(backend):
    """Step rewards 1, 2 | 6 in one group: mean 3, std √7; suffix sums −3, −1 | 3, over √7."""
    rewards = torch.tensor([[1.0, 2.0], [6.0, math.nan]])
    ends = torch.tensor([[1, 3], [2, -1]])
    got = rf.process_advantages(rewards, ends, group_size=2, length=5, eps=0.0, backend=backend)
    want = torch.tensor([[-3.0, -3, -1, -1, 0], [3, 3, 3, 0, 0]]) / math.sqrt(7)
    torch.testing.assert_close(got, want)


@process_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_a_loop(backend, dtype):
    if dtype == torch.float64 and backend not in ("eager", "cpu"):
        pytest.skip("fp64 runs on the eager and CPU backends")
    rewards, ends = random_steps(24, 7, 40)
    rewards = rewards.to(dtype)
    groups = torch.randint(5, (24,)) * 7919 - 10**12
    got = rf.process_advantages(rewards, ends, group_ids=groups, length=40, backend=backend)
    eager = rf.process_advantages(rewards, ends, group_ids=groups, length=40, backend="eager")
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_good_as_eager(got, loop(rewards, ends, groups, 40, 1e-6), eager)


@process_backend
def test_equal_rewards_and_single_steps_give_exactly_zero(backend):
    rewards = torch.full((4, 3), 0.1)
    rewards[3] = torch.tensor([5.0, math.nan, math.nan])
    ends = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 2, -1], [2, -1, -1]])
    ids = torch.tensor([1, 1, 1, 2])
    got = rf.process_advantages(rewards, ends, group_ids=ids, length=6, backend=backend)
    assert (got == 0).all()


@process_backend
def test_nan_harms_its_own_group_only(backend):
    rewards, ends = torch.randn(4, 2), torch.tensor([[1, 3]]).repeat(4, 1)
    rewards[0, 0] = math.nan
    got = rf.process_advantages(rewards, ends, group_size=2, length=5, backend=backend)
    assert got[:2, :4].isnan().all()
    assert not got[2:].isnan().any()
    assert (got[:, 4] == 0).all()


@process_backend
def test_empty(backend):
    none = torch.zeros(0, 3)
    assert rf.process_advantages(none, none.long(), group_size=2, length=5, backend=backend).shape == (0, 5)
    bare = torch.zeros(2, 0)
    assert rf.process_advantages(bare, bare.long(), group_size=2, length=5, backend=backend).tolist() == [[0.0] * 5] * 2
    ends = torch.full((2, 3), -1)
    assert rf.process_advantages(torch.randn(2, 3), ends, group_size=2, length=0, backend=backend).shape == (2, 0)


@pytest.mark.parametrize(
    ("error", "name", "changes"),
    [
        (ValueError, "step_ends", {"step_ends": torch.tensor([[0, 5], [1, 2]])}),
        (ValueError, "step_ends", {"step_ends": torch.tensor([[0, -2], [1, 2]])}),
        (ValueError, "step_ends", {"step_ends": torch.tensor([[2, 1], [1, 2]])}),
        (ValueError, "step_ends", {"step_ends": torch.tensor([[1, 1], [1, 2]])}),
        (ValueError, "step_ends", {"step_ends": torch.tensor([[-1, 1], [1, 2]])}),
        (ValueError, "step_ends", {"step_ends": torch.zeros(2, 3, dtype=torch.long)}),
        (TypeError, "step_ends", {"step_ends": torch.zeros(2, 2)}),
        (ValueError, "step_rewards", {"step_rewards": torch.zeros(2)}),
        (ValueError, "group_size", {"group_size": 3}),
        (ValueError, "group_size", {"group_size": None}),
        (ValueError, "group_ids", {"group_size": None, "group_ids": torch.zeros(3, dtype=torch.long)}),
        (ValueError, "length", {"length": -1}),
        (TypeError, "length", {"length": 2.0}),
    ],
)
def test_bad_input(error, name, changes):
    good = {"step_rewards": torch.randn(2, 2), "step_ends": torch.tensor([[0, 1], [2, 4]]), "group_size": 2}
    with pytest.raises(error, match=name):
        rf.process_advantages(**{**good, "length": 5, **changes})


class TestWhiten:
    @whiten_backend
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("masked", [False, True])
    def test_mean_0_variance_1(self, backend, dtype, masked):
        if dtype == torch.float64 and backend not in ("eager", "cpu"):
            pytest.skip("fp64 runs on the eager and CPU backends")
        x = (torch.randn(9, 130) * 3 + 50).to(dtype)
        mask = torch.rand(9, 130) < 0.6 if masked else None
        got = rf.whiten(x, mask, backend=backend)
        live = x.double() if mask is None else x[mask].double()
        want = torch.zeros(9, 130, dtype=torch.float64)
        want[slice(None) if mask is None else mask] = (live - live.mean()) / (live.var() + 1e-8).sqrt()
        assert_as_good_as_eager(got, want, rf.whiten(x, mask, backend="eager"))
        kept = rf.whiten(x, mask, shift_mean=False, backend=backend)
        want = want + live.mean() * (1 if mask is None else mask)
        assert_as_good_as_eager(kept, want, rf.whiten(x, mask, shift_mean=False, backend="eager"))

    @whiten_backend
    def test_masked_tokens_may_hold_anything(self, backend):
        x, mask = torch.randn(500), torch.rand(500) < 0.5
        got = rf.whiten(x.masked_fill(~mask, math.nan), mask, backend=backend)
        assert torch.equal(got, rf.whiten(x, mask, backend=backend))
        assert (got[~mask] == 0).all()

    @whiten_backend
    def test_few_live_tokens(self, backend):
        x = torch.tensor([3.0, 4.0, 5.0])
        assert rf.whiten(x, torch.tensor([0, 1, 0]), backend=backend).tolist() == [0.0, 0.0, 0.0]
        assert rf.whiten(x, torch.tensor([0, 1, 0]), shift_mean=False, backend=backend).tolist() == [0.0, 4.0, 0.0]
        assert rf.whiten(x, torch.tensor([0, 0, 0]), backend=backend).tolist() == [0.0, 0.0, 0.0]
        assert rf.whiten(torch.zeros(0), backend=backend).shape == (0,)

    @pytest.mark.skipif("cpu" not in rf.backends()["whiten"], reason="the C++ extension is not built here")
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_instruction_set_agrees(self, dtype):
        from rl4llm_fast import _C as extension

        x, mask = (torch.randn(3, 8_219) * 3 + 50).to(dtype), torch.rand(3, 8_219) < 0.6
        want = rf.whiten(x.double(), mask, backend="eager")
        try:
            for isa in extension.build_info()["cpu_instruction_sets"]:
                try:
                    extension.force_cpu_isa(isa)
                except ValueError:
                    continue  # not on this CPU
                for count in (0, 1, 7, 8, 9, 31, 33, x.shape[1]):
                    part, live = x[:, :count], mask[:, :count]
                    wanted = want if count == x.shape[1] else rf.whiten(part.double(), live, backend="eager")
                    assert_as_good_as_eager(rf.whiten(part, live), wanted, rf.whiten(part, live, backend="eager"))
        finally:
            extension.force_cpu_isa(None)

    @whiten_backend
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_stats_of_a_difference(self, backend, dtype):
        """As value_loss takes them for the explained variance: x − minus is never a tensor."""
        if dtype == torch.float64 and backend not in ("eager", "cpu"):
            pytest.skip("fp64 is for the CPU")
        x, minus = torch.randn(2, 3, 7_001).to(dtype).unbind()
        mask = torch.rand(x.shape) < 0.7
        minus[~mask] = math.nan
        kernels = reference_returns if backend == "eager" else dispatch.ops(backend)
        rounded = 1e-2 if backend == "eager" and dtype.itemsize == 2 else 1e-6  # the oracle subtracts in its dtype
        for live in (mask, None):
            other = minus.nan_to_num(0.5)
            want = reference_returns.whiten_stats(x.double(), live, other.double())
            got = kernels.whiten_stats(x, live, minus if live is not None else other)
            torch.testing.assert_close(got, want, rtol=rounded, atol=rounded)

    @pytest.mark.skipif("cpu" not in rf.backends()["whiten"], reason="the C++ extension is not built here")
    def test_what_is_subtracted_is_like_x(self):
        x = torch.randn(3, 4)
        for minus in (x.double(), x[:2], x.t().contiguous().t()):
            with pytest.raises(ValueError, match="minus: wanted 12 contiguous elements of Float"):
                dispatch.ops("cpu").whiten_stats(x, None, minus)

    @whiten_backend
    def test_a_large_offset_does_not_cancel(self, backend):
        x = torch.randn(100_000, dtype=torch.float64)
        got = rf.whiten((x + 4096).float(), backend=backend)
        exact = (x + 4096).float().double()
        want = (exact - exact.mean()) / exact.std()
        assert float((got - want).abs().max()) < 1e-6 * float(want.abs().max())

    @whiten_backend
    def test_strides_and_shapes(self, backend):
        x = torch.randn(6, 8, 10)
        view = x.permute(2, 0, 1)[::2]
        torch.testing.assert_close(rf.whiten(view, backend=backend), rf.whiten(view.contiguous(), backend=backend))

    def test_bad_input(self):
        with pytest.raises(TypeError, match="x:"):
            rf.whiten(torch.zeros(3, dtype=torch.long))
        with pytest.raises(ValueError, match="mask"):
            rf.whiten(torch.zeros(3), torch.ones(4, dtype=torch.bool))
        with pytest.raises(TypeError, match="eps"):
            rf.whiten(torch.zeros(3), eps="small")
        with pytest.raises(ValueError, match="eps: wanted a number >= 0"):
            rf.whiten(torch.zeros(3), eps=-5.0)
        with pytest.raises(TypeError, match=r"group: wanted a .*process group or None, got int"):
            rf.whiten(torch.zeros(3), group=3)


_RANK = """
import sys, torch, torch.distributed as dist, rl4llm_fast as rf
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
x, mask = torch.load(f"{folder}/inputs.pt")
part = slice(0, 40) if rank == 0 else slice(40, 100)  # ranks hold different numbers of tokens
backends = {"eager", *rf.backends().get("whiten", [])}
results = {b: rf.whiten(x[part], mask[part], group=dist.group.WORLD, backend=b) for b in backends}
torch.save(results, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_whiten_over_two_ranks(tmp_path: pathlib.Path):
    """Each rank gets its part of what one process computes from all tokens."""
    x, mask = torch.randn(100, 30) * 2 + 7, torch.rand(100, 30) < 0.7
    torch.save((x, mask), tmp_path / "inputs.pt")
    ranks = [
        subprocess.Popen([sys.executable, "-c", _RANK, str(rank), str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=100)
        assert rank.returncode == 0, errors.decode()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for backend in parts[0]:
        got = torch.cat([part[backend] for part in parts])
        torch.testing.assert_close(got, rf.whiten(x, mask, backend=backend), rtol=1e-6, atol=1e-6)
