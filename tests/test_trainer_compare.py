"""What the demo ends with: a step on given answers, fused and in plain PyTorch, in two processes."""

from __future__ import annotations

import pytest
import torch
from tiny_llama import PROMPTS, config, save_with_tokenizer

from rl4llm_fast.trainer.batch import Batch
from rl4llm_fast.trainer.compare import compare, write_batch
from rl4llm_fast.trainer.grpo import GRPOTrainer
from rl4llm_fast.trainer.tasks import Task

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_same_step_beside_the_checkpoint_of_the_run(tmp_path):
    save_with_tokenizer(tmp_path / "m")
    settings = config(tmp_path, model=str(tmp_path / "m"), steps=1, checkpoint_every=1)
    trainer = GRPOTrainer(settings, task=Task(train=PROMPTS, reward=lambda example, answer: answer.count("w7") / 4))
    rollout = trainer.collect(1).rollout
    count = len(rollout.answers)
    write_batch(tmp_path / "batch.json", settings, Batch(rollout, [0.0] * count, torch.linspace(-1, 1, count)))
    trainer.run()
    assert (tmp_path / "checkpoint.pt").is_file()
    costs = compare(tmp_path / "batch.json", rounds=2)
    assert costs["fused"].loss == pytest.approx(costs["eager"].loss, rel=1e-4, abs=1e-6)
    assert all(cost.step_seconds > 0 and cost.extra_bytes >= 0 for cost in costs.values())
