"""Models of realistic size for whole steps: made of a config, with random weights, without a download.

A folder holds the config and a tokenizer of two words; whoever loads it fills the model at random, everyone alike. What
a step costs hangs on the widths, the vocabulary and the number of tokens, not on what the weights have learned.
"""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from torch import nn

_LLAMA_3 = {
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
}
# Widths, heads and layers of Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B.
CONFIGS: dict[str, dict[str, Any]] = {
    "1b": {
        **_LLAMA_3, "hidden_size": 2_048, "intermediate_size": 8_192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "head_dim": 64, "tie_word_embeddings": True,
    },
    "3b": {
        **_LLAMA_3, "hidden_size": 3_072, "intermediate_size": 8_192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "head_dim": 128, "tie_word_embeddings": True,
    },
    "8b": {
        **_LLAMA_3, "hidden_size": 4_096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "head_dim": 128, "tie_word_embeddings": False,
    },
}  # fmt: skip
MEMORY = 80e9  # bytes that the default number of layers leaves room in: eager's step is to fit too
_RESERVE = 8e9  # of them for the CUDA context, the libraries' workspaces and what the allocator cannot join
# Bytes of a parameter under autocast: fp32 weight, gradient and Adam's two moments, and autocast's copy in bf16; or
# the weight of a frozen reference with its copy.
_TRAINED, _FROZEN = 4 + 4 + 8 + 2, 4 + 2
# Bytes of a logit in the eager loss, by its tensors: bf16 logits, fp32 of them, log-probabilities, their gradient, that
# of the fp32 logits, and in bf16.
_LOGIT = 2 + 4 + 4 + 4 + 4 + 2
_WITH_REFERENCE = ("dpo", "kto", "ppo")


def parameters(config: dict[str, Any], layers: int) -> tuple[int, int]:
    """How many a model of that many layers has, and how many of them a model without a head."""
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    attention = width * config["head_dim"] * (2 * heads + 2 * config["num_key_value_heads"])
    layer = attention + 3 * width * inner + 2 * width
    embedding = config["vocab_size"] * width
    body = embedding + layers * layer + width
    return body + (0 if config["tie_word_embeddings"] else embedding), body


def step_bytes(config: dict[str, Any], layers: int, trainer: str, sizes: dict[str, int]) -> float:
    """An estimate of an eager step's peak, with layers that are computed again in the backward pass."""
    whole, body = parameters(config, layers)
    state = _TRAINED * whole
    if trainer in _WITH_REFERENCE:
        state += _FROZEN * whole
    if trainer == "ppo":  # its value model has the policy's body
        state += _TRAINED * body
    sampled = trainer in ("grpo", "ppo")
    rows = sizes["prompts"] * sizes["group"] if sampled else 2 * sizes.get("pairs", sizes["prompts"])
    tokens = rows * (sizes["prompt"] + sizes["answer"])
    predicted = rows * sizes["answer"] if sampled else tokens
    width, inner = config["hidden_size"], config["intermediate_size"]
    kept = tokens * layers * 4 * width  # each layer's input, in fp32
    one_layer = tokens * (2 * (6 * width + 4 * inner) + 4 * 4 * width)
    loss = 0 if trainer == "rm" else predicted * config["vocab_size"] * _LOGIT
    return state + kept + one_layer + loss + _RESERVE


def layers_that_fit(name: str, trainer: str, sizes: dict[str, int], memory: float = MEMORY) -> int:
    """The most layers, of those the model has, with which an eager step is estimated to fit.

    Raises:
        ValueError: not even one layer does.
    """
    config = CONFIGS[name]
    for layers in range(config["num_hidden_layers"], 0, -1):
        if step_bytes(config, layers, trainer, sizes) <= memory:
            return layers
    least = step_bytes(config, 1, trainer, sizes) / 1e9
    raise ValueError(f"memory: one layer of {name} under {trainer} takes about {least:.0f} GB, got {memory / 1e9:.0f}")


def save(folder: pathlib.Path, name: str, layers: int | None = None) -> str:
    """The config, with ``layers`` of its layers, and a tokenizer as a folder without weights; returns its path."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = CONFIGS[name] | ({} if layers is None else {"num_hidden_layers": layers})
    end = config["vocab_size"] - 1
    transformers.LlamaConfig(
        **config, architectures=["LlamaForCausalLM"], bos_token_id=None, eos_token_id=end, pad_token_id=end
    ).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"w": 0, "<end>": end}, unk_token="w"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end_token = {"eos_token": "<end>", "pad_token": "<end>", "unk_token": "w"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **end_token).save_pretrained(folder)
    return str(folder)


def has_weights(folder: str) -> bool:
    """Whether there is more than a config, or the name is of a model elsewhere."""
    return not pathlib.Path(folder).is_dir() or any(pathlib.Path(folder).glob("*.safetensors"))


def load(folder: str, device: str) -> tuple[nn.Module, Any]:
    """A model in fp32 and its tokenizer; where the folder has no weights, random ones, the same for everyone."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if has_weights(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device), tokenizer
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    return model, tokenizer
