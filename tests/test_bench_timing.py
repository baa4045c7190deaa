"""The benchmark suite: statistics and clocks."""

from __future__ import annotations

import itertools

import pytest

from bench import timing


def test_percentiles_interpolate_between_sorted_neighbours() -> None:
    values = [4.0, 1.0, 3.0, 2.0, 5.0]
    assert timing.percentile(values, 0) == 1.0
    assert timing.percentile(values, 50) == 3.0
    assert timing.percentile(values, 100) == 5.0
    assert timing.percentile(values, 20) == pytest.approx(1.8)  # place 0.8 between 1 and 2
    assert timing.percentile([7.0], 80) == 7.0
    with pytest.raises(ValueError, match="at least one sample"):
        timing.percentile([], 50)


def test_samples_give_median_and_percentiles() -> None:
    samples = timing.Samples([10.0, 30.0, 20.0])
    assert (samples.p20, samples.median, samples.p80) == (pytest.approx(14.0), 20.0, pytest.approx(26.0))


def test_interleave_rotates_the_order_and_drops_the_first_round() -> None:
    calls: list[str] = []

    def sampler(name: str, ms: float) -> object:
        return lambda: (calls.append(name), ms)[1]

    samplers = {"a": sampler("a", 1.0), "b": sampler("b", 2.0), "c": sampler("c", 3.0)}
    result = timing.interleave(samplers, budget_s=0.0, min_rounds=2, max_rounds=9)  # type: ignore[arg-type]
    assert calls == list("abc" + "bca" + "cab")
    assert {name: samples.ms for name, samples in result.items()} == {"a": [1.0] * 2, "b": [2.0] * 2, "c": [3.0] * 2}


def test_interleave_stops_at_the_largest_number_of_rounds() -> None:
    result = timing.interleave({"a": lambda: 1.0}, budget_s=60.0, min_rounds=1, max_rounds=5)
    assert len(result["a"].ms) == 5


def test_interleave_keeps_the_first_sample_of_a_call_that_takes_a_second() -> None:
    samplers = {"slow": lambda: 1500.0, "quick": lambda: 1.0}
    result = timing.interleave(samplers, budget_s=60.0, min_rounds=2, max_rounds=2)
    assert {name: len(samples.ms) for name, samples in result.items()} == {"slow": 3, "quick": 2}


def test_interleave_leaves_out_who_used_the_budget_alone() -> None:
    samplers = {"fast": lambda: 1.0, "slow": lambda: 2_500.0}
    result = timing.interleave(samplers, budget_s=6.0, min_rounds=5, max_rounds=5)
    assert {name: len(samples.ms) for name, samples in result.items()} == {"fast": 5, "slow": 3}


def test_interleave_takes_two_samples_of_a_call_beyond_the_budget() -> None:
    samplers = {"fast": lambda: 1.0, "slow": lambda: 7_000.0}
    result = timing.interleave(samplers, budget_s=6.0, min_rounds=5, max_rounds=5)
    assert {name: len(samples.ms) for name, samples in result.items()} == {"fast": 5, "slow": 2}


def test_interleave_ends_after_few_rounds_of_twice_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 5.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    result = timing.interleave({"a": lambda: 1.0}, budget_s=4.0, min_rounds=9, max_rounds=9)
    assert len(result["a"].ms) == 3


def test_a_cpu_sample_is_one_call_from_a_settled_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(timing, "settle", lambda: done.append("settled"))
    assert timing.cpu_sample(timing.Step(prepare=lambda: "state", run=done.append)) >= 0
    assert done == ["settled", "state"]
