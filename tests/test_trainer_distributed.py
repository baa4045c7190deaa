"""Two processes on gloo, started as torchrun starts them, train as one does: the same losses, one set of files."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from tiny_data import demonstrations, labelled, pairs, ranked, settings
from tiny_llama import PROMPTS, config, count_sevens, tiny_model

from rl4llm_fast.trainer import (
    CurryConfig,
    DPOConfig,
    KTOConfig,
    PPOConfig,
    RMConfig,
    SFTConfig,
    train_curry,
    train_dpo,
    train_grpo,
    train_kto,
    train_ppo,
    train_rm,
    train_sft,
)
from rl4llm_fast.trainer.distributed import Ranks, join
from rl4llm_fast.trainer.sharding import for_file
from rl4llm_fast.trainer.tasks import Task

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
ROOT = pathlib.Path(__file__).resolve().parent.parent
LENGTHS = dict.fromkeys(("checkpoint_every", "eval_every"), 2)


def runs(folder: pathlib.Path):
    """(name, function that trains) of each run; 3 rows a step, which two processes cannot share equally."""
    sft = {"batch_size": 3, "micro_batch_size": 1, "steps": 4, "heldout": 5, "save_model": True, **LENGTHS}
    half = {**sft, "precision": "bf16", "aggregation": "seq_mean_token_mean", "packing": True}
    sharded = {**sft, "batch_size": 4, "parallel": "fsdp"}

    def train(kind, function, rows, name, changes, **model):
        cfg = kind(**settings(folder / name, **changes))
        dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
        return lambda: function(cfg, model=tiny_model(dtype=dtype, **model), rows=rows())

    def interrupted():
        for steps in (2, 4):
            train(SFTConfig, train_sft, demonstrations, "sft_fsdp", {**sharded, "steps": steps})()

    yield "sft", train(SFTConfig, train_sft, demonstrations, "sft", sft)
    yield "sft_bf16", train(SFTConfig, train_sft, demonstrations, "sft_bf16", half)
    yield "sft_fsdp", interrupted
    yield "dpo", train(DPOConfig, train_dpo, pairs, "dpo", {**sft, "micro_batch_size": 0})
    changes = {**sharded, "precision": "bf16", "gradient_checkpointing": True}
    yield "dpo_fsdp_bf16", train(DPOConfig, train_dpo, pairs, "dpo_fsdp_bf16", changes, tie_word_embeddings=False)
    yield "kto", train(KTOConfig, train_kto, labelled, "kto", sft)
    yield "kto_fsdp", train(KTOConfig, train_kto, labelled, "kto_fsdp", {**sharded, "heldout": 5})
    yield "curry", train(CurryConfig, train_curry, ranked, "curry", {**sft, "steps_per_round": 2})
    yield "rm", train(RMConfig, train_rm, pairs, "rm", sft)
    grpo = {
        "steps": 4, "epochs": 2, "minibatches": 2, "micro_batch_size": 5, "kl_coef": 0.01, "entropy_coef": 1e-3,
        "advantage_scale": "batch", "prompts_per_step": 3, "sampling_batch_size": 2, **LENGTHS,
    }  # fmt: skip
    task = Task(train=PROMPTS, reward=count_sevens, heldout=[[1, 2], [3, 4], [5]])
    yield "grpo", lambda: train_grpo(config(folder / "grpo", **grpo), model=tiny_model(), task=task)
    ppo = {
        "steps": 4, "batch_size": 3, "micro_batch_size": 1, "heldout": 0, "max_new_tokens": 4, "kl_target": 0.01,
        "kl_every": 2, "trust_region": 0.05, "ptx_coef": 0.1, "ptx_batch_size": 3, "learning_rate": 3e-3, **LENGTHS,
    }  # fmt: skip
    for value in ("policy", "shared"):
        cfg = PPOConfig(**settings(folder / f"ppo_{value}", **{**ppo, "value": value}))
        yield (
            f"ppo_{value}",
            lambda cfg=cfg: train_ppo(cfg, model=tiny_model(), task=task, ptx_rows=demonstrations(8)),
        )


def rows_of(folder: pathlib.Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


def start(processes: int, port: int, *command: object) -> list[subprocess.Popen]:
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",  # gloo on the CPU, also where there is one GPU for two processes
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)], text=True,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(processes)
    ]  # fmt: skip


def finish(ranks: list[subprocess.Popen]) -> list[str]:
    try:
        texts = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, text in zip(ranks, texts, strict=True):
        assert process.returncode == 0, text
    return texts


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_train_as_one(tmp_path):
    both = start(2, free_port(), __file__, tmp_path / "two")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _, train in runs(tmp_path / "one"):
            train()
    finally:
        torch.set_num_threads(threads)
    finish(both)
    for name, _ in runs(tmp_path):
        one, two = rows_of(tmp_path / "one" / name), rows_of(tmp_path / "two" / name)
        assert len(one) == len(two) >= 4, name
        loose = "bf16" in name
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys(), name
            for key, value in a.items():
                if value is None:  # a ratio of no undesirable answers
                    assert b[key] is None
                    continue
                wanted = pytest.approx(value, rel=2e-2 if loose else 1e-4, abs=2e-3 if loose else 2e-5)
                assert b[key] == wanted, (name, a["step"], key)
        weights = [
            torch.load(tmp_path / count / name / "checkpoint.pt", weights_only=True)["optimizer"]
            for count in ("one", "two")
        ]
        weights = [state.get("policy", state)["weights"] for state in weights]
        for key in weights[0]:
            torch.testing.assert_close(weights[0][key], weights[1][key], rtol=0, atol=2e-2 if loose else 1e-4)
    files = [{p.relative_to(tmp_path / n).as_posix() for p in (tmp_path / n).rglob("*")} for n in ("one", "two")]
    assert {f for f in files[0] if "reference/" not in f} == {f for f in files[1] if "reference/" not in f}


ADDED_UP = """
import torch, torch.distributed as dist
from rl4llm_fast.trainer import distributed

ranks = distributed.join()
distributed.MESSAGE_BYTES = 1000
torch.manual_seed(ranks.rank)
shapes = [(3, 5), (200, 2), (7,), (), (11, 4), (90,), (300,)]
given = [torch.randn(shape, dtype=torch.bfloat16 if i % 3 == 2 else torch.float32) for i, shape in enumerate(shapes)]
given[4] = given[4].T.contiguous().T  # as a gradient may lie in memory
one_by_one = [tensor.clone() for tensor in given]
for tensor in one_by_one:
    dist.all_reduce(tensor)
messages, reduce = [], dist.all_reduce
dist.all_reduce = lambda tensor, **options: messages.append(tensor.numel()) or reduce(tensor, **options)
ranks.add_up(iter(given))
assert all(torch.equal(a, b) for a, b in zip(given, one_by_one))
assert messages == [15 + 1 + 44, 400, 7 + 90, 300], messages
"""


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_gradients_that_travel_together_add_up_to_the_same_bits():
    finish(start(2, free_port(), "-c", ADDED_UP))


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_the_example_of_a_sharded_head():
    text = finish(start(2, free_port(), ROOT / "examples" / "fsdp2_head.py"))[0]
    for head in ("tied", "separate", "frozen", "lora"):
        assert f"{head} head: gradients of 2 processes" in text


def test_what_a_checkpoint_holds_is_whole_in_the_first_process_alone():
    class Cut:  # as FSDP's are: a piece here, the whole by asking
        def full_tensor(self):
            return torch.arange(4.0)

        def to_local(self):
            return torch.arange(2.0)

    assert for_file(Cut(), Ranks(0, 2)).tolist() == [0, 1, 2, 3]
    assert for_file(Cut(), Ranks(1, 2)).numel() == 0
    assert for_file(torch.ones(2), Ranks(1, 2)).tolist() == [1, 1]


@pytest.mark.parametrize(("place", "taken"), [("0", [0]), ("1", []), (None, [])])
def test_a_process_takes_the_gpu_of_its_place_where_there_is_one(monkeypatch, place, taken):
    found = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: int(place or 1))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if place is not None:
        monkeypatch.setenv("LOCAL_RANK", place)
    assert join().rank == int(place or 1)
    assert found == taken


if __name__ == "__main__":
    torch.set_num_threads(1)
    for _, go in runs(pathlib.Path(sys.argv[1])):
        go()
