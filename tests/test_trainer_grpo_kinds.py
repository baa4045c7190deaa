"""GRPO's kinds on a tiny random Llama: each setting of §6 by hand or by what it must equal, and that it learns."""

from __future__ import annotations

import importlib
import json
import math
import pathlib
import sys

import pytest
import torch
from tiny_llama import PROMPTS, config, count_sevens, rewards, run, tiny_model
from tiny_tokenizer import END, WORDS, tiny_tokenizer

from rl4llm_fast.trainer import GRPOConfig, Task, fill, train_grpo
from rl4llm_fast.trainer.grpo import GRPOTrainer
from rl4llm_fast.trainer.steps import Steps, advantages, cut

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(tmp_path, reward=count_sevens, **changes) -> GRPOTrainer:
    return GRPOTrainer(config(tmp_path, **changes), model=tiny_model(), prompts=PROMPTS, reward=reward)


def gradients(made: GRPOTrainer, batch) -> list[torch.Tensor]:
    """Those of an update on ``batch``, which is not taken."""
    made.optimizer.step = lambda rate, norm: 0.0
    made.update(batch, 1)
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in made.model.parameters()]
    made.model.zero_grad()
    return found


# Every kind learns from a line of the config


@pytest.mark.parametrize(
    "changes",
    [
        {"advantage_scale": "none", "aggregation": "seq_mean_token_sum_norm"},  # Dr.GRPO
        {"advantage_baseline": "leave_one_out", "loss": "pg"},
        {"loss": "gspo", "aggregation": "seq_mean_token_mean", "epochs": 2},
        {"loss": "cispo", "epochs": 2},
        {"loss": "sapo", "epochs": 2},
        {"loss_options": {"eps_high": 0.28}, "epochs": 2},  # clip-higher
        {"kl_coef": 1e-3, "kl_estimator": "k1", "kl_gradient": "importance"},
        {"kl_coef": 1e-3, "kl_estimator": "k2"},
        {"rollout_correction": "truncate", "rollout_level": "sequence"},
        {"rollout_correction": "mask", "rollout_floor": 0.5},
        {"groups_without_spread": "drop"},
        {"groups_without_spread": "resample"},
    ],
    ids=str,
)
def test_every_kind_learns(tmp_path, changes):
    def reward(example, answer):
        return answer[:4].count(7) / 4

    result = run(config(tmp_path, steps=24, **changes), reward=reward)
    values = rewards(result)
    assert sum(values[-5:]) / 5 > sum(values[:3]) / 3 + 0.25, values


@pytest.mark.parametrize("gradient", ["value", "straight_through", "importance"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_the_kl_term_takes_every_estimator_and_gradient(tmp_path, estimator, gradient):
    changes = {"kl_coef": 0.5, "kl_estimator": estimator, "kl_gradient": gradient, "steps": 1, "epochs": 2}
    row = run(config(tmp_path, **changes)).history[-1]
    assert math.isfinite(row["kl_ref"])
    assert row["grad_norm"] > 0


# Groups without spread, overlong answers


def one_prompt_only(example, answer):
    return float(example == [4, 5] and 7 in answer)


def test_dropped_groups_do_not_count(tmp_path):
    kept = trainer(tmp_path, one_prompt_only)
    dropped = trainer(tmp_path, one_prompt_only, groups_without_spread="drop")
    batch, smaller = kept.collect(1), dropped.collect(1)
    assert batch.groups is None
    assert smaller.groups == [i for i, prompt in enumerate(smaller.rollout.prompts) if prompt == [4, 5]]
    assert smaller.measures["groups_without_spread"] == 0.75
    tokens = [sum(map(len, b.rollout.answers[g * 8 : g * 8 + 8])) for b in (smaller,) for g in range(4)]
    share = tokens[smaller.groups[0]] / sum(tokens)
    for all_count, one_counts in zip(gradients(kept, batch), gradients(dropped, smaller), strict=True):
        torch.testing.assert_close(all_count, one_counts * share, rtol=1e-4, atol=1e-7)


def test_resampling_replaces_groups_without_spread(tmp_path):
    calls = []

    def reward(example, answer):
        calls.append(example)
        return answer.count(7) if example in ([4, 5], [1, 2, 3]) else 0.0

    made = trainer(tmp_path, reward, groups_without_spread="resample", resample_rounds=3, prompts_per_step=2)
    found = [made.collect(step) for step in range(1, 5)]
    rounds = [len(batch.rollout.prompts) // 2 for batch in found]
    assert max(rounds) > 1
    for batch, count in zip(found, rounds, strict=True):
        assert len(batch.groups) <= 2
        assert count == 4 or len(batch.groups) == 2
        live = batch.is_live().unflatten(0, (-1, 8)).any(1)
        assert all(live[g] for g in batch.groups)
        assert len(batch.rewards) == len(batch.rollout.answers) == 16 * count


@pytest.mark.parametrize("choice", ["drop", "resample"])
def test_a_step_without_any_spread_changes_nothing(tmp_path, choice):
    model = tiny_model()
    before = [p.detach().clone() for p in model.parameters()]
    result = run(config(tmp_path, steps=2, groups_without_spread=choice), model, reward=lambda e, a: 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert [row["groups_without_spread"] for row in result.history] == [1, 1]
    assert [row["grad_norm"] for row in result.history] == [0, 0]


def test_masked_overlong_answers_are_in_the_baseline_only(tmp_path):
    all_count = trainer(tmp_path)
    masked = trainer(tmp_path, overlong="mask", epochs=2, kl_coef=0.1)
    batch = all_count.collect(1)
    ended = batch.rollout.ended
    assert 0 < sum(ended) < len(ended)
    seen = []
    inner = masked._accumulate
    masked._accumulate = lambda batch, index, *rest: seen.extend(index) or inner(batch, index, *rest)
    assert torch.equal(masked.collect(1).advantages, batch.advantages)  # the same draws, the same baseline
    gradients(masked, batch)
    assert sorted(seen) == sorted(2 * [i for i, has in enumerate(ended) if has])


# Process supervision


@pytest.mark.parametrize(
    ("text", "ends", "steps"),
    [
        ("ab\ncd\ne", [2, 5, 6], ["ab", "cd", "e"]),
        ("ab\ncd\n", [2, 5], ["ab", "cd"]),
        ("ab\n\n\ncd", [4, 6], ["ab", "cd"]),  # empty lines belong to the step before
        ("\n\nab\ncd", [4, 6], ["ab", "cd"]),  # or after, in front
        ("ab", [1], ["ab"]),
        ("\n", [0], [""]),
        ("", [], [""]),
    ],
)
def test_steps_by_hand(text, ends, steps):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    if ids:
        assert cut(ids, tokenizer, "\n", {END}) == (ends, steps)
    with_end = [*ends[:-1], len(ids)]  # the end token belongs to the last step
    assert cut([*ids, END], tokenizer, "\n", {END}) == (with_end, steps)


def test_separators_of_several_tokens():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a; b; c;d")["input_ids"] if ";" in WORDS else tokenizer("a. b. c.d")["input_ids"]
    assert cut(ids, tokenizer, ". ", {END})[0] == [2, 5, 8]


def test_step_advantages_by_hand():
    # Rewards 1 0 | 1 1: mean 3/4, std 1/2: 1/2 and −3/2 | 1/2 and 1/2; each token gets those of its own step and later.
    found = advantages([Steps([1, 2], [1.0, 0.0]), Steps([0, 3], [1.0, 1.0])], 2, "eager")
    expected = torch.tensor([[-1.0, -1.0, -1.5, 0.0], [1.0, 0.5, 0.5, 0.5]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def text_model(**changes):
    return tiny_model(vocab_size=len(WORDS), eos_token_id=END, pad_token_id=END, max_position_embeddings=512, **changes)


def sevens_of_steps(example, steps):
    return [step.count("7") / max(len(step), 1) for step in steps]


def text_run(tmp_path, **changes):
    settings = {"steps": 25, "max_new_tokens": 6, "supervision": "process", "step_separator": "7"} | changes
    return train_grpo(
        config(tmp_path, **settings), model=text_model(), tokenizer=tiny_tokenizer(),
        task=Task(train=["a", "bc", "d", "ef"], reward=lambda e, text: text.count("7") / 6, heldout=["gh"]),
        step_reward=None if changes.get("step_reward") else sevens_of_steps,
    )  # fmt: skip


def test_process_supervision_learns_and_resumes(tmp_path):
    whole = text_run(tmp_path / "whole", log_samples=2)
    values = rewards(whole)
    assert sum(values[-5:]) / 5 > sum(values[:3]) / 3 + 0.2, values
    assert {"steps", "step_reward_mean"} <= set(whole.history[-1])
    text_run(tmp_path / "cut", steps=4, checkpoint_every=2, log_samples=2)
    lines = (tmp_path / "cut" / "samples.jsonl").read_text()
    (tmp_path / "cut" / "samples.jsonl").write_text(lines + '{"step": 5, "broken')
    rest = text_run(tmp_path / "cut", steps=8, checkpoint_every=2, log_samples=2)
    assert rewards(rest) == rewards(whole)[:8]
    kept = (tmp_path / "cut" / "samples.jsonl").read_text().splitlines()
    assert kept == (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()[:16]


def test_process_supervision_with_minibatches_and_per_token_ratios(tmp_path):
    result = text_run(
        tmp_path, steps=2, loss="gspo", epochs=2, minibatches=2, micro_batch_size=3, groups_without_spread="drop"
    )
    assert all(math.isfinite(row["grad_norm"]) for row in result.history)


def too_few(example, steps):
    return [1.0] * (len(steps) - 1)


def not_a_number(example, steps):
    return [math.nan] * len(steps)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", r"step reward 'too_few': wanted (\d+) numbers, one a step, got \d+ for the steps \["),
        ("not_a_number", "'not_a_number': wanted a finite number, got nan for the answer"),
    ],
)
def test_step_rewards_that_cannot_be_used(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        text_run(tmp_path, steps=1, step_reward=f"{__name__}.{name}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"supervision": "process"}, "step_reward: wanted a function"),
        ({"supervision": "process", "step_reward": "no.such"}, "step_reward: no function 'no.such'"),
        ({"supervision": "process", "advantage_scale": "none"}, "advantage_scale: wanted group under process"),
        ({"supervision": "process", "step_reward": "json.dumps"}, "tokenizer: supervision"),
        ({"overlong": "drop"}, "overlong: wanted one of keep, mask"),
        ({"rewards": {"acuracy": 1.0}}, "nearest is 'accuracy'"),
        ({"template": "r1_zero"}, "template: r1_zero"),
        ({"rollout_level": "word"}, "rollout_level"),
    ],
)
def test_refused_settings(tmp_path, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run(config(tmp_path, **changes))


# Rules, their trace, the times


def test_rules_are_weighed_and_traced(tmp_path):
    cfg = config(
        tmp_path, steps=3, eval_every=3, max_new_tokens=24, template="r1_zero", log_samples=3,
        rewards={"accuracy": 1.0, "tags": 0.5, "length": 0.1, "ended": 0.25}, reward_options={"length_limit": 24},
    )  # fmt: skip
    task = Task(train=["a", "bc", "d", "ef"], reward=lambda e, text: float(text == "7"), heldout=["gh", "i"])
    result = train_grpo(cfg, model=text_model(), tokenizer=tiny_tokenizer(), task=task)
    assert set(result.history[0]) == {"step", *(key for key in result.history[-1] if key.startswith("heldout_"))}
    for row in result.history[1:]:
        total = row["reward_accuracy"] + 0.5 * row["reward_tags"] + 0.1 * row["reward_length"]
        assert row["reward_mean"] == pytest.approx(total + 0.25 * row["reward_ended"])
    assert {"heldout_accuracy", "heldout_tags", "heldout_length", "heldout_ended"} <= set(result.history[-1])
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert set(lines[0]["rules"]) == {"accuracy", "tags", "length", "ended"}
    assert "User: " in lines[0]["prompt"]


def test_the_times_of_all_phases_are_there_and_add_up(tmp_path):
    row = run(config(tmp_path, steps=1, epochs=2, kl_coef=0.1)).history[0]
    phases = {key: value for key, value in row.items() if key.startswith("seconds_")}
    wanted = {"sample", "reward", "logprobs", "forward", "loss", "backward", "optimizer"}
    assert set(phases) == {f"seconds_{name}" for name in wanted}
    assert all(value > 0 for value in phases.values())
    assert sum(phases.values()) == pytest.approx(row["seconds"])


def test_defaults_are_those_of_the_paper():
    cfg = GRPOConfig()
    assert (cfg.supervision, cfg.groups_without_spread, cfg.overlong, cfg.template) == (
        "outcome",
        "keep",
        "keep",
        "none",
    )


EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize("name", ["grpo_chain_sum", "grpo_process", "r1_zero"])
def test_the_examples_are_valid_configs(name):
    assert fill(GRPOConfig, EXAMPLES / f"{name}.toml").steps > 0


def test_the_table_of_kinds(tmp_path, monkeypatch, capsys):
    text_model().save_pretrained(tmp_path / "m")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "m")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    kinds = importlib.import_module("grpo_kinds")
    given = ["--steps", "1", "--heldout", "2", "--model", str(tmp_path / "m"), "--only", "process,GSPO", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["grpo_kinds.py", str(tmp_path / "out"), *given])
    kinds.main()
    table = (tmp_path / "out" / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["process", "GSPO"]
    monkeypatch.setattr(kinds, "train_grpo", lambda *args, **kwargs: pytest.fail("a run that is there is run again"))
    kinds.main()
    assert (tmp_path / "out" / "table.md").read_text() == table


def test_step_rewards_of_the_example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("step_rewards")
    task = example.sums_in_lines(seed=0, heldout=8, size=64)
    asked = [{e["prompt"][-1]["content"] for e in rows} for rows in (task.heldout, task.train)]
    assert not asked[0] & asked[1]
    question = {"answer": "12", "lines": example.lines_of(3, 4, 5)}
    assert question["lines"] == ["3 + 4 = 7", "7 + 5 = 12"]
    for steps, wanted in (
        (["3 + 4 = 7", "7 + 5 = 12", "so it is 12"], [1, 1, 0]),
        (["Let me see.", "3 + 4 = 8", "8 + 5 = 13"], [0, -1, -1]),
        (["2 + 4 = 6", "3 + 4 = 7", "7 + 5 = 12"], [-1, 1, 1]),  # true, but nobody asked
        (["3 + 4 = 7", "3 + 4 = 7"], [1, -1]),  # once is enough
        (["3 + 4 = 7"], [-1]),  # not the end
    ):
        assert example.true_lines(question, steps) == wanted
    assert [example.right(question, text) for text in ("3 + 4 = 7\n7 + 5 = 12", "3 + 4 = 7")] == [1, 0]
