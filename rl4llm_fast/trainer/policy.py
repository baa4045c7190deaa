"""A causal language model as a policy: per-token log-probabilities of answers, computing as little as possible."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import rl4llm_fast as rf

from .layout import Layout, Shape, forward_flops, plain_layout, plain_shape, shared_layout

# What ``layout = "auto"`` allows a mask on a GPU, its boolean twin included: it is there beside the activations.
MASK_BYTES = 2**30
# Attention with a mask leaves out no pair of tokens, where causal attention leaves out half: 2. On a GPU it is not
# flash attention either; that it takes twice as long for a pair is a guess, which no measurement stands behind yet.
_MASKED, _MASKED_ON_GPU = 2.0, 4.0


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

    @property
    def dtype(self) -> torch.dtype:
        """What attention computes in, and a mask must be in."""
        cut: torch.dtype | None = getattr(self.model, "computes_in", None)  # over processes: see sharding.py
        own: torch.dtype = next(self.model.parameters()).dtype
        return torch.bfloat16 if self.autocast else cut or own

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
        """The rows of a forward pass over the answers; neighbours of the same group share a prompt."""
        if self.layout != "plain":
            shared = shared_layout(prompts, answers, groups)
            if self.layout == "shared" or self._pays(shared.shape, plain_shape(prompts, answers)):
                return shared.to(self.device)
        return plain_layout(prompts, answers).to(self.device)

    def _pays(self, shared: Shape, plain: Shape) -> bool:
        """Whether a shared layout takes fewer products than a plain one, and on a GPU no more than ``MASK_BYTES``."""
        gpu, (rows, width) = self.device.type == "cuda", shared
        if gpu and rows * width * width * (1 + self.dtype.itemsize) > MASK_BYTES:
            return False
        size = (self.parameters, self.config.num_hidden_layers, self.config.hidden_size)
        masked = _MASKED_ON_GPU if gpu else _MASKED
        return forward_flops(shared, masked, *size) < forward_flops(plain, 1.0, *size)

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
        return layout.of_answers(logp), None if entropy is None else layout.of_answers(entropy)

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
        hidden, _ = self.hidden(
            input_ids=layout.input_ids, position_ids=layout.position_ids.expand_as(layout.input_ids),
            attention_mask=layout.additive_mask(self.dtype), use_cache=False,
        )  # fmt: skip
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
        """Try both layouts on three short answers: models with other attention than a mask can express show it here.

        They differ by rounding, and by how much depends on the model: as a measure of it the plain rows are computed
        once more beside a longer one, with a mask that says what they do without. Whatever that gives, the difference
        has to be small beside the one to the same row without its mask, which is what a model that does not look at
        masks computes.
        """
        size = self.config.vocab_size
        prompts = [[1 % size, 2 % size, 3 % size]] * 3
        answers = [[4 % size, *(token % size for token in range(5 * i, 5 * i + 5))] for i in (1, 2, 3)]
        implementation = getattr(self.config, "_attn_implementation", "eager")
        if implementation not in ("sdpa", "eager"):
            return f"its attention ({implementation}) takes no 4-D mask"
        window = getattr(self.config, "sliding_window", None)
        if window and getattr(self.config, "use_sliding_window", True):
            return "it has sliding-window attention"
        plain, shared = plain_layout(prompts, answers), shared_layout(prompts, answers, [0, 0, 0])
        wide = plain_layout([*prompts, prompts[0]], [*answers, [*answers[0], *answers[1], *answers[2]]])
        wide = replace(wide, until=torch.full_like(wide.input_ids, wide.shape[1]))
        found: list[Tensor] = []
        try:
            with torch.no_grad(), self._evaluating():
                for layout in (plain, shared, wide, replace(shared, until=None)):
                    logp, _ = self.token_logprobs(layout.to(self.device), temperature=1.0)
                    found.append(logp[: len(plain.token_ids)].float())
        except (TypeError, ValueError, RuntimeError, IndexError) as raised:
            return f"it does not take a 4-D mask: {raised}"
        error, rounding, blind = (float((other - found[0]).abs().max()) for other in found[1:])
        half = self.dtype in (torch.bfloat16, torch.float16)
        if not error <= min(max(0.1 if half else 1e-3, 4 * rounding), blind / 4):
            return (
                f"its log-probabilities differ by {error:.2g} from one row an answer, by {blind:.2g} without the mask, "
                f"and rounding makes {rounding:.2g}"
            )
        return None

    @contextlib.contextmanager
    def _evaluating(self) -> Any:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)
