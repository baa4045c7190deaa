"""What to run on a GPU, the ranking of kernels, and what ncu's answers become, without a GPU."""

from __future__ import annotations

import json
import pathlib
import subprocess
from typing import Any

import pytest
import torch

from bench import campaign, cases, context, end_to_end, ncu, report, run, sanitizer, tune, verify
from bench.verify import Clock

ROOT = pathlib.Path(__file__).resolve().parent.parent
META = {"device": "GPU X", "date": "2026-01-01 00:00 UTC", "git": "g", "torch": "2", "triton": "3", "suite": "ncu"}
CASES = [cases.Case(op, op, cases.FORWARD, torch.float32, (8, 300), ("gpu",)) for op in ("a", "b", "c")]
TIMES = {
    CASES[0].name: {
        "void rl4llm::scan_kernel<float, 4>(Args)": 30.0,
        "Memcpy DtoD": 900.0,
        "cublas_gemm_kernel": 800.0,
    },
    CASES[1].name: {"scan_kernel": 50.0, "whiten_apply_kernel": 70.0},
    CASES[2].name: {"gae_fwd_kernel": 10.0, "vtrace_kernel": 5.0},
}
DETAILS = """
  scan_kernel (16, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    Memory Throughput                 %        91.25
    Duration                         us        12.50
    Registers Per Thread   register/thread              64
    Achieved Occupancy                        %        47.1
"""


def test_commands_are_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert campaign.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("   (")[0] for line in lines] == [order.command for order in campaign.orders()]
    assert campaign.orders()[0].command.startswith("python -m pytest -m gpu ")
    for order in campaign.orders()[1:]:
        module, *arguments = order.command.removeprefix("python -m bench.").split()
        parse = {"tune": tune, "verify": verify, "end_to_end": end_to_end, "context": context, "ncu": ncu, "run": run}
        if module == "run":
            assert parse[module].main(arguments) == 2 or torch.cuda.is_available()  # no plan: its budget is its minutes
        else:
            assert parse[module].main([*arguments, "--plan"]) == 0  # type: ignore[attr-defined]
    shown = (ROOT / "docs" / "gpu.md").read_text()
    assert campaign.markdown() in shown, "docs/gpu.md: python -m bench.report --gpu"


def test_minutes_come_from_the_plans() -> None:
    by = {order.command.split()[2]: order for order in campaign.orders()}
    seconds = [
        tune.seconds_of(knob, case, case is knob.cases[0]) for knob, case in tune.steps(("constants", "registers"))
    ]
    assert by["bench.tune"].minutes == round(sum(seconds) / 60)
    assert by["bench.context"].minutes == round(3 * (context._START_S + context._SEARCH_S) / 60)
    assert by["bench.ncu"].minutes == round((len(cases.select("gpu")) * ncu._CASE_S + 3 * ncu._KERNEL_S) / 60)


def test_verify_plans_name_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--plan", "--kernel", "kernels/gae.py"]) == 0
    assert "python -m bench.tune --minutes 9   (about" in capsys.readouterr().out


def test_the_slowest_of_our_kernels_once_each() -> None:
    ours = ncu.our_kernels()
    assert {"scan_kernel", "token_logprobs_fwd_kernel", "policy_loss_sequences_kernel"} <= ours
    rows = ncu.ranking(TIMES, ours)
    assert [(row["kernel"], row["us"], row["case"]) for row in rows] == [
        ("whiten_apply_kernel", 70.0, CASES[1].name),
        ("scan_kernel", 50.0, CASES[1].name),
        ("gae_fwd_kernel", 10.0, CASES[2].name),
        ("vtrace_kernel", 5.0, CASES[2].name),
    ]


def test_figures_of_a_report() -> None:
    assert ncu.figures(DETAILS) == {
        "Memory Throughput": "91.25 %",
        "Duration": "12.50 us",
        "Registers Per Thread": "64 register/thread",
        "Achieved Occupancy": "47.1 %",
    }


def test_steps_going_on_and_a_case_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(cases, "CASES", tuple(CASES))
    path, done = tmp_path / "ncu-gpu-x-2026-01-01.json", []

    def time_case(case: cases.Case) -> dict[str, float]:
        done.append(case.name)
        if case is CASES[2]:
            raise RuntimeError("no such launch")
        return TIMES[case.name]

    def look(kernel: str, case: str, beside: pathlib.Path) -> dict[str, Any]:
        done.append(kernel)
        if len(done) == 4:
            raise KeyboardInterrupt
        return {"status": "ok", "report": beside.name, "figures": {"Duration": "1 us"}}

    result: dict[str, Any] = {"meta": META, "times": {}, "reports": {}}
    assert ncu.profile(result, path, 2, Clock(0.0), time_case, look) == ncu.UNFINISHED
    assert not done
    with pytest.raises(KeyboardInterrupt):
        ncu.profile(result, path, 2, Clock(None), time_case, look)
    kept = json.loads(path.read_text())
    assert list(kept["times"]) == [case.name for case in CASES]
    assert ncu.profile(kept, path, 2, Clock(None), time_case, look) == ncu.HELD
    assert done == [*TIMES, "whiten_apply_kernel", "whiten_apply_kernel", "scan_kernel"]
    text = ncu.text(json.loads(path.read_text()), 2)
    assert "whiten_apply_kernel: 70.0 µs a launch in b/forward/fp32/8x300\n  Duration: 1 us\n" in text
    assert "report: ncu-scan_kernel-gpu-x-2026-01-01.txt" in text
    assert ncu.load([tmp_path], META)[0] == path
    assert ncu.load([tmp_path], {**META, "git": "other"})[0] is None


@pytest.mark.parametrize(
    ("said", "code", "status"),
    [
        (DETAILS, 0, "ok"),
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", 1, "unusable"),
        ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded", 1, "unusable"),
        ("==WARNING== No kernels were profiled.", 0, "failed"),
        (DETAILS, 9, "failed"),
    ],
)
def test_what_ncu_may_answer(
    said: str, code: int, status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    ran: list[list[str]] = []

    def answer(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, code, stdout=said, stderr="")

    monkeypatch.setattr(sanitizer, "program", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", answer)
    found = ncu.report_of("scan_kernel", "b", tmp_path / "ncu-scan_kernel.txt")
    assert found["status"] == status
    assert (tmp_path / "ncu-scan_kernel.txt").exists() == (status == "ok")
    assert ran[0][:3] == ["/bin/ncu", "--set", "full"]
    assert ran[0][-2:] == ["--run", "b"]
    if status == "unusable":
        assert said.removeprefix("==ERROR== ") == found["detail"]


def test_without_ncu_the_ranking_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(cases, "CASES", tuple(CASES))
    monkeypatch.setattr(sanitizer, "program", lambda name: None)
    result: dict[str, Any] = {"meta": META, "times": dict(TIMES), "reports": {}}
    assert ncu.profile(result, tmp_path / "ncu-x.json", 3, Clock(None)) == ncu.HELD
    assert list(result["reports"]) == ["whiten_apply_kernel"]  # asked once
    assert "ncu: absent: no ncu in PATH, CUDA_HOME or /usr/local/cuda" in ncu.text(result, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ncu.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().out == "profiling needs a GPU, and torch sees none here (--plan shows what would run)\n"
    assert not list(tmp_path.iterdir())


def test_the_page_is_written(tmp_path: pathlib.Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text("\n".join(report.marks("order")))
    assert report.write_gpu(page, {}) == ["order"]
    assert "| 2 | `python -m bench.run --suite gpu --resume --minutes 9` |" in page.read_text()
