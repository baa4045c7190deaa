"""The scripts of examples/ that show a trainer in plain Python, a few steps each on a tiny model."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from tiny_llama import save_with_tokenizer

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*_custom.py"))


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == EXAMPLES:
            del sys.modules[name]


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "r1_custom"])
def test_script(name, example, tmp_path, capsys):
    save_with_tokenizer(tmp_path / "m")
    changes = {"steps_per_round" if name == "curry_custom" else "steps": 2, "progress": False}
    if name.startswith(("grpo", "ppo")):
        changes["max_new_tokens"] = 4
    module = example(name)
    result = module.main(
        model=str(tmp_path / "m"), output_dir=str(tmp_path / "out"), device="cpu", learning_rate=1e-2, **changes
    )
    steps = [row for row in result.history if "seconds" in row]
    assert len(steps) == (4 if name == "curry_custom" else 2)
    if hasattr(module, "calm_answers"):
        measure = Path(module.__file__).read_text(encoding="utf-8").rsplit('"', 2)[1]  # what the script itself reports
        module.calm_answers.report(result, measure)
        assert f"{measure} " in capsys.readouterr().out


def test_peak_memory_is_that_of_the_device(example, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    peak = example("dpo_family").peak_memory_gib
    assert peak(torch.device("cuda")) == 3
    assert peak(torch.device("cpu")) > 0.05


def test_rows_of_the_recipe(example):
    """Its cold start is right, in the form that its rewards ask for, and not held out."""
    from rl4llm_fast.trainer.rewards import Sample, answer_of, format_rule

    recipe = example("r1_custom")
    task = recipe.task()
    asked = {row["prompt"] for row in task.train}
    assert not asked & {row["prompt"] for row in task.heldout}
    for row in task.train[:40]:
        answer = recipe.worked(row)["answer"]
        assert task.reward(row, answer_of(answer)) == 1.0
        assert format_rule(Sample(row, answer)) == 1.0
    wrong = next(word for word in recipe.SUBJECTS if word != row["answer"])
    assert task.reward(row, wrong) == 0.0
    assert recipe.calm("", "So!!") == pytest.approx(0.8)
