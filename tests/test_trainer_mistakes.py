"""Mistakes of a user's: each is one line that names the setting, before the data is read and a model is loaded."""

from __future__ import annotations

import errno
import json
import math
import os

import pytest
import torch
from tiny_data import demonstrations, labelled, pairs, ranked, settings
from tiny_llama import PROMPTS, count_sevens, run, tiny_model
from tiny_llama import config as grpo_config

import rl4llm_fast as rf
from rl4llm_fast import cli, trainer
from rl4llm_fast.trainer import devices, distill, preflight, r1
from rl4llm_fast.trainer import run as runs

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")

ALL = ["sft", "rm", "dpo", "curry", "kto", "ppo", "grpo", "r1", "distill"]
ON_ROWS = {
    "sft": (trainer.train_sft, trainer.SFTConfig, demonstrations),
    "rm": (trainer.train_rm, trainer.RMConfig, pairs),
    "dpo": (trainer.train_dpo, trainer.DPOConfig, pairs),
    "curry": (trainer.train_curry, trainer.CurryConfig, ranked),
    "kto": (trainer.train_kto, trainer.KTOConfig, labelled),
}
CONFIGS = [trainer.SFTConfig, trainer.RMConfig, trainer.DPOConfig, trainer.CurryConfig, trainer.KTOConfig,
           trainer.PPOConfig, trainer.GRPOConfig, trainer.R1Config, trainer.DistillConfig]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_model(monkeypatch):
    """No test here gets as far as a model by name."""

    def load(name, **options):
        raise AssertionError(f"{name} was loaded")

    for module in (runs, distill, r1):
        monkeypatch.setattr(module, "load_model", load)


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(row, default=int) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def said(capsys, algorithm: str, *overrides: str, status: int = 2) -> str:
    """What the command prints: one line on stderr."""
    arguments = [part for override in overrides for part in ("--set", override)]
    assert cli.main(["train", algorithm, *arguments]) == status
    error = capsys.readouterr().err
    assert error.startswith("rl4llm-fast: ")
    assert error.count("\n") == 1
    return error


# What is known of the machine


@pytest.mark.parametrize("algorithm", ALL)
def test_a_backend_that_cannot_run(algorithm, capsys, tmp_path):
    data = written(tmp_path / "data.jsonl", pairs(5))
    error = said(capsys, algorithm, "backend=cuda", "device=cpu", f"output_dir={tmp_path}/out",
                 *([f"data={data}", "heldout=2"] if algorithm == "rm" else []))  # fmt: skip
    assert "config: backend 'cuda' cannot run " in error


def test_the_backend_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RL4LLM_FAST_BACKEND", "cuda")
    with pytest.raises(rf.BackendError, match=r"^backend 'cuda' cannot run linear_sft_loss"):
        trainer.train_sft(trainer.SFTConfig(**settings(tmp_path)), rows=demonstrations(20))


def test_only_ranked_answers_need_no_backend(tmp_path):
    cfg = trainer.RMConfig(**settings(tmp_path, steps=1, heldout=0, anchors=0, backend="cuda"))
    trainer.train_rm(cfg, model=tiny_model(), rows=ranked(8))  # their loss is plain PyTorch on every device


def test_backends_that_run_are_not_refused(tmp_path):
    for backend in rf.backends()["policy_loss"]:
        if backend in ("eager", "cpu"):
            run(grpo_config(tmp_path / backend, steps=1, backend=backend))


@pytest.mark.parametrize("algorithm", ["sft", "grpo", "r1", "distill"])
@pytest.mark.parametrize(("device", "why"), [("cuda", "got 'cuda': PyTorch "), ("cuda:7", "got 'cuda:7'"),
                                             ("meta", "got 'meta'"), ("abacus", "'abacus' is no device")])  # fmt: skip
def test_a_device_that_is_not_here(algorithm, device, why, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = said(capsys, algorithm, f"device={device}", f"output_dir={tmp_path}")
    assert "config: device: " in error
    assert why in error


def test_a_gpu_beyond_the_last(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.available_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="config: device: wanted one of cuda:0 to cuda:1, got 'cuda:7'"):
        devices.available_device("cuda:7")
    assert trainer.SFTConfig(device="cuda:7", precision="fp32").device == "cuda:7"  # it may be there where it runs


def test_a_model_that_is_given_stays_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(grpo_config(tmp_path, steps=1, device="cuda"))


# What is known of the files


@pytest.mark.parametrize("algorithm", ALL)
def test_output_dir_is_a_file(algorithm, capsys, tmp_path):
    path = tmp_path / "file"
    path.touch()
    assert f"config: output_dir: wanted a folder, '{path}' is a file" in said(capsys, algorithm, f"output_dir={path}")
    assert f"'{path}' is a file" in said(capsys, algorithm, f"output_dir={path}/below/it")


def test_output_dir_cannot_be_written_to(capsys, monkeypatch, tmp_path):
    def refuse(dir):  # permissions do not stop root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

    monkeypatch.setattr(preflight.tempfile, "TemporaryFile", refuse)
    error = said(capsys, "sft", f"output_dir={tmp_path}/runs/one")
    assert f"config: output_dir: cannot write to '{tmp_path}': Permission denied" in error
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_none(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    out = f"output_dir={tmp_path}/out"
    error = said(capsys, "sft", out, f"model={tmp_path}/empty")
    assert f"config: model: wanted the folder of a model, '{tmp_path}/empty' has no config.json" in error
    assert f"there is no folder '{tmp_path}/none'" in said(capsys, "r1", out, f"model={tmp_path}/none")
    assert "config: teacher: " in said(capsys, "distill", out, f"teacher={tmp_path}/none")
    assert "config: reward_model: no reward_head.json" in said(capsys, "ppo", out, f"reward_model={tmp_path}/empty")
    data = written(tmp_path / "data.jsonl", [])
    judged = (out, f"cold_start_data={data}", f"helpful_model={tmp_path}/empty")
    assert "config: helpful_model: no reward_head.json" in said(capsys, "r1", *judged)


@pytest.mark.parametrize("algorithm", ["sft", "rm", "dpo", "curry", "kto", "ppo"])
def test_data_is_read_before_a_model_is_loaded(algorithm, capsys, tmp_path):
    out = [f"output_dir={tmp_path}/out", *(["reward=math:prod"] if algorithm == "ppo" else [])]
    assert "config: data: wanted a JSONL file" in said(capsys, algorithm, *out)
    rows = (ON_ROWS[algorithm][2] if algorithm in ON_ROWS else demonstrations)(12)
    data = f"data={written(tmp_path / 'data.jsonl', rows)}"
    error = said(capsys, algorithm, *out, data, "heldout=12")
    assert "config: heldout: wanted fewer than the 12 rows there are, got 12" in error
    none = f"heldout_data={tmp_path}/none.jsonl"
    assert f"config: heldout_data: there is no file or folder '{tmp_path}/none.jsonl'" in said(
        capsys, algorithm, *out, data, none
    )
    empty = written(tmp_path / "empty.jsonl", [])
    assert f"{empty}: wanted rows, there are none" in said(capsys, algorithm, *out, f"data={empty}")
    other = written(tmp_path / "other.jsonl", [{"question": 1}] * 3)
    assert cli.main(["train", algorithm, *(f"--set={x}" for x in [*out, f"data={other}", "heldout=1"])]) == 2
    assert f"{other}: none of 3 rows can be used\n  line 1: prompt: missing" in capsys.readouterr().err
    error = said(capsys, algorithm, *out, f"data={other}", "strict=true", "heldout=1")
    assert f"{other}, line 1: prompt: missing; the row has question" in error


def test_further_sources_are_looked_for(capsys, tmp_path):
    out, data = f"output_dir={tmp_path}/out", written(tmp_path / "data.jsonl", demonstrations(5))
    error = said(
        capsys, "ppo", out, f"data={data}", "heldout=1", "reward=math:prod", "ptx_coef=0.1", "ptx_data=no/no.jsonl"
    )
    assert "config: ptx_data: there is no file or folder" in error
    assert "config: data: there is no" in said(capsys, "distill", out, "data=no/no.jsonl")
    assert "config: heldout_data: there is no" in said(capsys, "distill", out, "heldout_data=no/no.jsonl")
    task = ["task=tiny_llama:no_such"]
    assert "config: task: no function" in said(capsys, "distill", out, *task)
    both = written(tmp_path / "pairs.jsonl", pairs(5))
    error = said(capsys, "dpo", out, f"data={both}", "loss=2d_dpo", "segment_scores=no.jsonl", "heldout=1")
    assert "no.jsonl" in error
    error = said(capsys, "sft", out, f"data={data}", "heldout_split=test")
    assert "config: heldout_split: wanted a split of a data set, got 'test'" in error


def test_binary_files(capsys, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    assert cli.main(["train", "dpo", str(path)]) == 2
    assert f"{path}: not a TOML file: 'utf-8' codec can't decode byte 0x89" in capsys.readouterr().err
    path.write_bytes(b"\xef\xbb\xbfsteps = 3\n")
    assert trainer.load_config(path).steps == 3  # a mark that editors put there
    assert cli.main(["train", "dpo", "steps=5"]) == 2
    assert "there is no file 'steps=5'; a setting goes behind --set" in capsys.readouterr().err


# What is known of the settings


@pytest.mark.parametrize("kind", CONFIGS)
def test_numbers_are_finite(kind):
    for name, value in vars(kind()).items():
        if isinstance(value, float):
            with pytest.raises(ValueError, match=f"config: {name}: wanted a finite number, got nan"):
                kind(**{name: math.nan})
            if name in ("max_grad_norm", "max_ratio", "rollout_cap", "value_clip", "trust_region"):
                assert getattr(kind(**{name: math.inf}), name) == math.inf
                continue
            with pytest.raises(ValueError, match=f"config: {name}: wanted a finite number, got inf"):
                kind(**{name: math.inf})
        if isinstance(value, int):
            with pytest.raises(ValueError, match=f"config: {name}: wanted"):
                kind(**{name: math.inf})
    with pytest.raises(ValueError, match="config: adam_betas: wanted two values"):
        kind(adam_betas=(0.9, math.inf))
    with pytest.raises(ValueError, match=r"config: seed: wanted less than 2 \*\* 63"):
        kind(seed=2**64)


def test_numbers_in_tables_and_lists():
    for kind, given, name in (
        (trainer.GRPOConfig, {"loss_options": {"eps_high": math.nan}}, "loss_options.eps_high"),
        (trainer.R1Config, {"final_rl": {"loss_options": {"eps_high": math.nan}}}, "final_rl.loss_options.eps_high"),
        (trainer.DPOConfig, {"loss": "2d_dpo", "aspect_weights": [math.inf]}, "aspect_weights"),
        (trainer.GRPOConfig, {"stop_tokens": [1.5]}, "stop_tokens"),
        (trainer.DistillConfig, {"min_language": 1.5}, "min_language"),
    ):
        with pytest.raises(ValueError, match=f"config: {name}: wanted"):
            kind(**given)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("=3", "wanted key=value or table.key=value, got '=3'"),
        ("lerning rate=3", "wanted key=value or table.key=value, got 'lerning rate=3'"),
        ("steps=[3]", "steps: wanted a whole number, got [3]"),
        ("loss_options=3", "loss_options: wanted a table, got 3"),
        ("resume=yes", "resume: wanted true or false, got 'yes'"),
        ("adam_betas=0.9", "adam_betas: wanted 2 values, got 0.9"),
        ("loss_options.a.b=3", None),
        ("sampler=vlm", "sampler: wanted one of own, vllm"),
        ("lr_schedule=cosin", "lr_schedule: wanted one of constant, linear, cosine"),
        ("rewards.accuracy.x=3", None),
    ],
)
def test_overrides(override, message):
    if message is None:
        assert isinstance(trainer.load_config(None, [override]), trainer.GRPOConfig)
        return
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        trainer.load_config(None, [override])
    assert message in str(raised.value)


def test_texts_and_deep_keys_in_overrides():
    cfg = trainer.load_config(None, ["output_dir=2024", 'rewards."my.module.rule"=0.5', 'model="quoted"'])
    assert (cfg.output_dir, cfg.rewards, cfg.model) == ("2024", {"my.module.rule": 0.5}, "quoted")
    found = trainer.fill(trainer.R1Config, None, ["final_rl.loss_options.eps_high=0.28"])
    assert found.stage("final_rl").loss_options == {"eps_high": 0.28}


# What is given from Python


@pytest.mark.parametrize("algorithm", ON_ROWS)
@pytest.mark.parametrize(("given", "said"), [(5, "got int"), ("a.jsonl", "got 'a.jsonl'; a file"), ({}, "got dict")])
def test_rows_that_are_none(algorithm, given, said, tmp_path):
    train, kind, rows = ON_ROWS[algorithm]
    cfg = kind(**settings(tmp_path))
    with pytest.raises(TypeError, match=f"^rows: wanted a list of rows, {said}"):
        train(cfg, rows=given)
    with pytest.raises(TypeError, match=f"^heldout_rows: wanted a list of rows, {said}"):
        train(cfg, rows=rows(20), heldout_rows=given)


def test_arguments_that_are_something_else(tmp_path):
    cfg = {"output_dir": str(tmp_path)}
    ppo, grpo, recipe = (kind(**cfg) for kind in (trainer.PPOConfig, trainer.GRPOConfig, trainer.R1Config))
    for call, message in (
        (lambda: trainer.train_ppo(ppo, prompts=5, reward=count_sevens), "^prompts: wanted a list"),
        (lambda: trainer.train_ppo(ppo, prompts=[{"prompt": [1]}] * 99, heldout_prompts=5, reward=count_sevens),
         "^heldout_prompts: wanted a list"),
        (lambda: trainer.train_ppo(ppo, prompts=[], reward=5), "^reward: wanted a function, got 5"),
        (lambda: trainer.train_ppo(ppo, prompts=[], reward_model="a/b"), "^reward_model: wanted a RewardModel"),
        (lambda: trainer.train_grpo(grpo, prompts=5, reward=count_sevens), "^prompts: wanted a list"),
        (lambda: trainer.train_grpo(grpo, prompts=PROMPTS, reward="math:prod"), "^reward: wanted a function"),
        (lambda: trainer.train_grpo(grpo, task="chain_sum"), "^task: wanted a Task, got 'chain_sum'; a name goes into"),
        (lambda: trainer.train_r1(recipe, cold_start_rows=5), "^cold_start_rows: wanted a list"),
        (lambda: trainer.train_r1(recipe, cold_start_rows=[], general_rows=5), "^general_rows: wanted a list"),
        (lambda: trainer.train_distill(trainer.DistillConfig(**cfg), rows=5), "^rows: wanted a list"),
        (lambda: trainer.train_dpo(trainer.SFTConfig(**cfg)), "^config: wanted a DPOConfig, got SFTConfig"),
        (lambda: trainer.train_curry(trainer.DPOConfig(**cfg)), "^config: wanted a CurryConfig, got DPOConfig"),
        (lambda: trainer.train_sft({"steps": 3}), "^config: wanted a SFTConfig, got dict"),
        (lambda: trainer.train_sft(trainer.SFTConfig(**cfg), model="gpt2"), "^model: wanted a built model, got 'gpt2'"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=message):
            call()


# What stops a run


def test_other_settings_than_the_checkpoint_s(tmp_path, capsys):
    cfg = settings(tmp_path / "out", steps=1, checkpoint_every=1)
    trainer.train_sft(trainer.SFTConfig(**cfg), model=tiny_model(), rows=demonstrations(20))
    with pytest.raises(ValueError, match=r"written with other settings \(learning_rate 0.01 -> 0.5\)"):
        trainer.train_sft(trainer.SFTConfig(**cfg | {"learning_rate": 0.5}), rows=5)


def interrupt(config):
    raise KeyboardInterrupt


def test_what_goes_on_behind_an_interruption(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(trainer, "train_sft", interrupt)
    assert cli.main(["train", "sft", "--set", f"output_dir={tmp_path}"]) == 130
    assert "no checkpoint yet (the first is at step 20): the same command begins anew" in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").touch()
    assert cli.main(["train", "sft", "--set", f"output_dir={tmp_path}"]) == 130
    assert f"The same command goes on from {tmp_path}/checkpoint.pt" in capsys.readouterr().err
    os.utime(tmp_path / "checkpoint.pt", (1, 1))  # another run's
    assert cli.main(["train", "sft", f"--set=output_dir={tmp_path}", "--set=resume=false"]) == 130
    assert "begins anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/checkpoint.partial"), 2, "No space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), 1, "CUDA out of memory. A smaller micro_batch_size"),
    ],
)
def test_what_runs_out_is_one_line(error, status, message, monkeypatch, capsys):
    def fail(config):
        raise error

    monkeypatch.setattr(trainer, "train_sft", fail)
    assert message in said(capsys, "sft", status=status)


def test_columns_that_no_row_has(tmp_path, capsys):
    data = written(tmp_path / "data.jsonl", demonstrations(5))
    error = said(capsys, "sft", f"data={data}", "heldout=1", "columns.answer=completion", f"output_dir={tmp_path}")
    assert "config: columns.answer: no row of the data has a field 'completion'" in error


@pytest.mark.parametrize(
    ("algorithm", "overrides", "message"),
    [
        ("grpo", ["loss=gpro"], "config: loss: wanted one of 'pg', "),
        ("grpo", ["loss_options.eps_hihg=1"], "config: loss_options.eps_hihg: not a knob of kind 'grpo'"),
        ("grpo", ["kl_estimator=k9", "kl_coef=0.1"], "config: kl_estimator: wanted one of"),
        ("grpo", ["aggregation=none"], "config: aggregation: wanted "),
        ("ppo", ["aggregation=mean"], "config: aggregation: wanted one of"),
        ("ppo", ["aggregation=none"], "config: aggregation: wanted "),
        ("dpo", ["loss_options.label_smoothing=2"], "config: loss_options.label_smoothing: wanted"),
        ("dpo", ["reference_cache={file}"], "config: reference_cache: wanted a folder"),
        ("grpo", ["task_options.size=many"], "task_options.size: wanted a whole number of at least 1, got 'many'"),
        ("grpo", ["task=none.jsonl"], "config: task: there is no file or folder 'none.jsonl'"),
        ("ppo", ["reward=broken_module:function"], "config: reward: no function 'broken_module:function': invalid"),
        ("r1", ["final_rl.loss=gpro", "task=chain_sum"], "config: loss: wanted one of 'pg', "),
        ("r1", ["final_rl.rewards.acuracy=1", "task=chain_sum"], "config: rewards: unknown rule 'acuracy'"),
        ("ppo", ["value=reward_model", "reward=math:prod"], "config: value: wanted policy or shared, without"),
        (
            "ppo",
            ["ptx_coef=1", "reward=math:prod", "data={rows}", "heldout=1"],
            "config: ptx_data: wanted a JSONL",
        ),
    ],
)
def test_settings_are_named_as_the_config_has_them(algorithm, overrides, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_module.py").write_text("def function(:")
    rows = written(tmp_path / "rows.jsonl", demonstrations(5))
    given = [override.format(file=rows, rows=rows) for override in overrides]
    given += [f"cold_start_data={rows}"] * (algorithm == "r1")
    assert message in said(capsys, algorithm, f"output_dir={tmp_path}/out", *given)
