"""TRL's trainers on a tiny model, patched and not: the same losses, rewards and metrics at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rl4llm_fast.compat import trl as ours

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(60))]
CLOCKS = ("time", "runtime", "per_second")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    ours.unpatch()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama with tied embeddings, and a tokenizer of whole words."""
    folder = str(tmp_path_factory.mktemp("model"))
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def words(*numbers: int) -> str:
    return " ".join(f"w{number % 60}" for number in numbers)


def settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "bf16": False, "learning_rate": 1e-2, "save_strategy": "no", "seed": 1,
        "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip


def grpo(model: str, folder: Path) -> Any:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(len(word) for word in text.split()) % 7) for text in completions]

    data = datasets.Dataset.from_dict({"prompt": [words(i, i + 3, 2 * i) for i in range(12)]})
    args = trl.GRPOConfig(
        **settings(folder), num_generations=4, max_completion_length=8, beta=0.04, temperature=0.9, num_iterations=2
    )
    return trl.GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=data)


def dpo(model: str, folder: Path) -> Any:
    pairs = {
        "prompt": [words(i, i + 3) for i in range(12)],
        "chosen": [" " + words(i + 1, i + 2) for i in range(12)],
        "rejected": [" " + words(i + 5, i, i + 7) for i in range(12)],
    }
    return trl.DPOTrainer(
        model, args=trl.DPOConfig(**settings(folder)), train_dataset=datasets.Dataset.from_dict(pairs)
    )


def kto(model: str, folder: Path) -> Any:
    answers = {
        "prompt": [words(i, i + 3) for i in range(12)],
        "completion": [" " + words(i + 1, 2 * i) for i in range(12)],
        "label": [i % 2 == 0 for i in range(12)],
    }
    return trl.KTOTrainer(
        model, args=trl.KTOConfig(**settings(folder)), train_dataset=datasets.Dataset.from_dict(answers)
    )


def sft(model: str, folder: Path) -> Any:
    data = datasets.Dataset.from_dict({"text": [words(i, i + 3, 2 * i, 7) for i in range(12)]})
    return trl.SFTTrainer(model, args=trl.SFTConfig(**settings(folder)), train_dataset=data)


@pytest.mark.parametrize("make", [grpo, dpo, kto, sft])
def test_patched_trainer_logs_the_same(make: Callable[..., Any], model_folder: str, tmp_path: Path) -> None:
    calls = []

    def history(name: str) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
        trainer = make(model_folder, tmp_path / name)
        trainer.train()
        logs = [{k: v for k, v in log.items() if not any(c in k for c in CLOCKS)} for log in trainer.state.log_history]
        return logs, [p.detach() for p in trainer.model.parameters()]

    plain, plain_weights = history("plain")
    with ours.patch() as report, pytest.MonkeyPatch.context() as spy:
        assert "trl.trainer.utils._ChunkedLogProbFunction" in report.swapped
        swapped = trl.trainer.utils._ChunkedLogProbFunction
        apply = swapped.apply
        spy.setattr(swapped, "apply", staticmethod(lambda *a: (calls.append(len(a)), apply(*a))[1]))
        patched, patched_weights = history("patched")
    assert calls
    assert len(plain) == len(patched) == 4  # three steps and the summary
    assert any("loss" in log for log in plain)
    for before, after in zip(plain, patched, strict=True):
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert after[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    for before_weight, after_weight in zip(plain_weights, patched_weights, strict=True):
        torch.testing.assert_close(after_weight, before_weight, rtol=1e-4, atol=1e-4)
