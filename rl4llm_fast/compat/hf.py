"""Hugging Face causal language models whose forward gives log-probabilities of labels, and never makes the logits."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import tiles
from ..logprobs import linear_token_logprobs, token_logprobs


def logprob_head(
    model: Any,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    chunk_tokens: int | None = None,
    check: bool = True,
) -> Any:
    r"""Give a causal language model a head that returns log-probabilities of labels in place of logits.

    ``model(input_ids, attention_mask=..., labels=labels)`` then returns an output with

    - ``log_probs`` (B, T−1): :math:`\log\pi(\mathrm{labels}_{t+1} \mid x_{\le t})`, fp32, differentiable; 0 where the
      label is −100. With ``shift_labels`` (B, T) in place of ``labels``: (B, T), not shifted.
    - ``entropy``, alike, with ``return_entropy``; else None.
    - ``loss``: the mean of −``log_probs`` over labels that are not −100 (their sum over ``num_items_in_batch``, given
      that).

    ``logits`` is another name for ``log_probs``, for code that reads that field. A call without labels, generation
    among them, is the model's own forward. The head and the backbone are looked up at every call, so a tied head, one
    that was resized, or one that was wrapped later is the one that counts.

    Args:
        model: a ``transformers`` causal LM, or a PEFT model around one. Changed in place; ``del model.forward`` (of the
            model inside PEFT) restores it.
        temperature: τ > 0, the divisor of the logits.
        return_entropy: also return the entropy.
        chunk_tokens: as in :func:`linear_token_logprobs`.
        check: run the model once on a few tokens and compare with its own logits, so that a model that does something
            unknown to them is refused. False where it cannot run yet (weights on "meta", sharded).

    Returns:
        The model. Soft-capping (Gemma 2: ``final_logit_softcapping``) and scales of the logits (Cohere:
        ``logit_scale``, Granite: ``logits_scaling``, Falcon-H1: ``lm_head_multiplier``) are taken from its
        configuration. A head that is no plain ``nn.Linear``, such as one with LoRA or quantised, is called on a chunk
        of tokens at a time, and again in the backward.

    Raises:
        TypeError: no head or no backbone to be found. ValueError: the check failed, or a scale <= 0.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for method in ("get_output_embeddings", "base_model"):
        if not hasattr(inner, method):
            raise TypeError(f"model: wanted a transformers causal LM, got {type(inner).__name__} without {method}")
    if inner.base_model is inner or inner.get_output_embeddings() is None:
        raise TypeError(f"model: {type(inner).__name__} has no backbone and head that could be called one by one")
    scale, softcap = _scale(inner.config), getattr(_text_config(inner.config), "final_logit_softcapping", None)
    if not scale > 0:
        raise ValueError(f"model: wanted a positive scale of the logits, its configuration says {scale}")
    # A scale is a temperature and another cap: s·z/τ = z/(τ/s), c·tanh(s·z/c) = s·(c/s)·tanh(z/(c/s)).
    tau, cap = temperature / scale, None if softcap is None else softcap / scale
    own_forward = getattr(inner.forward, "_own_forward", inner.forward)

    def score(hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        head = inner.get_output_embeddings()
        options: dict[str, Any] = {"temperature": tau, "softcap": cap, "return_entropy": return_entropy}
        if type(head).forward is torch.nn.Linear.forward and not head._forward_hooks and not head._forward_pre_hooks:
            hidden = hidden.to(head.weight.device)
            result: Any = linear_token_logprobs(
                hidden, head.weight, ids.to(hidden.device), head.bias, chunk_tokens=chunk_tokens, **options
            )
        else:
            result = _by_chunks(head, hidden, ids, chunk_tokens, options)
        return result if return_entropy else (result, None)

    def forward(
        self: Any,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None and shift_labels is None:
            return own_forward(*args, return_dict=return_dict, **kwargs)
        for name in ("logits_to_keep", "output_router_logits"):
            if kwargs.pop(name, None):
                raise ValueError(f"{name}: not supported beside labels of a log-probability head")
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, return_dict=True, **kwargs).last_hidden_state
        if shift_labels is None:
            assert labels is not None
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        log_probs, entropy = score(hidden, shift_labels)
        scored = num_items_in_batch
        if scored is None:
            scored = (shift_labels != -100).sum().clamp(min=1).to(log_probs.device)
        output = _output_class()(loss=-log_probs.sum() / scored, log_probs=log_probs, entropy=entropy)
        return output.to_tuple() if return_dict is False else output

    if check:
        _compare(inner, own_forward, score, temperature)
    forward.__wrapped__ = type(inner).forward  # type: ignore[attr-defined]  # generate() reads its signature
    forward._own_forward = own_forward  # type: ignore[attr-defined]
    inner.forward = types.MethodType(forward, inner)
    return model


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _scale(config: Any) -> float:
    """What the model multiplies its logits with."""
    text = _text_config(config)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(text, name, None)
        if value is not None:
            return float(value)
    divisor = getattr(text, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if text.model_type == "hyperclovax" else 1.0 / float(divisor)


def _by_chunks(
    head: Callable[[Tensor], Tensor], hidden: Tensor, ids: Tensor, chunk_tokens: int | None, options: dict[str, Any]
) -> Any:
    """token_logprobs of whatever the head makes of a chunk of tokens; the backward makes the chunk's logits again."""
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1)

    def chunk(x: Tensor, y: Tensor) -> Any:
        logits = head(x)
        return token_logprobs(logits, y.to(logits.device), **options)

    size = chunk_tokens or tiles.chunk_rule(_vocabulary(head, rows), hidden.dtype, hidden.device.type)
    starts = range(0, max(rows.shape[0], 1), size)
    pieces = [
        checkpoint(chunk, rows[i : i + size], flat[i : i + size], use_reentrant=False)
        if torch.is_grad_enabled()
        else chunk(rows[i : i + size], flat[i : i + size])
        for i in starts
    ]
    if options["return_entropy"]:
        logp, entropy = zip(*pieces, strict=True)
        return torch.cat(logp).reshape(ids.shape), torch.cat(entropy).reshape(ids.shape)
    return torch.cat(pieces).reshape(ids.shape)


def _vocabulary(head: Any, rows: Tensor) -> int:
    size = getattr(head, "out_features", None)
    if size is None:
        with torch.no_grad():
            size = head(rows[:1].detach()).shape[-1]
    return int(size)


def _compare(
    model: Any, own_forward: Callable[..., Any], score: Callable[..., tuple[Tensor, Tensor | None]], temperature: float
) -> None:
    """Refuse a model whose logits are something else than its head on its backbone's last hidden states."""
    modes = [(module, module.training) for module in model.modules()]
    ids = torch.arange(6, device=model.get_input_embeddings().weight.device).unsqueeze(0)
    ids = ids % _text_config(model.config).vocab_size
    model.eval()
    try:
        with torch.no_grad():
            logits = own_forward(input_ids=ids, use_cache=False, return_dict=True).logits.double() / temperature
            wanted = logits.log_softmax(-1).gather(-1, ids.to(logits.device).unsqueeze(-1)).squeeze(-1)
            hidden = model.base_model(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
            got = score(hidden, ids)[0].double().to(wanted.device)
    finally:
        for module, training in modes:
            module.training = training
    low = torch.finfo(torch.bfloat16 if hidden.dtype == torch.bfloat16 else hidden.dtype).eps
    allowed = 64 * max(low, torch.finfo(torch.float32).eps) * max(1.0, float(logits.abs().max()))
    error = float((got - wanted).abs().max())
    if not error <= allowed:
        raise ValueError(
            f"model: the log-probabilities of {type(model).__name__} from its head on its last hidden states differ "
            f"from those of its own logits by {error:.2g} (allowed: {allowed:.2g}); it does something to them "
            "that is not known here"
        )


_output: type | None = None


def _output_class() -> Any:
    """The output type, made when it is first needed: transformers is imported by whoever has a model, not by this."""
    global _output
    if _output is None:
        from dataclasses import make_dataclass

        from transformers.utils import ModelOutput

        fields = [(name, Tensor | None, None) for name in ("loss", "log_probs", "entropy")]
        logits = property(
            lambda self: self.log_probs, doc="The log-probabilities, under the name of what they replace."
        )
        _output = make_dataclass(
            "LogprobOutput", fields, bases=(ModelOutput,), namespace={"logits": logits, "__module__": __name__}
        )
    return _output
