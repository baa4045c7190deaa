"""``python -m bench.tune`` with stand-ins for the clock and the GPU: what it asks, refuses, keeps and advises."""

from __future__ import annotations

import ast
import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import rl4llm_fast as rf
from bench import knobs, measure, peers, tune
from bench.cases import CASES, FORWARD, Case
from rl4llm_fast import dispatch, tiles

CASE = Case("token_logprobs", "token_logprobs", FORWARD, torch.float32, (400, 700), ())
DEVICE = {"device": "GPU X", "date": "2026-01-01 00:00 UTC", "torch": "2", "triton": "3", "code": "c", "suite": "tune"}


class Scale(knobs.Knob):
    """Its candidates multiply what the op returns: only 1 is right, and "no" is no launch."""

    value: Any = 1.0

    def now(self) -> knobs.Candidate:
        return (1.0,)

    def label(self, candidate: knobs.Candidate) -> str:
        return str(candidate[0])

    def line(self, candidate: knobs.Candidate, why: str) -> str:
        return f"file.py: SCALE = {candidate[0]}  # {why}"

    @contextlib.contextmanager
    def applied(self, candidate: knobs.Candidate) -> Iterator[None]:
        type(self).value = candidate[0]
        yield
        type(self).value = 1.0


def scale(*candidates: Any, cases: tuple[Case, ...] = (CASE,)) -> Scale:
    return Scale("scale", (), tuple((c,) for c in candidates), cases, False)


def test_candidates_that_are_wrong_or_fail_have_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        logp = rf.token_logprobs(logits, token_ids)
        return logp if Scale.value == -1.0 else logp * Scale.value

    monkeypatch.setattr(peers, "build", lambda name, case, device: scaled)
    calls: list[float] = []

    def clock(steps: Any, repeatable: bool, device: str) -> tuple[Callable[[], float], str]:
        def sample() -> float:
            steps[0].run(steps[0].prepare())
            calls.append(Scale.value)
            return 2.0

        return sample, "counted"

    record = tune.measure_step(scale(1.01, "no", -1.0), CASE, "cpu", clock, measure.Budget(0.0, 2, 2))
    by = {row["candidate"]: row for row in record["results"]}
    assert list(by) == ["1.0", "1.01", "no", "-1.0"]
    assert record["now"] == "1.0"
    assert (by["1.01"]["status"], by["1.01"]["reason"], by["1.01"]["same_bits"]) == ("wrong", "wrong: logp", False)
    assert by["no"]["status"] == "failed"
    assert by["no"]["reason"].startswith("TypeError")
    assert not any("median_ms" in by[name] for name in ("1.01", "no"))
    assert (by["-1.0"]["status"], by["-1.0"]["same_bits"], by["-1.0"]["median_ms"]) == ("ok", True, 2.0)
    assert 1.01 not in calls


def test_rows_of_logits_are_judged_at_both_ends() -> None:
    inputs = {"logits": torch.arange(400.0)[:, None].expand(400, 3), "token_ids": torch.arange(400)}
    part, given, sample = tune.checked(CASE, inputs)
    assert part.shape == (256, 700)
    assert given["token_ids"].tolist() == [*range(128), *range(272, 400)]
    assert sample({"logp": torch.arange(400)})["logp"].tolist() == given["token_ids"].tolist()


def record(case: str = "c", now: str = "a", **ms: float) -> dict[str, Any]:
    rows = [{"candidate": n, "status": "ok", "same_bits": n != "c", "median_ms": value} for n, value in ms.items()]
    return {"knob": "scale", "case": case, "now": now, "cut": True, "results": rows}


def test_the_verdict_by_hand() -> None:
    # b: twice as fast, then half as fast; c: 2x and 4.5x, so 3x by the geometric mean.
    found = tune.verdict([record(a=4.0, b=2.0, c=2.0), record(a=9.0, b=18.0, c=2.0)])
    assert found == {"now": "a", "best": "c", "gain": pytest.approx(3.0), "least": 2.0, "same_bits": False}
    assert tune.verdict([record(a=4.0, c=2.0), record(a=4.0, b=1.0)])["best"] == "a"  # type: ignore[index]
    assert tune.verdict([record(b=1.0)]) is None
    assert tune.verdict([]) is None
    wrong = record(a=4.0, c=1.0)
    wrong["results"][1]["status"] = "wrong"
    assert tune.verdict([wrong])["best"] == "a"  # type: ignore[index]


def test_what_is_printed_of_a_knob(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs, "knobs", lambda: [scale(2.0, 3.0)])
    steps = {"1": record("c1", "1.0", **{"1.0": 4.0, "2.0": 3.0}), "2": record("c2", "1.0", **{"1.0": 4.0, "2.0": 3.0})}
    text = tune.text({"meta": DEVICE, "steps": steps})
    assert "best: 2.0, 1.33x over 2 of 1 cases, least 1.33x, the same bits" in text
    assert "file.py: SCALE = 2.0  # GPU X, 2026-01-01: 1.33x of 1.0 over 2 cases" in text
    steps["2"]["results"][1]["median_ms"] = 4 / 0.75 * 0.99  # 1.005x in all: not worth a change
    assert "keep it: the best is 2.0, 1.01x" in tune.text({"meta": DEVICE, "steps": steps})


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> list[Scale]:
    cases = tuple(Case("token_logprobs", "token_logprobs", FORWARD, torch.float32, (n, 9), ()) for n in (1, 2))
    made = [scale(2.0, cases=cases), scale(3.0, cases=cases)]
    for number, knob in enumerate(made):
        object.__setattr__(knob, "name", f"knob{number}")
    monkeypatch.setattr(knobs, "knobs", lambda: made)
    return made


def test_a_run_that_is_cut_off_goes_on(many: list[Scale], tmp_path: pathlib.Path) -> None:
    path, taken = tmp_path / "tune.json", []

    def take(knob: knobs.Knob, case: Case) -> dict[str, Any]:
        if len(taken) == 2:
            taken.append("cut off")
            raise KeyboardInterrupt
        taken.append(tune.key_of(knob, case))
        return {"knob": knob.name, "case": case.name, **record(a=1.0)}

    start = {"meta": DEVICE, "steps": {}, "attempts": {}}
    with pytest.raises(KeyboardInterrupt):
        tune.tune(start, path, (), None, take)
    kept = json.loads(path.read_text())
    assert len(kept["steps"]) == 2
    assert tune.tune(kept, path, (), None, take) == tune.HELD
    assert len(json.loads(path.read_text())["steps"]) == 4
    keys = [tune.key_of(*step) for step in tune.steps()]
    assert taken == [*keys[:2], "cut off", *keys[2:]]
    # Breadth first: every knob's first case before anybody's second.
    assert [key.split(" |")[0] for key in keys] == ["knob0", "knob1", "knob0", "knob1"]


def test_minutes_end_a_run_and_a_wrong_present_value_fails_it(many: list[Scale], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tune.json"
    start = {"meta": DEVICE, "steps": {}, "attempts": {}}
    assert tune.tune(start, path, (), 0.0, lambda knob, case: record(a=1.0)) == tune.UNFINISHED
    assert not path.exists()
    wrong = record(a=1.0)
    wrong["results"][0]["status"] = "wrong"
    assert tune.tune(start, path, ("knob1",), None, lambda knob, case: wrong) == tune.FAILED


def test_a_step_that_ends_the_process_twice_is_left_out(many: list[Scale], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tune.json"
    result: dict[str, Any] = {"meta": DEVICE, "steps": {}, "attempts": {}}

    def take(knob: knobs.Knob, case: Case) -> dict[str, Any]:
        if knob.name == "knob0" and case.shape == (1, 9):
            raise SystemExit("illegal memory access")
        return {**record(a=1.0), "knob": knob.name}

    for _ in range(2):
        with pytest.raises(SystemExit):
            tune.tune(result, path, (), None, take)
        result = json.loads(path.read_text())
    assert tune.tune(result, path, (), None, take) == tune.HELD
    (left_out,) = [step for step in result["steps"].values() if "reason" in step]
    assert left_out["reason"] == "left out: its process ended 2 times"
    assert "left out: its process ended 2 times" in tune.text(result)


def test_a_step_that_fails_says_why_and_the_others_go_on(many: list[Scale], tmp_path: pathlib.Path) -> None:
    result: dict[str, Any] = {"meta": DEVICE, "steps": {}, "attempts": {}}

    def take(knob: knobs.Knob, case: Case) -> dict[str, Any]:
        if knob.name == "knob0":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {**record(a=1.0), "knob": knob.name}

    assert tune.tune(result, tmp_path / "tune.json", (), None, take) == tune.HELD
    assert len(result["steps"]) == 4
    assert "OutOfMemoryError: CUDA out of memory" in tune.text(result)
    assert "no verdict: the present value has no time" in tune.text(result)


def test_the_plan_adds_up_what_is_left(many: list[Scale]) -> None:
    result: dict[str, Any] = {"meta": DEVICE, "steps": {}}
    whole = sum(tune.seconds_of(knob, case, case is knob.cases[0]) for knob, case in tune.steps())
    assert whole == pytest.approx(2 * (3.0 + 1.9) + 2 * (3.0 + 0.4))
    assert f"4 steps, in all about {whole / 60:.0f} minutes" in tune.plan(result, ())
    result["steps"] = {tune.key_of(many[0], case): {} for case in many[0].cases}
    assert "constants: knob0, 1 candidates on 2 cases, done" in tune.plan(result, ())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().out == "tuning needs a GPU, and torch sees none here (--plan shows what would run)\n"
    assert not list(tmp_path.iterdir())
    assert tune.main(["--plan", "--out", str(tmp_path)]) == 0
    assert "chunk: tiles.GPU_WORKSPACE, 6 candidates on 3 cases" in capsys.readouterr().out
    assert tune.main(["--show", "--out", str(tmp_path)]) == 0
    assert "no result in" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tune.main(["--only", "no such knob"])


def test_only_figures_of_the_same_kernels_are_gone_on_with(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tune-gpu-x-2026-01-01.json"
    path.write_text(json.dumps({"meta": DEVICE, "steps": {"s": {}}, "attempts": {}}))
    assert tune.load([tmp_path], DEVICE)[0] == path
    assert tune.load([tmp_path], {**DEVICE, "code": "other"}) == (
        None, {"meta": {**DEVICE, "code": "other"}, "steps": {}, "attempts": {}},
    )  # fmt: skip
    assert tune.free(path).name == "tune-gpu-x-2026-01-01-2.json"
    tune.free(path).write_text("{}")
    assert tune.free(path).name == "tune-gpu-x-2026-01-01-3.json"


def test_every_constant_of_the_tables_is_a_knob() -> None:
    from rl4llm_fast.kernels import configs

    tuned = {place.name for knob in knobs.knobs() for place in knob.places if place.modules[0] == "kernels.configs"}
    # Facts of the hardware, and what the tests hold the compiler to.
    fixed = {"COMPILE", "WARP", "PART_STEP", "SCAN_REGISTERS"}
    assert {name for name in vars(configs) if name.isupper()} == tuned | fixed
    rows = {knob.places[0].key for knob in knobs.knobs() if knob.group == "launches"}
    assert rows == set(configs.LAUNCHES)
    for knob in knobs.knobs():
        if knob.group in ("launches", "constants"):
            assert knob.cases[0].op in rf.__all__


def test_candidates_keep_the_rules_of_the_tables() -> None:
    from rl4llm_fast.kernels import configs

    for knob in knobs.knobs():
        if knob.group == "launches":
            kernel, _ = knob.places[0].key  # type: ignore[misc]
            assert knob.cut == kernel.endswith("_fwd")  # a backward writes each logit's gradient by itself
            for block, warps in knob.candidates:
                assert block & (block - 1) == 0
                assert block % (warps * configs.WARP) == 0
        if knob.name == "configs.SCAN_PART":
            assert all(part % configs.SCAN_ROWS[0] == 0 for (part,) in knob.candidates)
        if knob.name in ("configs.SCAN_ROWS", "configs.SCAN_PACKED"):
            assert all(configs.SCAN_PART % block == 0 for ((block, _),) in knob.candidates)
        for case in knob.cases:  # what lies on the GPU at once stays below 80 GB
            assert case.bytes < 60e9


def test_every_op_of_both_backends_is_compared() -> None:
    if dispatch.why_not("gae", "cuda", "cuda"):
        pytest.skip("the extension was built without CUDA")
    compared = {knob.name.removeprefix("backend ") for knob in knobs.knobs() if knob.group == "backends"}
    measured = {case.op for case in CASES if "gpu" in case.suites} | {"process_advantages"}
    assert compared == {op for op in measured if dispatch.why_not(op, "cuda", "cuda") is None}
    assert compared | set(knobs.TRITON_ONLY) == measured


def test_the_lines_to_write_are_python() -> None:
    from rl4llm_fast.kernels import configs

    for knob in knobs.knobs():
        if knob.group not in ("launches", "registers", "constants", "chunk"):
            continue
        for line in knob.line(knob.candidates[-1], "GPU X").split("\n"):
            file, _, code = line.partition(": ")
            root = pathlib.Path(__file__).resolve().parent.parent
            assert (root / file).is_file()
            if knob.group in ("launches", "registers"):
                ((key, row),) = eval("{" + code + "}", {"Launch": configs.Launch}).items()
                assert key in configs.LAUNCHES
                assert row.why == "GPU X"
            else:
                ast.parse(code)
                names = [target.id for target in ast.walk(ast.parse(code)) if isinstance(target, ast.Name)]
                assert set(names) - {"MIB"} <= {place.name for place in knob.places}


def test_a_knob_sets_its_constant_everywhere_and_back() -> None:
    (workspace,) = [knob for knob in knobs.knobs() if knob.group == "chunk"]
    assert workspace.now() == (tiles.GPU_WORKSPACE,)
    # A row of 131,072 logits in bf16 takes 256 KiB.
    assert workspace.label((256 * tiles.MIB,)) == "256 MiB (1,024 tokens a chunk at V 131,072)"
    assert workspace.label((2_048 * tiles.MIB,)) == "2048 MiB (8,192 tokens a chunk at V 131,072)"
    assert workspace.now() == (512 * tiles.MIB,)


def test_the_measured_backend_is_the_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_UNUSABLE", dict(dispatch._UNUSABLE))
    monkeypatch.setattr(dispatch, "_AUTOMATIC", dict(dispatch._AUTOMATIC))
    monkeypatch.setattr(dispatch, "_probe", lambda op, backend, device: None)
    monkeypatch.setattr(dispatch, "MEASURED", {"gae": "cuda"})
    dispatch._build_tables()
    assert (dispatch._AUTOMATIC["gae", "cuda"], dispatch._AUTOMATIC["vtrace", "cuda"]) == ("cuda", "triton")
    assert dispatch._AUTOMATIC["gae", "cpu"] == "cpu"
    (gae,) = [knob for knob in knobs.knobs() if knob.name == "backend gae"]
    assert gae.now() == ("cuda",)
    rows = gae.line(("cuda",), "GPU X").split("\n")
    assert [row.split('"')[1] for row in rows] == ["gae", "discounted_returns", "lambda_returns"]


def test_registers_are_held_to_a_rows_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    from rl4llm_fast.kernels import configs

    (knob,) = [knob for knob in knobs.knobs() if knob.name == "LAUNCHES token_logprobs_bwd 2 maxnreg"]
    assert "maxnreg" not in configs.row_options("token_logprobs_bwd", 2, 9_999)
    with knob.applied((48,)) if "triton" in rf.backends()["gae"] else contextlib.nullcontext():
        row = knob._with((48,))  # type: ignore[attr-defined]
    monkeypatch.setitem(configs.LAUNCHES, ("token_logprobs_bwd", 2), row)
    assert configs.row_options("token_logprobs_bwd", 2, 9_999)["maxnreg"] == 48
