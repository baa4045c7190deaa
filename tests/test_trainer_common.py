"""What every trainer has: recomputed activations, the times of a step, TensorBoard's events."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_data import assert_same_gradients, demonstrations, gradients, settings
from tiny_llama import config, rewards, run, tiny_model

from rl4llm_fast.trainer import SFTConfig, train_sft
from rl4llm_fast.trainer.metrics import Averages, Phases
from rl4llm_fast.trainer.sft import SFTTrainer

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_recomputed_layers_give_the_same_gradients_from_less_memory(tmp_path):
    found, kept = [], []
    for recompute in (False, True):
        cfg = SFTConfig(**settings(tmp_path, gradient_checkpointing=recompute))
        trainer = SFTTrainer(cfg, model=tiny_model(num_hidden_layers=4), rows=demonstrations())
        size = 0

        def pack(tensor):
            nonlocal size
            size += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found.append(gradients(trainer))
        kept.append(size)
    assert_same_gradients(*found)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept[1] < 0.4 * kept[0]


def test_recomputed_layers_under_sampling_and_a_reference(tmp_path):
    plain, recomputed = (
        run(config(tmp_path / str(value), steps=3, kl_coef=0.01, gradient_checkpointing=value))
        for value in (False, True)
    )
    assert rewards(plain) == rewards(recomputed)
    assert [row["grad_norm"] for row in plain.history] == [row["grad_norm"] for row in recomputed.history]


def test_a_model_without_layers_is_refused(tmp_path):
    cfg = SFTConfig(**settings(tmp_path, gradient_checkpointing=True))
    with pytest.raises(ValueError, match="gradient_checkpointing: this model has no layers"):
        train_sft(cfg, model=torch.nn.Linear(2, 2), rows=demonstrations())


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"tensorboard": True, "checkpoint_every": 2, "eval_every": 2}
    train_sft(SFTConfig(**settings(tmp_path, steps=2, **changes)), model=tiny_model(), rows=demonstrations())
    result = train_sft(SFTConfig(**settings(tmp_path, steps=4, **changes)), model=tiny_model(), rows=demonstrations())
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in result.history if "loss" in row]
    assert [event.step for event in events.Scalars("heldout_loss")] == [0, 2, 4]


def test_missing_tensorboard_names_the_command(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else find(name, *a))
    with pytest.raises(ImportError, match=r"pip install 'rl4llm_fast\[tensorboard\]'"):
        train_sft(SFTConfig(**settings(tmp_path, tensorboard=True)), model=tiny_model(), rows=demonstrations())


def test_on_a_gpu_phases_are_events_and_nobody_waits_within_a_step(monkeypatch):
    clock, waited = [0.0], []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "the step's"
            self.at = clock[0]

        def synchronize(self):
            waited.append(self.at)

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("everything was waited for"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the step's")
    phases = Phases(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "another thread's")

    def mark(phase, milliseconds):
        clock[0] += milliseconds
        phases.mark(phase)

    mark("forward", 20.0)
    hook = threading.Thread(target=mark, args=("loss", 30.0))  # as from the backward pass
    hook.start()
    hook.join()
    mark("backward", 50.0)
    mark("forward", 1.0)
    assert waited == []
    expected = {"forward": 0.021, "loss": 0.03, "backward": 0.05}
    assert {phase: value for phase, value in phases.seconds.items() if value} == pytest.approx(expected)
    assert waited == [101.0]
    assert phases.seconds == phases.seconds  # read again: nothing is counted twice, nobody waits
    mark("optimizer", 4.0)
    assert phases.seconds["optimizer"] == pytest.approx(0.004)
    assert waited == [101.0, 105.0]


def test_averages_take_all_metrics_off_the_device_at_once(monkeypatch):
    averages, copies, tolist = Averages(), [], torch.Tensor.tolist
    for tokens, value in ((1, 1.0), (3, 2.0)):
        names = ("loss", "ratio_min", "ratio_max")
        averages.add({name: torch.tensor(value, dtype=torch.bfloat16) for name in names}, tokens)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: copies.append(tensor.shape) or tolist(tensor))
    assert averages.result() == {"loss": 1.75, "ratio_min": 1.0, "ratio_max": 2.0}
    assert copies == [(6,)]
