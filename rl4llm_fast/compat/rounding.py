"""Log-probabilities and entropy of logits, in the dtype and with the roundings that drop-ins owe their namesakes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..logprobs import check_ids_shape, check_logits, token_entropy, token_logprobs

NO_IGNORED_ID = -(2**63)  # for namesakes without an ignore_index: −100 is out of range like any other id


class _Substitute(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        ctx.dtype = surrogate.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.to(ctx.dtype)


def with_gradient(value: Tensor, surrogate: Tensor | None) -> Tensor:
    if surrogate is None:
        return value
    result: Tensor = _Substitute.apply(value, surrogate)  # type: ignore[no-untyped-call]
    return result


def differentiable(logits: Tensor) -> bool:
    return torch.is_grad_enabled() and logits.requires_grad


def rounds_like_torch(logits: Tensor) -> bool:
    """Whether a namesake's result is rounded after every step, so that only the same steps give the same number."""
    return logits.device.type == "cpu" and logits.dtype in (torch.bfloat16, torch.float16)


def logprobs_and_entropy(
    logits: Tensor, index: Tensor, temperature: float, mask: Tensor | None, entropy: bool, *, name: str
) -> tuple[Tensor, Tensor | None]:
    """log softmax(z/τ) at the ids, and the entropy: in fp32 (fp64), or in bf16 and fp16 on a CPU with torch's own bits.

    There the value is that of ``torch.log_softmax`` in the logits' dtype, some rows at a time, and the gradient the
    kernel's: nothing of the size of the logits is kept for it. ``name`` is the namesake's for the ids.
    """
    check_logits(logits)
    check_ids_shape(index, logits, "logits", name)
    exact = rounds_like_torch(logits)
    logp = uncertainty = None
    if differentiable(logits) or not exact:
        common: dict[str, Any] = {"temperature": temperature, "mask": mask, "ignore_index": NO_IGNORED_ID}
        if entropy:
            logp, uncertainty = token_logprobs(logits, index, return_entropy=True, **common)
        else:
            logp = token_logprobs(logits, index, **common)
    if exact:
        scaled = logits.detach() if temperature == 1.0 else logits.detach() / temperature
        logp = with_gradient(_torch_logprobs(scaled, index, mask, name), logp)
        if entropy:
            uncertainty = with_gradient(_torch_entropy(scaled, 128), uncertainty)
            uncertainty = uncertainty if mask is None else uncertainty.masked_fill(~mask, 0.0)
    assert logp is not None
    return logp, uncertainty


def entropy(logits: Tensor, rows_at_a_time: int = 128) -> Tensor:
    """The entropy, as :func:`logprobs_and_entropy` gives it."""
    check_logits(logits)
    if not rounds_like_torch(logits):
        return token_entropy(logits)
    return with_gradient(
        _torch_entropy(logits, rows_at_a_time), token_entropy(logits) if differentiable(logits) else None
    )


@torch.no_grad()
def _torch_logprobs(logits: Tensor, index: Tensor, mask: Tensor | None, name: str) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1])
    ids = index.reshape(rows.shape[0], index.shape[-1] if index.dim() == logits.dim() else 1)
    if mask is not None:
        ids = ids.masked_fill(~mask.reshape(-1, 1), 0)
    invalid = (ids < 0) | (ids >= rows.shape[-1])
    if not torch.compiler.is_compiling() and bool(invalid.any()):  # compiled, gather itself raises
        row, column = (int(i) for i in invalid.nonzero()[0])
        raise IndexError(f"{name}: wanted ids in [0, {rows.shape[-1]}), got {int(ids[row, column])} at row {row}")
    pieces = zip(rows.split(128), ids.long().split(128), strict=True)
    logp = torch.cat([z.log_softmax(-1).gather(-1, i) for z, i in pieces])
    if mask is not None:
        logp = logp.masked_fill(~mask.reshape(-1, 1), 0.0)
    return logp.reshape(index.shape)


@torch.no_grad()
def _torch_entropy(logits: Tensor, rows_at_a_time: int) -> Tensor:
    pieces = []
    for chunk in logits.reshape(-1, logits.shape[-1]).split(rows_at_a_time):
        logp = chunk.log_softmax(-1)
        p = logp.exp()
        # 0·log 0 counts as 0; a product with any other log p keeps its bits.
        pieces.append(-(p * logp).masked_fill(p == 0, 0.0).sum(-1))
    return torch.cat(pieces).reshape(logits.shape[:-1])
