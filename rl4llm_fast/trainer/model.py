"""Loading a model and its tokenizer by name, in the precision that it will be trained in."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from . import smollm2
from .extras import require


def load_model(name: str, *, precision: str, device: torch.device) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer; ``smollm2-135m-instruct`` comes from a Python package.

    Raises:
        ImportError: an extra is missing.
        ValueError: there is no such model.
    """
    require("transformers", extra="trainer")
    source = model_source(name)
    if name == smollm2.NAME:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        model = _quietly(lambda: AutoModelForCausalLM.from_pretrained(source, dtype=dtype))
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise ValueError(
            f"model: {name!r} is neither {smollm2.NAME!r} nor one transformers can load: {error}"
        ) from error
    return model.to(device), tokenizer


def model_source(name: str) -> str:
    """The folder or id that transformers takes for a model's name."""
    return str(smollm2.model_folder()) if name == smollm2.NAME else name


def _quietly(load: Callable[[], Any]) -> Any:
    """Without the progress bar that transformers draws for a load of a fraction of a second."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return load()
    finally:
        if shown:
            logging.enable_progress_bar()


def recompute_layers(model: nn.Module) -> None:
    """Keep only each layer's input for the backward pass, which computes the layer again: memory for time, same values.

    transformers' own switch works in training mode alone; models here stay in evaluation mode, without dropout.

    Raises:
        ValueError: the model is not made of layers that transformers can checkpoint.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError("gradient_checkpointing: this model has no layers that transformers can compute again")
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return torch.utils.checkpoint.checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def end_token_ids(model: nn.Module, tokenizer: Any, more: Sequence[Any] = ()) -> frozenset[int]:
    """Every token that ends an answer: those of the generation config, the tokenizer's own, and ``more``.

    Raises:
        ValueError: one of ``more`` is neither a token id nor a text that is one token.
    """
    found: set[int] = set()
    for token in more:
        read = [token]
        if isinstance(token, str) and tokenizer is not None:
            read = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(read) != 1 or isinstance(read[0], bool) or not isinstance(read[0], int):
            raise ValueError(f"config: stop_tokens: wanted token ids, or texts that are one token, got {token!r}")
        found.update(read)
    for holder in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return frozenset(int(i) for i in found)
