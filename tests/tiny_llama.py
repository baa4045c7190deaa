"""A random Llama small enough to train in seconds, and a reward that it can learn: for the trainer's tests."""

from __future__ import annotations

import torch

from rl4llm_fast.trainer import GRPOConfig, train_grpo

V, END = 32, 31


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object):
    import transformers

    torch.manual_seed(seed)
    settings = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": END, "bos_token_id": None,
        "pad_token_id": END, "tie_word_embeddings": True, "initializer_range": 0.2, **changes,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).to(dtype).eval()


def save_with_tokenizer(folder) -> None:
    """The tiny model as a folder that ``from_pretrained`` takes; the words w0, w1, ... are its tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(END)} | {"<end>": END}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    tiny_model().save_pretrained(folder)


PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11]]


def count_sevens(example, answer: list[int]) -> float:
    return answer.count(7) / 4


def config(tmp_path, **changes) -> GRPOConfig:
    settings = {
        "output_dir": str(tmp_path), "precision": "fp32", "device": "cpu", "steps": 6, "prompts_per_step": 4,
        "group_size": 8, "max_new_tokens": 4, "learning_rate": 1e-2, "checkpoint_every": 0, "progress": False,
        "save_model": False, **changes,
    }  # fmt: skip
    return GRPOConfig(**settings)


def run(cfg: GRPOConfig, model=None, reward=count_sevens):
    return train_grpo(cfg, model=tiny_model() if model is None else model, prompts=PROMPTS, reward=reward)


def rewards(result) -> list[float]:
    return [row["reward_mean"] for row in result.history if "reward_mean" in row]


def weights(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]
