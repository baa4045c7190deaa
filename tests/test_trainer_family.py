"""examples/dpo_family.py on a tiny Llama: losses run on their data, the table says what came of it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from tiny_llama import END, tiny_model

transformers = pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).parents[1] / "examples" / "dpo_family.py"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def family():
    spec = importlib.util.spec_from_file_location("dpo_family", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folders(tmp_path):
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(END)} | {"<end>": END}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path / "m")
    tiny_model().save_pretrained(tmp_path / "m")

    def sentence(i: int, kind: int) -> str:
        return f"w{10 + i % 9} w{kind} w{20 + i % 7}"

    prompt, good, bad, between = {"prompt": "w1 w2"}, 7, 8, 9
    files = {
        "pairs": [prompt | {"chosen": sentence(i, good), "rejected": sentence(i + 1, bad)} for i in range(120)],
        "labelled": [prompt | {"answer": sentence(i, (good, bad)[i % 2]), "desirable": i % 2 == 0} for i in range(240)],
        "segments": [
            prompt | {
                "chosen": [sentence(i, good) + " ", sentence(i, between)], "chosen_scores": [[0.9, 1.0], [0.5, 0.5]],
                "rejected": [sentence(i, bad) + " ", sentence(i, between)], "rejected_scores": [[0.1, 0.0], [0.5, 0.5]],
            }
            for i in range(120)
        ],
        "ranked": [
            prompt | {"answers": [sentence(i, k) for k in (7, 9, 6, 8)], "ranks": [0, 1, 2, 3]} for i in range(60)
        ],
    }  # fmt: skip
    (tmp_path / "data").mkdir()
    for name, rows in files.items():
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path / "data", tmp_path / "out", tmp_path / "m"


def test_losses_in_one_table(family, folders, monkeypatch, capsys):
    data, out, model = folders
    names = ["dpo", "simpo", "2d_dpo", "kto", "curry", "ipo, repeated"]  # one of each kind
    assert set(names) <= set(family.METHODS)
    given = [str(data), str(out), "--steps", "3", "--model", str(model), "--only", *names]

    def here(command, check):  # a child of its own would import torch for each of them
        assert command[:2] == [sys.executable, family.__file__]
        assert check
        monkeypatch.setattr(sys, "argv", command[1:])
        assert family.main() == 0
        monkeypatch.setattr(sys, "argv", ["dpo_family.py", *given])

    monkeypatch.setattr(family.subprocess, "run", here)
    monkeypatch.setattr(sys, "argv", ["dpo_family.py", *given])
    family.main()
    results = json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert [result["method"] for result in results] == names
    assert [result["steps"] for result in results] == [3, 3, 3, 3, 3, 4]
    assert all(len(result["margins"]) == result["steps"] for result in results)
    lines = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0][2:] for line in lines if line.startswith("|")][2:] == [
        name for name in names if "repeated" not in name
    ]
    assert (out / "ipo_settles.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("checkpoint.pt"))
    monkeypatch.setattr(family.subprocess, "run", lambda *_, **__: pytest.fail("it is there already"))
    family.main()


def test_what_counts_as_better(family):
    def result(before, after):
        names = ("heldout_loss", "heldout_accuracy", "heldout_margin")
        return {"before": dict(zip(names, before, strict=True)), "after": dict(zip(names, after, strict=True))}

    assert family.improved(result((0.69, 0.0, 0.0), (0.6, 0.6, 0.2)))
    assert not family.improved(result((0.69, 0.0, 0.0), (0.6, 0.5, 0.2)))  # no better than a coin
    assert not family.improved(result((0.69, 0.0, 0.0), (0.7, 0.6, 0.2)))
    assert family.improved(result((3.0, 0.4, -0.5), (2.9, 0.45, -0.4)))  # without a reference: from where it was
    assert not family.improved(result((3.0, 0.6, 0.3), (2.9, 0.6, 0.4)))
