"""Sweeps, their exponents and plots; a run in parts; the pages that are rewritten."""

from __future__ import annotations

import itertools
import json
import pathlib
from typing import Any

import pytest
import torch

from bench import cases, measure, memory, ops, peers, plots, report, run, sweeps, timing
from bench.cases import BOTH, Case
from bench.peers import OURS

CEILINGS = {"ceilings_bytes_per_s": {"copy": 2e10, "read": 1.5e10}, "ceilings_flops_per_s": {"fp32": 3e11}}


def record_of(case: Case, ms: dict[str, float], correct: bool = True) -> dict[str, Any]:
    each = {"version": "0", "status": "ok", "correct": correct, "p20_ms": 1.0, "p80_ms": 1.0, "extra_bytes": 2**20}
    results = [{**each, "implementation": name, "median_ms": value} for name, value in ms.items()]
    record: dict[str, Any] = {
        "name": case.name,
        "op": case.op,
        "call": case.call,
        "variant": case.variant,
        "mode": case.mode,
        "dtype": case.dtype_name,
        "shape": list(case.shape),
        "axis": case.axis,
        "bytes": case.bytes,
        "flops": case.flops,
        "backend": "cpu",
        "results": results,
        "targets": [],
    }
    measure._add_ratios(record)
    return record


def swept(power: float) -> dict[str, Any]:
    """A result in which ours grows with that power of the size and eager with its square, at 1 ms for size 1,000."""
    records = []
    for case in cases.select("sweep"):
        size = cases.size_of(case.op, case.axis, case.shape)
        records.append(record_of(case, {OURS: (size / 1e3) ** power, "eager": (size / 1e3) ** 2}))
    meta = {**run.environment("cpu"), "suite": "sweep", "command": "python -m bench.run --suite sweep", "seconds": 1.0}
    return {"meta": meta, **CEILINGS, "cases": records}


def test_each_sweep_covers_two_decades_of_one_size_and_names_are_unique() -> None:
    chosen = cases.select("sweep")
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)
    assert {case.axis for case in chosen} == {"N", "V", "D", "T", "B"}
    for _, group in itertools.groupby(chosen, key=lambda case: (case.op, case.axis)):
        members = list(group)
        sizes = [cases.size_of(case.op, case.axis, case.shape) for case in members]
        assert sizes == sorted(sizes)
        assert sizes[-1] == 100 * sizes[0]
        others = {tuple(size for size in case.shape if size not in sizes) for case in members}
        assert len(others) == 1


def test_the_exponent_is_the_slope_on_logarithmic_axes() -> None:
    assert sweeps.exponent([(10, 3.0), (100, 3.0 * 10**1.5), (1_000, 3.0 * 10**3)]) == pytest.approx(1.5)
    # a fixed cost of 1 ms hides the growth at small sizes, and not in the last decade
    points = [(n, 1.0 + 1e-3 * n) for n in (10, 100, 1_000, 10_000, 100_000, 1_000_000)]
    whole, last = sweeps.exponent(points), sweeps.exponent(sweeps.last_decade(points))
    assert sweeps.last_decade(points) == points[-2:]
    assert whole is not None
    assert last is not None
    assert whole < 0.75 < 0.99 < last < 1.01
    assert sweeps.exponent([(10, 3.0)]) is None
    assert sweeps.exponent([]) is None


def test_the_table_of_a_sweep() -> None:
    text = sweeps.markdown(swept(1.0))
    assert (
        "| token_logprobs forward+backward fp32, N 32 - 3,200 x 16,384 | 0.032 – 3.2 ms | 1.00 | 1.00 | 2.00 |" in text
    )
    assert text.count("\n| ") == len(sweeps.of(swept(1.0)))
    wrong = swept(1.0)
    for record in wrong["cases"]:
        record["results"][0]["correct"] = False
    assert "token_logprobs" not in sweeps.markdown(wrong)


def test_the_plots_of_a_sweep(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    written = plots.draw(swept(1.0), tmp_path, "sweep-x-2026-01-01")
    names = [f"sweep-x-2026-01-01-{key}{theme}.png" for key in ("time", "peak") for theme in ("", "-dark")]
    assert [path.name for path in written] == names
    assert all(path.stat().st_size > 10_000 for path in written)
    page = tmp_path / "page.md"
    assert 'srcset="sweep-x-2026-01-01-peak-dark.png"' in report.pictures(tmp_path / "sweep-x-2026-01-01", page)


def test_the_gradients_alone_by_hand() -> None:
    assert plots._gradients("linear_policy_loss", 10, [8, 300]) == 4 * (10 * 8 + 300 * 8)
    assert plots._gradients("token_logprobs", 10, [300]) == 4 * 10 * 300


def test_the_page_takes_the_table(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, page = tmp_path / "sweep-x-2026-01-01.json", tmp_path / "page.md"
    result.write_text(json.dumps(swept(1.0)))
    begin, end = report.marks("sweep")
    page.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    assert report.main([str(result), "--performance", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"above\n{begin}\n| sweep |")
    assert text.endswith(f"{end}\nbelow\n")
    assert "old" not in text
    other = tmp_path / "cpu-x-2026-01-01.json"
    other.write_text(json.dumps({**swept(1.0), "meta": {**swept(1.0)["meta"], "suite": "cpu"}}))
    assert report.main([str(other), "--performance", str(page)]) == 1
    assert "no result: run" in capsys.readouterr().out
    assert page.read_text() == text
    real = (report.ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert all(real.count(mark) == 1 for mark in report.marks("sweep"))


# --- a run in parts


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three cases, and the names of those that were measured."""
    found: list[str] = []

    def run_case(case: Case, names: list[str], *_: object, **__: object) -> dict[str, Any]:
        found.append(case.name)
        return record_of(case, dict.fromkeys(names, 1.0))

    chosen = [
        Case("token_logprobs", "token_logprobs", BOTH, torch.float32, (n, 300), ("smoke",), (), "", "N")
        for n in (8, 16, 32)
    ]
    monkeypatch.setattr(cases, "CASES", tuple(chosen))
    monkeypatch.setattr(measure, "run_case", run_case)
    monkeypatch.setattr(timing, "ceilings", lambda device: CEILINGS["ceilings_bytes_per_s"])
    monkeypatch.setattr(timing, "product_ceilings", lambda device: CEILINGS["ceilings_flops_per_s"])
    monkeypatch.setattr(plots, "draw", lambda *_: [])
    return found


def test_a_run_that_breaks_off_keeps_its_cases_and_goes_on(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    right = measure.run_case

    def breaks(case: Case, *a: Any, **k: Any) -> dict[str, Any]:
        if case.shape[0] == 32:
            raise KeyboardInterrupt
        return right(case, *a, **k)

    monkeypatch.setattr(measure, "run_case", breaks)
    with pytest.raises(KeyboardInterrupt):
        run.main(["--out", str(tmp_path)])
    (path,) = tmp_path.glob("smoke-*.json")
    half = json.loads(path.read_text())
    assert (len(half["cases"]), half["meta"]["unfinished"]) == (2, 1)
    monkeypatch.setattr(measure, "run_case", right)
    monkeypatch.setattr(timing, "ceilings", lambda device: pytest.fail("the ceilings are those of the run"))
    assert run.main(["--out", str(tmp_path), "--resume"]) == 0
    whole = json.loads(path.read_text())
    assert [record["shape"][0] for record in whole["cases"]] == [8, 16, 32]
    assert whole["meta"]["unfinished"] == 0
    assert len(measured) == 3
    assert run.unfinished(tmp_path, "smoke", None, "cpu") is None


def test_minutes_end_a_run_and_another_commit_does_not_go_on_with_it(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(0.0, 40.0)
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(clock))
    assert run.main(["--out", str(tmp_path), "--minutes", "1"]) == 0
    assert 1 <= len(measured) < 3
    assert "the same command with --resume goes on" in capsys.readouterr().out
    assert run.unfinished(tmp_path, "smoke", None, "cpu") is not None
    assert run.unfinished(tmp_path, "smoke", "token_logprobs", "cpu") is None
    environment = run.environment
    monkeypatch.setattr(run, "environment", lambda device: {**environment(device), "git": "another"})
    assert run.unfinished(tmp_path, "smoke", None, "cpu") is None


def test_one_op_alone_is_no_page_s_table(measured: list[str], tmp_path: pathlib.Path) -> None:
    assert run.main(["--suite", "smoke", "--out", str(tmp_path), "--op", "token_logprobs", "--peers", "eager"]) == 0
    (path,) = tmp_path.glob("*.json")
    assert path.stem.endswith("-token_logprobs")
    assert report.newest(tmp_path) == []


def test_peers_of_a_sweep_are_few_unless_asked_for() -> None:
    assert run._arguments(["--suite", "sweep"]).peers == ["eager", "loop"]
    assert run._arguments(["--suite", "cpu"]).peers == list(peers.RIVALS)
    assert run._arguments(["--suite", "sweep", "--peers", "trl"]).peers == ["trl"]
    assert run._arguments(["--suite", "gpu"]).device == "cuda"


def test_a_page_shows_the_newest_of_each_suite() -> None:
    def result(suite: str, date: str, kind: str = "cpu", device: str = "old", op: str | None = None) -> dict[str, Any]:
        return {"meta": {"suite": suite, "date": date, "device_kind": kind, "device": device, "op": op}}

    given = {
        pathlib.Path("cpu-a.json"): result("cpu", "2026-01-01"),
        pathlib.Path("cpu-b.json"): result("cpu", "2026-01-02"),
        pathlib.Path("gpu-c.json"): result("gpu", "2025-01-01", "cuda"),
        pathlib.Path("smoke-b.json"): result("smoke", "2026-01-03"),
        pathlib.Path("sweep-a.json"): result("sweep", "2026-01-01"),
    }
    assert [path.stem for path in report.newest_of_suites(given)] == ["cpu-b", "gpu-c", "sweep-a"]
    assert report.of_other_devices(given, "cpu") == []
    given[pathlib.Path("cpu-c.json")] = result("cpu", "2026-01-05", device="new")
    given[pathlib.Path("cpu-d.json")] = result("cpu", "2026-01-04", device="other", op="gae")
    assert report.of_other_devices(given, "cpu") == [given[pathlib.Path("cpu-b.json")]]


@pytest.mark.parametrize(("multiplies", "size"), [(True, 2_048), (False, 256)])
def test_ceilings_of_products(monkeypatch: pytest.MonkeyPatch, multiplies: bool, size: int) -> None:
    monkeypatch.setattr(timing, "cpu_multiplies", lambda dtype: multiplies or dtype == torch.float32)
    monkeypatch.setattr(torch, "mm", lambda left, right, *, out: out)
    monkeypatch.setattr(timing, "cpu_sample", lambda step: (step.run(step.prepare()), 4.0)[1])
    found = timing.product_ceilings("cpu", budget_s=0.0)
    assert found == {name: pytest.approx(2 * n**3 / 4e-3) for name, n in (("fp32", 2_048), ("bf16", size))}


def test_the_prober_knows_the_sweeps() -> None:
    case = cases.select("sweep", "group_advantages")[0]
    assert {c.name for c in memory.CASES} >= {case.name}
    inputs = ops.make_inputs(case, "cpu")
    found = ops.first_run(ops.step(case, peers.build(OURS, case, "cpu"), inputs))
    assert found["advantages"].shape == (2_000,)
