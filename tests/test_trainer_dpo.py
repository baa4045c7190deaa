"""DPO and its family on a tiny random Llama: every pair loss learns; references, layouts and micro-batches agree."""

from __future__ import annotations

import pytest
import torch
from tiny_data import assert_same_gradients, gradients, pairs, settings, timeless
from tiny_llama import END, tiny_model, weights

from rl4llm_fast.trainer import DPOConfig, train_dpo
from rl4llm_fast.trainer.dpo import DPOTrainer

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
pytestmark = pytest.mark.usefixtures("one_thread")


def trainer_of(tmp_path, rows=None, **changes) -> DPOTrainer:
    return DPOTrainer(DPOConfig(**settings(tmp_path, **changes)), model=tiny_model(), rows=rows or pairs())


def run(tmp_path, model=None, rows=None, **changes):
    return train_dpo(DPOConfig(**settings(tmp_path, **changes)), model=model or tiny_model(), rows=rows or pairs())


KINDS = [
    ("dpo", {}), ("dpo", {"label_smoothing": 0.1}), ("robust", {"label_smoothing": 0.1}), ("ipo", {}), ("hinge", {}),
    ("cpo", {}), ("cpo", {"nll": "token"}), ("simpo", {"gamma": 0.3}), ("orpo", {"lam": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=[f"{k}{i}" for i, (k, _) in enumerate(KINDS)])
def test_every_pair_loss_improves_held_out_pairs(tmp_path, kind, options):
    beta = 2.0 if kind == "simpo" else 0.1
    result = run(tmp_path, loss=kind, loss_options=options, beta=beta, steps=25, eval_every=25)
    first, last = result.history[0], result.history[-1]
    assert last["heldout_loss"] < first["heldout_loss"]
    assert last["heldout_margin"] > first["heldout_margin"]
    assert last["heldout_accuracy"] > 0.9
    assert (tmp_path / "dpo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "reference").exists() == (kind not in ("cpo", "simpo", "orpo"))


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
@pytest.mark.parametrize("reference", ["precomputed", "live"])
def test_learns_in_half_precision(tmp_path, precision, reference):
    model = tiny_model(dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    result = run(tmp_path, model, precision=precision, reference=reference, steps=25, eval_every=25)
    assert result.history[-1]["heldout_accuracy"] > 0.9


def test_the_loss_of_the_first_step_by_hand(tmp_path):
    # Policy and reference are the same at first: −log σ(0), reward 0, no pair strictly right.
    row = trainer_of(tmp_path).step(1)
    assert row["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert row["margin"] == pytest.approx(0.0, abs=1e-5)


def test_probabilities_of_the_pairs(tmp_path):
    rows = [row | {"prob": 0.5} for row in pairs()]
    fair = run(tmp_path, rows=rows, steps=25)
    assert abs(fair.history[-1]["margin"]) < 0.3  # a fair coin has nothing to say
    with pytest.raises(ValueError, match="prob: wanted in all rows or in none"):
        trainer_of(tmp_path, rows=[*pairs()[1:], rows[0]])
    for prob, loss, message in ((2, "dpo", r"\[0, 1\], got 2"), (0.5, "hinge", "hinge has none")):
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path, rows=[pairs()[0] | {"prob": prob}], strict=True, loss=loss, heldout=0)


def test_reference_layout_and_micro_batches_change_nothing(tmp_path):
    found = []
    for changes in (
        {"layout": "plain"},
        {"layout": "shared"},
        {"layout": "plain", "reference": "live"},
        {"micro_batch_size": 3},
    ):
        trainer = trainer_of(tmp_path, **changes)
        with torch.no_grad():  # off the reference, or everything is 0
            for parameter in trainer.model.parameters():
                parameter.mul_(1.1)
        found.append(gradients(trainer))
    for other in found[1:]:
        assert_same_gradients(found[0], other)


def test_the_reference_is_computed_once(tmp_path, monkeypatch):
    trainer_of(tmp_path)
    (cached,) = (tmp_path / "reference").iterdir()
    monkeypatch.setattr("rl4llm_fast.trainer.reference_cache.answer_logprobs", lambda *a: pytest.fail("again"))
    trainer_of(tmp_path)
    assert [path.name for path in (tmp_path / "reference").iterdir()] == [cached.name]
    monkeypatch.undo()
    trainer_of(tmp_path, rows=pairs()[1:])  # other data
    DPOTrainer(DPOConfig(**settings(tmp_path)), model=tiny_model(seed=1), rows=pairs())  # another model
    assert len(list((tmp_path / "reference").iterdir())) == 3


@pytest.mark.parametrize("layout", ["plain", "shared"])
@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_the_kl_to_the_first_model_by_hand(tmp_path, layout, loss):
    held = pairs(20)[10:]
    cfg = DPOConfig(**settings(tmp_path, layout=layout, loss=loss, steps=6, eval_every=3, batch_size=4))
    result = train_dpo(cfg, model=tiny_model(), rows=pairs(20)[:10], heldout_rows=held)
    total, tokens = 0.0, 0
    for row in held:
        for answer in (row["chosen"], row["rejected"]):
            now, first = (
                torch.log_softmax(model(torch.tensor([row["prompt"] + answer])).logits[0].detach().double(), -1)
                for model in (result.model, tiny_model())
            )
            kl = (now.exp() * (now - first)).sum(-1)[len(row["prompt"]) - 1 : -1]
            total, tokens = total + float(kl.sum()), tokens + len(answer)
    found = [row["heldout_kl"] for row in result.history if "heldout_kl" in row]
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert found[-1] == pytest.approx(total / tokens, rel=1e-4)
    off = DPOConfig(**settings(tmp_path / "off", heldout_kl=False, eval_every=1, steps=1))
    assert "heldout_kl" not in train_dpo(off, model=tiny_model(), rows=pairs()).history[-1]


def test_same_curve_fused_and_eager(tmp_path):
    curves = [run(tmp_path / backend, steps=8, backend=backend).history for backend in ("auto", "eager")]
    for fused, eager in zip(*curves, strict=True):
        assert fused["loss"] == pytest.approx(eager["loss"], abs=1e-5)
        assert fused["margin"] == pytest.approx(eager["margin"], abs=1e-4)


@pytest.mark.parametrize("reference", ["precomputed", "live"])
def test_resumes_bit_exactly(tmp_path, reference):
    changes = {"checkpoint_every": 3, "reference": reference, "precision": "bf16", "lr_schedule": "constant"}

    def half():
        return tiny_model(dtype=torch.bfloat16)

    whole = run(tmp_path / "whole", half(), steps=6, **changes)
    run(tmp_path / "cut", half(), steps=3, **changes)
    torch.manual_seed(12345)
    rest = run(tmp_path / "cut", half(), steps=6, **changes)
    assert timeless(rest) == timeless(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.model), weights(rest.model), strict=True))


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smothing"):
        trainer_of(tmp_path, loss_options={"label_smothing": 0.1})
    with pytest.raises(ValueError, match="micro_batch_size: wanted 0 for orpo"):
        trainer_of(tmp_path, loss="orpo", micro_batch_size=2)
    with pytest.raises(ValueError, match="the same answer"):
        trainer_of(tmp_path, rows=[{"prompt": [1], "chosen": [2, END], "rejected": [2, END]}], strict=True, heldout=0)
    with pytest.raises(ValueError, match="rejected: missing"):
        trainer_of(tmp_path, rows=[{"prompt": [1], "chosen": [2, END]}], strict=True)


def test_on_repeated_pairs_ipo_settles_where_dpo_grows(tmp_path):
    # Survey §5.2.9: the margin β·h of IPO comes to rest at its target ½; DPO's has none.
    changes = {"heldout": 0, "batch_size": 4, "steps": 60, "learning_rate": 2e-3}
    margins = {
        loss: [row["margin"] for row in run(tmp_path / loss, rows=pairs(4), loss=loss, **changes).history]
        for loss in ("ipo", "dpo")
    }
    assert all(abs(margin - 0.5) < 0.05 for margin in margins["ipo"][-20:])
    assert margins["dpo"][-1] > margins["dpo"][-20] + 0.05 > 1.0
