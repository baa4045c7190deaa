"""Where rows come from, and the one way in which all trainers refuse those that cannot be used."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_data import demonstrations, pairs, settings
from tiny_llama import PROMPTS, config, count_sevens, tiny_model

from rl4llm_fast.trainer import PPOConfig, RMConfig, SFTConfig, fill
from rl4llm_fast.trainer.data import Limits, numbered_rows, usable
from rl4llm_fast.trainer.grpo import GRPOTrainer
from rl4llm_fast.trainer.ppo import PPOTrainer
from rl4llm_fast.trainer.rm import RMTrainer
from rl4llm_fast.trainer.sft import SFTTrainer

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
pytestmark = pytest.mark.usefixtures("one_thread")


def plain(rows: list[dict]) -> list[dict]:
    return json.loads(json.dumps(rows, default=int))


def sft(tmp_path, **changes) -> SFTTrainer:
    return SFTTrainer(SFTConfig(**settings(tmp_path, **changes)), model=tiny_model())


def test_a_line_ends_at_the_newline_alone(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a\xe2\x80\xa8b"}\r\n\n{"prompt": "\xff"}\n{"prompt": "c"}')
    rows = numbered_rows(str(path))
    assert [line for line, _ in rows] == [1, 3, 4]
    assert rows[0][1] == {"prompt": "a\u2028b"}
    assert isinstance(rows[1][1], UnicodeDecodeError)
    found = usable(rows, "data", lambda row: row["prompt"] if isinstance(row, dict) else None, strict=False)
    assert found == ["a\u2028b", "c"]


def test_a_folder_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'datasets'")
    rows = plain(demonstrations(20))
    renamed = [{"question": row["prompt"], "completion": row["answer"]} for row in rows]
    both = {"train": datasets.Dataset.from_list(renamed), "test": datasets.Dataset.from_list(renamed[:5])}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "both"))
    both["train"].save_to_disk(str(tmp_path / "one"))
    columns = {"prompt": "question", "answer": "completion"}
    trainer = sft(tmp_path, data=str(tmp_path / "both"), heldout_split="test", columns=columns)
    assert [(e.prompt, e.answer) for e in trainer.train] == [(row["prompt"], row["answer"]) for row in rows]
    assert len(trainer.heldout) == 5
    assert len(sft(tmp_path, data=str(tmp_path / "one"), columns=columns, heldout=4).train) == 16
    with pytest.raises(ValueError, match=r"cannot load split 'dev' of .*both"):
        sft(tmp_path, data=str(tmp_path / "both"), split="dev")
    with pytest.raises(ValueError, match="prompt: missing; the row has question, completion"):
        sft(tmp_path, data=str(tmp_path / "one"))
    given = SFTTrainer(SFTConfig(**settings(tmp_path)), model=tiny_model(), rows=datasets.Dataset.from_list(rows))
    assert len(given.train) == 8


def test_an_id_of_hugging_face(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'datasets'")
    asked = []

    def load(name, split):
        asked.append((name, split))
        if name == "some/where-else":
            raise ConnectionError("no route")
        return plain(demonstrations(20))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(sft(tmp_path, data="some/where", heldout_split="test").heldout) == 20
    assert asked == [("some/where", "train"), ("some/where", "test")]
    with pytest.raises(ValueError, match="datasets cannot load split 'train' of 'some/where-else': no route"):
        sft(tmp_path, data="some/where-else")
    for file in ("where.jsonl", "some/where.jsonl", "/some/where"):
        with pytest.raises(FileNotFoundError):
            sft(tmp_path, data=file)


def test_missing_extra_names_the_command(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "datasets" else find(name, *a))
    with pytest.raises(ImportError, match=r"pip install 'rl4llm_fast\[datasets\]'"):
        sft(tmp_path, data="some/where")


def test_columns_are_names():
    with pytest.raises(ValueError, match="columns: wanted names of columns"):
        fill(SFTConfig, None, ["columns.answer=3"])


TOO_LONG = [*([1] * 70)]


def test_what_the_model_cannot_take_is_named(tmp_path, capsys):
    good, end = plain(demonstrations(20)), [3, 4]
    bad = [
        {"prompt": TOO_LONG, "answer": end},
        {"prompt": [1] * 63, "answer": end},
        {"prompt": [1], "answer": [32]},
        {"prompt": [-1], "answer": end},
    ]
    trainer = SFTTrainer(SFTConfig(**settings(tmp_path)), model=tiny_model(), rows=good + bad)
    assert len(trainer.train) + len(trainer.heldout) == 20
    printed = capsys.readouterr().out
    assert "rows: 4 of 24 rows cannot be used" in printed
    assert "line 21: prompt: 70 tokens leave no room in the model's context of 64" in printed
    assert "line 22: prompt and answer: 65 tokens (63 of the prompt), more than the model's context of 64" in printed
    assert "line 23: token ids: 32 is outside the vocabulary [0, 32)" in printed
    assert "line 24: token ids: -1 is outside" in printed
    with pytest.raises(ValueError, match="rows, line 21: prompt: 70 tokens"):
        SFTTrainer(SFTConfig(**settings(tmp_path, strict=True)), model=tiny_model(), rows=good + bad)


def test_limits_of_models():
    assert Limits.of(tiny_model()) == Limits(64, 32)
    assert Limits.of(torch.nn.Linear(1, 1)) == Limits()
    trained = RMTrainer(RMConfig(**settings("unused", heldout=0)), model=tiny_model(), rows=pairs(4))
    assert Limits.of(trained.model) == Limits(64, 32)


@pytest.mark.parametrize("strict", [False, True])
def test_prompts_that_cannot_be_used(tmp_path, capsys, strict):
    prompts = [*PROMPTS, [], TOO_LONG, "text", [1] * 62]
    arguments = {"model": tiny_model(), "prompts": prompts, "reward": count_sevens}

    def grpo() -> GRPOTrainer:
        return GRPOTrainer(config(tmp_path, strict=strict), **arguments)

    if strict:
        with pytest.raises(ValueError, match="prompts, line 5: prompt: empty"):
            grpo()
        return
    assert list(grpo().task.train) == PROMPTS
    printed = capsys.readouterr().out
    assert "prompts: 4 of 8 rows cannot be used" in printed
    for message in (
        "line 5: prompt: empty",
        "line 6: prompt: 70 tokens leave no room in the model's context of 64",
        "line 7: tokenizer: prompts that are text need one",
        "line 8: prompt and answer: 66 tokens (62 of the prompt), more than the model's context of 64",
    ):
        assert message in printed
    cfg = PPOConfig(**settings(tmp_path, heldout=0, max_new_tokens=4, max_length=64))
    arguments["prompts"] = [{"prompt": prompt} for prompt in prompts]
    assert [prompt.ids for prompt in PPOTrainer(cfg, **arguments).train] == PROMPTS
