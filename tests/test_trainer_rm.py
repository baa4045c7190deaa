"""The reward model on a tiny random Llama: pairs and ranked answers, the shift of its scores, saving, resuming."""

from __future__ import annotations

import pathlib

import pytest
import torch
from tiny_data import assert_same_gradients, gradients, pairs, prompts, settings, timeless
from tiny_llama import END, tiny_model, weights

from rl4llm_fast.trainer import RMConfig, fill, load_reward_model, train_rm
from rl4llm_fast.trainer.reward_model import RewardModel
from rl4llm_fast.trainer.rm import RMTrainer

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
pytestmark = pytest.mark.usefixtures("one_thread")


def rankings(count: int = 60) -> list[dict]:
    """The more sevens the better, listed in any order."""
    rows = []
    for i, prompt in enumerate(prompts(count)):
        answers = [[*[7] * k, *[9 + i % 20] * (3 - k), END] for k in range(4)]
        ranks = [3, 2, 1, 0]
        turn = i % 4
        rows.append(
            {"prompt": prompt, "answers": answers[turn:] + answers[:turn], "ranks": ranks[turn:] + ranks[:turn]}
        )
    return rows


def trainer_of(tmp_path, rows=None, **changes) -> RMTrainer:
    return RMTrainer(RMConfig(**settings(tmp_path, **changes)), model=tiny_model(), rows=rows or pairs())


def run(tmp_path, rows=None, model=None, **changes):
    return train_rm(RMConfig(**settings(tmp_path, **changes)), model=model or tiny_model(), rows=rows or pairs())


@pytest.mark.parametrize("data", [pairs, rankings])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_heldout_accuracy_rises(tmp_path, data, precision):
    model = tiny_model(dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    result = run(tmp_path, data(), model, steps=25, eval_every=25, precision=precision)
    first, last = result.history[0], result.history[-1]
    assert last["heldout_loss"] < 0.5 * first["heldout_loss"]
    assert last["heldout_accuracy"] > 0.9
    assert (tmp_path / "rm.png").read_bytes().startswith(b"\x89PNG")


def test_scores_are_read_at_the_last_token_whatever_is_padded():
    model = RewardModel.of(tiny_model())
    sequences = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    together = model(sequences)
    for sequence, score in zip(sequences, together, strict=True):
        hidden = model.decoder(input_ids=torch.tensor([sequence])).last_hidden_state[0, -1]
        torch.testing.assert_close(score, hidden @ model.weight, rtol=1e-5, atol=1e-5)


def test_the_anchors_mean_score_is_zero_and_the_model_loads_again(tmp_path):
    result = run(tmp_path, steps=10, save_model=True, anchors=20)
    trainer = trainer_of(tmp_path, anchors=20)  # the same rows are held out
    anchors = [ranking.prompt + ranking.best() for ranking in trainer.train[:20]]
    with torch.no_grad():
        scores = result.model(anchors)
        assert scores.std() > 0.01
        assert float(scores.mean()) == pytest.approx(0.0, abs=1e-5)
        assert result.model.bias != 0
        torch.testing.assert_close(load_reward_model(tmp_path / "model")(anchors), scores)
    assert float(run(tmp_path / "none", steps=1, anchors=0).model.bias) == 0
    with pytest.raises(ValueError, match=r"no reward_head\.json"):
        load_reward_model(tmp_path)


@pytest.mark.parametrize("data", [pairs, rankings])
def test_micro_batches_equal_the_whole_batch(tmp_path, data):
    found = [gradients(trainer_of(tmp_path, data(), micro_batch_size=size)) for size in (0, 3)]
    assert_same_gradients(*found)


def test_the_accuracy_of_rows_of_different_sizes_by_hand(tmp_path):
    rows = [
        {"prompt": [1], "answers": [[2], [3], [4]], "ranks": [0, 1, 2]},
        {"prompt": [1], "answers": [[5], [6]], "ranks": [1, 0]},
    ]
    trainer = trainer_of(tmp_path, rows, heldout=0)
    trainer.model = lambda sequences: torch.tensor([0.0, 2.0, 1.0, 7.0, 8.0])
    # of the first row's pairs (2, 3), (2, 4), (3, 4) only the last is in order; the second row's one is
    assert float(trainer.loss(trainer.train)[1]["accuracy"]) == pytest.approx((1 / 3 + 1) / 2)


def test_pairs_are_rankings_of_two(tmp_path):
    ranked = [{"prompt": r["prompt"], "answers": [r["rejected"], r["chosen"]], "ranks": [5, 2]} for r in pairs()]
    found = [gradients(trainer_of(tmp_path, rows)) for rows in (pairs(), ranked)]
    assert_same_gradients(*found)
    # and a margin is worth what it should be: −log σ(d − m)
    trainer = trainer_of(tmp_path, margin=1.5)
    batch = trainer.train[:4]
    with torch.no_grad():
        scores = trainer.model([r.prompt + a for r in batch for a in r.answers])
        expected = -torch.nn.functional.logsigmoid(scores[::2] - scores[1::2] - 1.5).mean()
        torch.testing.assert_close(trainer.loss(batch)[0], expected)


def test_same_curve_fused_and_eager(tmp_path):
    curves = [run(tmp_path / backend, steps=8, backend=backend).history for backend in ("auto", "eager")]
    for fused, eager in zip(*curves, strict=True):
        assert fused["loss"] == pytest.approx(eager["loss"], abs=1e-5)


def test_resumes_bit_exactly(tmp_path):
    def half():
        return tiny_model(dtype=torch.bfloat16)

    changes = {"checkpoint_every": 3, "precision": "bf16"}
    whole = run(tmp_path / "whole", model=half(), steps=6, **changes)
    run(tmp_path / "cut", model=half(), steps=3, **changes)
    torch.manual_seed(12345)
    rest = run(tmp_path / "cut", model=half(), steps=6, **changes)
    assert timeless(rest) == timeless(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.model), weights(rest.model), strict=True))
    assert torch.equal(whole.model.bias, rest.model.bias)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": [[1], [2]], "ranks": [0]}, "ranks: wanted 2 integers"),
        ({"answers": [[1], [2]], "ranks": [1, 1]}, "no answer is better"),
        ({"answers": [[1], []], "ranks": [0, 1]}, "answers: empty"),
        ({"answers": "ab", "ranks": [0, 1]}, "answers, ranks: wanted two lists"),
        ({"chosen": [1], "rejected": [1]}, "the same answer"),
        ({"chosen": [1]}, "rejected: missing"),
    ],
)
def test_rows_that_are_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, [{"prompt": [1], **row}], strict=True, heldout=0)


def test_the_config(tmp_path):
    example = pathlib.Path(__file__).resolve().parent.parent / "examples" / "rm_film_reviews.toml"
    assert fill(RMConfig, example).data
    with pytest.raises(ValueError, match="'anchor'; the nearest is 'anchors'"):
        fill(RMConfig, None, ["anchor=3"])
    with pytest.raises(ValueError, match="margin: for pairs; this row has 4 answers"):
        trainer_of(tmp_path, rankings(), margin=1.0, strict=True)
    with pytest.raises(ValueError, match="a decoder apart from its head"):
        RewardModel.of(torch.nn.Linear(2, 2))
