"""Curry-DPO on a tiny random Llama: rank lists as rounds of pairs, each round's reference, resumed anywhere."""

from __future__ import annotations

import pytest
import torch
from tiny_data import ranked, settings, timeless
from tiny_llama import END, tiny_model, weights

from rl4llm_fast.trainer import CurryConfig, train_curry
from rl4llm_fast.trainer.curry import CurryTrainer, Ranking, in_rounds
from rl4llm_fast.trainer.reference_cache import answer_logprobs

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
pytestmark = pytest.mark.usefixtures("one_thread")


def config(tmp_path, **changes) -> CurryConfig:
    return CurryConfig(**settings(tmp_path, **{"steps": 0, "steps_per_round": 4, **changes}))


def trainer_of(tmp_path, rows=None, **changes) -> CurryTrainer:
    return CurryTrainer(config(tmp_path, **changes), model=tiny_model(), rows=rows or ranked())


def run(tmp_path, model=None, rows=None, **changes):
    return train_curry(config(tmp_path, **changes), model=model or tiny_model(), rows=rows or ranked())


def test_improves_held_out_pairs(tmp_path):
    result = run(tmp_path, steps_per_round=10, eval_every=10)
    held = [row for row in result.history if "heldout_loss" in row]
    assert [row["step"] for row in held] == [0, 10, 20, 30]
    assert [row["round"] for row in result.history[1:]] == [1] * 10 + [2] * 10 + [3] * 10
    assert held[-1]["heldout_loss"] < held[0]["heldout_loss"]
    assert held[-1]["heldout_margin"] > held[0]["heldout_margin"]
    assert held[-1]["heldout_accuracy"] > 0.85
    assert (tmp_path / "curry.png").read_bytes().startswith(b"\x89PNG")


def test_pairs_of_a_ranking():
    ranking = Ranking([1], [[2], [3], [4], [5]], [0, 2, 0, 5])
    found = {(gap, pair.chosen[0], pair.rejected[0]) for gap, pair in ranking.pairs("best")}
    assert found == {(2, 2, 3), (5, 2, 5), (2, 4, 3), (5, 4, 5)}
    assert {(gap, p.chosen[0], p.rejected[0]) for gap, p in ranking.pairs("all")} == found | {(3, 3, 5)}


def test_the_widest_gap_comes_first(tmp_path):
    trainer = trainer_of(tmp_path, rows=ranked(20), heldout=0)
    gaps = [{p.chosen.count(7) - p.rejected.count(7) for p in part} for part in trainer.rounds]
    assert gaps == [{3}, {2}, {1}]
    assert [len(part) for part in trainer.rounds] == [20, 20, 20]
    every = [pair for row in trainer.rounds for pair in row]
    assert all(pair.chosen.count(7) == 3 for pair in every)
    pairs = Ranking([1], [[2], [3], [4], [5]], [0, 1, 2, 3]).pairs("all")
    assert [len(part) for part in in_rounds(pairs, 0)] == [1, 2, 3]
    assert [len(part) for part in in_rounds(pairs, 2)] == [3, 3]
    with pytest.raises(ValueError, match="rounds: wanted at most 3, as many as there are rank gaps, got 4"):
        in_rounds(pairs, 4)


def test_the_reference_of_a_round_is_the_last_rounds_policy(tmp_path):
    trainer = trainer_of(tmp_path)
    for step in range(1, 9):
        before = weights(trainer.model)
        row = trainer.step(step)
        if step in (1, 5):  # first steps of rounds: the policy is its own reference
            assert row["margin"] == pytest.approx(0.0, abs=1e-5)
            assert row["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
            start = before
        else:
            assert abs(row["margin"]) > 1e-3
    with torch.no_grad():
        for parameter, value in zip(trainer.model.parameters(), start, strict=True):
            parameter.copy_(value)
        pair = trainer.batch(8)[0]
        texts = trainer.texts([pair])
        torch.testing.assert_close(torch.cat(pair.reference), answer_logprobs(trainer.policy, *texts))


@pytest.mark.parametrize("cut", [3, 4, 10])
def test_resumes_bit_exactly_between_and_inside_rounds(tmp_path, cut):
    def half():
        return tiny_model(dtype=torch.bfloat16)

    changes = {"checkpoint_every": 2, "eval_every": 4, "precision": "bf16"}
    whole = run(tmp_path / "whole", half(), **changes)
    run(tmp_path / "cut", half(), steps=cut, **{**changes, "checkpoint_every": cut})
    for path in (tmp_path / "cut" / "reference").iterdir():
        path.unlink()  # what a round needs lies in the checkpoint
    rest = run(tmp_path / "cut", half(), **changes)
    without = [{k: v for k, v in row.items() if not k.startswith("heldout")} for row in timeless(rest)]
    assert without == [{k: v for k, v in row.items() if not k.startswith("heldout")} for row in timeless(whole)]
    assert rest.history[-1]["heldout_loss"] == whole.history[-1]["heldout_loss"]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.model), weights(rest.model), strict=True))


@pytest.mark.parametrize("loss", ["ipo", "hinge"])
def test_other_losses_and_micro_batches(tmp_path, loss):
    whole = run(tmp_path / "whole", loss=loss, steps=6).history
    parts = run(tmp_path / "parts", loss=loss, steps=6, micro_batch_size=3).history
    for one, other in zip(whole, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-4)


def test_same_curve_fused_and_eager(tmp_path):
    curves = [run(tmp_path / backend, steps=9, backend=backend).history for backend in ("auto", "eager")]
    for fused, eager in zip(*curves, strict=True):
        assert fused["loss"] == pytest.approx(eager["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [1, 1, 1, 1]}, "line 2: ranks: no answer is better than another"),
        ({"ranks": [0, 1, 2]}, "line 2: ranks: wanted 4 integers"),
        (
            {"answers": [[1, END], [1, END], [2, END], [3, END]]},
            "line 2: answers: the same answer at the ranks 0 and 1",
        ),
        ({"answers": [[1, END], [], [2, END], [3, END]]}, "line 2: answers: empty"),
        ({"answers": "text"}, "line 2: answers, ranks: wanted two lists"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, capsys, change, message):
    rows = ranked()
    rows[1] = rows[1] | change
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, rows=rows, strict=True)
    assert len(trainer_of(tmp_path, rows=rows).rounds[0]) == 60 - 1 - 12
    assert "1 of 60 rows cannot be used" in capsys.readouterr().out


def test_settings_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="steps: wanted at most 3 rounds of 4 steps, got 13"):
        trainer_of(tmp_path, steps=13)
    for setting in ({"loss": "simpo"}, {"reference": "live"}, {"pairs": "some"}, {"steps_per_round": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(setting))}: wanted"):
            config(tmp_path, **setting)
