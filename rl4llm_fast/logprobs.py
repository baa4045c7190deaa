"""From logits to one number per token: log-probabilities of chosen tokens and the entropy of the distribution."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import checks, dispatch, reference, tiles
from .autograd import LinearTokenLogprobs, LinearTokenLogprobsOptions, TokenLogprobs, TokenLogprobsOptions
from .checks import Number
from .heads import check_chunk, check_dtypes, check_group, check_linear, product_dtype
from .vocab_parallel import GatheredRows


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
            logits that require grad and views of them; a hint under torch.compile and on the eager backend.
        backend: "eager", "cpu", "triton" or "cuda"; None chooses by device.

    Returns:
        The log-probabilities, shaped like ``token_ids``; with ``return_entropy`` a tuple of them and the entropy (...).
        fp32, or fp64 for fp64 logits.

    A logit of −inf is a token that cannot be drawn: probability 0, gradient 0. NaN or +inf in a live row, or a live row
    of −inf only, gives NaN for that row and no other.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; temperature or softcap <= 0 or not finite (not looked at
            on a GPU: NaN in that row).
        IndexError: a token id outside [0, V) on the CPU, naming position and value. On a GPU that row gives NaN, or
            the same error where RL4LLM_FAST_DEBUG=1.
    """
    check_logits(logits)
    lead = logits.shape[:-1]
    check_ids_shape(token_ids, logits, "logits")
    checks.integer("ignore_index", ignore_index)
    if inplace_backward and belongs_to_a_leaf(logits):
        raise ValueError(
            "inplace_backward: refused, because logits are a leaf that requires grad, or a view of one; its values "
            "would be overwritten by their gradient"
        )
    mask = checks.live_mask("mask", mask, lead, logits, "logits without V")
    tau = check_temperature(temperature, logits)
    cap = None if softcap is None else checks.number("softcap", softcap, logits, positive=True)
    chosen = dispatch.choose("token_logprobs", logits, backend)
    if chosen == "eager":
        logp, entropy = reference.token_logprobs(logits, token_ids, mask, tau, cap, ignore_index, return_entropy)
        return logp if entropy is None else (logp, entropy)

    rows = checks.as_rows(logits)
    in_place = inplace_backward and not torch.compiler.is_compiling() and not _overlaps(rows)
    options = TokenLogprobsOptions(
        backend=chosen,
        ignore_index=ignore_index,
        return_entropy=return_entropy,
        inplace_backward=in_place,
    )
    if chosen != "cpu" and checks.debug():
        reference.check_token_ids(token_ids, mask, ignore_index, logits.shape[-1])
    logp, entropy = TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        rows,
        flat_ids(token_ids, logits),
        *flat_rows(mask, tau),
        cap,
        options,
    )
    logp = logp.reshape(token_ids.shape)
    return (logp, entropy.reshape(lead)) if return_entropy else logp


def token_entropy(
    logits: Tensor,
    *,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Entropy in nats of each row's distribution, differentiable: :math:`H = \log s - \sum_v p_v (u_v - m)`.

    The entropy bonus of PPO's unified objective (survey (33); Schulman et al. 2017, eq. 9). Arguments, dtypes, edge
    cases and errors are those of :func:`token_logprobs`.

    Returns:
        (...), fp32, or fp64 for fp64 logits.
    """
    checks.is_float("logits", logits)
    nothing = torch.empty((*logits.shape[:-1], 0), dtype=torch.long, device=logits.device)
    _, entropy = token_logprobs(
        logits, nothing, temperature=temperature, softcap=softcap, mask=mask, return_entropy=True, backend=backend
    )
    return entropy


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None = ...,
    *,
    temperature: Number = ...,
    softcap: Number | None = ...,
    mask: Tensor | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    chunk_tokens: int | None = ...,
    tp_group: Any = ...,
    logits_dtype: torch.dtype | None = ...,
    grad_weight_dtype: torch.dtype | None = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None = ...,
    *,
    temperature: Number = ...,
    softcap: Number | None = ...,
    mask: Tensor | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[True],
    chunk_tokens: int | None = ...,
    tp_group: Any = ...,
    logits_dtype: torch.dtype | None = ...,
    grad_weight_dtype: torch.dtype | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    chunk_tokens: int | None = None,
    tp_group: Any = None,
    logits_dtype: torch.dtype | None = None,
    grad_weight_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-probabilities of chosen tokens straight from hidden states: :func:`token_logprobs` of :math:`x W^\top + b`.

    The logits exist for one tile at a time, in a workspace that is used again; the backward makes them anew (but for
    the last ones, which still lie there or where :math:`dW` will), overwrites them with :math:`dz`, and adds up
    :math:`dW = dz^\top x` and :math:`db = \sum_n dz` in fp32. Gradients that nobody needs are not computed. Survey (2),
    (4).

    Args:
        hidden: (..., D). Under autocast the products run in the autocast dtype.
        weight: (V, D), the head (tied or not), in the dtype of ``hidden`` unless autocast is on.
        token_ids: integers, (...) or (..., K).
        bias: (V,) or None.
        chunk_tokens: tokens per chunk. None: as many as fit 512 MiB of logits on a GPU, and on a CPU 64 MiB in fp32 or
            256 MiB in bf16. Where that is not all of them, fp32 on a CPU takes up to 2,048 tokens at a time and cuts
            the vocabulary into slices of 32 MiB instead (``rl4llm_fast.tiles.tiling``).
        tp_group: a process group over whose ranks the rows of ``weight`` (and ``bias``) are split, in rank order, any
            number each: the ids are those of the whole vocabulary, and everything but ``weight`` and ``bias`` is the
            same on all ranks. So are the results, those of the whole vocabulary; d hidden comes back summed over the
            group. One all-gather of 3 or 4 numbers a token forward (and one of the slices' sizes), one all-reduce
            backward.
        logits_dtype: the dtype in which logits are kept between the product and the softmax. None: that of the product.
            torch.float32 for products in bf16 or fp16: their fp32 sums, not rounded; twice the workspace.
        grad_weight_dtype: the dtype in which dW is added up over chunks. None: fp32. The product's own (bf16, fp16)
            halves that memory and rounds at every chunk (docs/numerics.md).
        temperature, softcap, mask, ignore_index, return_entropy, backend: as in :func:`token_logprobs`. Hidden states
            of masked rows may hold anything, NaN included, and reach no gradient.

    Returns:
        As :func:`token_logprobs`.

    Raises:
        As :func:`token_logprobs`; also ValueError for shapes of ``hidden``, ``weight`` and ``bias`` that do not fit,
        and TypeError for dtypes that differ outside autocast.
    """
    compute_dtype = check_linear(hidden, weight, bias, sharded=tp_group is not None)
    check_dtypes(compute_dtype, logits_dtype, grad_weight_dtype)
    check_ids_shape(token_ids, hidden, "hidden")
    group = check_group(tp_group)
    lead = hidden.shape[:-1]
    checks.integer("ignore_index", ignore_index)
    chunk_tokens = check_chunk(chunk_tokens)
    mask = checks.live_mask("mask", mask, lead, hidden, "hidden without D")
    tau = check_temperature(temperature, hidden)
    cap = None if softcap is None else checks.number("softcap", softcap, hidden, positive=True)
    chosen = dispatch.choose("linear_token_logprobs", hidden, backend)
    if chosen == "eager":
        if group:
            weight = GatheredRows.apply(weight, group)  # type: ignore[no-untyped-call]
            bias = None if bias is None else GatheredRows.apply(bias, group)  # type: ignore[no-untyped-call]
        live = reference.live_rows(token_ids, hidden, mask, ignore_index)
        logits = reference.project(hidden, weight, bias, live, compute_dtype, logits_dtype)
        logp, entropy = reference.token_logprobs(logits, token_ids, mask, tau, cap, ignore_index, return_entropy)
        return logp if entropy is None else (logp, entropy)

    ids, (flat_mask, flat_tau) = flat_ids(token_ids, hidden), flat_rows(mask, tau)
    if group:
        ids = dispatch.ops(chosen).vocab_parallel_ids(ids, flat_mask, weight.detach(), ignore_index, -100, group)
        ignore_index = -100
    else:
        reference.check_token_ids(token_ids, mask, ignore_index, weight.shape[0])
    options = LinearTokenLogprobsOptions(
        backend=chosen,
        ignore_index=ignore_index,
        return_entropy=return_entropy,
        compute_dtype=product_dtype(compute_dtype, hidden, logits_dtype, grad_weight_dtype),
        logits_dtype=logits_dtype,
        grad_weight_dtype=grad_weight_dtype,
        chunk_tokens=chunk_tokens or tiles.BY_RULE,
        keep_logits=torch.is_grad_enabled() and not torch.compiler.is_compiling() and not group,
        group=group,
    )
    logp, entropy = LinearTokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        ids,
        flat_mask,
        flat_tau,
        cap,
        options,
    )
    logp = logp.reshape(token_ids.shape)
    return (logp, entropy.reshape(lead)) if return_entropy else logp


def check_ids_shape(token_ids: Tensor, rows: Tensor, like: str, name: str = "token_ids") -> None:
    checks.is_integer(name, token_ids)
    checks.same_device(name, token_ids, rows, like)
    lead = rows.shape[:-1]
    if token_ids.dim() not in (rows.dim() - 1, rows.dim()) or token_ids.shape[: len(lead)] != lead:
        raise ValueError(
            f"{name}: wanted {tuple(lead)}, or that with K ids a row behind it, to match {like} "
            f"{checks.shape(rows)}; got {checks.shape(token_ids)}"
        )


def flat_ids(token_ids: Tensor, rows: Tensor) -> Tensor:
    """Ids as ops take them: contiguous int64 (N,) or (N, K)."""
    return token_ids.reshape((rows.shape[:-1].numel(), *token_ids.shape[rows.dim() - 1 :])).long().contiguous()


def flat_rows(mask: Tensor | None, tau: Tensor) -> tuple[Tensor | None, Tensor]:
    """Per-row arguments as ops take them: contiguous mask (N,), temperature 0-d or (N,)."""
    flat_mask = None if mask is None else mask.reshape(-1).contiguous()
    return flat_mask, tau.reshape(-1).contiguous() if tau.dim() else tau


def check_logits(logits: Tensor) -> None:
    checks.is_float("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits: wanted (..., V), got a 0-d tensor")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits: wanted a vocabulary of at least one token, got shape {checks.shape(logits)}")


def belongs_to_a_leaf(logits: Tensor) -> bool:
    """Whether writing over the logits would write over a leaf that requires grad."""
    owner = logits if torch.compiler.is_compiling() or logits._base is None else logits._base
    return owner.is_leaf and owner.requires_grad


def _overlaps(rows: Tensor) -> bool:
    """Whether two of its elements may share memory, as in ``expand`` and ``unfold``: then no gradient fits in there.

    Not where each stride steps beyond all that the smaller ones reach; other layouts count as overlapping.
    """
    reach = 0
    for stride, size in sorted(zip(rows.stride(), rows.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def check_temperature(temperature: Number, rows: Tensor) -> Tensor:
    """τ as a 0-d tensor, or one value per row (...)."""
    if not isinstance(temperature, Tensor) or temperature.dim() == 0:
        tau = checks.number("temperature", temperature, rows, positive=True)
    else:
        checks.is_float("temperature", temperature)
        checks.has_shape("temperature", temperature, rows.shape[:-1], "one value a row")
        checks.same_device("temperature", temperature, rows, "its rows")
        if temperature.requires_grad:
            raise ValueError("temperature: gets no gradient, but came as a tensor that requires one")
        tau = temperature.to(torch.float64 if rows.device.type == "cpu" else torch.float32)
    if not isinstance(temperature, Tensor):
        return tau
    return checks.at_every("temperature", tau, lambda t: (t > 0) & (t < math.inf), "finite values > 0")
