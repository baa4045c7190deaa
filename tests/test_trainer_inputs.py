"""Rows and reward functions that cannot be used, in the trainers that sample: counted, reported, or refused."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from tiny_data import demonstrations, settings
from tiny_llama import PROMPTS, tiny_model

from rl4llm_fast.trainer import GRPOConfig, SFTConfig, Task, train_grpo, train_sft
from rl4llm_fast.trainer.attempts import Attempts
from rl4llm_fast.trainer.data import token_ids_of
from rl4llm_fast.trainer.distill import text_rows
from rl4llm_fast.trainer.distributed import Ranks
from rl4llm_fast.trainer.run import differences
from rl4llm_fast.trainer.tasks import load_task, prompt_token_ids

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")


def run(tmp_path, **given):
    changes = given.pop("changes", {})
    config = GRPOConfig(
        steps=1, max_new_tokens=4, prompts_per_step=2, group_size=4, output_dir=str(tmp_path), checkpoint_every=0,
        save_model=False, progress=False, device="cpu", **changes,
    )  # fmt: skip
    return train_grpo(config, **{"model": tiny_model(), **given})


def picky(example, answer):
    if answer[0] % 2:
        raise KeyError("odd")
    return 1.0


def broken(example, answer):
    raise KeyError("no such thing")


def test_an_answer_on_which_a_reward_raises_scores_0_and_is_reported(tmp_path, capsys):
    row = run(tmp_path, prompts=PROMPTS, reward=picky).history[0]
    assert 0 < row["reward_mean"] < 1
    count = round(8 * (1 - row["reward_mean"]))
    said = f"reward 'picky': raised on {count} of 8 answers, which score 0: KeyError('odd')"
    assert said in capsys.readouterr().out
    with pytest.raises(ValueError, match="reward 'broken': raised on every answer: KeyError"):
        run(tmp_path, prompts=PROMPTS, reward=broken)


def test_held_out_answers_follow_the_same_rule(tmp_path, capsys):
    asked = []

    def once(example, answer):  # raises on the first held-out answer alone
        asked.append(answer)
        if len(asked) == 1:
            raise KeyError("odd")
        return 1.0

    row = run(tmp_path, task=Task(train=PROMPTS, heldout=PROMPTS, reward=once), changes={"eval_every": 1}).history[0]
    assert row["heldout_accuracy"] == 1 - 1 / len(PROMPTS)
    assert f"reward 'once': raised on 1 of {len(PROMPTS)} answers" in capsys.readouterr().out
    task = Task(train=PROMPTS, heldout=PROMPTS, reward=lambda example, answer: float("nan"))
    with pytest.raises(ValueError, match="wanted a finite number, got nan for the answer"):
        run(tmp_path, task=task, changes={"eval_every": 1})


def test_attempts_are_counted_by_function(capsys):
    attempts = Attempts()
    found = [attempts.call("ratio", 0.0, lambda x: 1 / x, x) for x in (0, 1, 2)]
    found += [attempts.call("steps", [0.0, 0.0], lambda x: [x, x], 1.0)]
    assert found == [0.0, 1.0, 0.5, [1.0, 1.0]]
    attempts.report()
    attempts.report()  # said once
    assert capsys.readouterr().out == (
        "reward 'ratio': raised on 1 of 3 answers, which score 0: ZeroDivisionError('division by zero')\n"
    )


def test_questions_that_cannot_be_used_are_counted(tmp_path, capsys):
    path = tmp_path / "questions.jsonl"
    good = [json.dumps({"prompt": f"{i} + 1 =", "answer": i + 1}) for i in range(4)]
    bad = ["{", "[1]", '{"prompt": "2"}', '{"prompt": " ", "answer": 1}']
    path.write_text("\n".join([*good, "", *bad]), encoding="utf-8")
    task = load_task(str(path), heldout=2)
    assert len(task.train) == len(task.heldout) == 2
    said = capsys.readouterr().out
    assert f"{path}: 4 of 8 rows cannot be used" in said
    assert all(f"line {line}: " in said for line in (6, 7, 8, 9))
    with pytest.raises(ValueError, match="line 6: no JSON"):
        load_task(str(path), heldout=2, strict=True)


def test_rows_of_other_domains_that_cannot_be_used_are_counted(tmp_path, capsys):
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "a"}, {"prompt": "", "answer": "b"}]
    assert text_rows("", rows, "general", strict=False) == rows[:1]
    said = capsys.readouterr().out
    assert "general_rows: 2 of 3 rows cannot be used" in said
    assert "line 2: wanted" in said
    with pytest.raises(ValueError, match="general_rows, line 2: wanted"):
        text_rows("", rows, "general", strict=True)


class Endless:
    """A tokenizer of one word that has no end token."""

    eos_token_id = None

    def __call__(self, text, **options):
        return {"input_ids": [1]}

    def decode(self, ids, **options):
        return "a" * len(ids)


def test_answers_that_never_end_are_named(tmp_path, capsys):
    def endless():
        model = tiny_model()
        model.config.eos_token_id = model.generation_config.eos_token_id = None
        return model

    given = {"prompts": PROMPTS, "reward": lambda example, answer: float(len(answer)), "tokenizer": Endless()}
    run(tmp_path, model=endless(), **given)
    assert capsys.readouterr().out.count("have no end token; every answer goes on to max_new_tokens = 4") == 1
    run(tmp_path, model=endless(), changes={"stop_tokens": [7], "overlong": "mask"}, **given)
    run(tmp_path, **given)  # the model has one
    assert "end token" not in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="config: overlong: wanted keep, or stop_tokens, where no token ends an answer"
    ):
        run(tmp_path, model=endless(), changes={"overlong": "mask"}, **given)
    rows = [{"prompt": "a", "answer": "b"}] * 4
    cfg = SFTConfig(**settings(tmp_path / "sft", steps=1, heldout=0))
    train_sft(cfg, model=endless(), tokenizer=Endless(), rows=rows)
    assert capsys.readouterr().out.count("tokenizer: has no end token; answers of the data") == 1


@pytest.mark.parametrize(
    ("given", "asked", "said"),
    [
        (torch.float32, "fp32", ""),
        (torch.float32, "autocast", ""),
        (torch.bfloat16, "bf16", ""),
        (torch.bfloat16, "fp32", "in torch.bfloat16, where precision = fp32 asks for torch.float32"),
        (torch.float32, "bf16", "in torch.float32, where precision = bf16 asks for torch.bfloat16"),
    ],
)
def test_a_model_unlike_the_config_is_named(given, asked, said):
    config = SFTConfig(device="cpu", precision=asked)
    assert differences(tiny_model(dtype=given), config, Ranks()) == said
    elsewhere = differences(tiny_model(dtype=given), SFTConfig(device="meta", precision=asked), Ranks())
    assert elsewhere == "on cpu, where device asks for meta" + (f" and {said}" if said else "")


def test_a_model_unlike_the_config_is_said(tmp_path, capsys):
    run(tmp_path, prompts=PROMPTS, reward=picky, changes={"precision": "bf16"})
    assert "model: is trained as it was given, in torch.float32, where precision = bf16" in capsys.readouterr().out


def test_a_full_disk_leaves_what_there_was(tmp_path, monkeypatch):
    cfg = settings(tmp_path, steps=1, checkpoint_every=1, save_model=True)
    model = tiny_model()

    def full(*given, **options):
        if hasattr(given[-1], "write"):
            given[-1].write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match=r"model cannot be saved: .*No space left.*checkpoint.pt has its weights"):
        train_sft(SFTConfig(**cfg), model=model, rows=demonstrations(20))
    assert not (tmp_path / "model.partial").exists()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint of step 2 cannot .*No space left.*; the one before it is"):
        train_sft(SFTConfig(**cfg | {"steps": 2}), model=tiny_model(), rows=demonstrations(20))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not (tmp_path / "checkpoint.partial").exists()


def test_messages_that_a_template_does_not_take():
    class Chat:
        chat_template = "{{ messages }}"

        def apply_chat_template(self, messages, **options):
            return "".join(message["content"] for message in messages)

    for prompt, error in (([{"rol": "user"}], ValueError), ([{"role": "user", "content": 3}], ValueError)):
        with pytest.raises(error, match=r"^prompt: the chat template does not take these messages: "):
            prompt_token_ids({"prompt": prompt}, Chat())
    with pytest.raises(TypeError, match=r"^prompt: wanted chat messages, each a mapping"):
        prompt_token_ids([{"role": "user", "content": "a"}, 5], Chat())


def test_truths_are_no_token_ids():
    with pytest.raises(TypeError, match="prompt: wanted text, chat messages or token ids"):
        prompt_token_ids([True, False], None)
    with pytest.raises(TypeError, match="answer: wanted text or token ids"):
        token_ids_of("answer", [True], None)
