"""PPO on a tiny random Llama: four models, a trunk with two heads, KL controllers, trust region, ptx, resuming."""

from __future__ import annotations

import pytest
import torch
from tiny_data import assert_same_gradients, demonstrations, timeless
from tiny_llama import PROMPTS, tiny_model, weights
from tiny_ppo import ROWS, config, reward_model, run, sevens, sources, trainer_of

import rl4llm_fast as rf
from rl4llm_fast.trainer import Task, train_ppo

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
pytestmark = pytest.mark.usefixtures("one_thread")


# It learns


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({}, {}),
        ({"value": "shared", "value_clip": 0.5}, {}),
        ({"precision": "bf16", "entropy_coef": 1e-3, "micro_batch_size": 5}, {"dtype": torch.bfloat16}),
        ({"loss": "kl_pen", "kl_old_target": 0.02, "kl_target": 1.0, "kl_every": 5}, {}),
    ],
    ids=["four models", "two heads", "bf16", "two controllers"],
)
def test_the_reward_rises(tmp_path, changes, given):
    rows = run(tmp_path, sources(model=tiny_model(**given)), steps=12, **changes).history
    rewards = [row["reward_mean"] for row in rows]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.35, rewards
    assert rows[-1]["kl_ref_answer"] > rows[0]["kl_ref_answer"] + 0.5
    assert (tmp_path / "ppo.png").read_bytes().startswith(b"\x89PNG")


def test_a_reward_models_held_out_score_rises_and_a_second_reward_is_reported(tmp_path):
    judge = reward_model()
    given = sources(reward_model=judge, heldout_prompts=ROWS * 4, heldout_reward=sevens)
    rows = run(tmp_path, given, steps=20, eval_every=10).history
    held = [row["heldout_reward"] for row in rows if "heldout_reward" in row]
    assert len(held) == 3
    assert held[-1] > held[0] + 0.5, held
    assert {"heldout_sevens", "heldout_kl_ref_answer"} <= set(rows[-1])
    assert rows[0]["heldout_kl_ref"] == pytest.approx(0.0, abs=1e-5)
    assert judge.weight.grad is None  # it judges, nothing more


def test_a_task_brings_prompts_and_reward(tmp_path):
    task = Task(train=PROMPTS, reward=sevens, heldout=PROMPTS[:2])
    row = train_ppo(config(tmp_path, steps=1, eval_every=1), model=tiny_model(), task=task).history[-1]
    assert "heldout_reward" in row


# What is computed


def test_advantages_and_returns_by_the_formulas(tmp_path):
    trainer = trainer_of(tmp_path, kl_coef=0.3, gamma=0.9, lam=0.8, whiten=False)
    trainer.models.reference.model.model.layers[0].mlp.up_proj.weight.data += 0.5  # so that KL is not 0
    rollout = trainer.sample(trainer.train, trainer.generator)
    scores = trainer.score(trainer.train, rollout.answers)
    e, metrics = trainer.judge(rollout, scores)
    place = 0
    for prompt, answer, score in zip(rollout.prompts, rollout.answers, scores, strict=True):
        ids, first = torch.tensor([prompt + answer]), len(prompt) - 1
        part = slice(place, place + len(answer))
        logp, ref = (
            torch.log_softmax(policy.model(ids).logits[0, first:-1], -1)[range(len(answer)), answer].detach()
            for policy in (trainer.policy, trainer.models.reference)
        )
        torch.testing.assert_close(e.logp[part], logp, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(e.ref_logp[part], ref, rtol=1e-4, atol=1e-5)
        rewards = -0.3 * (logp - ref)
        rewards[-1] += score
        advantage, following = 0.0, 0.0
        for t in reversed(range(len(answer))):
            value = float(e.values[part][t])
            delta = float(rewards[t]) + 0.9 * following - value
            advantage, following = delta + 0.9 * 0.8 * advantage, value
            assert float(e.advantages[part][t]) == pytest.approx(advantage, abs=1e-4)
            assert float(e.returns[part][t]) == pytest.approx(advantage + value, abs=1e-4)
        place += len(answer)
    assert metrics["kl_ref"] == pytest.approx(float((e.logp - e.ref_logp).mean()))
    assert metrics["kl_ref"] != 0


def test_the_value_model_begins_as_the_reward_model(tmp_path):
    judge = reward_model()
    judge.bias += 0.25
    trainer = trainer_of(tmp_path, sources(reward_model=judge))
    rollout = trainer.sample(trainer.train, trainer.generator)
    e, _ = trainer.judge(rollout, trainer.score(trainer.train, rollout.answers))
    place = 0
    for prompt, answer in zip(rollout.prompts, rollout.answers, strict=True):
        prefixes = [prompt + answer[:t] for t in range(len(answer))]  # V(s_t): before token t is drawn
        torch.testing.assert_close(
            e.values[place : place + len(answer)], judge(prefixes).detach(), rtol=1e-4, atol=1e-5
        )
        place += len(answer)
    before = [p.clone() for p in judge.parameters()]
    trainer.step(1)
    assert all(torch.equal(a, b) for a, b in zip(before, judge.parameters(), strict=True))
    assert not torch.equal(trainer.models.value_model.head.weight, judge.weight)
    # the others begin at V = 0
    assert not trainer_of(tmp_path, sources(reward_model=judge), value="policy").models.value_model.head.weight.any()
    assert not trainer_of(tmp_path, sources(reward_model=judge), value="shared").models.trained.value_head.weight.any()


@pytest.mark.parametrize("value", ["policy", "shared"])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_micro_batches_equal_the_whole_batch(tmp_path, value, aggregation):
    found = []
    for size in (0, 3):
        trainer = trainer_of(
            tmp_path, sources(ptx_rows=demonstrations(8)), micro_batch_size=size, value=value, entropy_coef=0.01,
            aggregation=aggregation, epochs=1, minibatches=1, ptx_coef=0.1, ptx_batch_size=8,
        )  # fmt: skip
        for optimizer in (trainer.optimizer, trainer.value_optimizer):
            if optimizer is not None:
                optimizer.step = lambda rate, norm: 0.0
        row = trainer.step(1)
        models = [trainer.models.trained] + ([trainer.models.value_model] if value == "policy" else [])
        gradients = [p.grad for model in models for p in model.parameters() if p.grad is not None]
        found.append((row, gradients))
    assert_same_gradients(found[0][1], found[1][1])
    for name in ("loss", "value_loss", "ptx_loss", "entropy", "kl_ref"):
        assert found[0][0][name] == pytest.approx(found[1][0][name], abs=1e-5)


def test_same_curve_fused_and_eager(tmp_path):
    changes = {"steps": 4, "entropy_coef": 0.01, "value": "shared", "ptx_coef": 0.1, "kl_target": 0.05, "kl_every": 1}
    curves = [
        run(tmp_path / backend, sources(ptx_rows=demonstrations(8)), backend=backend, **changes).history
        for backend in ("auto", "eager")
    ]
    for fused, eager in zip(*curves, strict=True):
        for name in ("reward_mean", "loss", "value_loss", "ptx_loss", "kl_ref", "grad_norm", "explained_variance"):
            assert fused[name] == pytest.approx(eager[name], rel=2e-3, abs=1e-5), name


def test_ptx_pulls_towards_its_rows(tmp_path):
    losses = {}
    for coefficient in (1e-6, 3.0):
        given = sources(ptx_rows=demonstrations(40))
        rows = run(tmp_path / str(coefficient), given, steps=10, ptx_coef=coefficient).history
        losses[coefficient] = rows[-1]["ptx_loss"]
    assert losses[3.0] < losses[1e-6] - 0.5, losses


# KL


def test_an_update_outside_the_trust_region_is_refused_and_counted(tmp_path):
    delta, updates = 1e-3, 4 * 2
    rows = run(tmp_path, steps=3, epochs=4, learning_rate=1e-2, trust_region=delta).history
    free = run(tmp_path / "free", steps=3, epochs=4, learning_rate=1e-2).history
    refused = [row["updates_refused"] for row in rows]
    assert all(0 < count < updates for count in refused), refused  # the first is never: KL(old‖now) is 0 there
    assert all(row["updates_refused"] == 0 for row in free)
    assert rows[0]["kl_old_k3"] < free[0]["kl_old_k3"]


def test_a_refused_update_changes_nothing(tmp_path, monkeypatch):
    for value in ("policy", "shared"):
        trainer = trainer_of(tmp_path, trust_region=1.0, value=value)
        monkeypatch.setattr(rf, "trust_region_exceeded", lambda kl, delta: True)
        before = weights(trainer.models.trained)
        row = trainer.step(1)
        assert row["updates_refused"] == 4
        assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer.models.trained), strict=True))
        monkeypatch.undo()
        trainer.step(2)
        assert not all(torch.equal(a, b) for a, b in zip(before, weights(trainer.models.trained), strict=True))


def test_the_coefficients_adapt(tmp_path):
    rows = run(tmp_path, steps=5, kl_target=100.0, kl_every=2).history
    assert [row["kl_coef"] for row in rows] == [0.01, 0.01, 0.005, 0.005, 0.0025]
    rows = run(tmp_path / "old", steps=3, loss="kl_pen", loss_options={"beta": 0.5}, kl_old_target=1e-9).history
    assert [row["kl_pen_beta"] for row in rows] == [0.5, 1.0, 2.0]
    assert all(row["kl_old_after"] > 0 for row in rows)


def test_without_a_penalty_there_is_no_reference(tmp_path):
    trainer = trainer_of(tmp_path, kl_coef=0.0)
    assert trainer.models.reference is None
    assert "kl_ref" not in trainer.step(1)


# Resuming


@pytest.mark.parametrize("value", ["reward_model", "shared"])
def test_resumes_bit_exactly(tmp_path, value):
    changes = {
        "checkpoint_every": 2, "precision": "bf16", "value": value, "kl_target": 100.0, "kl_every": 1, "loss": "kl_pen",
        "kl_old_target": 1e-9, "ptx_coef": 0.1, "heldout": 1, "eval_every": 2,
    }  # fmt: skip

    def given():
        half = {"dtype": torch.bfloat16}
        return sources(model=tiny_model(**half), reward_model=reward_model(**half), ptx_rows=demonstrations(8))

    whole = run(tmp_path / "whole", given(), steps=4, **changes)
    run(tmp_path / "cut", given(), steps=2, **changes)
    torch.manual_seed(12345)
    rest = run(tmp_path / "cut", given(), steps=4, **changes)
    assert timeless(rest) == timeless(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.model), weights(rest.model), strict=True))
    with pytest.raises(ValueError, match="other rows"):
        run(tmp_path / "cut", {**given(), "ptx_rows": demonstrations(9)}, steps=5, **changes)
