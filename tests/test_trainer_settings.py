"""The GRPO trainer's settings, tasks and command line: what is refused, and in which words."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys

import numpy as np
import pytest
import torch
from tiny_llama import PROMPTS, config, count_sevens, run, tiny_model

from rl4llm_fast import cli
from rl4llm_fast.trainer import Task, load_config, load_task, train_grpo
from rl4llm_fast.trainer.described import described
from rl4llm_fast.trainer.tasks import examples_of_step, last_number, prompt_token_ids

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")


def test_config_from_toml_and_overrides(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("steps = 3\nlearning_rate = 1\n[loss_options]\neps_high = 0.28\n")
    cfg = load_config(path, ["steps=7", "task_options.max_terms=3", "output_dir=some/where", "adam_betas=[0.9, 0.95]"])
    assert (cfg.steps, cfg.learning_rate, cfg.loss_options) == (7, 1.0, {"eps_high": 0.28})
    assert (cfg.task_options, cfg.output_dir, cfg.adam_betas) == ({"max_terms": 3}, "some/where", (0.9, 0.95))


def test_the_example_is_a_valid_config():
    example = pathlib.Path(__file__).resolve().parent.parent / "examples" / "grpo_chain_sum.toml"
    assert load_config(example).task == "chain_sum"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learnig_rate=1", "'learnig_rate'; the nearest is 'learning_rate'"),
        ("task_option.x=1", "'task_option'; the nearest is 'task_options'"),
        ("steps", "key=value"),
        ("steps=1.5", "steps: wanted a whole number, got 1.5"),
        ("steps=true", "steps: wanted a whole number"),
        ("steps.x=1", "steps"),
        ("steps=-1", "steps: wanted 0 or more"),
        ("temperature=0", "temperature: wanted more than 0"),
        ("top_p=1.5", "top_p"),
        ("precision=int4", "precision: wanted one of auto, bf16, autocast, fp32"),
        ("device=abacus", "device: 'abacus' is no device"),
        ("adam_betas=[0.9]", "adam_betas: wanted 2 values"),
        ("group_size=1", "group_size: wanted at least 2, for the advantage of an answer without others is 0, got 1"),
        ("minibatches=99", "minibatches: wanted at most prompts_per_step"),
    ],
)
def test_config_errors(override, message):
    with pytest.raises(ValueError, match="(?s).*" + message.replace("[", r"\[")):
        load_config(None, [override])


def test_one_answer_a_prompt_where_something_else_teaches():
    for override in ("kl_coef=0.1", "entropy_coef=0.1", "supervision=process"):
        assert load_config(None, ["group_size=1", override]).group_size == 1


@pytest.mark.parametrize(("has", "chosen"), [({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"bf16": True}, "bf16")])
def test_precision_that_the_machine_multiplies_in(monkeypatch, has, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert load_config(None, ["device=cpu"]).precision == chosen
    assert load_config(None, ["device=cpu", "precision=autocast"]).precision == "autocast"


def test_loss_settings_are_checked_before_any_work(tmp_path):
    for changes, message in (
        ({"loss": "grpoo"}, "grpoo"),
        ({"loss_options": {"eps_hihg": 0.3}}, "eps_hihg"),
        ({"aggregation": "average"}, "aggregation"),
    ):
        with pytest.raises(ValueError, match=message):
            run(config(tmp_path, **changes))
    with pytest.raises(ValueError, match="prompts, reward"):
        train_grpo(config(tmp_path), model=tiny_model(), prompts=PROMPTS)
    with pytest.raises(ValueError, match="finite number, got nan"):
        run(config(tmp_path), reward=lambda e, a: math.nan)
    with pytest.raises(ValueError, match="tokenizer"):
        prompt_token_ids("text", None)
    with pytest.raises(ValueError, match="empty"):
        prompt_token_ids({"prompt": []}, None)
    with pytest.raises(TypeError, match="prompt: wanted"):
        prompt_token_ids(3.5, None)


def test_cli(capsys, tmp_path):
    assert cli.main(["train", "grpo", "--set", "stepz=3"]) == 2
    assert "the nearest is 'steps'" in capsys.readouterr().err
    assert cli.main(["train", "grpo", str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err
    assert cli.main(["train", "grpo", str(tmp_path)]) == 2  # a folder
    assert str(tmp_path) in capsys.readouterr().err
    assert cli.main(["train", "grpo", "--set", "lr=1"]) == 2  # like no key
    assert "unknown key 'lr'; there are " in (error := capsys.readouterr().err)
    assert "learning_rate" in error


@pytest.mark.parametrize("name", ["data", "heldout_data"])
def test_cli_looks_for_the_data_before_it_loads_a_model(name, capsys, tmp_path):
    (tmp_path / "data.jsonl").write_text("{}")
    files = {"data": str(tmp_path / "data.jsonl"), name: str(tmp_path / "none.jsonl")}
    overrides = [part for key, path in files.items() for part in ("--set", f"{key}={path}")]
    assert cli.main(["train", "dpo", "--set", "model=not/looked-at", *overrides]) == 2
    assert f"config: {name}: there is no file or folder '{tmp_path}/none.jsonl'" in capsys.readouterr().err


def test_missing_extra_names_the_command(monkeypatch, tmp_path):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else find(name, *a)
    )
    with pytest.raises(ImportError, match=r"pip install 'rl4llm_fast\[trainer\]'"):
        run(config(tmp_path))


def test_the_package_itself_needs_no_extra():
    import subprocess

    code = (
        "import sys; sys.modules.update(transformers=None, tqdm=None, matplotlib=None, reasoning_gym=None)\n"
        "import rl4llm_fast, rl4llm_fast.cli, rl4llm_fast.trainer"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_chain_sum_holds_questions_out():
    pytest.importorskip("reasoning_gym", reason="needs the extra 'demo'")
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    task = load_task("chain_sum", heldout=64, **options)
    held = {e["prompt"] for e in task.heldout}
    assert len(held) == 64
    assert not held & {e["prompt"] for e in task.train}
    example = task.heldout[0]
    answer = example["entry"]["answer"]
    assert task.reward(example, f"The answer is {answer}.") == 1
    assert task.reward(example, "") == 0
    assert task.reward(example, "no idea") == 0
    with pytest.raises(ValueError, match="too few distinct questions"):
        load_task("chain_sum", heldout=150 * 10, **options)
    with pytest.raises(ValueError, match="chain_summ"):
        load_task("chain_summ")


def test_scorers_that_raise_score_zero():
    pytest.importorskip("reasoning_gym", reason="needs the extra 'demo'")
    task = load_task("chain_sum", heldout=2, size=8)
    assert task.reward({"prompt": "broken", "entry": None}, "7") == 0.0  # its scorer reads the entry's answer


def test_last_number():
    assert [last_number(t) for t in ("4 - 1 = 3.", "-7", "1,234 or so", "none ")] == ["3", "-7", "1,234", "none"]


def test_every_prompt_comes_once_a_pass():
    train = list(range(10))
    seen = [e for step in range(1, 6) for e in examples_of_step(train, step, 4, seed=3)]
    assert sorted(seen[:10]) == train
    assert sorted(seen[10:]) == train
    assert seen[:10] != seen[10:]


def test_a_pass_is_shuffled_once(monkeypatch):
    made, default_rng = [], np.random.default_rng

    def counted(key):
        made.append(tuple(key))
        return default_rng(key)

    monkeypatch.setattr(np.random, "default_rng", counted)
    train = list(range(101))
    seen = [e for step in range(1, 28) for e in examples_of_step(train, step, 8, seed=4321)]
    assert made == [(4321, 0), (4321, 1), (4321, 2)]
    order = [int(i) for epoch in range(3) for i in default_rng([4321, epoch]).permutation(101)]
    assert seen == order[: 27 * 8]


def test_evaluation_of_held_out_examples(tmp_path):
    task = Task(train=PROMPTS, reward=count_sevens, heldout=[[1, 2], [3, 4]])
    result = train_grpo(config(tmp_path, steps=30, eval_every=15), model=tiny_model(), task=task)
    held = [row["heldout_reward"] for row in result.history if "heldout_reward" in row]
    assert len(held) == 3  # the first model's too
    assert held[0] < 0.5
    assert held[-1] > 0.5


@pytest.mark.parametrize("algorithm", ["sft", "rm", "dpo", "curry", "kto", "ppo", "grpo", "r1", "distill"])
def test_help_lists_every_setting(algorithm, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", algorithm, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(cli._runs()[algorithm][1]):
        assert f"\n{field.name} = " in shown


def test_help_says_what_a_setting_is():
    text = described(cli._runs()["dpo"][1])
    assert 'precision = "auto"' in text  # as written, not as this machine understands it
    (line,) = (line for line in text.splitlines() if line.startswith("loss = "))
    assert "one of" in line
    assert "ipo" in line
