"""The benchmark suite: statistics, formulas, a tiny case from end to end, the report."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib

import pytest
import torch

import rl4llm_fast as rf
from bench import base, cases, measure, memory, ops, peers, plots, report, run, timing
from bench.cases import BACKWARD, BOTH, FORWARD, IN_PLACE, Case, Target

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = measure.Budget(seconds=0.05, min_rounds=3, max_rounds=4)


def logits_case(mode: str, dtype: torch.dtype = torch.float32, call: str = "token_logprobs", **more: object) -> Case:
    return Case("token_logprobs", call, mode, dtype, (8, 300), ("smoke",), **more)  # type: ignore[arg-type]


def test_products_that_the_cpu_emulates_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "cpu_multiplies", lambda dtype: dtype == torch.float32)
    for case in cases.CASES:
        over = case.op.startswith("linear_") and case.dtype != torch.float32
        assert (measure.passed_over(case, "cpu") is not None) == over
        assert measure.passed_over(case, "cuda") is None
    case = next(c for c in cases.select("cpu", "linear_policy_loss") if c.dtype == torch.bfloat16)
    record = measure.run_case(case, [peers.OURS, "eager"], "cpu", TINY, copy_ceiling=1e9)
    assert [r["status"] for r in record["results"]] == ["absent", "absent"]
    assert [t["verdict"] for t in record["targets"]] == ["not judged"] * len(case.targets)
    assert all("emulates" in item["reason"] for item in (*record["results"], *record["targets"]))
    monkeypatch.setattr(cases, "CASES", (case,))
    monkeypatch.setattr(timing, "ceilings", lambda device: {"copy": 20e9, "read": 15e9})
    monkeypatch.setattr(timing, "product_ceilings", lambda device: {"fp32": 3e11, "bf16": 1e10})
    result = run.run("cpu", None, [peers.OURS, "eager"])
    assert "has no instructions for products in bf16" in report.table(result)
    row = next(line for line in report.markdown(result).split("\n") if "linear_policy_loss" in line)
    assert "| not run: this CPU has no instructions for products in bf16, and emulates them |" in row


def test_a_call_that_another_case_measures_is_not_made_again() -> None:
    names = {case.name for case in cases.CASES}
    assert {case.repeats for case in cases.CASES if case.repeats} <= names
    in_place = next(case for case in cases.select("smoke", "token_logprobs") if case.mode == IN_PLACE)
    tiny = dataclasses.replace(in_place, shape=(4, 300))
    record = measure.run_case(tiny, [peers.OURS, "eager", "chunked"], "cpu", TINY, copy_ceiling=1e9)
    chunked = measure.result_of(record, "chunked")
    assert (chunked["status"], chunked["reason"]) == ("absent", f"its call is measured in {in_place.repeats}")
    assert [r["status"] for r in record["results"] if r is not chunked] == ["ok", "ok"]


# --- the registry


@pytest.mark.parametrize(
    ("mode", "call", "wanted"),
    [
        # 8 rows x 300 logits: 2,400 logits of 4 bytes = 9,600; a row: 8 of id, 4 of logp, 4 of entropy
        (FORWARD, "token_logprobs", 9_600 + 8 * 12),
        (FORWARD, "token_logprobs_entropy", 9_600 + 8 * 16),
        # backward reads the logits, the id, m and log s (8), g (4), with entropy h and H; and writes the logits' size
        (BACKWARD, "token_logprobs", 2 * 9_600 + 8 * 20),
        (BACKWARD, "token_logprobs_entropy", 2 * 9_600 + 8 * 28),
        (BOTH, "token_logprobs", 3 * 9_600 + 8 * 32),
        (IN_PLACE, "token_logprobs", 3 * 9_600 + 8 * 32),
    ],
)
def test_bytes_of_token_logprobs(mode: str, call: str, wanted: int) -> None:
    assert logits_case(mode, call=call).bytes == wanted


def test_bytes_and_flops_by_hand() -> None:
    # bf16 halves the logits' part alone: 2,400 x 2 = 4,800
    assert logits_case(FORWARD, torch.bfloat16).bytes == 4_800 + 8 * 12
    assert logits_case(BOTH).flops == 2_400 * 9
    assert logits_case(BOTH, call="token_logprobs_entropy").flops == 2_400 * 14
    policy = Case("policy_loss", "policy_loss", BOTH, torch.float32, (2, 10), ("cpu",))
    assert policy.bytes == 20 * (12 + 1 + 4) + 8 + 20 * 8
    group = Case("group_advantages", "group_advantages", FORWARD, torch.float32, (100,), ("cpu",))
    assert group.bytes == 1_600


def test_the_registry_holds_every_row_that_must_be_reached() -> None:
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    smoke = cases.select("smoke")
    assert {case.shape for case in smoke} == {(512, 49_152)}
    assert {case.dtype for case in smoke} == {torch.bfloat16, torch.float32}
    assert all(case.targets for case in smoke)
    assert {case.shape[-1] for case in cases.select("cpu", "token_logprobs")} == {49_152, 151_936}
    thresholds = {(case.name, str(target)) for case in cases.CASES for target in case.targets}
    assert ("token_logprobs_entropy/forward+backward/bf16/512x49152", ">= 12x eager") in thresholds
    assert ("token_logprobs/forward+backward in place/fp32/512x151936", ">= 7x eager") in thresholds
    assert ("token_logprobs_entropy/forward/bf16/8192x151936", "<= 0.85 ms on H100") in thresholds
    with pytest.raises(ValueError, match="suite: wanted one of"):
        cases.select("all")
    with pytest.raises(ValueError, match="op: the suite 'cpu' has"):
        cases.select("cpu", "softmax")


# --- results against the oracle


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD, BOTH, IN_PLACE])
@pytest.mark.parametrize("call", ["token_logprobs", "token_logprobs_entropy"])
def test_every_peer_is_judged_and_ours_is_right(mode: str, call: str) -> None:
    case = logits_case(mode, call=call)
    inputs = ops.make_inputs(case, "cpu")
    before = inputs["logits"].clone()
    outputs = {}
    for name in (peers.OURS, "eager", "chunked"):
        step = ops.step(case, peers.build(name, case, "cpu"), inputs, ops.overwrites(case, name))
        outputs[name] = ops.first_run(step)
        again = ops.first_run(step)
        assert all(torch.equal(again[key], value) for key, value in outputs[name].items())  # in-place steps restore
    assert torch.equal(inputs["logits"], before)
    judged = ops.errors(case, inputs, outputs)
    wanted = {"logp"} | ({"entropy"} if case.entropy else set()) | (set() if mode == FORWARD else {"grad_logits"})
    assert set(judged[peers.OURS]) == wanted
    assert all(error.within for error in judged[peers.OURS].values())
    # another implementation of the same formula lies near, too: the peers compute what they are meant to
    torch.testing.assert_close(outputs["eager"], outputs["chunked"])
    torch.testing.assert_close(outputs["eager"], outputs[peers.OURS], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_wrong_result_is_caught(wrong: float) -> None:
    case = logits_case(BOTH)
    inputs = ops.make_inputs(case, "cpu")
    outputs = {"x": ops.first_run(ops.step(case, peers.build("eager", case, "cpu"), inputs))}
    outputs["x"]["grad_logits"][3, 7] += wrong
    judged = ops.errors(case, inputs, outputs)["x"]
    assert judged["logp"].within
    assert not judged["grad_logits"].within


def test_group_peers_agree() -> None:
    case = Case("group_advantages", "group_advantages", FORWARD, torch.float32, (200,), ("cpu",), variant="shuffled")
    inputs = ops.make_inputs(case, "cpu")
    outputs = {
        name: ops.first_run(ops.step(case, peers.build(name, case, "cpu"), inputs))
        for name in (peers.OURS, "eager", "loop")
    }
    assert all(error.within for error in ops.errors(case, inputs, outputs)[peers.OURS].values())
    torch.testing.assert_close(outputs["eager"], outputs["loop"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs["eager"], outputs[peers.OURS], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not hasattr(rf, "policy_loss"), reason="this tree has no policy_loss")
def test_policy_loss_and_its_eager_peer_agree_on_loss_gradient_and_metrics() -> None:
    case = Case("policy_loss", "policy_loss", BOTH, torch.float32, (4, 33), ("cpu",))
    inputs = ops.make_inputs(case, "cpu")
    outputs = {
        name: ops.first_run(ops.step(case, peers.build(name, case, "cpu"), inputs)) for name in (peers.OURS, "eager")
    }
    assert set(outputs["eager"]) <= set(outputs[peers.OURS])
    judged = ops.errors(case, inputs, outputs)
    assert {"loss", "grad_logp", "metric clip_fraction", "metric kl_ref"} <= set(judged[peers.OURS])
    assert all(error.within for error in judged[peers.OURS].values())
    for key, value in outputs["eager"].items():
        torch.testing.assert_close(
            value, outputs[peers.OURS][key], atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_absent_peers_say_why() -> None:
    with pytest.raises(peers.Absent, match="needs a GPU"):
        peers.build("liger", logits_case(FORWARD), "cpu")
    with pytest.raises(peers.Absent, match="counterpart"):
        peers.build("loop", logits_case(FORWARD), "cpu")


# --- one tiny case from end to end


def tiny_result(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    targets = (Target("speedup", 1e-9, "eager"), Target("speedup", 1e9, "eager"), Target("time_ms", 1.0, device="H100"))
    case = logits_case(BOTH, targets=targets)
    monkeypatch.setattr(cases, "CASES", (case,))
    monkeypatch.setitem(measure.BUDGETS, "smoke", TINY)
    monkeypatch.setattr(timing, "ceilings", lambda device: {"copy": 20e9, "read": 15e9})
    monkeypatch.setattr(timing, "product_ceilings", lambda device: {"fp32": 3e11, "bf16": 1e12})
    monkeypatch.setattr(memory.Prober, "ask", lambda self, case, peer, long: 3 * 2**20)
    return run.run("smoke", None, [peers.OURS, "eager", "chunked", "liger"])


def test_a_run_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    result = tiny_result(monkeypatch)
    stem = run.stem(result["meta"])  # type: ignore[arg-type]
    paths = report.write(result, tmp_path, stem)
    assert [path.name for path in paths[:2]] == [f"{stem}.json", f"{stem}.csv"]
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(result))
    with open(paths[1], newline="") as file:
        rows = {row["implementation"]: row for row in csv.DictReader(file)}
    assert set(rows) == {peers.OURS, "eager", "chunked", "liger"}
    assert rows["liger"]["status"] == "absent"
    assert "GPU" in rows["liger"]["reason"]
    ours, eager = float(rows[peers.OURS]["median_ms"]), float(rows["eager"]["median_ms"])
    assert float(rows["eager"]["speedup"]) == pytest.approx(eager / ours)
    pytest.importorskip("matplotlib")
    plotted = [f"{stem}-{key}{theme}.png" for key in ("speed", "memory", "roofline") for theme in ("", "-dark")]
    assert [path.name for path in paths[2:]] == plotted
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5_000 for path in paths[2:])

    text = report.table(result)
    assert max(map(len, text.splitlines())) <= 120
    assert "token_logprobs forward+backward fp32 8 x 300" in text
    assert "reached >= 1e-09x eager" in text
    assert "MISSED >= 1e+09x eager" in text
    assert "not judged <= 1 ms on H100" in text
    assert "targets: 1 reached, 1 missed, 1 not judged" in text
    assert "liger: absent, its counterpart is a GPU kernel: needs a GPU" in text

    readme, (begin, end) = tmp_path / "README.md", report.marks("bench")
    readme.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    assert report.main([str(paths[0]), "--readme", str(readme)]) == 0
    block = readme.read_text()
    assert f'srcset="{stem}-speed-dark.png"' in block
    assert f'src="{stem}-memory.png"' in block
    assert block.startswith(f"above\n{begin}\n| case | rl4llm_fast | eager | chunked |")
    assert block.endswith(f"{end}\nbelow\n")
    assert "old" not in block
    assert f"{ours:.3g} ms" in block
    once = readme.read_text()
    report.main([str(paths[0]), "--readme", str(readme)])
    assert readme.read_text() == once


def test_no_speedup_is_printed_for_a_wrong_result(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    right = peers.build

    def build(name: str, case: Case, device: str) -> object:
        function = right(name, case, device)
        return (lambda *a: function(*a) + 1e-2) if name == peers.OURS else function

    monkeypatch.setattr(peers, "build", build)
    result = tiny_result(monkeypatch)
    (record,) = result["cases"]  # type: ignore[misc]
    assert not any("speedup" in r for r in record["results"])
    assert [target["verdict"] for target in record["targets"]] == ["missed", "missed", "not judged"]
    text = report.table(result)
    assert "WRONG: logp; no speed-up is printed" in text
    assert "result wrong: not shown" in report.markdown(result)
    assert "result wrong: not shown" in report.headlines(result)
    assert plots.draw(result, tmp_path, "x") == []


@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_policy_loss"])
@pytest.mark.parametrize("peer", [peers.OURS, "eager"])
def test_cases_from_hidden_states_are_judged_against_the_oracle(op: str, peer: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(op, op, BOTH, dtype, (16, 8, 60), ("smoke",))
        inputs = ops.make_inputs(case, "cpu")
        outputs = ops.first_run(ops.step(case, peers.build(peer, case, "cpu"), inputs))
        judged = ops.errors(case, inputs, {peer: outputs})[peer]
        assert judged.keys() == {"loss" if op == "linear_policy_loss" else "logp", "grad_hidden", "grad_weight"}
        assert all(error.within for error in judged.values()), judged
        assert (case.bytes, case.flops) == (4 * 76 * 8 * dtype.itemsize, 6 * 16 * 8 * 60)


def test_a_peer_that_breaks_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    right = peers.build

    def build(name: str, case: Case, device: str) -> object:
        def breaks(*_: object) -> None:
            raise RuntimeError("no\nway")

        return breaks if name == "chunked" else right(name, case, device)

    monkeypatch.setattr(peers, "build", build)
    assert "chunked: failed, RuntimeError: no way" in report.table(tiny_result(monkeypatch))


def test_targets_of_time_bandwidth_and_memory() -> None:
    ours = {"implementation": peers.OURS, "status": "ok", "correct": True, "median_ms": 0.8, "bytes_per_s": 9e9}
    eager = {"implementation": "eager", "status": "ok", "median_ms": 1.0, "extra_bytes": 35 * 2**20}
    record = {"results": [{**ours, "extra_bytes": 5 * 2**20}, eager]}

    def verdict(target: Target, device: str = "NVIDIA H100 80GB HBM3") -> str:
        return str(measure.judge(target, record, device, copy_ceiling=1e10)["verdict"])

    assert verdict(Target("time_ms", 0.85, device="H100")) == "reached"
    assert verdict(Target("time_ms", 0.75, device="H100")) == "missed"
    assert verdict(Target("time_ms", 0.85, device="H100"), "cpu") == "not judged"
    assert verdict(Target("copy_fraction", 0.90)) == "reached"
    assert verdict(Target("copy_fraction", 0.92)) == "missed"
    assert verdict(Target("extra_bytes", 5 * 2**20)) == "reached"
    assert verdict(Target("extra_bytes", 4 * 2**20)) == "missed"
    assert verdict(Target("speedup", 2.0, "compile")) == "not judged"
    assert verdict(Target("memory", 7, "eager")) == "reached"
    assert verdict(Target("memory", 7.5, "eager")) == "missed"
    assert verdict(Target("memory", 2, "compile")) == "not judged"


def test_the_newest_results_are_chosen(tmp_path: pathlib.Path) -> None:
    for name in ("smoke-a-2026-01-02", "smoke-a-2026-01-01", "cpu-b-2026-01-01", "smoke-b-2026-01-03", "verified"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert [path.stem for path in report.newest(tmp_path)] == ["cpu-b-2026-01-01", "smoke-a-2026-01-02"]


def test_a_readme_without_markers_is_refused(tmp_path: pathlib.Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="bench:begin"):
        report.rewrite(readme, "bench", ["x"])
    assert readme.read_text() == "no markers"


def test_command_line_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--peers", "eager,nobody"], "got nobody"),
        (["--op", "softmax"], "got 'softmax'"),
        (["--suite", "all"], "invalid choice"),
    ):
        with pytest.raises(SystemExit) as stop:
            run.main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="wanted a git ref, got 'no-such-ref'"):
        base.Base("no-such-ref", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_gpu_suite_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--suite", "gpu"]) == 2
    assert "needs a GPU" in capsys.readouterr().out


# --- the lane of pytest-benchmark (--benchmark-enable times it; without, it runs once and is checked)


@pytest.mark.parametrize("mode", [FORWARD, BOTH])
def test_benchmark_token_logprobs(benchmark: object, mode: str) -> None:
    case = dataclasses.replace(logits_case(mode), shape=(32, 4_096))
    inputs = ops.make_inputs(case, "cpu")
    step = ops.step(case, peers.build(peers.OURS, case, "cpu"), inputs)
    result = benchmark(step.run, step.prepare())  # type: ignore[operator]
    assert all(error.within for error in ops.errors(case, inputs, {"x": result})["x"].values())


def test_the_page_shows_the_largest_case_of_each_op_and_dtype_and_folds_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = tiny_result(monkeypatch)
    (record,) = result["cases"]  # type: ignore[misc]
    larger = record | {"shape": [2 * size for size in record["shape"]]}
    forward = record | {"mode": "forward", "shape": [4 * size for size in record["shape"]]}
    text = report.headlines(result | {"cases": [record, larger, forward]})
    shown, folded = text.split("<details>")
    assert report.title(larger) in shown
    assert all(report.title(r) not in shown and report.title(r) in folded for r in (record, forward))
    assert "<details>" not in report.headlines(result)
