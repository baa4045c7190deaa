"""Shared by all tests: GPU tests skip with a reason, and every test starts from the same seed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import interpreted
import pytest
import torch

from rl4llm_fast.info import ledger_lines

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreted.patch_once()

GPU_REASON = "no GPU here (torch.cuda.is_available() is False)"


def pytest_report_header() -> list[str]:
    """What CI's output says of kernels that no test here runs."""
    return ["GPU kernels, last verified:", *ledger_lines()]


# Files of few tests that take minutes: begun first, so that no process waits for another at the end.
_LONG = (
    "test_triton_interpret.py", "test_token_loss_gpu.py", "test_trainer_distributed.py", "test_preference_triton.py",
    "test_trainer_kill.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONG)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=GPU_REASON))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests that train: a model that small only waits for a second thread, long where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
