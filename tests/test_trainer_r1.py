"""R1's recipe and distillation on a tiny random Llama that writes characters: every stage, cut off, resumed."""

from __future__ import annotations

import json
import pathlib
import random

import pytest
import torch
from tiny_llama import tiny_model
from tiny_tokenizer import END, WORDS, tiny_tokenizer

from rl4llm_fast import cli
from rl4llm_fast.trainer import DistillConfig, R1Config, Task, distill, fill, r1, rewards, train_distill, train_r1
from rl4llm_fast.trainer.grpo import GRPOTrainer
from rl4llm_fast.trainer.r1 import R1
from rl4llm_fast.trainer.rewards import Sample
from rl4llm_fast.trainer.run import Trainer
from rl4llm_fast.trainer.scorers import Judge
from rl4llm_fast.trainer.sft import SFTTrainer

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """One thread, and a template that is not ten times as long as the answer."""
    monkeypatch.setattr(rewards, "R1_ZERO_TEMPLATE", "{example}U: {prompt} A:")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text_model():
    return tiny_model(vocab_size=len(WORDS), eos_token_id=END, pad_token_id=END)


LETTERS = "abcdefghijklmnop"


def the_task() -> Task:
    """Whatever the question, 7 is right."""
    return Task(
        train=[{"prompt": f"{letter}?"} for letter in LETTERS[4:]], heldout=[{"prompt": f"{c}?"} for c in LETTERS[:4]],
        reward=lambda example, text: float(text.strip() == "7"),
    )  # fmt: skip


def demonstrations() -> list[dict]:
    """In the form, and right as often as not."""
    draw = random.Random(0)
    return [
        {"prompt": f"{letter}?", "answer": f"<think>{letter} is</think><answer>{draw.choice('78')}</answer>"}
        for letter in LETTERS[4:]
        for _ in range(4)
    ]


GENERAL = [{"prompt": f"say {letter}", "answer": letter * 2} for letter in "qrst"]


def settings(tmp_path, **changes) -> dict:
    grpo = {"steps": 4, "prompts_per_step": 4, "group_size": 8, "learning_rate": 3e-3}
    cold_start = {"steps": 40, "batch_size": 12, "learning_rate": 2e-2}
    return {
        "output_dir": str(tmp_path), "precision": "fp32", "device": "cpu", "max_new_tokens": 10, "progress": False,
        "checkpoint_every": 2, "learning_rate": 1e-2, "sft_from": "checkpoint", "general_share": 0.25,
        "cold_start": cold_start, "reasoning_rl": grpo, "final_rl": grpo,
        "rejection_sft": {"steps": 6, "prompts": 12, "samples": 4, "sampling_batch_size": 4}, **changes,
    }  # fmt: skip


def helpful(prompt, text):
    return min(text.count(prompt[-1]), 2) / 2


def recipe(tmp_path, **changes):
    return train_r1(
        R1Config(**settings(tmp_path, **changes)), model=text_model(), tokenizer=tiny_tokenizer(), task=the_task(),
        cold_start_rows=demonstrations(), general_rows=GENERAL, helpful=helpful,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The recipe, run without a break."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "R1_ZERO_TEMPLATE", "{example}U: {prompt} A:")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        result = recipe(folder)
        torch.set_num_threads(threads)
        return result


def measures(result) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]


def test_all_four_stages(whole):
    rows = measures(whole)
    assert [row["stage"] for row in rows] == ["base", *r1.STAGES]
    accuracy = [row["heldout_accuracy"] for row in rows]
    assert accuracy[0] == 0
    assert min(accuracy[2:]) >= 0.75  # the demonstrations alone are right as often as not
    assert [row["heldout_format"] for row in rows[:3]] == [0, 1, 1]
    folder = whole.output_dir
    assert json.loads((folder / "r1.json").read_text()) == whole.history
    learned = [json.loads(line) for line in (folder / "3_rejection_sft" / "rows.jsonl").read_text().splitlines()]
    assert learned
    for row in learned:
        thought, answer = rewards.parts(row["answer"])
        assert answer.strip() == "7"
        assert thought.strip()
    final = [json.loads(line) for line in (folder / "4_final_rl" / "metrics.jsonl").read_text().splitlines()]
    assert {"reward_accuracy", "reward_format", "reward_helpful"} <= {key for row in final for key in row}
    reasoning = (folder / "2_reasoning_rl" / "metrics.jsonl").read_text()
    assert '"reward_language"' in reasoning
    assert '"reward_format"' not in reasoning  # as in R1: the cold start has taught the form
    assert not list(folder.glob("*/checkpoint.pt"))


class CutOff(Exception):
    pass


@pytest.mark.parametrize("stage", r1.STAGES)
def test_each_stage_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, whole, stage):
    folder = f"{1 + r1.STAGES.index(stage)}_{stage}"
    steps: list[str] = []
    kinds = {
        "cold_start": SFTTrainer,
        "rejection_sft": SFTTrainer,
        "reasoning_rl": GRPOTrainer,
        "final_rl": GRPOTrainer,
    }
    with monkeypatch.context() as patch:
        kind = kinds[stage]
        inner = kind.step

        def step(self, number):
            if folder in self.run_config.output_dir and number == 4:  # after the checkpoint of step 2
                raise CutOff
            return inner(self, number)

        patch.setattr(kind, "step", step)
        with pytest.raises(CutOff):
            recipe(tmp_path)
    run = Trainer.run

    def counted(self):
        steps.append(self.run_config.output_dir.rpartition("/")[2])
        return run(self)

    monkeypatch.setattr(Trainer, "run", counted)
    assert measures(recipe(tmp_path)) == measures(whole)
    names = [f"{n}_{name}" for n, name in enumerate(r1.STAGES, 1)]
    assert steps == names[names.index(folder) :]  # what was finished is not run again
    lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))


def test_sampling_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, whole):
    inner, calls = distill.sample, []
    with monkeypatch.context() as patch:

        def cut_off(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise CutOff
            return inner(*args, **kwargs)

        patch.setattr(distill, "sample", cut_off)
        with pytest.raises(CutOff):
            recipe(tmp_path)
    assert len((tmp_path / "3_rejection_sft" / "sampled.jsonl").read_text().splitlines()) == 2
    assert measures(recipe(tmp_path)) == measures(whole)
    one, other = ((folder / "3_rejection_sft" / "rows.jsonl").read_text() for folder in (tmp_path, whole.output_dir))
    assert one == other


def test_a_finished_run_is_only_read_and_other_settings_are_refused(tmp_path, monkeypatch):
    changes = {name: {"steps": 1} for name in ("cold_start", "reasoning_rl", "final_rl")}
    changes["cold_start"] = settings(tmp_path)["cold_start"]
    first = recipe(tmp_path, **changes)
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("a finished stage is run again"))
    assert recipe(tmp_path, **changes).history == first.history
    with pytest.raises(ValueError, match=r"2_reasoning_rl/done\.json: finished with other settings"):
        recipe(tmp_path, **changes | {"reasoning_rl": {"steps": 2}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_rl": {"stepz": 3}}, "'stepz'; the nearest is 'steps' \\(in the table final_rl\\)"),
        ({"cold_start": {"model": "x"}}, "model: the recipe's own.*table cold_start"),
        ({"rejection_sft": {"keep": 0}}, "keep: wanted at least 1"),
        ({"general_share": 1.0}, "general_share"),
        ({"sft_from": "teacher"}, "sft_from: wanted one of base, checkpoint"),
    ],
)
def test_refused_settings(tmp_path, changes, message):
    with pytest.raises(ValueError, match="(?s).*" + message):
        R1Config(**settings(tmp_path, **changes))


def test_what_is_missing_shows_before_the_first_stage(tmp_path):
    config = R1Config(**settings(tmp_path))
    with pytest.raises(ValueError, match="cold_start_data: wanted a JSONL file"):
        r1.R1(config, the_task())
    with pytest.raises(ValueError, match="only a reward model"):
        r1.R1(config, the_task(), demonstrations(), GENERAL)
    held = [{"prompt": "a?", "answer": "<think>a</think><answer>7</answer>"}, {"prompt": "e?", "answer": "7"}]
    with pytest.raises(ValueError, match="none of 2 rows can be used"):
        r1.R1(config, the_task(), held)
    assert len(r1.R1(config, the_task(), [*held, *demonstrations()]).cold_start) == len(demonstrations())
    with pytest.raises(ValueError, match="general_rows: none of 1 rows can be used"):
        r1.R1(config, the_task(), demonstrations(), [{"prompt": "x"}])


def test_rules_and_reward_models_share_a_batch():
    mixed = r1.MixedRewards(rewards.of_function(lambda e, text: 1.0, "accuracy"), {"helpful": helpful})
    assert mixed.score(Sample({"question": "a?"}, "aa")) == (1.0, {"accuracy": 1.0})
    assert mixed.score(Sample({"general": "say q"}, "qa")) == (0.5, {"helpful": 0.5})


def test_the_helpful_judge_reads_the_summary_and_the_harmless_one_everything(tmp_path):
    made = r1.R1(
        R1Config(**settings(tmp_path)), the_task(), demonstrations(), GENERAL, helpful=lambda prompt, text: text,
        harmless=lambda prompt, text: text,
    )  # fmt: skip
    text = "<think>bad</think><answer>good</answer>"
    assert [made.judges[name]("p", text) for name in ("helpful", "harmless")] == ["good", text]


def saved_reward_model(folder):
    from rl4llm_fast.trainer import RewardModel

    model = RewardModel.of(text_model())
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def scored(model, prompt, text):
    ids = [tiny_tokenizer()(part)["input_ids"] for part in (prompt, text)]
    return float(model([[*ids[0], *ids[1], END]]).detach())


def test_a_reward_model_as_judge(tmp_path):
    model = saved_reward_model(tmp_path)
    made = Judge(str(tmp_path), torch.device("cpu"))
    assert made("say q", "qq") == pytest.approx(scored(model, "say q", "qq"), rel=1e-5)
    summed = Judge(str(tmp_path), torch.device("cpu"), rewards.summary_of)
    text = "<think>a</think><answer>b</answer>"
    assert summed("say q", text) == pytest.approx(scored(model, "say q", "b"), rel=1e-5)


def test_judges_read_the_answers_of_a_step_together(tmp_path):
    """In forward passes of 16; where one answer is at fault they are read one by one, and it alone scores 0."""
    model = saved_reward_model(tmp_path)
    made, sizes = Judge(str(tmp_path), torch.device("cpu")), []
    forward = made.model.forward

    def counted(sequences):
        sizes.append(len(sequences))
        if any(len(ids) > 20 for ids in sequences):
            raise IndexError("too long")
        return forward(sequences)

    made.model.forward = counted
    mixed = r1.MixedRewards(rewards.of_function(lambda e, text: 1.0, "accuracy"), {"helpful": made})
    texts = ["q" * (1 + i % 3) + "ab"[i % 2] * (i % 5) for i in range(40)]
    samples = [Sample({"general": "say q"}, text) for text in texts] + [Sample({"question": "a?"}, "aa")]
    found = mixed.score_all(samples)
    assert sizes == [16, len(set(texts)) - 16]
    expected = {text: scored(model, "say q", text) for text in texts}
    assert [score for score, _ in found] == pytest.approx([*map(expected.get, texts), 1.0], rel=1e-4, abs=1e-5)
    found = mixed.score_all([*samples[:3], Sample({"general": "say q"}, "q" * 30)])
    assert [score for score, _ in found] == pytest.approx([*map(expected.get, texts[:3]), 0.0], rel=1e-4, abs=1e-5)
    assert [name for name, _ in mixed.attempts.raised] == ["helpful"]


# Distillation


def distill_config(tmp_path, **changes) -> DistillConfig:
    return DistillConfig(
        output_dir=str(tmp_path), precision="fp32", device="cpu", progress=False, steps=40, learning_rate=1e-2,
        max_new_tokens=10, samples=4, checkpoint_every=0, save_model=False, **changes,
    )  # fmt: skip


def test_a_student_learns_from_a_teachers_right_answers(tmp_path, whole):
    result = train_distill(
        distill_config(tmp_path, teacher=str(whole.output_dir / "2_reasoning_rl" / "model"), eval_every=40),
        model=text_model(), tokenizer=tiny_tokenizer(), task=the_task(), rows=GENERAL,
    )  # fmt: skip
    accuracy = [row["heldout_accuracy"] for row in result.history if "heldout_accuracy" in row]
    assert accuracy[0] == 0
    assert accuracy[-1] >= 0.75
    with pytest.raises(ValueError, match="sampled with other settings"):
        train_distill(
            distill_config(tmp_path, temperature=0.5), model=text_model(), tokenizer=tiny_tokenizer(), task=the_task()
        )


def test_a_teacher_without_a_right_answer(tmp_path):
    with pytest.raises(ValueError, match=r"none of its 48 answers can be learned from \(48 wrong\)"):
        train_distill(distill_config(tmp_path), model=text_model(), tokenizer=tiny_tokenizer(), task=the_task())


def test_questions_beyond_the_models_context_are_not_asked(tmp_path, capsys):
    def short():
        return tiny_model(vocab_size=len(WORDS), eos_token_id=END, pad_token_id=END, max_position_embeddings=24)

    task = the_task()
    task.train[5], task.heldout[1] = {"prompt": "a" * 9}, {"prompt": "b" * 9}
    with pytest.raises(ValueError, match=r"none of its 44 answers can be learned from \(44 wrong\)"):
        train_distill(distill_config(tmp_path / "d"), model=short(), tokenizer=tiny_tokenizer(), task=task)
    said = capsys.readouterr().out
    assert "questions: 1 of 12 rows cannot be used" in said
    assert "more than the model's context of 24" in said
    cfg = distill_config(tmp_path / "strict", strict=True)
    with pytest.raises(ValueError, match=r"questions, line 6: .* more than the model's context of 24"):
        train_distill(cfg, model=short(), tokenizer=tiny_tokenizer(), task=task)

    row = {"prompt": "c?", "answer": "7"}
    cfg = distill_config(tmp_path / "e")
    framed = distill.framed(task, cfg, tiny_tokenizer())
    made = distill.DistillTrainer(cfg, short(), tiny_tokenizer(), framed, [row], None)
    assert len(made.task.heldout) == 3
    made.optimizer.close()
    assert "held-out questions: 1 of 4 rows cannot be used" in capsys.readouterr().out

    short().save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    R1(R1Config(**settings(tmp_path)), task, demonstrations()).measure(str(tmp_path / "m"))
    assert "held-out questions: 1 of 4 rows cannot be used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("<think>it is so</think><answer>7</answer>", ""),
        ("7", "not in the form"),
        ("<think></think><answer>7</answer>", "not in the form"),
        ("<think>it 好 好 so</think><answer>7</answer>", "in several languages"),
        ("<think>so it is so it is so it is so it is</think><answer>7</answer>", "repeating itself"),
    ],
)
def test_what_is_readable(answer, reason):
    assert distill.why_not(answer, True, DistillConfig()) == reason
    assert distill.why_not(answer, False, DistillConfig()) == "cut off"


def test_the_command_names_what_is_wrong(capsys, tmp_path):
    path = tmp_path / "r1.toml"
    path.write_text('cold_start_data = "no.jsonl"\n[final_rl]\nsteps = 3\n')
    assert fill(R1Config, path, ["reasoning_rl.steps=5"]).stage("reasoning_rl").steps == 5
    examples = pathlib.Path(__file__).resolve().parent.parent / "examples"
    assert fill(R1Config, examples / "r1.toml").stage("final_rl").rewards == {"accuracy": 1.0, "format": 1.0}
    assert fill(DistillConfig, examples / "distill.toml").prompts > 0
    assert cli.main(["train", "r1", str(path)]) == 2
    assert "no.jsonl" in capsys.readouterr().err
    assert cli.main(["train", "distill", "--set", "teecher=x"]) == 2
    assert "the nearest is 'teacher'" in capsys.readouterr().err
