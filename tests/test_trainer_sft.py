"""Supervised fine-tuning on a tiny random Llama, and the data that trainers read: what is learned, refused, resumed."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from tiny_data import assert_same_gradients, demonstrations, gradients, prompts, settings, timeless
from tiny_llama import END, save_with_tokenizer, tiny_model, weights

from rl4llm_fast import cli
from rl4llm_fast.trainer import CurryConfig, DPOConfig, KTOConfig, SFTConfig, fill, train_sft
from rl4llm_fast.trainer.layout import packed_layout, plain_layout
from rl4llm_fast.trainer.policy import Policy
from rl4llm_fast.trainer.sft import SFTTrainer

transformers = pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
pytestmark = pytest.mark.usefixtures("one_thread")


def run(tmp_path, model=None, rows=None, **changes):
    config = SFTConfig(**settings(tmp_path, **changes))
    return train_sft(config, model=model or tiny_model(), rows=rows or demonstrations())


@pytest.mark.parametrize(
    "changes", [{}, {"packing": True}, {"precision": "bf16", "micro_batch_size": 3}, {"precision": "autocast"}]
)
def test_the_heldout_loss_falls(tmp_path, changes):
    model = tiny_model(dtype=torch.bfloat16 if changes.get("precision") == "bf16" else torch.float32)
    result = run(tmp_path, model, steps=30, eval_every=10, **changes)
    held = [row["heldout_loss"] for row in result.history if "heldout_loss" in row]
    assert [row["step"] for row in result.history] == list(range(31))
    assert len(held) == 4
    assert held[-1] < 0.7 * held[0]
    assert (tmp_path / "sft.png").read_bytes().startswith(b"\x89PNG")


def test_the_loss_is_that_of_the_answers_alone(tmp_path):
    rows = demonstrations(8)
    model = tiny_model()
    trainer = SFTTrainer(SFTConfig(**settings(tmp_path, heldout=0)), model=model, rows=rows)
    trainer.optimizer.step = lambda rate, norm: 0.0
    loss = trainer.step(1)["loss"]
    total, tokens = 0.0, 0
    for row in rows:
        prompt, answer = row["prompt"], row["answer"]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].detach().double()
        total -= float(torch.log_softmax(logits, -1)[range(len(answer)), answer].sum())
        tokens += len(answer)
    assert loss == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_micro_batches_and_packing_equal_the_whole_batch(tmp_path, aggregation):
    found = []
    for changes in ({}, {"micro_batch_size": 3}, {"packing": True, "max_length": 24}):
        config = SFTConfig(**settings(tmp_path, aggregation=aggregation, **changes))
        found.append(gradients(SFTTrainer(config, model=tiny_model(), rows=demonstrations())))
    for other in found[1:]:
        assert_same_gradients(found[0], other)


def test_same_curve_fused_and_eager(tmp_path):
    curves = [run(tmp_path / backend, steps=8, backend=backend).history for backend in ("auto", "eager")]
    for fused, eager in zip(*curves, strict=True):
        assert fused["loss"] == pytest.approx(eager["loss"], abs=1e-5)


def test_resumes_bit_exactly(tmp_path):
    changes = {"checkpoint_every": 3, "eval_every": 2, "precision": "bf16"}
    whole = run(tmp_path / "whole", tiny_model(dtype=torch.bfloat16), steps=6, **changes)
    run(tmp_path / "cut", tiny_model(dtype=torch.bfloat16), steps=3, **changes)
    torch.manual_seed(12345)
    rest = run(tmp_path / "cut", tiny_model(dtype=torch.bfloat16), steps=6, **changes)
    # The first run of three steps also measured at its end, step 3.
    rows = timeless(rest)
    assert rows[3].pop("heldout_loss") > 0
    rows[3].pop("heldout_perplexity")
    assert rows == timeless(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.model), weights(rest.model), strict=True))


def test_a_checkpoint_of_other_rows_is_refused(tmp_path):
    run(tmp_path, steps=1, checkpoint_every=1)
    with pytest.raises(ValueError, match="written with other rows of data; use resume=false"):
        run(tmp_path, rows=demonstrations(40), steps=2, checkpoint_every=1)
    assert len(run(tmp_path, rows=demonstrations(40), steps=2, resume=False).history) == 2


def test_packed_layout_equals_one_row_an_answer():
    model = tiny_model()
    policy = Policy(model)
    some = prompts(7)
    answers = [[*range(1, 2 + i), END] for i in range(7)]
    plain, _ = policy.token_logprobs(plain_layout(some, answers), temperature=1.0)
    layout = packed_layout(some, answers, 16)
    packed, _ = policy.token_logprobs(layout, temperature=1.0)
    assert layout.input_ids.shape[0] < 7
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)


def test_packed_layout_by_hand():
    layout = packed_layout([[1, 2], [3], [4, 5, 6]], [[7, 8], [9], [9, 9]], 5)
    assert layout.input_ids.tolist() == [[1, 2, 7, 3], [4, 5, 6, 9]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert layout.source.tolist() == [1, 2, 3, 6, 7]
    assert layout.token_ids.tolist() == [7, 8, 9, 9, 9]
    assert (~layout.unseen())[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]


# The data


BROKEN = [
    ({"prompt": [1]}, "answer: missing"),
    ({"prompt": [], "answer": [1]}, "prompt: empty"),
    ({"prompt": [1], "answer": []}, "answer: empty"),
    ({"prompt": [1], "answer": 3.5}, "answer: wanted text or token ids"),
    ({"prompt": [1], "answer": "text"}, "tokenizer"),
    ({"prompt": [1] * 60, "answer": [1] * 10}, "70 tokens (60 of the prompt), more than max_length = 64"),
    ([1, 2], "wanted an object, got list"),
]


def test_rows_that_cannot_be_used_are_counted_with_their_lines(tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    good = [json.dumps(row) for row in demonstrations(20)]
    path.write_text("\n".join([*good[:10], "", "{broken", json.dumps(BROKEN[0][0]), *good[10:]]), encoding="utf-8")
    config = SFTConfig(**settings(tmp_path, data=str(path), steps=1))
    trainer = SFTTrainer(config, model=tiny_model())
    assert len(trainer.train) + len(trainer.heldout) == 20
    printed = capsys.readouterr().out
    assert "2 of 22 rows cannot be used" in printed
    assert "line 12: no JSON" in printed
    assert "line 13: answer: missing" in printed
    config.strict = True
    with pytest.raises(ValueError, match=r"data\.jsonl, line 12: no JSON"):
        SFTTrainer(config, model=tiny_model())


@pytest.mark.parametrize(("row", "message"), BROKEN, ids=[message.split(":")[0] for _, message in BROKEN])
def test_a_broken_row_stops_a_strict_run(tmp_path, row, message):
    config = SFTConfig(**settings(tmp_path, strict=True, max_length=64, heldout=0))
    with pytest.raises(ValueError, match="rows, line 2") as caught:
        SFTTrainer(config, model=tiny_model(), rows=[demonstrations(1)[0], row])
    assert message in str(caught.value)


def test_held_out_rows_are_not_trained_on(tmp_path):
    trainer = SFTTrainer(SFTConfig(**settings(tmp_path)), model=tiny_model(), rows=demonstrations())
    assert (len(trainer.train), len(trainer.heldout)) == (48, 12)
    own = SFTTrainer(
        SFTConfig(**settings(tmp_path)), model=tiny_model(), rows=demonstrations(), heldout_rows=demonstrations(3)
    )
    assert (len(own.train), len(own.heldout)) == (60, 3)


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        (SFTConfig, "pakcing=true", "'pakcing'; the nearest is 'packing'"),
        (SFTConfig, "batch_size=0", "batch_size: wanted at least 1"),
        (SFTConfig, "aggregation=sum", "aggregation: wanted one of token_mean"),
        (SFTConfig, "precision=int4", "precision: wanted one of"),
        (DPOConfig, "loss=dpoo", "loss: wanted one of dpo"),
        (DPOConfig, "beta=0", "beta: wanted more than 0"),
        (DPOConfig, "refernce=live", "the nearest is 'reference'"),
    ],
)
def test_config_errors(kind, override, message):
    with pytest.raises(ValueError, match=message):
        fill(kind, None, [override])


def test_missing_data(tmp_path):
    with pytest.raises(ValueError, match="data: wanted a JSONL file"):
        train_sft(SFTConfig(**settings(tmp_path)), model=tiny_model())
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        train_sft(SFTConfig(**settings(tmp_path, data=str(tmp_path / "none.jsonl"))), model=tiny_model())
    with pytest.raises(ValueError, match="heldout: wanted fewer than the 3 rows"):
        run(tmp_path, rows=demonstrations(3))


@pytest.mark.parametrize(
    ("algorithm", "row"),
    [
        ("sft", {"prompt": "w1 w2", "answer": "w3 w4"}),
        ("dpo", {"prompt": "w1 w2", "chosen": "w3", "rejected": "w4 w5"}),
        ("kto", {"prompt": "w1 w2", "answer": "w3", "desirable": True}),
        ("curry", {"prompt": "w1 w2", "answers": ["w3", "w4 w5", "w6"], "ranks": [0, 1, 2]}),
        ("rm", {"prompt": "w1 w2", "answers": ["w3", "w4 w5", "w6"], "ranks": [0, 1, 1]}),
    ],
)
def test_the_command_trains_a_saved_model_on_text(tmp_path, capsys, algorithm, row):
    save_with_tokenizer(tmp_path / "m")
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps(row)] * 12), encoding="utf-8")
    (tmp_path / "run.toml").write_text(f'model = "{tmp_path / "m"}"\ndata = "{tmp_path / "data.jsonl"}"\nheldout = 4\n')
    overrides = ["steps=2", "eval_every=1", f"output_dir={tmp_path / 'out'}", "progress=false", "device=cpu"]
    arguments = [part for override in overrides for part in ("--set", override)]
    assert cli.main(["train", algorithm, str(tmp_path / "run.toml"), *arguments]) == 0
    assert "heldout loss" in capsys.readouterr().out
    assert {"metrics.jsonl", "checkpoint.pt", "model", f"{algorithm}.png"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert cli.main(["train", algorithm, "--set", "stepz=3"]) == 2
    assert "the nearest is 'steps'" in capsys.readouterr().err


def test_missing_extra_names_the_command(monkeypatch, tmp_path):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tqdm" else find(name, *a))
    with pytest.raises(ImportError, match=r"pip install 'rl4llm_fast\[trainer\]'"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sft_film_reviews", SFTConfig),
        ("dpo_film_reviews", DPOConfig),
        ("2d_dpo_film_reviews", DPOConfig),
        ("curry_film_reviews", CurryConfig),
        ("kto_film_reviews", KTOConfig),
    ],
)
def test_the_examples_are_valid_configs(name, kind):
    path = pathlib.Path(__file__).resolve().parent.parent / "examples" / f"{name}.toml"
    assert fill(kind, path).data
