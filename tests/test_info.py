"""rf.info(), the ledger of GPU kernels in every state on files made for the test, and the run that writes it."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

import rl4llm_fast as rf
from rl4llm_fast import dispatch
from rl4llm_fast.info import (
    Report,
    info,
    kernel_files,
    kernel_sources,
    ledger_lines,
    ledger_status,
    main,
    read_ledger,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    """A checkout with a Triton kernel and a CUDA kernel, each over a shared file, and files that hold no kernel."""
    files = {
        "kernels/__init__.py": "",
        "kernels/maths.py": "def helper(x):\n    return x\n",
        "kernels/configs.py": "WARPS = 4\n",
        "kernels/op.py": "from . import (\n    configs,\n)\nfrom .maths import helper\ndef op_fwd_kernel(x_ptr): ...\n",
        "csrc/hd.h": '#include "deep.h"\n',
        "csrc/deep.h": "// constants\n",
        "csrc/cuda/op.cu": '#include <cstdint>\n#include "hd.h"\n__global__ void op_fwd_kernel(float* x) {}\n',
        "csrc/cuda/empty.cu": "// nothing yet\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def write_ledger(tree: pathlib.Path, **tests: int) -> pathlib.Path:
    counts = {"passed": 0, "failed": 0, **tests}
    entries = {
        path: {"sources": kernel_sources(path, tree), "gpu": "GPU X", "date": "2026-01-02 03:04 UTC", "tests": counts}
        for path in kernel_files(tree)
    }
    ledger = tree / "bench" / "results" / "verified.json"
    ledger.parent.mkdir(parents=True, exist_ok=True)
    ledger.write_text(json.dumps({"kernels": entries}))
    return ledger


def states(tree: pathlib.Path) -> dict[str, str]:
    return {status.path: status.state for status in ledger_status(tree)}


def test_kernel_files_are_those_that_hold_kernels(tree: pathlib.Path) -> None:
    assert kernel_files(tree) == ["csrc/cuda/op.cu", "kernels/op.py"]


def test_sources_follow_includes_and_imports(tree: pathlib.Path) -> None:
    assert set(kernel_sources("kernels/op.py", tree)) == {"kernels/op.py", "kernels/configs.py", "kernels/maths.py"}
    sources = kernel_sources("csrc/cuda/op.cu", tree)
    assert list(sources) == ["csrc/cuda/op.cu", "csrc/hd.h", "csrc/deep.h"]
    assert all(len(digest) == 64 for digest in sources.values())


def test_ledger_status_goes_from_never_to_verified_to_changed(tree: pathlib.Path) -> None:
    both = ("csrc/cuda/op.cu", "kernels/op.py")
    assert states(tree) == dict.fromkeys(both, "never")
    assert all(status.detail == "never run on a GPU" for status in ledger_status(tree))

    write_ledger(tree, passed=12)
    assert states(tree) == dict.fromkeys(both, "verified")
    assert ledger_status(tree)[0].detail == "verified on GPU X, 2026-01-02 (12 tests)"

    (tree / "kernels/maths.py").write_text("def helper(x):\n    return -x\n")
    assert states(tree) == {"csrc/cuda/op.cu": "verified", "kernels/op.py": "changed"}
    changed = ledger_status(tree)[1]
    assert str(changed) == "kernels/op.py: changed since it was last run on GPU X, 2026-01-02 (kernels/maths.py)"

    (tree / "csrc/deep.h").write_text("// other constants\n")
    assert states(tree) == dict.fromkeys(both, "changed")


def test_failed_and_uncovered_kernels_are_not_verified(tree: pathlib.Path) -> None:
    write_ledger(tree, passed=3, failed=1)
    assert states(tree)["kernels/op.py"] == "failed"
    assert "1 of 4 tests FAILED on GPU X" in str(ledger_status(tree)[0])
    write_ledger(tree, skipped=5)
    assert states(tree)["kernels/op.py"] == "never"
    assert "no test covered it" in ledger_status(tree)[0].detail


def test_a_broken_ledger_is_an_error_that_names_the_file(tree: pathlib.Path) -> None:
    ledger = write_ledger(tree)
    for text in ("{", "[]", '{"kernels": 1}'):
        ledger.write_text(text)
        with pytest.raises(ValueError, match=r"verified\.json: not a ledger"):
            read_ledger(ledger)


def test_an_installation_without_sources_has_no_kernel_files(tmp_path: pathlib.Path) -> None:
    assert ledger_status(tmp_path) == []


def test_every_kernel_of_this_tree_has_a_line() -> None:
    text = "\n".join(ledger_lines())
    files = kernel_files()
    assert all(path in text for path in files)
    assert files or "not in this installation" in text


def test_info_tells_versions_build_backends_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    text = info()
    assert isinstance(text, Report)
    assert repr(text) == str(text)
    assert f"rl4llm_fast {rf.__version__}, torch " in text
    for heading in ("versions", "built", "backends usable here", "GPU", "GPU kernels, last verified"):
        assert heading in text.splitlines()
    for op, usable in rf.backends().items():
        assert any(line.split() == [op, *usable] for line in text.splitlines())
    if dispatch.extension is not None:
        assert dispatch.extension.build_info()["cpu_instruction_set_in_use"] in text
    main()
    assert capsys.readouterr().out == text + "\n"


def test_info_works_without_extension_and_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "from rl4llm_fast.info import main; main()"
    )
    environment = {**os.environ, "RL4LLM_FAST_NO_EXT": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "RL4LLM_FAST_NO_EXT=1 is set" in done.stdout
    assert "not triton: triton is not installed" in done.stdout
