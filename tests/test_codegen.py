"""The generated files: up to date, readable by the linter, and saying what the formulas say."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import pytest

from rl4llm_fast import codegen

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_checked_in_files_are_up_to_date():
    assert codegen.main(["--check"]) == 0


def test_check_notices_a_change(tmp_path, monkeypatch, capsys):
    stale = tmp_path / "token_formulas_gen.h"
    stale.write_text(codegen.CPP_FILE.read_text().replace("1.0", "2.0"))
    monkeypatch.setattr(codegen, "ROOT", tmp_path)
    monkeypatch.setattr(codegen, "CPP_FILE", stale)
    assert codegen.main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert codegen.main([]) == 0
    assert stale.read_text() == codegen.cpp_source()


def test_the_generated_python_is_clean():
    pytest.importorskip("ruff", reason="ruff is not installed")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(codegen.TRITON_FILE)], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_header_compiles_by_itself(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    source = tmp_path / "t.cpp"
    source.write_text('#include "token_formulas_gen.h"\n')
    done = subprocess.run(
        [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function",
         f"-I{ROOT / 'csrc'}", str(source)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
