"""When training goes wrong: a run stops before the weights are spoiled, with the batch kept, or goes on without it."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_data import demonstrations, pairs, settings, timeless
from tiny_llama import PROMPTS, config, count_sevens, tiny_model, weights

from rl4llm_fast import cli
from rl4llm_fast.trainer import DPOConfig, SFTConfig, train_dpo, train_sft
from rl4llm_fast.trainer.grpo import GRPOTrainer
from rl4llm_fast.trainer.guard import Diverged, problem_of
from rl4llm_fast.trainer.rewards import of_function
from rl4llm_fast.trainer.sft import SFTTrainer

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_counts_as_a_problem():
    assert problem_of({"loss": 1.0}, 10.0) == ""
    assert problem_of({"loss": 1.0, "ratio_max": 10.0}, 10.0) == ""
    assert problem_of({"loss": 1.0, "ratio_max": 1e9}, 0.0) == ""
    assert "loss is nan" in problem_of({"loss": math.nan}, 10.0)
    assert "loss is inf" in problem_of({"loss": math.inf}, 0.0)
    assert "11, more than max_ratio = 10" in problem_of({"loss": 1.0, "ratio_max": 11.0}, 10.0)
    assert "nan, more than" in problem_of({"loss": 1.0, "ratio_max": math.nan}, 10.0)


def poisoned(model, step: int = 3, *, gradient: bool):
    """``model``, in whose ``step``-th training forward a NaN appears: in the loss, or in one weight's gradient only."""
    count = 0
    weight = model.model.layers[1].mlp.up_proj.weight

    def forward(module, inputs, output):
        nonlocal count
        count += torch.is_grad_enabled()
        if count == step and torch.is_grad_enabled() and not gradient:
            output.last_hidden_state[:, -3:] = math.nan

    model.model.register_forward_hook(forward)
    weight.register_hook(lambda grad: grad * math.nan if gradient and count == step else grad)
    return model


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (False, r"step 3: the loss is nan\. The update was not taken and the batch lies in .*step-3\.pt"),
        (True, r"step 3: the gradient is not finite in 1 of \d+ parameters: model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stops_with_the_batch_and_the_weights_of_the_step_before(tmp_path, precision, gradient, message):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = poisoned(tiny_model(dtype=dtype), gradient=gradient)
    cfg = SFTConfig(**settings(tmp_path, precision=precision))
    trainer = SFTTrainer(cfg, model=model, rows=demonstrations())
    with pytest.raises(Diverged, match=message):
        trainer.run()
    other = train_sft(
        SFTConfig(**settings(tmp_path / "two", precision=precision, steps=2)),
        model=tiny_model(dtype=dtype), rows=demonstrations(),
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other.model), strict=True))
    kept = torch.load(tmp_path / "diverged" / "step-3.pt", weights_only=True)
    assert kept["step"] == 3
    assert len(kept["batch"]) == 8
    known = [(list(e.prompt), list(e.answer)) for e in trainer.train]
    assert all((row["prompt"], row["answer"]) in known for row in kept["batch"])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_skips_where_told_to(tmp_path):
    model = poisoned(tiny_model(), gradient=True)
    cfg = SFTConfig(**settings(tmp_path, steps=5, on_divergence="skip"))
    result = train_sft(cfg, model=model, rows=demonstrations())
    assert [row["updates_skipped"] for row in result.history] == [0, 0, 1, 0, 0]
    assert all(w.isfinite().all() for w in weights(model))
    assert not (tmp_path / "diverged").exists()


def test_a_stopped_run_goes_on_without_the_update(tmp_path):
    cfg = settings(tmp_path, steps=4, checkpoint_every=1, heldout=12)
    with pytest.raises(Diverged):
        train_dpo(DPOConfig(**cfg), model=poisoned(tiny_model(), 2, gradient=True), rows=pairs())
    skip = {**cfg, "on_divergence": "skip"}
    rest = train_dpo(DPOConfig(**skip), model=poisoned(tiny_model(), 1, gradient=True), rows=pairs())
    skip["output_dir"] = str(tmp_path / "whole")
    whole = train_dpo(DPOConfig(**skip), model=poisoned(tiny_model(), 2, gradient=True), rows=pairs())
    assert [row["updates_skipped"] for row in rest.history] == [0, 1, 0, 0]
    nan_free = [[{k: v for k, v in row.items() if k != "grad_norm"} for row in timeless(r)] for r in (rest, whole)]
    assert nan_free[0] == nan_free[1]


def test_an_exploding_ratio_stops_grpo(tmp_path):
    changes = {"epochs": 4, "learning_rate": 0.3, "max_grad_norm": 0.0, "steps": 4, "max_ratio": 2.0}
    trainer = GRPOTrainer(config(tmp_path, **changes), model=tiny_model(), prompts=PROMPTS, reward=count_sevens)
    with pytest.raises(Diverged, match=r"step \d: a token's ratio .* more than max_ratio = 2"):
        trainer.run()
    (path,) = (tmp_path / "diverged").iterdir()
    batch = torch.load(path, weights_only=True)["batch"]
    assert len(batch["rollout"]["answers"]) == len(batch["rewards"]) == 32
    assert batch["advantages"].shape == (32,)
    assert sorted(batch["answers"]) == list(range(32))


def test_a_minibatch_beyond_max_ratio_is_left_out_alone(tmp_path):
    cfg = config(tmp_path, minibatches=4, on_divergence="skip", loss="pg", entropy_coef=1e-3)
    trainer = GRPOTrainer(cfg, model=tiny_model(), prompts=PROMPTS, reward=count_sevens)
    inner, calls = trainer._accumulate, []

    def first_explodes(batch, index, old, reference, sampler, averages):
        calls.append(index)
        loss = inner(batch, index, old, reference, sampler, averages)
        averages.add({"ratio_max": torch.tensor(1e6 if len(calls) == 1 else 1.0)}, 1)
        return loss

    trainer._accumulate = first_explodes
    row = trainer.step(1)
    assert len(calls) == 4
    assert (row["updates_skipped"], trainer.updates) == (1, 3)
    assert row["ratio_max"] == 1e6


def test_a_minibatch_of_silent_answers_takes_no_step(tmp_path):
    def one_prompt(example, answer):  # the other groups have no spread
        return float(example == [4, 5] and 7 in answer)

    cfg = config(tmp_path, minibatches=4, weight_decay=0.1)
    trainer = GRPOTrainer(cfg, model=tiny_model(), prompts=PROMPTS, reward=one_prompt)
    row = trainer.step(1)
    assert 0 < row["silent_answers"] < 1
    assert trainer.updates == 1
    (steps,) = {int(state["step"]) for state in trainer.optimizer.adam.state.values()}
    assert steps == 1
    trainer.rewards = of_function(lambda example, answer: 1.0)
    before = weights(trainer.model)
    row = trainer.step(2)
    assert (row["silent_answers"], row["loss"], row["grad_norm"], trainer.updates) == (1, 0, 0, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer.model), strict=True))


def test_the_command_says_it_in_one_line(monkeypatch, capsys):
    def diverged(config):
        raise Diverged("step 7: the loss is nan")

    monkeypatch.setattr("rl4llm_fast.trainer.train_sft", diverged)
    assert cli.main(["train", "sft"]) == 1
    assert capsys.readouterr().err == "rl4llm-fast: step 7: the loss is nan\n"

    def broken(config):
        raise RuntimeError("a bug")

    monkeypatch.setattr("rl4llm_fast.trainer.train_sft", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["train", "sft"])
