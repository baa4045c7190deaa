"""The next step's answers drawn during this one: the same answers with whatever timing, and after every resume."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from test_trainer_sampler import Engine
from tiny_data import timeless
from tiny_llama import PROMPTS, config, count_sevens, tiny_model, weights

from rl4llm_fast import dispatch
from rl4llm_fast.trainer import Task, sample, train_grpo
from rl4llm_fast.trainer.grpo import GRPOTrainer

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
AHEAD = {"overlap": True, "old_logprobs": "sampler"}
pytestmark = pytest.mark.usefixtures("one_thread")


def train(tmp_path, *, sampler=None, **changes):
    cfg = config(tmp_path, **{**AHEAD, **changes})
    return train_grpo(cfg, model=tiny_model(), prompts=PROMPTS, reward=count_sevens, sampler=sampler)


def test_a_step_learns_from_answers_one_update_old(tmp_path):
    """Drawn under the weights before the update of the step before; the first step's under the model as it came."""
    made = GRPOTrainer(config(tmp_path, steps=3, **AHEAD), model=tiny_model(), prompts=PROMPTS, reward=count_sevens)
    seen, begun, begin = [], [], made.begin

    def begin_and_look(step):
        begun.append((step, weights(made.model)))
        begin(step)

    made.begin = begin_and_look
    for step in (1, 2, 3):
        before = weights(made.model)
        made.step(step)
        seen.append(before)
    assert [step for step, _ in begun] == [1, 2, 3]  # nothing is drawn behind a last step that is not saved
    for (_, drawn_under), trained in zip(begun[1:], seen[:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(drawn_under, trained, strict=True))
    made.optimizer.close()


def test_the_reward_rises(tmp_path):
    rows = train(tmp_path, steps=12).history
    assert rows[-1]["reward_mean"] > rows[0]["reward_mean"] + 0.1
    assert all(row["sampler_gap"] > 0 for row in rows[1:] if "sampler_gap" in row)  # the weights have moved since


@pytest.mark.parametrize("engine", [False, True], ids=["copy", "engine"])
def test_timing_changes_nothing_and_a_run_goes_on_bit_by_bit(tmp_path, engine):
    class Slow(Engine):
        def generate(self, prompts, **options):
            time.sleep(0.05)
            return super().generate(prompts, **options)

    def made(slow=False):
        return (Slow if slow else Engine)() if engine else None

    task = {"checkpoint_every": 2, "epochs": 2, "minibatches": 2}
    whole = train(tmp_path / "whole", sampler=made(slow=True), steps=4, **task)
    train(tmp_path / "cut", sampler=made(), steps=2, **task)
    torch.manual_seed(12345)
    rest = train(tmp_path / "cut", sampler=made(), steps=4, **task)
    assert timeless(whole) == timeless(rest)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.model), weights(rest.model), strict=True))


def test_replacing_groups_draws_the_others_now(tmp_path):
    task = Task(train=PROMPTS, reward=lambda example, answer: float(answer[0] < 8), heldout=PROMPTS[:2])
    cfg = config(tmp_path, steps=2, groups_without_spread="resample", eval_every=1, **AHEAD)
    rows = train_grpo(cfg, model=tiny_model(), task=task).history
    assert [row["step"] for row in rows] == [0, 1, 2]


def test_a_named_backend_is_not_left_in_force(tmp_path, monkeypatch):
    """The thread is drawing when the update begins, and has drawn before the update ends."""
    drawing, updating, backends = threading.Event(), threading.Event(), []

    def slow(*args, **options):
        backends.append(options["backend"])
        if len(backends) > 1:  # nobody updates during the first step's
            drawing.set()
            updating.wait(10)
        return sample(*args, **options)

    monkeypatch.setattr("rl4llm_fast.trainer.sampler.sample", slow)
    cfg = config(tmp_path, backend="eager", checkpoint_every=1, **AHEAD)
    made = GRPOTrainer(cfg, model=tiny_model(), prompts=PROMPTS, reward=count_sevens)
    update, layout = made.update, made._layout

    def update_during_the_draw(*args):
        assert drawing.wait(10)
        return update(*args)

    def layout_behind_the_draw(*args):  # called where the backend is chosen
        updating.set()
        made.ahead.take()
        return layout(*args)

    made.update, made._layout = update_during_the_draw, layout_behind_the_draw
    made.step(1)
    assert backends == ["eager", "eager"]
    assert dispatch.named(None) is None
    made.optimizer.close()


def test_an_error_of_the_sampler_stops_the_run(tmp_path):
    class Broken(Engine):
        def generate(self, prompts, **options):
            raise RuntimeError("out of cache blocks")

    with pytest.raises(RuntimeError, match="out of cache blocks"):
        train(tmp_path, sampler=Broken(), steps=2)


def test_old_answers_need_their_own_log_probabilities(tmp_path):
    with pytest.raises(ValueError, match="overlap: wanted old_logprobs = sampler, or a rollout_correction"):
        config(tmp_path, overlap=True)
