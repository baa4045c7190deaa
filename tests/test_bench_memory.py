"""The probe of peak memory on the CPU."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from bench import cases, memory, ops, peers, timing

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_memory_probe_sees_a_known_allocation_behind_a_higher_peak() -> None:
    code = (
        "import torch; from bench.timing import cpu_extra_bytes\n"
        "big = torch.ones(80 * 2**20 // 4); del big\n"  # the process's own peak is higher than the call's
        "print(cpu_extra_bytes(lambda: torch.ones(32 * 2**20 // 4)), cpu_extra_bytes(lambda: None))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seen, nothing = map(int, done.stdout.split())
    assert 32 * 2**20 <= seen <= 33.5 * 2**20
    assert nothing <= 2**20


def test_the_prober_answers_case_by_case_and_survives_a_peer_that_cannot() -> None:
    case = next(c for c in cases.CASES if c.op == "group_advantages")
    prober = memory.Prober()
    try:
        assert prober.ask(case, "chunked") is None
        extra = prober.ask(case, "eager")
        assert extra is not None
        assert 0 < extra < 64 * 2**20
    finally:
        prober.close()


def test_a_long_call_is_warmed_up_on_a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in cases.CASES if c.name == "linear_policy_loss grpo k3/forward+backward/fp32/1024x576x49152")
    called: list[int] = []
    monkeypatch.setattr(ops, "make_inputs", lambda case, device: case.shape[0])
    monkeypatch.setattr(peers, "build", lambda peer, case, device: None)
    monkeypatch.setattr(ops, "step", lambda case, f, rows, *_: timing.Step(lambda: rows, lambda n: called.append(n)))
    memory._inputs.cache_clear()
    for peer, long, wanted in (
        ("eager", True, [64, 1_024]),
        ("eager", False, [1_024, 1_024]),
        ("liger", True, [1_024, 1_024]),
    ):
        called.clear()
        assert memory.probe(case, peer, long) >= 0
        assert called == wanted, (peer, long)
    memory._inputs.cache_clear()
