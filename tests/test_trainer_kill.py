"""SIGKILL at random moments: started again, a run ends with the metrics and weights of one that was never cut off."""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_data import demonstrations
from tiny_llama import PROMPTS, config, count_sevens, save_with_tokenizer, tiny_model

from rl4llm_fast import cli
from rl4llm_fast.trainer import train_grpo

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
ROOT = pathlib.Path(__file__).resolve().parent.parent


def outcome(folder: pathlib.Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The metrics without the seconds, and the weights of the last checkpoint."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]
    return rows, torch.load(folder / "checkpoint.pt", weights_only=True)["optimizer"]["weights"]


def assert_same(one, other) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def sft_command(folder: pathlib.Path, name: str, steps: int) -> list[str]:
    settings = {
        "model": folder / "m", "data": folder / "data.jsonl", "heldout": 12, "steps": steps, "eval_every": 5,
        "checkpoint_every": 1, "learning_rate": 0.01, "lr_schedule": "cosine", "device": "cpu", "progress": "false",
        "output_dir": folder / name,
    }  # fmt: skip
    pairs = (f"{key}={value}" for key, value in settings.items())
    return ["train", "sft", *(part for pair in pairs for part in ("--set", pair))]


def write_data(folder: pathlib.Path) -> None:
    save_with_tokenizer(folder / "m")
    rows = [{key: [int(i) for i in ids] for key, ids in row.items()} for row in demonstrations()]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_the_command_killed_and_started_again(tmp_path):
    write_data(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rl4llm_fast.cli", *sft_command(tmp_path, "cut", 40)]
    cut = subprocess.Popen(command, env=environment)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(random.random() * 0.5)
    cut.kill()
    assert cut.wait(timeout=60) in (-signal.SIGKILL, 0)  # 0: it had just come to its end
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in ("cut", "whole"):
            assert cli.main(sft_command(tmp_path, name, 40)) == 0
    finally:
        torch.set_num_threads(threads)
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))
    assert (tmp_path / "cut" / "model" / "model.safetensors").is_file()
    assert not list((tmp_path / "cut").glob("*.partial"))


# Many kills in little time: the processes are forked from one that has done the imports.


def run_sft(folder: pathlib.Path, name: str) -> None:
    torch.set_num_threads(1)
    sys.exit(cli.main(sft_command(folder, name, 20)))


def run_grpo(folder: pathlib.Path, name: str) -> None:
    torch.set_num_threads(1)
    cfg = config(folder / name, steps=12, checkpoint_every=1, epochs=2, minibatches=2, precision="bf16", kl_coef=0.01)
    train_grpo(cfg, model=tiny_model(dtype=torch.bfloat16), prompts=PROMPTS, reward=count_sevens)


def wait_for_steps(folder: pathlib.Path, steps: int, process: multiprocessing.Process) -> None:
    """Until the run has written so many lines, and a random moment more, shorter than its last steps."""
    metrics = folder / "metrics.jsonl"
    while steps and process.is_alive() and not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= steps):
        time.sleep(0.001)
    time.sleep(random.random() * 0.02)


@pytest.mark.parametrize("run", [run_sft, run_grpo])
def test_killed_again_and_again(tmp_path, run):
    write_data(tmp_path)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["transformers.models.llama.modeling_llama", "rl4llm_fast.trainer", "matplotlib"])

    def start(name: str) -> multiprocessing.Process:
        process = processes.Process(target=run, args=(tmp_path, name))
        process.start()
        return process

    whole = start("whole")
    whole.join(120)
    assert whole.exitcode == 0
    for steps in sorted(random.sample(range(10), 3)):  # of the 12 or 20 that a run makes
        process = start("cut")
        wait_for_steps(tmp_path / "cut", steps, process)
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    last = start("cut")
    last.join(120)
    assert last.exitcode == 0
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))
