"""TRL's DPO and KTO trainers beside these: from the same batch and weights the same losses, rewards and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rl4llm_fast.trainer import DPOConfig, KTOConfig, train_dpo, train_kto

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets", reason="TRL's data sets are not installed")
transformers = pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
tokenizers = pytest.importorskip("tokenizers")

COUNT, STEPS = 6, 3
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(60))]
SHARED = {"beta": 0.2, "learning_rate": 1e-2, "seed": 1}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama, and a tokenizer of whole words."""
    path = str(tmp_path_factory.mktemp("model"))
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def words(*numbers: int) -> str:
    return " ".join(f"w{number % 60}" for number in numbers)


PROMPTS = [words(i, i + 3) for i in range(COUNT)]
CHOSEN = [" " + words(*range(i + 1, 2 * i + 3)) for i in range(COUNT)]
REJECTED = [" " + words(i + 5, i, i + 7) for i in range(COUNT)]
LABELS = [i % 3 != 1 for i in range(COUNT)]


def theirs(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def settings_of_theirs(folder: Path) -> dict[str, Any]:
    return {
        **SHARED, "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": COUNT,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no",
        "disable_tqdm": True, "gradient_checkpointing": False, "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
    }  # fmt: skip


def settings_of_ours(folder: Path, model: str) -> dict[str, Any]:
    return {
        **SHARED, "output_dir": str(folder), "steps": STEPS, "batch_size": COUNT, "model": model, "heldout": 0,
        "precision": "fp32", "device": "cpu", "checkpoint_every": 0, "progress": False, "save_model": False,
    }  # fmt: skip


LOSSES = [
    ("sigmoid", "dpo", {}, {}),
    ("robust", "robust", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    ("hinge", "hinge", {}, {}),
    ("ipo", "ipo", {}, {}),
]


@pytest.mark.parametrize(("name", "kind", "knobs", "options"), LOSSES, ids=["dpo", "robust", "hinge", "ipo"])
def test_pairs(folder: str, tmp_path: Path, name: str, kind: str, knobs: dict, options: dict) -> None:
    args = trl.DPOConfig(**settings_of_theirs(tmp_path), loss_type=[name], **knobs)
    data = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
    expected = theirs(trl.DPOTrainer(folder, args=args, train_dataset=datasets.Dataset.from_dict(data)))
    rows = [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]
    # TRL's ipo takes means over an answer's tokens, where (68) has sums; its rewards are of sums.
    config = DPOConfig(**settings_of_ours(tmp_path, folder), loss=kind, loss_options=options, average=kind == "ipo")
    found = train_dpo(config, rows=rows).history
    assert len(found) == len(expected) == STEPS
    for ours, other in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(other["loss"], rel=2e-4, abs=2e-5)
        assert ours["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-3, abs=1e-4)
        if kind != "ipo":
            assert ours["reward_chosen"] == pytest.approx(other["rewards/chosen"], rel=2e-3, abs=2e-4)
            assert ours["margin"] == pytest.approx(other["rewards/margins"], rel=2e-3, abs=2e-4)
            assert ours["accuracy"] == pytest.approx(other["rewards/accuracies"])
    assert abs(found[-1]["loss"] - found[0]["loss"]) > 1e-3


def test_labelled_answers(folder: str, tmp_path: Path) -> None:
    args = trl.KTOConfig(**settings_of_theirs(tmp_path), desirable_weight=1.0, undesirable_weight=1.5)
    data = {"prompt": PROMPTS, "completion": CHOSEN, "label": LABELS}
    expected = theirs(trl.KTOTrainer(folder, args=args, train_dataset=datasets.Dataset.from_dict(data)))
    rows = [
        {"prompt": prompt, "answer": answer, "desirable": label}
        for prompt, answer, label in zip(PROMPTS, CHOSEN, LABELS, strict=True)
    ]
    config = KTOConfig(**settings_of_ours(tmp_path, folder), lambda_u=1.5)
    found = train_kto(config, rows=rows).history
    assert len(found) == len(expected) == STEPS
    for ours, other in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(other["loss"], rel=2e-4, abs=2e-5)
        assert ours["z"] == pytest.approx(SHARED["beta"] * other["kl"], rel=2e-3, abs=2e-4)
        assert ours["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-3, abs=1e-4)
        assert ours["reward_chosen"] == pytest.approx(other["rewards/chosen"], rel=2e-3, abs=2e-4)
        assert ours["reward_rejected"] == pytest.approx(other["rewards/rejected"], rel=2e-3, abs=2e-4)
