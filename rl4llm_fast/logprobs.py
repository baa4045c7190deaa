"""From logits to one number per token: log-probabilities of chosen tokens and the entropy of the distribution."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import checks, dispatch, reference
from .autograd import TokenLogprobs, TokenLogprobsOptions
from .checks import Number


@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: Number = ...,
    softcap: Number | None = ...,
    mask: Tensor | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: Number = ...,
    softcap: Number | None = ...,
    mask: Tensor | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[True],
    inplace_backward: bool = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-probabilities of the chosen tokens, and optionally the entropy, in one pass over the logits.

    .. math::
        u = z'/\tau, \quad z' = c\,\tanh(z/c) \text{ if a softcap } c \text{ is given, else } z

        \log p_y = (u_y - m) - \log s, \qquad m = \max_v u_v, \quad s = \sum_v e^{u_v - m}

        H = \log s - \sum_v p_v (u_v - m)

    Its backward is one read and one write of the logits:
    :math:`\partial L/\partial u_v = g(1[v{=}y] - p_v) - h\,p_v(\log p_v + H)`. These are the log-probabilities
    π(a|s) of the policy gradient (survey (2), (4)) and the entropy bonus of PPO's unified objective (33; Schulman et
    al. 2017, eq. 9).

    Args:
        logits: (..., V), fp32, bf16, fp16; fp64 on the eager and CPU backends. Any strides.
        token_ids: integers, (...) for one token per row, or (..., K) for K of them.
        temperature: τ > 0, a number, a 0-d tensor, or one value per row (...). Gets no gradient.
        softcap: c > 0 (Gemma's logit soft-capping), a number or a 0-d tensor, or None.
        mask: (...), bool or 0/1 integers, True for a live row. Rows that are not live give log-probability 0, entropy
            0 and an exactly zero gradient, whatever their logits and ids hold.
        ignore_index: a row whose one id is this is masked out; with K ids it zeroes that id alone.
        return_entropy: also return the entropy in nats, differentiable.
        inplace_backward: write the gradient over the logits' own storage, so that peak memory is one copy of the
            logits. Any later use of the logits by autograd, a second backward included, raises. Refused for leaf
            logits that require grad; a hint under torch.compile and on the eager backend.
        backend: "eager", "cpu", "triton" or "cuda"; None chooses by device.

    Returns:
        The log-probabilities, shaped like ``token_ids``; with ``return_entropy`` a tuple of them and the entropy (...).
        fp32, or fp64 for fp64 logits.

    A logit of −inf is a token that cannot be drawn: probability 0, gradient 0. NaN or +inf in a live row, or a live row
    of −inf only, gives NaN for that row and no other.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; temperature <= 0 (on a GPU tensor: NaN in that row).
        IndexError: a token id outside [0, V) on the CPU, naming position and value. On a GPU that row gives NaN, or
            the same error where RL4LLM_FAST_DEBUG=1.
    """
    _check_logits(logits)
    checks.is_integer("token_ids", token_ids)
    checks.same_device("token_ids", token_ids, logits, "logits")
    lead = logits.shape[:-1]
    if token_ids.dim() not in (logits.dim() - 1, logits.dim()) or token_ids.shape[: len(lead)] != lead:
        raise ValueError(
            f"token_ids: wanted {checks.shape(logits)[:-1]}, or that with K ids a row behind it, to match logits "
            f"{checks.shape(logits)}; got {checks.shape(token_ids)}"
        )
    if inplace_backward and logits.is_leaf and logits.requires_grad:
        raise ValueError(
            "inplace_backward: refused, because logits are a leaf that requires grad; their values would be "
            "overwritten by their gradient"
        )
    mask = checks.live_mask("mask", mask, lead, logits, "logits without V")
    tau = _temperature(temperature, logits)
    cap = None if softcap is None else checks.number("softcap", softcap, logits, positive=True)
    chosen = dispatch.choose("token_logprobs", logits, backend)
    if chosen == "eager":
        logp, entropy = reference.token_logprobs(logits, token_ids, mask, tau, cap, ignore_index, return_entropy)
        return logp if entropy is None else (logp, entropy)

    rows = checks.as_rows(logits)
    overlapping = any(stride == 0 and size > 1 for stride, size in zip(rows.stride(), rows.shape, strict=True))
    options = TokenLogprobsOptions(
        backend=chosen,
        ignore_index=ignore_index,
        return_entropy=return_entropy,
        inplace_backward=inplace_backward and not overlapping and not torch.compiler.is_compiling(),
    )
    flat_ids = token_ids.reshape(-1) if token_ids.dim() < logits.dim() else token_ids.reshape(-1, token_ids.shape[-1])
    if chosen != "cpu" and checks.debug() and not torch.compiler.is_compiling():
        _check_ids_on_device(token_ids, mask, ignore_index, logits)
    logp, entropy = TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        rows,
        flat_ids.long().contiguous(),
        None if mask is None else mask.reshape(-1).contiguous(),
        tau.reshape(-1).contiguous() if tau.dim() else tau,
        cap,
        options,
    )
    logp = logp.reshape(token_ids.shape)
    return (logp, entropy.reshape(lead)) if return_entropy else logp


def _check_logits(logits: Tensor) -> None:
    checks.is_float("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits: wanted (..., V), got a 0-d tensor")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits: wanted a vocabulary of at least one token, got shape {checks.shape(logits)}")


def _temperature(temperature: Number, logits: Tensor) -> Tensor:
    """τ as a 0-d tensor, or one value per row (...)."""
    if not isinstance(temperature, Tensor) or temperature.dim() == 0:
        tau = checks.number("temperature", temperature, logits, positive=True)
    else:
        checks.is_float("temperature", temperature)
        checks.has_shape("temperature", temperature, logits.shape[:-1], "logits without V")
        checks.same_device("temperature", temperature, logits, "logits")
        if temperature.requires_grad:
            raise ValueError("temperature: gets no gradient, but came as a tensor that requires one")
        tau = temperature.to(torch.float64 if logits.device.type == "cpu" else torch.float32)
    on_host = tau.device.type == "cpu" or checks.debug()
    if isinstance(temperature, Tensor) and on_host and not torch.compiler.is_compiling() and bool((tau <= 0).any()):
        raise ValueError("temperature: wanted values > 0 in every row")
    return tau


def _check_ids_on_device(token_ids: Tensor, mask: Tensor | None, ignore_index: int, logits: Tensor) -> None:
    one_id = token_ids.dim() < logits.dim()
    live = token_ids != ignore_index
    if mask is not None:
        live = live & (mask if one_id else mask.unsqueeze(-1))
    invalid = live & ((token_ids < 0) | (token_ids >= logits.shape[-1]))
    reference.check_token_ids(token_ids, invalid, logits.shape[-1])
