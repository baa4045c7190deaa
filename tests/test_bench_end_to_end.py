"""Whole steps of the trainers and of TRL's: the same gradient from the same answers, and the rows made of them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from tiny_llama import END, save_with_tokenizer

from bench import end_to_end, report, run, trainer_steps
from rl4llm_fast import reference
from rl4llm_fast.trainer import compare
from rl4llm_fast.trainer.compare import take_turns

pytest.importorskip("transformers")
SMALL = {"prompts": 3, "prompt": 8, "group": 4, "answer": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("model")
    save_with_tokenizer(made)
    return str(made)


@pytest.mark.parametrize("trainer", end_to_end.TRAINERS)
def test_everyone_takes_the_same_step(trainer: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    plain: list[str] = []
    obvious = compare.plain_token_logprobs
    counted = lambda *args, **how: plain.append(variant) or obvious(*args, **how)  # noqa: E731
    monkeypatch.setattr(compare, "plain_token_logprobs", counted)
    monkeypatch.setattr(reference, "token_logprobs", reference.token_logprobs)  # put back after the test
    batch = trainer_steps.make_batch(trainer, SMALL, END)
    assert json.loads(json.dumps(batch)) == batch
    found = {}
    variants = [v for v in trainer_steps.VARIANTS if v != "trl" or trainer in trainer_steps.TRL]
    for variant in variants:
        if variant == "eager":
            trainer_steps.take_plain_logprobs()
        step = trainer_steps.make_step(trainer, variant, batch, folder, "fp32", "cpu")
        found[variant] = [step(), step()]
    for variant in variants[1:]:
        for mine, theirs in zip(found["fused"], found[variant], strict=True):
            assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)
            assert trainer_steps.agrees(theirs["grad_norm"], mine["grad_norm"], "fp32")
    assert set(plain) == (set() if trainer == "rm" else {"eager"})  # not the library's own oracle, which is slower
    first, second = found[variants[-1]]
    assert first["grad_norm"] != second["grad_norm"]  # the optimizer took its step


def test_the_batch_by_hand() -> None:
    grpo = trainer_steps.make_batch("grpo", SMALL, END)
    assert (len(grpo["prompts"]), len(grpo["answers"]), len(grpo["advantages"])) == (3, 12, 12)
    assert all(3 <= len(answer) <= 12 and max(answer) < END for answer in grpo["answers"])
    assert trainer_steps.make_batch("grpo", SMALL, END) == grpo
    given = {"prompts": [[1, 2], [3]], "group_size": 2, "answers": [[1], [2, 3], [4], [5]]}
    assert trainer_steps.tokens_of("grpo", given) == 2 * 3 + 5
    rows = [{"prompt": [1, 2], "chosen": [3], "rejected": [4, 5, 6]}]
    assert trainer_steps.tokens_of("dpo", {"rows": rows}) == 2 * 2 + 1 + 3
    ids, mask = trainer_steps._padded([[1, 2], [3]], 9, left=True)
    assert (ids.tolist(), mask.tolist()) == ([[1, 2], [9, 3]], [[1, 1], [0, 1]])


def steps(*seconds: float, norm: float = 2.0) -> list[dict[str, float]]:
    return [{"seconds": s, "before": 100.0, "peak": 100.0 + 50 * s, "loss": 0.5, "grad_norm": norm} for s in seconds]


def test_the_first_step_is_not_timed_and_a_wrong_gradient_gets_no_ratio() -> None:
    fused = end_to_end.cost(steps(9.0, 1.0, 2.0, 3.0), tokens=100)
    assert (fused["median_s"], fused["tokens_per_s"], fused["extra_bytes"]) == (2.0, 50.0, 100)
    rows = [
        {"trainer": "grpo", "variant": "fused", **fused},
        {"trainer": "grpo", "variant": "eager", **end_to_end.cost(steps(9.0, 4.0, norm=2.001), 100)},
        {"trainer": "grpo", "variant": "trl", **end_to_end.cost(steps(9.0, 4.0, norm=2.2), 100)},
    ]
    _, eager, trl = end_to_end.with_ratios(rows, "fp32")
    assert eager["speedup"] == 2.0
    assert "speedup" not in trl
    meta = {**run.environment("cpu"), "command": "c", "precision": "fp32", "sizes": SMALL, "trl": "1"}
    text = end_to_end.markdown({"meta": meta, "rows": rows})
    assert "| grpo | fused | 2 s (1.4 – 2.6) | 50 | 0 MiB |  |" in text
    assert "| grpo | eager | 4 s (4 – 4) | 25 | 0 MiB | 2.00x |" in text
    assert "| other gradient |" in text


def test_the_command_from_end_to_end(
    folder: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(end_to_end.SIZES, "cpu", SMALL)
    monkeypatch.setattr(end_to_end.importlib.util, "find_spec", lambda name: None)
    arguments = ["--model", folder, "--trainers", "dpo", "--precision", "fp32", "--rounds", "2", "--out", str(tmp_path)]
    arguments += ["--variants", "fused,trl"]
    assert end_to_end.main(arguments) == 0
    (path,) = tmp_path.glob("end-to-end-*.json")
    fused, trl = json.loads(path.read_text())["rows"]
    assert fused["status"] == "ok"
    assert fused["tokens_per_s"] > 0
    assert trl == {"trainer": "dpo", "variant": "trl", "status": "absent", "reason": "not installed: trl"}
    assert "| dpo | trl | absent: not installed: trl | – | – | – |" in capsys.readouterr().out
    page, (begin, end) = tmp_path / "page.md", report.marks("end-to-end")
    page.write_text(f"{begin}\n{end}\n")
    assert report.main([str(path), "--performance", str(page)]) == 0
    assert "| dpo | fused |" in page.read_text()


def test_a_process_that_dies_is_a_row(tmp_path: pathlib.Path) -> None:
    batch: dict[str, Any] = {"rows": [{"prompt": [1], "chosen": [2], "rejected": [3]}]}
    (row,) = end_to_end.measure("dpo", batch, str(tmp_path / "no-model"), "fp32", "cpu", 1, ["fused"])
    assert row["status"] == "failed"
    assert "ended with status" in row["reason"]


def test_a_worker_that_dies_on_the_way_leaves_the_others_their_turns() -> None:
    class Worker:
        def __init__(self, dies_at: int) -> None:
            self.left = dies_at

        def step(self) -> dict[str, float]:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("ended with status -9")
            return {"seconds": 1.0}

    failed: dict[str, str] = {}
    workers: Any = {"a": Worker(9), "b": Worker(1), "c": Worker(9)}
    rows = take_turns(workers, 3, failed)
    assert {name: len(steps) for name, steps in rows.items()} == {"a": 3, "c": 3}
    assert failed == {"b": "ended with status -9"}
    with pytest.raises(RuntimeError, match="status -9"):
        take_turns(workers, 1)


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        end_to_end.main(["--trainers", "grpo,ppt"])
    assert "got 'grpo,ppt'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        end_to_end.main(["--variants", "fused,egaer"])
    assert "got 'fused,egaer'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert end_to_end.main(["--device", "cuda"]) == 2
