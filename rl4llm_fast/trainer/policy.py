"""A causal language model as a policy: per-token log-probabilities of answers, computing as little as possible."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rl4llm_fast as rf

from .layout import Layout, forward_flops, grow_forest, layout_of, plain_layout, shared_layout

Hook = Callable[[], None]


class Policy:
    """Wraps a causal language model of transformers; its head runs on the tokens asked for, never on whole rows."""

    def __init__(self, model: Any, *, autocast: bool = False, layout: str = "auto") -> None:
        self.model: Any = model
        self.config: Any = self.model.config.get_text_config()
        self.device: torch.device = next(model.parameters()).device
        self.autocast = autocast
        self.layout = layout
        self.parameters = sum(p.numel() for p in model.parameters())
        self.logprobs_op: Callable[..., Any] = rf.token_logprobs  # compare.py puts the obvious formula here
        self.softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self.decoder: Any = None
        self.head: Any = None
        self._find_head()
        if layout != "plain":
            reason = self._why_not_shared()
            if reason and layout == "shared":
                raise ValueError(f"layout: this model cannot take 'shared': {reason}")
            self.layout = "plain" if reason else layout

    def frozen_copy(self) -> Policy:
        """The reference: the same model as it is now, without gradients."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model).requires_grad_(False)
        other._find_head()
        return other

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def hidden(self, **inputs: Any) -> tuple[Tensor, Any]:
        """Last hidden states (R, S, D) and the cache; logits (R, S, V) for a model whose head cannot be split off."""
        if self.decoder is None:
            output = self.model(**inputs)
            return output.logits, output.past_key_values if inputs.get("use_cache") else None
        decode = getattr(self.model, "decode", self.decoder)  # of a model that is cut over processes; see sharding.py
        output = decode(**inputs)
        return output.last_hidden_state, output.past_key_values if inputs.get("use_cache") else None

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), before the softcap, which rf.token_logprobs applies."""
        return hidden if self.decoder is None else self.head(hidden)

    def choose_layout(
        self, prompts: Sequence[list[int]], answers: Sequence[list[int]], groups: Sequence[int]
    ) -> Layout:
        plain = plain_layout(prompts, answers)
        if self.layout == "plain":
            return plain.to(self.device)
        forest = grow_forest(prompts, answers, groups)
        size = (self.parameters, self.config.num_hidden_layers, self.config.hidden_size)
        # Before there is a mask: of long answers it would outgrow the memory that the plain rows spare.
        cheaper = forward_flops(forest.shape, True, *size) < forward_flops(plain.shape, False, *size)
        return (layout_of(forest) if cheaper or self.layout == "shared" else plain).to(self.device)

    def token_logprobs(
        self,
        layout: Layout,
        *,
        temperature: float,
        return_entropy: bool = False,
        from_hidden: bool = False,
        mark: Callable[[str], None] = lambda phase: None,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (N,), and entropies, of the layout's answer tokens, one answer behind the other.

        ``mark(phase)`` is told when a phase ends, the backward's included: "forward", "loss", "backward".
        ``from_hidden`` makes the logits chunk by chunk, for a linear head.
        """
        result: Any
        if from_hidden:
            with self.precision():
                hidden, weight, bias = self.head_inputs(layout)
                mark("forward")
                result = rf.linear_token_logprobs(
                    hidden, weight, layout.token_ids, bias,
                    temperature=temperature, softcap=self.softcap, return_entropy=return_entropy,  # type: ignore[call-overload]
                )  # fmt: skip
        else:
            result = self._from_logits(layout, temperature, return_entropy, mark)
        logp, entropy = result if isinstance(result, tuple) else (result, None)
        return logp[layout.prediction], None if entropy is None else entropy[layout.prediction]

    def _from_logits(
        self, layout: Layout, temperature: float, return_entropy: bool, mark: Callable[[str], None]
    ) -> Any:
        with self.precision():
            logits = self.logits(self._predicting(layout))
        mark("forward")
        if logits.requires_grad:
            logits.register_hook(lambda grad: mark("loss"))
        return self.logprobs_op(
            logits,
            layout.token_ids,
            temperature=temperature,
            softcap=self.softcap,
            return_entropy=return_entropy,
            inplace_backward=logits.requires_grad and not logits.is_leaf,
        )

    @property
    def has_linear_head(self) -> bool:
        """Whether the logits are one linear layer of the last hidden states, as losses from hidden states need."""
        return isinstance(self.head, nn.Linear)

    def head_inputs(self, layout: Layout) -> tuple[Tensor, Tensor, Tensor | None]:
        """What losses from hidden states take: hidden (M, D) of the predictions, the head's weight (V, D) and bias.

        Raises:
            ValueError: the model's logits are not one linear layer of its hidden states.
        """
        if not self.has_linear_head:
            raise ValueError("model: its logits are not one linear layer of its last hidden states, which this needs")
        return self._predicting(layout), self.head.weight, self.head.bias

    def _predicting(self, layout: Layout) -> Tensor:
        """The hidden states (M, D) that predict, or for a model that is called whole their logits."""
        mask = layout.visible
        if mask is not None:  # additive, which every attention that takes a 4-D mask understands
            dtype = torch.bfloat16 if self.autocast else next(self.model.parameters()).dtype
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
        hidden, _ = self.hidden(
            input_ids=layout.input_ids, position_ids=layout.position_ids, attention_mask=mask, use_cache=False
        )
        return hidden.flatten(0, 1)[layout.source]

    def _find_head(self) -> None:
        """Split the model into decoder and head, if together they are the model: checked, not assumed."""
        self.decoder = self.head = None
        decoder, head = getattr(self.model, "base_model", None), self.model.get_output_embeddings()
        if decoder is None or decoder is self.model or head is None:
            return
        ids = torch.tensor([[1, 2, 3]], device=self.device) % self.config.vocab_size
        with torch.no_grad(), self._evaluating():
            whole = self.model(input_ids=ids, use_cache=False).logits.float()
            parts = head(decoder(input_ids=ids, use_cache=False).last_hidden_state).float()
        if self.softcap is not None:
            parts = torch.tanh(parts / self.softcap) * self.softcap
        if whole.shape == parts.shape and torch.allclose(whole, parts, rtol=1e-2, atol=1e-2):
            self.decoder, self.head = decoder, head
        else:
            self.softcap = None  # the model's own forward has applied it, and whatever else stands behind the head

    def _why_not_shared(self) -> str | None:
        """Try both layouts on four tokens: models with other attention than a mask can express show it here."""
        prompts, answers = [[1, 2, 3]] * 2, [[4, 5, 6], [4, 7, 8]]
        size = self.config.vocab_size
        prompts, answers = ([[t % size for t in row] for row in rows] for rows in (prompts, answers))
        implementation = getattr(self.config, "_attn_implementation", "eager")
        if implementation not in ("sdpa", "eager"):
            return f"its attention ({implementation}) takes no 4-D mask"
        window = getattr(self.config, "sliding_window", None)
        if window and getattr(self.config, "use_sliding_window", True):
            return "it has sliding-window attention"
        try:
            with torch.no_grad(), self._evaluating():
                plain, _ = self.token_logprobs(plain_layout(prompts, answers).to(self.device), temperature=1.0)
                shared, _ = self.token_logprobs(
                    shared_layout(prompts, answers, [0, 0]).to(self.device), temperature=1.0
                )
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            return f"it does not take a 4-D mask: {error}"
        half = next(self.model.parameters()).dtype in (torch.bfloat16, torch.float16) or self.autocast
        if not torch.allclose(plain, shared, rtol=0.0, atol=0.1 if half else 1e-3):
            return f"its log-probabilities differ by {float((plain - shared).abs().max()):.2g} from one row an answer"
        return None

    @contextlib.contextmanager
    def _evaluating(self) -> Any:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)
