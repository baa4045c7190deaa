"""2D-DPO as a loss of ``train dpo``: segments of answers, their scores over aspects, and the loss (79) by hand."""

from __future__ import annotations

import importlib.util
import json
import math
import pathlib

import pytest
import torch
from tiny_data import assert_same_gradients, gradients, pairs, segmented, settings, timeless
from tiny_llama import END, tiny_model, weights

from rl4llm_fast.trainer import DPOConfig, train_dpo
from rl4llm_fast.trainer.dpo import DPOTrainer
from rl4llm_fast.trainer.two_dimensional import Segmenter, Segments, cut_sentences, segment_tensors

transformers = pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
pytestmark = pytest.mark.usefixtures("one_thread")


def config(tmp_path, **changes) -> DPOConfig:
    return DPOConfig(**settings(tmp_path, loss="2d_dpo", **changes))


def trainer_of(tmp_path, rows=None, **changes) -> DPOTrainer:
    return DPOTrainer(config(tmp_path, **changes), model=tiny_model(), rows=rows or segmented())


def off_the_reference(trainer) -> None:
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.1)


def run(tmp_path, model=None, rows=None, **changes):
    return train_dpo(config(tmp_path, **changes), model=model or tiny_model(), rows=rows or segmented())


def test_improves_held_out_pairs(tmp_path):
    result = run(tmp_path, steps=25, eval_every=25)
    first, last = result.history[0], result.history[-1]
    assert last["heldout_loss"] < first["heldout_loss"]
    assert last["heldout_margin"] > first["heldout_margin"]
    assert last["heldout_accuracy"] > 0.9
    assert last["heldout_segment_reward_chosen"] > last["heldout_segment_reward_rejected"]
    assert last["heldout_segment_accuracy"] > 0.4  # segments of weight 0 are never strictly right
    assert last["heldout_kl"] > 0.01
    assert (tmp_path / "dpo.png").read_bytes().startswith(b"\x89PNG")


def test_the_loss_and_the_segment_rewards_by_hand(tmp_path):
    rows = segmented(3)
    del rows[0]["chosen_segments"][0], rows[0]["chosen_scores"][0]  # one segment against two
    rows[1] |= {"chosen_scores": [-0.5, [1.0, 3.0]], "rejected_scores": [2.0, 0.25]}
    trainer = trainer_of(tmp_path, rows=rows, heldout=0, beta=0.5, batch_size=3)
    off_the_reference(trainer)
    first = tiny_model()

    def ratios(prompt, answer):
        found = []
        for model in (trainer.model, first):
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].detach().double()
            found.append(torch.log_softmax(logits, -1)[range(len(answer)), answer])
        return found[0] - found[1]

    def reward(row, side, k):
        if k >= len(row[f"{side}_segments"]):
            return 0.0
        (a, b), score = row[f"{side}_segments"][k], row[f"{side}_scores"][k]
        score = sum(score) / len(score) if isinstance(score, list) else score
        return 0.5 * score * float(ratios(row["prompt"], row[side])[a:b].sum())

    loss, better, accuracy = 0.0, 0.0, 0.0
    for row in rows:
        for k in range(2):
            h = reward(row, "chosen", k) - reward(row, "rejected", k)
            loss += math.log1p(math.exp(-h)) / 3
            better += reward(row, "chosen", k) / 6
            accuracy += (h > 0) / 6
    trainer.optimizer.step = lambda rate, norm: 0.0
    step = trainer.step(1)
    assert step["loss"] == pytest.approx(loss, abs=1e-5)
    assert step["segment_reward_chosen"] == pytest.approx(better, abs=1e-5)
    assert step["segment_accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_a_single_segment_of_weight_one_is_dpo(tmp_path):
    rows = pairs()
    whole = [
        row | {f"{side}_{what}": [[0, len(row[side])] if what == "segments" else 1.0]
               for side in ("chosen", "rejected") for what in ("segments", "scores")}
        for row in rows
    ]  # fmt: skip
    found = []
    for trainer in (
        DPOTrainer(DPOConfig(**settings(tmp_path)), model=tiny_model(), rows=rows),
        trainer_of(tmp_path, rows=whole),
    ):
        off_the_reference(trainer)
        found.append(gradients(trainer))
    assert_same_gradients(*found)


def test_reference_layout_and_micro_batches_change_nothing(tmp_path):
    found = []
    for changes in ({"layout": "plain"}, {"layout": "shared"}, {"reference": "live"}, {"micro_batch_size": 3}):
        trainer = trainer_of(tmp_path, **changes)
        off_the_reference(trainer)
        found.append(gradients(trainer))
    for other in found[1:]:
        assert_same_gradients(found[0], other)


def test_same_curve_fused_and_eager(tmp_path):
    curves = [run(tmp_path / backend, steps=8, backend=backend).history for backend in ("auto", "eager")]
    for fused, eager in zip(*curves, strict=True):
        assert fused["loss"] == pytest.approx(eager["loss"], abs=1e-5)
        assert fused["segment_reward_chosen"] == pytest.approx(eager["segment_reward_chosen"], abs=1e-4)


def test_resumes_bit_exactly(tmp_path):
    changes = {"checkpoint_every": 3, "precision": "bf16"}

    def half():
        return tiny_model(dtype=torch.bfloat16)

    whole = run(tmp_path / "whole", half(), steps=6, **changes)
    run(tmp_path / "cut", half(), steps=3, **changes)
    rest = run(tmp_path / "cut", half(), steps=6, **changes)
    assert timeless(rest) == timeless(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.model), weights(rest.model), strict=True))
    changed = [row | {"chosen_scores": [1.0, 1.0]} for row in segmented()]
    with pytest.raises(ValueError, match="other rows of data"):
        run(tmp_path / "cut", half(), rows=changed, steps=8, **changes)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One. ", "Two! ", "Three?"]),
        ('He said "No." Then he left...  Why?', ['He said "No." ', "Then he left...  ", "Why?"]),
        ("A score of 3.5, e.g. this one. 7 more", ["A score of 3.5, e.g. this one. ", "7 more"]),
        ("one line\nand another\n", ["one line\n", "and another\n"]),
        ("好看。真的！", ["好看。", "真的！"]),
        ("no end", ["no end"]),
        ("  . A", ["  . ", "A"]),
    ],
)
def test_sentences(text, sentences):
    assert cut_sentences(text) == sentences
    assert "".join(sentences) == text


@pytest.fixture(scope="module")
def tokenizer():
    """Whole words, a space in front of each, and full stops apart: " w3." is the tokens " w3" and "."."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = {f"{space}w{i}": 10 * (space == " ") + i for space in ("", " ") for i in range(10)} | {".": 20}
    found = Tokenizer(models.WordLevel(words | {"<end>": END, "?": 21}, unk_token="?"))
    found.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\."), "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<end>")


def test_segments_of_text(tokenizer):
    row = {"chosen": "w1 w2. w3.", "chosen_scores": [1, [2, 4]]}
    # "w2. w3" is not cut: a small letter follows.
    with pytest.raises(ValueError, match="chosen_scores: wanted 1, one a segment, got 2"):
        Segmenter(tokenizer, "row", [], 0.0).read(row, "chosen")
    row["chosen"] = ["w1 w2. ", "w3.", ""]
    row["chosen_scores"] = [1, [2, 4], 0]
    ids, segments = Segmenter(tokenizer, "row", [], 0.0).read(row, "chosen")
    assert ids == [1, 12, 20, 13, 20, END]
    # The space in front of w3 stands in the first segment; the token's last character does not.
    assert segments == Segments([[0, 3], [3, 5], [5, 6]], [1.0, 3.0, 0.0])


def test_aspects_and_the_scale_of_the_scores():
    row = {side: [1, 2, END] for side in ("chosen", "rejected")}
    row |= {f"{side}_segments": [[0, 3]] for side in ("chosen", "rejected")}
    row |= {f"{side}_scores": [[1.0, 3.0]] for side in ("chosen", "rejected")}
    for weights_, score_max, wanted in (([], 0.0, (2.0, 2.0)), ([0.5, 1.0], 4.0, (3.5, 0.5))):
        segmenter = Segmenter(None, "row", weights_, score_max)
        assert tuple(segmenter.read(row, side)[1].weights[0] for side in ("chosen", "rejected")) == wanted
    with pytest.raises(ValueError, match="wanted 3 aspects as in aspect_weights, got 2"):
        Segmenter(None, "row", [1, 1, 1], 0.0).read(row, "chosen")
    with pytest.raises(ValueError, match=r"wanted 0 to score_max = 1.5, got 2.0"):
        Segmenter(None, "row", [], 1.5).read(row, "chosen")


def count_sevens(prompt, answer, segments):
    assert [token for part in segments for token in part] == answer
    return [float(part.count(7) or part.count(8)) for part in segments]


def test_scores_from_a_function_and_from_a_file(tmp_path):
    rows = segmented()
    lines = [{"prompt": r["prompt"], "answer": r[s], "scores": [0, 1]} for r in rows for s in ("chosen", "rejected")]
    (tmp_path / "scores.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    bare = [{k: v for k, v in row.items() if not k.endswith("_scores")} for row in rows]
    found = [
        [pair.segments for pair in trainer_of(tmp_path, rows=data, segment_scores=scores).train]
        for data, scores in (
            (rows, "row"),
            (bare, str(tmp_path / "scores.jsonl")),
            (bare, f"{count_sevens.__module__}.count_sevens"),
        )
    ]
    assert found[0] == found[1] == found[2]
    assert found[0][0][0].weights == [0.0, 1.0]
    (tmp_path / "less.jsonl").write_text("\n".join(map(json.dumps, lines[2:])), encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1: chosen: .*less.jsonl has no scores for this prompt and answer"):
        trainer_of(tmp_path, rows=bare, segment_scores=str(tmp_path / "less.jsonl"), strict=True)
    (tmp_path / "less.jsonl").write_text('{"prompt": [1]}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"less.jsonl, line 1: wanted prompt, answer and scores"):
        trainer_of(tmp_path, rows=bare, segment_scores=str(tmp_path / "less.jsonl"))
    for name in ("no.such.function", "json.nothing", "nothing"):
        with pytest.raises(ValueError, match=f"segment_scores: no function '{name}'"):
            trainer_of(tmp_path, segment_scores=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen_segments": [[0, 2], [2, 9]]}, r"line 2: chosen_segments: .* <= 5, got \[\[0, 2\], \[2, 9\]\]"),
        ({"rejected_segments": []}, "line 2: rejected_segments: wanted"),
        ({"rejected_scores": [1.0]}, "line 2: rejected_scores: wanted 2, one a segment, got 1"),
        ({"rejected_scores": [1.0, "good"]}, "line 2: rejected_scores: wanted a number"),
        ({"chosen_scores": [1.0, math.nan]}, "line 2: chosen_scores: wanted finite numbers"),
        ({"chosen": ["a ", 3]}, "line 2: chosen: wanted a list of texts, or of token ids, got both"),
        ({"chosen": []}, "line 2: chosen: empty"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, capsys, change, message):
    rows = segmented()
    rows[1] = rows[1] | change
    with pytest.raises((ValueError, TypeError), match=message):
        trainer_of(tmp_path, rows=rows, strict=True)
    trainer_of(tmp_path, rows=rows)
    assert "1 of 60 rows cannot be used" in capsys.readouterr().out


def test_segments_are_refused_elsewhere():
    for setting in ({"segment_scores": "a.b"}, {"aspect_weights": [1.0]}, {"score_max": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(setting))}: wanted"):
            DPOConfig(**setting)
    for setting in ({"average": True}, {"loss_options": {"label_smoothing": 0.1}}, {"aspect_weights": ["a"]}):
        with pytest.raises(ValueError, match=f"{next(iter(setting))}: wanted"):
            DPOConfig(loss="2d_dpo", **setting)


def test_padding_of_segments():
    one, two = Segments([[0, 2]], [1.0]), Segments([[0, 1], [1, 2]], [1.0, 2.0])
    (chosen, weights_), (rejected, others) = segment_tensors([(one, two), (one, one)], torch.device("cpu"))
    assert chosen.tolist() == [[[0, 2], [0, 0]], [[0, 2], [-1, -1]]]
    assert rejected.tolist() == [[[0, 1], [1, 2]], [[0, 2], [-1, -1]]]
    assert weights_.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert others.tolist() == [[1.0, 2.0], [1.0, 0.0]]


def test_reviews_of_two_sentences():
    path = pathlib.Path(__file__).resolve().parent.parent / "examples" / "film_reviews.py"
    spec = importlib.util.spec_from_file_location("film_reviews", path)
    film = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(film)
    good, bad = ([(sign * 3.0, f"{sign} {i}.", [sign * 4, sign * 2]) for i in range(9)] for sign in (1, -1))
    rows = film.two_sentences(good, bad, [(0.0, f"between {i}.", [1, -1]) for i in range(14)])
    assert len(rows) == 7
    assert len({part.strip() for row in rows for side in ("chosen", "rejected") for part in row[side]}) == 28
    places = set()
    for row in rows:
        first = row["chosen"][0].startswith("1 ")
        places.add(first)
        assert row["rejected"][0].startswith("-1 ") is first
        telling = 0 if first else 1
        assert row["chosen_scores"][telling] == [0.875, 1.0]
        assert row["rejected_scores"][telling] == [0.125, 0.0]
        assert row["chosen_scores"][1 - telling] == row["rejected_scores"][1 - telling] == [0.5, 0.5]
    assert places == {True, False}
