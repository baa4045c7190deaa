"""What PPO is given: settings, rewards and functions that are refused or reported, text and messages, the command."""

from __future__ import annotations

import json
import math
import pathlib

import pytest
import torch
from tiny_llama import save_with_tokenizer, weights
from tiny_ppo import ROWS, reward_model, run, sevens, sources, trainer_of

from rl4llm_fast import cli
from rl4llm_fast.trainer import PPOConfig, fill
from rl4llm_fast.trainer.guard import Diverged
from rl4llm_fast.trainer.tasks import prompt_token_ids

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kl_coeff=1", "'kl_coeff'; the nearest is 'kl_coef'"),
        ("rewardmodel=x", "'rewardmodel'; the nearest is 'reward_model'"),
        ("value=mine", "value: wanted one of auto, reward_model, policy, shared"),
        ("lam=1.5", r"lam: wanted a number in \[0, 1\]"),
        ("minibatches=99", "minibatches: wanted at most batch_size"),
        ("kl_old_target=0.1", 'kl_old_target: wanted loss = "kl_pen"'),
        ("trust_region=-1", "trust_region: wanted 0 or more"),
        ("value_clip=0", "value_clip: wanted more than 0"),
    ],
)
def test_config_errors(override, message):
    with pytest.raises(ValueError, match=message):
        fill(PPOConfig, None, [override])


def test_rewards_that_are_refused(tmp_path):
    def crooked(example, answer):
        return wrong

    sample = r"for the answer \[.*\] to \{'prompt'"
    for wrong, message in (  # noqa: B007
        (math.nan, f"reward 'crooked': wanted a finite number, got nan {sample}"),
        ([1.0, 2.0], rf"reward 'crooked': wanted one number, got \[1.0, 2.0\] {sample}"),
        (torch.ones(3), rf"reward 'crooked': wanted one number, got tensor\(.*\) {sample}"),
        (None, f"reward 'crooked': wanted one number, got None {sample}"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, sources(reward=crooked))
    with pytest.raises(ValueError, match="reward_model, reward, task: wanted one"):
        run(tmp_path, sources(reward=None))
    with pytest.raises(ValueError, match="reward_model, reward, task: wanted one"):
        run(tmp_path, sources(reward=sevens, reward_model=reward_model()))
    with pytest.raises(ValueError, match="vocabulary of 32 tokens, got 40"):
        run(tmp_path, sources(reward_model=reward_model(vocab_size=40)))
    with pytest.raises(ValueError, match="reward_model: its context is 7 tokens, and a prompt with its answer takes"):
        run(tmp_path, sources(reward_model=reward_model(max_position_embeddings=7)))
    with pytest.raises(ValueError, match="value: wanted policy or shared"):
        run(tmp_path, value="reward_model")
    with pytest.raises(ValueError, match="ppo_clipp"):
        run(tmp_path, loss="ppo_clipp")
    with pytest.raises(
        ValueError, match=r"line 1: prompt and answer: 7 tokens .3 of the prompt., more than max_length"
    ):
        run(tmp_path, max_length=6, strict=True)


def test_an_answer_that_cannot_be_scored_scores_0_and_is_reported(tmp_path, capsys):
    def picky(example, answer):
        if len(answer) == 4:
            raise KeyError("too long")
        return 1.0

    row = run(tmp_path, sources(reward=picky), steps=1).history[0]
    assert 0 < row["reward_mean"] < 1
    assert "reward 'picky': raised on " in capsys.readouterr().out

    def broken(example, answer):
        raise KeyError("no such thing")

    with pytest.raises(ValueError, match="'broken': raised on every answer: KeyError"):
        run(tmp_path / "broken", sources(reward=broken), steps=1)


def test_functions_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def short(example, answer):\n    return 1 / (1 + len(answer))\n")
    (tmp_path / "needs_more.py").write_text("raise ImportError('lexicon missing: pip install lexicon')\n")
    monkeypatch.chdir(tmp_path)
    changes = {"steps": 1, "reward": "my_rewards:short", "heldout_reward": "my_rewards.short", "eval_every": 1}
    row = run(tmp_path, sources(reward=None, heldout_prompts=ROWS), **changes).history[-1]
    assert 0 < row["reward_mean"] <= 1
    assert row["heldout_short"] == row["heldout_reward"]
    for name, message in (
        ("my_rewards:shrt", "config: reward: no function 'my_rewards:shrt'"),
        ("needs_more:score", "config: reward: .*lexicon missing: pip install lexicon"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, sources(reward=None), reward=name)


def test_a_nan_stops_the_run_with_the_batch_saved(tmp_path):
    trainer = trainer_of(tmp_path)
    before = weights(trainer.model)
    trainer.models.value_model.head.bias.data.fill_(math.nan)
    with pytest.raises(Diverged, match=r"step 1: the loss is nan"):
        trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer.model), strict=True))
    batch = torch.load(tmp_path / "diverged" / "step-1.pt", weights_only=True)["batch"]
    assert len(batch["answers"]) == 16
    assert len(batch["index"]) == 8
    assert batch["values"].isnan().all()


# From the outside


def test_the_commands_from_pairs_to_a_policy_on_text(tmp_path, capsys, monkeypatch):
    save_with_tokenizer(tmp_path / "m")
    pair = {"prompt": "w1 w2", "chosen": "w7 w7", "rejected": "w8 w9"}
    (tmp_path / "pairs.jsonl").write_text("\n".join([json.dumps(pair)] * 12), encoding="utf-8")
    prompts = [json.dumps({"prompt": f"w{i} w2"}) for i in range(12)] + ["{}"]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts), encoding="utf-8")
    (tmp_path / "my_words.py").write_text("def words(example, text):\n    return len(text.split())\n")
    monkeypatch.chdir(tmp_path)

    def command(algorithm: str, *settings: str) -> int:
        usual = [f"model={tmp_path / 'm'}", "heldout=4", "steps=2", "eval_every=1", "progress=false", "device=cpu"]
        return cli.main(["train", algorithm, *[part for s in (*usual, *settings) for part in ("--set", s)]])

    assert command("rm", "data=pairs.jsonl", "output_dir=rm", "batch_size=4") == 0
    ppo = ("data=prompts.jsonl", "reward_model=rm/model", "heldout_reward=my_words:words", "batch_size=4")
    assert command("ppo", *ppo, "output_dir=ppo", "max_new_tokens=4") == 0
    printed = capsys.readouterr().out
    assert "line 13: prompt: missing" in printed
    assert all(f"heldout {name}: " in printed for name in ("reward", "words", "kl ref"))
    assert {"metrics.jsonl", "checkpoint.pt", "model", "ppo.png"} <= {p.name for p in (tmp_path / "ppo").iterdir()}
    assert command("ppo", *ppo, "output_dir=more", "model=ppo/model", "steps=1") == 0  # what it saved, it loads
    capsys.readouterr()
    for wrong, message in (
        ("stepz=3", "the nearest is 'steps'"),
        ("reward_model=nowhere", "no reward_head.json in 'nowhere'"),
        ("reward=my_words:words", "reward_model, reward, task: wanted one of them"),
    ):
        assert command("ppo", *ppo, "output_dir=wrong", wrong) == 2
        assert message in capsys.readouterr().err
    example = pathlib.Path(__file__).resolve().parent.parent / "examples" / "ppo_film_reviews.toml"
    assert fill(PPOConfig, example).reward_model


def test_messages_that_end_with_the_assistants_are_continued():
    class Tokenizer:
        chat_template = "a template"

        def apply_chat_template(self, messages, *, add_generation_prompt, continue_final_message, tokenize):
            assert add_generation_prompt != continue_final_message
            return "".join(m["content"] for m in messages) + ("" if continue_final_message else ">")

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(c) for c in text]}

    user, begun = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
    assert prompt_token_ids([user], Tokenizer()) == [ord("u"), ord(">")]
    assert prompt_token_ids({"prompt": [user, begun]}, Tokenizer()) == [ord("u"), ord("a")]
