"""GRPO's loss from hidden states: what it is without them, for every kind and option, and when it is chosen."""

from __future__ import annotations

import pytest
import torch
from tiny_llama import PROMPTS, config, count_sevens, run, tiny_model

from rl4llm_fast.trainer import grpo
from rl4llm_fast.trainer.grpo import GRPOTrainer
from rl4llm_fast.trainer.objective import Head, objective

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"epochs": 2, "minibatches": 2, "layout": "shared"},
        {"kl_coef": 0.05, "entropy_coef": 0.01, "micro_batch_size": 3},
        {"loss": "gspo", "aggregation": "seq_mean_token_mean", "epochs": 2},
        {"rollout_correction": "truncate", "rollout_level": "sequence"},
        {"precision": "autocast"},
    ],
    ids=str,
)
def test_same_gradients_from_hidden_states_and_from_logits(tmp_path, changes):
    found, metrics = [], []
    for head in ("hidden", "logits"):
        trainer = GRPOTrainer(
            config(tmp_path, head=head, temperature=0.9, **changes),
            model=tiny_model(), prompts=PROMPTS, reward=count_sevens,
        )  # fmt: skip
        batch = trainer.collect(1)
        trainer.optimizer.step = lambda rate, norm: 0.0
        metrics.append(trainer.update(batch, 1))
        found.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainer.model.parameters()])
    rtol, atol = (0.05, 2e-3) if changes.get("precision") == "autocast" else (1e-4, 1e-6)
    assert any(g.abs().max() > 1e-3 for g in found[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    assert metrics[0].keys() == metrics[1].keys()
    for name, value in metrics[0].items():
        assert value == pytest.approx(metrics[1][name], rel=max(rtol, 1e-3), abs=1e-3 if rtol > 1e-3 else 1e-5), name


def test_hidden_states_are_the_default(tmp_path, monkeypatch):
    sources = []

    def spy(config, source, *arguments, **options):
        sources.append(type(source))
        return objective(config, source, *arguments, **options)

    monkeypatch.setattr(grpo, "objective", spy)
    results = [run(config(tmp_path / head, steps=1, head=head)).history[0] for head in ("auto", "logits")]
    assert sources[0] is Head
    assert sources[-1] is torch.Tensor
    for name in ("grad_norm", "sampler_gap", "loss"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-3, abs=1e-6)
