"""``python -m bench.verify`` with stand-ins for what needs a GPU: its steps, its plan, what the ledger keeps."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

from bench import capacity, cases, sanitizer, verify
from rl4llm_fast.info import kernel_files, kernel_sources, ledger_status

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLEAN = {"passed": 3, "failed": 0, "skipped": 0, "names": ["t::a"], "failures": []}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_verify_leaves_the_ledger_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = tmp_path / "verified.json"
    monkeypatch.setattr(verify, "LEDGER", ledger)
    assert verify.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().out
    assert not ledger.exists()


def test_the_plan_names_tests_and_cases() -> None:
    text = verify.plan(["kernels/token_logprobs.py", "csrc/cuda/token_loss.cu", "kernels/new.py"])
    assert text.startswith("kernels/token_logprobs.py  (backend triton, about ")
    assert "  tests: pytest tests/test_gpu.py -m gpu -k 'triton or not cuda'\n" in text
    assert "case:  token_logprobs_entropy/forward/bf16/8192x151936" in text
    assert "tests/test_losses.py -m gpu -k 'not triton'" in text
    assert "case:  linear_policy_loss grpo k3/forward+backward/bf16/8192x4096x131072" in text
    assert "case:  policy_loss grpo k3/forward+backward/fp32/256x4096" in text
    assert "tests/test_gpu_new.py -m gpu -k 'triton or not cuda'   (there is no such file" in text
    assert "case:  none in the suite gpu yet" in text  # of kernels/new.py


def test_every_kernel_of_the_tree_has_tests_and_a_case() -> None:
    for kernel in kernel_files(ROOT):
        assert (ROOT / verify.tests_of(kernel)[0]).is_file(), kernel
        assert verify.cases_of(kernel), kernel
    assert {case.call for case in verify.cases_of("kernels/token_loss_sequences.py")} == {"policy_loss_gspo"}


@pytest.mark.parametrize(
    ("kernel", "mine", "other"),
    [("kernels/token_logprobs.py", "triton", "cuda"), ("csrc/cuda/token_logprobs.cu", "cuda", "triton")],
)
def test_the_tests_of_a_kernel_are_found_and_name_its_backend(kernel: str, mine: str, other: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *verify.tests_of(kernel)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    collected = [line.partition("[")[2] for line in done.stdout.splitlines() if "::" in line]
    assert sum(mine in parameters for parameters in collected) > 50
    assert not any(other in parameters for parameters in collected)


def test_the_tests_output_begins_with_the_ledger() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "tests/test_codegen.py"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    at = shown.index("GPU kernels, last verified:")
    assert any("kernels/token_logprobs.py: " in line for line in shown[at:])


def test_a_kernel_without_a_test_file_has_no_passed_test() -> None:
    assert verify.run_tests("kernels/no_such_kernel.py")["passed"] == 0


def test_junit_results_are_counted(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="t" name="a"/>'
        '<testcase classname="t" name="b"><failure/></testcase>'
        '<testcase classname="t" name="c"><skipped/></testcase><testcase classname="t" name="d"><error/></testcase>'
        "</testsuite></testsuites>"
    )
    tests = verify.parse_junit(path)
    assert (tests["passed"], tests["failed"], tests["skipped"]) == (1, 2, 1)
    assert tests["names"] == ["t::a"]
    assert tests["failures"] == ["t::b", "t::d"]


@pytest.fixture
def tree(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """A checkout with a Triton kernel, a CUDA kernel and a case for each; no step needs a GPU, and each is written."""
    for name in ("kernels/a.py", "csrc/cuda/b.cu"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def {path.stem}_fwd_kernel(x_ptr):\n    pass\n// __global__\n".replace("//", "#"))
    made = [cases.Case(op, op, cases.FORWARD, torch.float32, (8, 300), ("gpu",)) for op in ("a", "b")]
    keys = ("gpu", "date", "git", "rl4llm_fast", "torch", "triton", "python", "cuda", "driver")
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    monkeypatch.setattr(cases, "CASES", tuple(made))
    monkeypatch.setattr(verify.run, "environment", lambda device: {**dict.fromkeys(keys, "2026-01-01"), "device": "X"})
    monkeypatch.setattr(verify.timing, "ceilings", lambda device: {"copy": 1.0})
    return tmp_path


class Steps:
    """Stands for the steps: writes each down, answers that all is well, and is cut off at one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.cut_off_at = ""
        self.found: dict[str, Any] = {"status": "clean", "tests": [], "detail": ""}
        self.tests: dict[str, Any] = CLEAN
        monkeypatch.setattr(verify, "run_tests", lambda kernel: self.step(f"{kernel} tests", self.tests))
        monkeypatch.setattr(verify, "sanitize", lambda tool, *arguments: self.step(tool, self.found))
        monkeypatch.setattr(verify, "run_figures", self.figures)
        monkeypatch.setattr(verify, "run_suite", lambda minutes, folder: self.step("suite", True))
        monkeypatch.setattr(capacity, "measure", lambda: self.step("capacity", LARGEST))

    def figures(self, kernel: str, case: cases.Case, copy: float) -> Any:
        return self.step(case.name, {"case": case.name, "correct": True, "median_ms": 1.0})

    def step(self, name: str, answer: Any) -> Any:
        if name == self.cut_off_at:
            raise KeyboardInterrupt
        self.done.append(name)
        return answer


LARGEST = {
    "meta": {"width": 1, "vocabulary": 1, "device": "X"},
    "tokens": {"eager": 1, "rl4llm_fast": 12},
    "ratio": 12.0,
    "target": 10.0,
    "reached": True,
}
KERNELS = ["kernels/a.py", "csrc/cuda/b.cu"]
ALL = [
    *("kernels/a.py tests", "a/forward/fp32/8x300"),
    *("csrc/cuda/b.cu tests", "memcheck", "racecheck", "b/forward/fp32/8x300", "suite", "capacity"),
]


def test_all_steps_in_order_and_what_the_ledger_keeps(tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, path = Steps(monkeypatch), tree / "verified.json"
    assert verify.verify(KERNELS, path, again=False) == verify.HELD
    assert steps.done == ALL
    ledger = json.loads(path.read_text())
    entry = ledger["kernels"]["csrc/cuda/b.cu"]
    assert entry["sources"] == kernel_sources("csrc/cuda/b.cu", tree)
    assert (entry["gpu"], entry["tests"], entry["complete"]) == ("X", CLEAN, True)
    assert entry["sanitizer"].keys() == {"memcheck", "racecheck"}
    assert [figure["case"] for figure in entry["figures"]] == ["b/forward/fp32/8x300"]
    assert entry["seconds"].keys() == {"tests", "memcheck", "racecheck", "b/forward/fp32/8x300"}
    assert ledger["capacity"]["tokens"] == {"eager": 1, "rl4llm_fast": 12}
    assert {status.state for status in ledger_status(tree, path)} == {"verified"}
    assert verify.verify(KERNELS, path, again=False) == verify.HELD
    assert steps.done == ALL  # nothing ran again, the suite neither


@pytest.mark.parametrize("step", ALL)
def test_cut_off_at_any_step_it_goes_on_there(step: str, tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, path = Steps(monkeypatch), tree / "verified.json"
    steps.cut_off_at = step
    with pytest.raises(KeyboardInterrupt):
        verify.verify(KERNELS, path, again=False)
    steps.cut_off_at = ""
    assert verify.verify(KERNELS, path, again=False) == verify.HELD
    assert steps.done == ALL


def test_minutes_end_a_run_between_steps(tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, path = Steps(monkeypatch), tree / "verified.json"
    now = [0.0]
    right = steps.step

    def takes_a_minute(name: str, answer: Any) -> Any:
        now[0] += 60.0
        return right(name, answer)

    steps.step = takes_a_minute  # type: ignore[method-assign]
    monkeypatch.setattr(verify.time, "monotonic", lambda: now[0])
    statuses = [verify.verify(KERNELS, path, again=False, minutes=2) for _ in range(4)]
    assert statuses == [verify.UNFINISHED] * 3 + [verify.HELD]
    assert steps.done == ALL


def test_a_change_and_again_run_what_they_must(tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, path = Steps(monkeypatch), tree / "verified.json"
    verify.verify(KERNELS, path, again=False)
    (tree / "kernels" / "a.py").write_text("def a_fwd_kernel(y_ptr):\n    pass\n")
    steps.done.clear()
    assert verify.verify(KERNELS, path, again=False) == verify.HELD
    assert steps.done == ALL[:2]
    steps.done.clear()
    steps.cut_off_at = "memcheck"
    with pytest.raises(KeyboardInterrupt):
        verify.verify(KERNELS, path, again=True)
    steps.cut_off_at = ""
    verify.verify(KERNELS, path, again=False)  # goes on with what --again began
    assert steps.done == ALL


def test_what_fails_is_told(tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, path = Steps(monkeypatch), tree / "verified.json"
    steps.found = {"status": "found", "tests": [], "detail": "Invalid __global__ read of size 4"}
    assert verify.verify(KERNELS, path, again=False) == verify.FAILED
    states = {status.path: status for status in ledger_status(tree, path)}
    assert states["kernels/a.py"].state == "verified"
    assert states["csrc/cuda/b.cu"].state == "failed"
    assert "memcheck FAILED on X" in str(states["csrc/cuda/b.cu"])
    steps.found, steps.tests = {"status": "absent", "detail": "none here"}, {**CLEAN, "failed": 1}
    assert verify.verify(KERNELS, path, again=True) == verify.FAILED
    steps.tests = CLEAN
    assert verify.verify(KERNELS, path, again=True) == verify.HELD  # a machine without the sanitizer is no failure


def test_the_plan_uses_the_ledger_s_own_seconds(tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, path = Steps(monkeypatch), tree / "verified.json"
    first = verify.plan(KERNELS)
    assert "compute-sanitizer" in first
    assert "about 7.6 min" in first  # 90 + 180 + 180 + 8 s
    assert "guessed where the ledger has no figure" in first
    verify.verify(KERNELS, path, again=False)
    assert steps.done == ALL
    ledger = json.loads(path.read_text())
    assert "already verified on X" in verify.plan(KERNELS, ledger)
    (tree / "kernels" / "a.py").write_text("def a_fwd_kernel(y_ptr):\n    pass\n")
    ledger["kernels"]["kernels/a.py"]["seconds"] = {"tests": 100.0, "a/forward/fp32/8x300": 20.0}
    assert "kernels/a.py  (backend triton, about 2.0 min)" in verify.plan(KERNELS, ledger)


# --- the sanitizer, with a stand-in for the program


@pytest.fixture
def program(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Says what it was asked, and ends with the status in a file."""
    script = tmp_path / "compute-sanitizer"
    script.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "cache $PYTORCH_NO_CUDA_MEMORY_CACHING" >> {tmp_path}/asked\n'
        f'echo "========= ERROR SUMMARY"\nexit $(cat {tmp_path}/status)\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sanitizer, "program", lambda: str(script))
    monkeypatch.setattr(sanitizer, "collect", lambda arguments: [f"t.py::test[{i}]" for i in range(100)])
    return tmp_path


@pytest.mark.parametrize(("code", "status"), [(0, "clean"), (86, "found"), (1, "failed")])
def test_what_the_sanitizer_says(code: int, status: str, program: pathlib.Path) -> None:
    (program / "status").write_text(str(code))
    found = sanitizer.check("racecheck", ["t.py"])
    assert found["status"] == status
    assert "ERROR SUMMARY" in found["detail"]
    assert found["tests"] == sanitizer.spread([f"t.py::test[{i}]" for i in range(100)])
    asked = (program / "asked").read_text()
    assert asked.startswith("--tool racecheck --error-exitcode 86 --kernel-regex kns=rl4llm ")
    assert "t.py::test[0] " in asked
    assert "cache 1" in asked


def test_without_a_sanitizer_or_tests_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "program", lambda: None)
    assert sanitizer.check("memcheck", [])["status"] == "absent"
    monkeypatch.setattr(sanitizer, "program", lambda: "/bin/false")
    monkeypatch.setattr(sanitizer, "collect", lambda arguments: [])
    assert sanitizer.check("memcheck", [])["status"] == "absent"


def test_graphs_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch captures none while its caching of memory is off."""
    said = subprocess.CompletedProcess([], 0, stdout="t.py::test_cuda_graph[cuda]\nt.py::test_values[cuda]\n3 tests\n")
    monkeypatch.setattr(sanitizer.subprocess, "run", lambda *args, **options: said)
    assert sanitizer.collect(["t.py"]) == ["t.py::test_values[cuda]"]


def test_the_ledger_may_lie_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    seen: list[pathlib.Path] = []
    known = tmp_path / "verified.json"
    known.write_text('{"kernels": {}}')
    monkeypatch.setattr(verify, "LEDGER", known)
    monkeypatch.setattr(verify.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(verify, "verify", lambda kernels, ledger, again, minutes: seen.append(ledger) or verify.HELD)
    assert verify.main(["--out", str(tmp_path / "there")]) == verify.HELD
    assert seen == [tmp_path / "there" / "verified.json"]
    assert seen[0].read_text() == known.read_text()


def test_tests_are_spread_evenly() -> None:
    assert sanitizer.spread(list("abc")) == list("abc")
    chosen = sanitizer.spread([str(i) for i in range(91)])
    assert chosen == [str(i) for i in range(0, 91, 10)]


def test_kernels_are_ours_by_their_namespace() -> None:
    """What the sanitizer's filter goes by."""
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        assert "namespace rl4llm {" in source.read_text(), source
