"""KTO on a tiny random Llama: it learns, z is the whole batch's, and what (74) says is said."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_data import assert_same_gradients, gradients, labelled, settings, timeless
from tiny_llama import END, tiny_model, weights

from rl4llm_fast.trainer import KTOConfig, train_kto
from rl4llm_fast.trainer.kto import KTOTrainer, weight_warning

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
pytestmark = pytest.mark.usefixtures("one_thread")


def trainer_of(tmp_path, rows=None, **changes) -> KTOTrainer:
    return KTOTrainer(KTOConfig(**settings(tmp_path, **changes)), model=tiny_model(), rows=rows or labelled())


def off_the_reference(trainer) -> None:
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.1)


def run(tmp_path, model=None, rows=None, **changes):
    return train_kto(KTOConfig(**settings(tmp_path, **changes)), model=model or tiny_model(), rows=rows or labelled())


@pytest.mark.parametrize("reference", ["precomputed", "live"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_improves_held_out_answers(tmp_path, reference, precision):
    model = tiny_model(dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    result = run(tmp_path, model, reference=reference, precision=precision, steps=25, eval_every=25)
    first, last = result.history[0], result.history[-1]
    assert last["heldout_loss"] < first["heldout_loss"]
    assert last["heldout_reward_chosen"] > last["heldout_reward_rejected"]
    assert last["heldout_accuracy"] > 0.8 > first["heldout_accuracy"]
    assert first["heldout_kl"] == pytest.approx(0.0, abs=1e-6)
    assert last["heldout_kl"] > 0.01
    assert (tmp_path / "kto.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_loss_by_hand(tmp_path):
    # Policy and reference are the same: r = z = 0, v = 1/2, w = 3 or 1 for half of the answers each.
    trainer = trainer_of(tmp_path, rows=labelled(8), heldout=0, lambda_d=3.0)
    row = trainer.step(1)
    assert row["loss"] == pytest.approx(1.0, abs=1e-6)
    assert row["z"] == pytest.approx(0.0, abs=1e-6)
    assert row["weight_ratio"] == pytest.approx(3.0)


def test_z_and_the_loss_by_hand(tmp_path):
    rows, beta = labelled(8), 0.3
    trainer = trainer_of(tmp_path, rows=rows, heldout=0, beta=beta, lambda_u=1.25)
    off_the_reference(trainer)
    first, now = tiny_model(), trainer.model

    def total(model, prompt, answer):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].detach().double()
        return float(torch.log_softmax(logits, -1)[range(len(answer)), answer].sum())

    def reward(prompt, answer):
        return beta * (total(now, prompt, answer) - total(first, prompt, answer))

    assert len({tuple(row["prompt"]) for row in rows}) == len(rows)
    z = max(0.0, sum(reward(row["prompt"], rows[i - 1]["answer"]) for i, row in enumerate(rows)) / len(rows))
    found = {True: [], False: []}
    loss = 0.0
    for row in rows:
        r = reward(row["prompt"], row["answer"])
        found[row["desirable"]].append(r)
        sign, weight = (1, 1.0) if row["desirable"] else (-1, 1.25)
        loss += weight * (1 - 1 / (1 + math.exp(-sign * (r - z)))) / len(rows)
    trainer.optimizer.step = lambda rate, norm: 0.0
    step = trainer.step(1)
    assert step["z"] == pytest.approx(z, abs=1e-5)
    assert step["loss"] == pytest.approx(loss, abs=1e-5)
    assert step["reward_chosen"] == pytest.approx(sum(found[True]) / 4, abs=1e-4)
    assert step["reward_rejected"] == pytest.approx(sum(found[False]) / 4, abs=1e-4)


def test_reference_layout_and_micro_batches_change_nothing(tmp_path):
    found, rows = [], []
    for changes in ({"layout": "plain"}, {"layout": "shared"}, {"reference": "live"}, {"micro_batch_size": 3}):
        trainer = trainer_of(tmp_path, **changes)
        off_the_reference(trainer)
        found.append(gradients(trainer))
        rows.append(trainer.step(1))
    for other, row in zip(found[1:], rows[1:], strict=True):
        assert_same_gradients(found[0], other)
        for name in ("loss", "z", "margin", "reward_chosen", "reward_rejected", "accuracy"):
            assert row[name] == pytest.approx(rows[0][name], abs=1e-4), name


def test_same_curve_fused_and_eager(tmp_path):
    curves = [run(tmp_path / backend, steps=8, backend=backend).history for backend in ("auto", "eager")]
    for fused, eager in zip(*curves, strict=True):
        assert fused["loss"] == pytest.approx(eager["loss"], abs=1e-5)
        assert fused["z"] == pytest.approx(eager["z"], abs=1e-4)


def test_resumes_bit_exactly(tmp_path):
    changes = {"checkpoint_every": 3, "eval_every": 2, "precision": "bf16"}

    def half():
        return tiny_model(dtype=torch.bfloat16)

    whole = run(tmp_path / "whole", half(), steps=6, **changes)
    run(tmp_path / "cut", half(), steps=4, **changes)
    torch.manual_seed(12345)
    rest = run(tmp_path / "cut", half(), steps=6, **changes)
    assert timeless(rest) == timeless(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.model), weights(rest.model), strict=True))


def test_mismatched_answers_belong_to_other_prompts(tmp_path):
    rows = [{"prompt": [p], "answer": [a, END], "desirable": True} for p, a in ((1, 2), (1, 3), (4, 5), (6, 7), (6, 8))]
    trainer = trainer_of(tmp_path, rows=rows, heldout=0)
    assert [row.other[0] for row in trainer.train] == [8, 8, 3, 5, 5]
    one = [row | {"prompt": [1]} for row in rows]
    assert [row.other[0] for row in trainer_of(tmp_path, rows=one, heldout=0).train] == [8, 2, 3, 5, 7]
    rows[1] |= {"answer": [3] * 6 + [END]}
    short = trainer_of(tmp_path, rows=[*rows[:2], rows[2] | {"prompt": [4] * 5}], heldout=0, max_length=8)
    assert short.train[2].other == [3, 3, 3]


def test_mismatched_answers_end_where_the_models_context_does(tmp_path):
    rows = [
        {"prompt": [1], "answer": [3] * 6, "desirable": True},
        {"prompt": [4] * 5, "answer": [6], "desirable": False},
    ]
    cfg = KTOConfig(**settings(tmp_path, heldout=0, max_length=20))
    trainer = KTOTrainer(cfg, model=tiny_model(max_position_embeddings=8), rows=rows)
    assert [row.other for row in trainer.train] == [[6], [3, 3, 3]]


def test_the_weights_that_74_asks_for(tmp_path, capsys):
    rows = labelled(60)
    uneven = [row for row in rows if row["desirable"]] + [row for row in rows if not row["desirable"]][:10]
    trainer = trainer_of(tmp_path, rows=uneven, heldout=0)
    told = capsys.readouterr().out
    assert "30 desirable / (lambda_u * 10 undesirable) = 3, outside of [1, 1.5] (74)" in told
    assert "lambda_d between 0.333 and 0.5" in told
    for lambda_d, warns in ((0.334, False), (0.499, False), (0.51, True), (0.32, True)):
        assert bool(weight_warning(trainer.train, lambda_d, 1.0)) is warns
    good = [row for row in trainer.train if row.desirable]
    assert "nothing to tell apart" in weight_warning(good, 1.0, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"desirable": 1}, "line 2: desirable: wanted true or false, got 1"),
        ({"answer": []}, "line 2: answer: empty"),
        ({"answer": [3] * 30}, "line 2: prompt and answer: .* more than max_length = 20"),
        ({"answer": "text"}, "line 2: tokenizer: answers that are text need one"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, capsys, change, message):
    rows = labelled()
    rows[1] = rows[1] | change
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, rows=rows, strict=True, max_length=20)
    trainer = trainer_of(tmp_path, rows=rows, max_length=20)
    assert len(trainer.train) == len(rows) - 1 - 12
    assert "1 of 60 rows cannot be used" in capsys.readouterr().out


def test_settings_out_of_range(tmp_path):
    for name in ("beta", "lambda_d", "lambda_u"):
        with pytest.raises(ValueError, match=f"{name}: wanted more than 0"):
            KTOConfig(**{name: 0.0})
