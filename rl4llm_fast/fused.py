"""Losses straight from hidden states: the logits never exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks, chunked, dispatch, formulas, reference, tiles, user_losses
from .autograd_losses import PrecomputedGradients
from .checks import Number
from .chunked_losses import IGNORED, Slopes, Units, loss_of_units, whole_units
from .heads import check_chunk, check_dtypes, check_linear, product_dtype
from .logprobs import check_temperature, flat_ids, flat_rows, linear_token_logprobs
from .losses import aggregation_weights, formula_and_knobs, pack_params, policy_loss, rollout_weights
from .schemas import accumulation_dtype
from .sequences import sequences


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "ppo_clip",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    ignore_index: int = -100,
    ref_logp: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    entropy_coef: Number = 0.0,
    chunk_tokens: int | None = None,
    tp_group: Any = None,
    logits_dtype: torch.dtype | None = None,
    grad_weight_dtype: torch.dtype | None = None,
    backend: str | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Policy loss straight from hidden states: :func:`policy_loss` of the log-probabilities of :math:`x W^\top + b`.

    .. math::
        L = \sum_t w_t\,(\omega_t\,\ell_t + \beta\,\mathrm{kl}_t - c_2 H_t), \qquad
        dx = dz\,W, \quad dW = dz^\top x, \quad db = \sum_n dz

    with :math:`dz` of :func:`token_logprobs` for :math:`g = \partial L/\partial \log\pi_t` and
    :math:`h = \partial L/\partial H_t` (survey (2), (10), (33), (82)). The logits exist for one chunk of tokens at a
    time. The gradient is made in the forward pass, while those logits are there: three matrix products in all; the
    backward multiplies by the upstream gradient. Kinds that must see a whole sequence first (gspo;
    rollout_level="sequence" without old_logp) take chunks of whole sequences for that. Two passes, of which the second
    makes the logits again (four products), are left where a sequence has more tokens than ``chunk_tokens``; for packed
    sequences on a GPU, whose lengths would cost a synchronisation; for these kinds under torch.compile; for
    aggregation="none"; and for vocabulary-parallel heads, whose ranks would have to meet at every chunk.

    Args:
        hidden: (B, T, D), or packed (N, D) with ``cu_seqlens``. Under autocast the products run in its dtype.
        weight: (V, D), the head (tied or not), in the dtype of ``hidden`` unless autocast is on.
        token_ids: (B, T) or (N,), the tokens that were sampled. One that is ``ignore_index`` is not live.
        old_logp, advantages, kind, mask, cu_seqlens: as in :func:`policy_loss`. Hidden states of tokens that are not
            live may hold anything, NaN included, and reach no gradient.
        bias: (V,) or None.
        temperature, softcap: as in :func:`token_logprobs`.
        ref_logp: the reference's log-probabilities; or they are made here, in chunks and without gradient, from
            ref_hidden, ref_weight and ref_bias: (B, T, D') or (N, D'), (V, D'), (V,) or None.
        entropy_coef: c₂ (33). Any but the number 0 makes entropies, their gradient, and the metric ``entropy``.
        chunk_tokens, logits_dtype, grad_weight_dtype, tp_group: as in :func:`linear_token_logprobs`; with a group
            ref_weight is a slice too.
        backend: "eager", "cpu", "triton" or "cuda"; None chooses by device.
        **options: everything else that :func:`policy_loss` takes (kl_coef, kl_estimator, kl_gradient, kl_clamp, the
            rollout arguments, aggregation, num_tokens, num_sequences, dp_size, max_length, token_weights), and the
            kind's knobs.

    Returns:
        The loss and the metrics of :func:`policy_loss`.

    Raises:
        As :func:`policy_loss` and :func:`linear_token_logprobs`; nothing has run by then but checks of the arguments.
    """
    loss, metrics, _ = linear_policy_loss_and_logprobs(
        hidden, weight, token_ids, old_logp, advantages, bias, kind=kind, mask=mask, cu_seqlens=cu_seqlens,
        temperature=temperature, softcap=softcap, ignore_index=ignore_index, ref_logp=ref_logp, ref_hidden=ref_hidden,
        ref_weight=ref_weight, ref_bias=ref_bias, entropy_coef=entropy_coef, chunk_tokens=chunk_tokens,
        tp_group=tp_group, logits_dtype=logits_dtype, grad_weight_dtype=grad_weight_dtype, backend=backend, **options,
    )  # fmt: skip
    return loss, metrics


def linear_policy_loss_and_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "ppo_clip",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    ignore_index: int = -100,
    ref_logp: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    entropy_coef: Number = 0.0,
    chunk_tokens: int | None = None,
    tp_group: Any = None,
    logits_dtype: torch.dtype | None = None,
    grad_weight_dtype: torch.dtype | None = None,
    backend: str | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """:func:`linear_policy_loss`, and the log-probabilities that it made, without gradient."""
    compute_dtype = check_linear(hidden, weight, bias, sharded=tp_group is not None)
    check_dtypes(compute_dtype, logits_dtype, grad_weight_dtype)
    compute_dtype = product_dtype(compute_dtype, hidden, logits_dtype, grad_weight_dtype)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden: wanted (B, T, D), or packed (N, D); got {checks.shape(hidden)}")
    lead = hidden.shape[:-1]
    checks.is_integer("token_ids", token_ids)
    checks.has_shape("token_ids", token_ids, lead, "hidden without D")
    checks.same_device("token_ids", token_ids, hidden, "hidden")
    if "entropy" in options:
        raise ValueError("entropy: made here from the hidden states; entropy_coef asks for it")
    chunk_tokens = check_chunk(chunk_tokens)
    mask = checks.live_mask("mask", mask, lead, hidden, "hidden without D")
    kept = token_ids != checks.integer("ignore_index", ignore_index)
    mask = kept if mask is None else kept & mask
    if tp_group is None:
        reference.check_token_ids(token_ids, mask, ignore_index, weight.shape[0])
    tau = check_temperature(temperature, hidden)
    cap = None if softcap is None else checks.number("softcap", softcap, hidden, positive=True)
    head: dict[str, Any] = {
        "temperature": temperature,
        "softcap": softcap,
        "chunk_tokens": chunk_tokens,
        "tp_group": tp_group,
        "logits_dtype": logits_dtype,
    }
    with_entropy = isinstance(entropy_coef, Tensor) or entropy_coef != 0
    options = {"kind": kind, "mask": mask, "cu_seqlens": cu_seqlens, "entropy_coef": entropy_coef, **options}
    options["backend"] = backend
    check_reference(hidden, weight, ref_logp, ref_hidden, ref_weight, ref_bias, tp_group is not None)

    # The loss of zeros: every other argument is checked by the function that it is meant for, before any product.
    nothing = torch.zeros(lead, dtype=accumulation_dtype(compute_dtype), device=hidden.device)
    if not torch.compiler.is_compiling():
        stand_in = nothing if ref_hidden is not None else ref_logp
        policy_loss(
            nothing, old_logp, advantages, ref_logp=stand_in, entropy=nothing if with_entropy else None, **options
        )
    if ref_hidden is not None and ref_weight is not None:
        with torch.no_grad():
            ref_logp = linear_token_logprobs(
                ref_hidden,
                ref_weight,
                token_ids,
                ref_bias,
                mask=mask,
                ignore_index=ignore_index,
                backend=backend,
                **head,
            )
    options["ref_logp"] = ref_logp

    chosen = dispatch.choose("linear_policy_loss", hidden, backend)
    gradient = torch.is_grad_enabled()
    need = [t is not None and t.requires_grad and gradient for t in (hidden, weight, bias)]
    size = chunk_tokens or tiles.chunk_rule(weight.shape[0], compute_dtype, hidden.device.type, logits_dtype)
    one_pass = units = None
    if chosen != "eager" and tp_group is None and options.get("aggregation") != "none":
        one_pass = _one_pass(old_logp, options, chosen)
        if not one_pass and any(need) and not torch.compiler.is_compiling():
            units = _whole_sequences(mask, cu_seqlens, size)
    if not one_pass and units is None:
        head |= {"mask": mask, "ignore_index": ignore_index, "return_entropy": with_entropy, "backend": backend}
        head["grad_weight_dtype"] = grad_weight_dtype
        result = linear_token_logprobs(hidden, weight, token_ids, bias, **head)
        logp, entropy = result if isinstance(result, tuple) else (result, None)
        return *policy_loss(logp, old_logp, advantages, entropy=entropy, **options), logp.detach()

    def loss_of(logp: Tensor, entropy: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        return policy_loss(logp, old_logp, advantages, entropy=entropy, **options)

    rows = chunked.Rows(
        hidden.reshape(-1, hidden.shape[-1]),
        flat_ids(token_ids.masked_fill(~kept, IGNORED), hidden),
        *flat_rows(mask, tau),
    )
    dtypes = (compute_dtype, logits_dtype, grad_weight_dtype)
    with torch.no_grad():
        if units is not None:
            how = (slopes_of(loss_of, lead), with_entropy, *dtypes, tuple(need))
            logp, entropy, *gradients = loss_of_units(dispatch.ops(chosen), rows, weight, bias, cap, units, *how)
        else:
            per_token = _per_token(nothing, old_logp, advantages, options)
            logp, entropy, *gradients = dispatch.ops(chosen).linear_policy_loss_fwd(
                rows.hidden, weight, bias, *rows[1:], cap, *per_token, with_entropy, *dtypes, size, *need
            )
        logp = logp.reshape(lead)
        entropy = entropy.reshape(lead) if with_entropy else None
        loss, metrics = loss_of(logp, entropy)
    if any(need):
        grad_hidden = gradients[0].reshape(hidden.shape) if need[0] else gradients[0]
        loss = PrecomputedGradients.apply(  # type: ignore[no-untyped-call]
            loss, hidden, weight, bias, grad_hidden, *gradients[1:], chosen
        )
    return loss, metrics, logp


def linear_sft_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    aggregation: str = "token_mean",
    num_tokens: Number | None = None,
    num_sequences: Number | None = None,
    dp_size: Number = 1,
    max_length: Number | None = None,
    token_weights: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    tp_group: Any = None,
    logits_dtype: torch.dtype | None = None,
    grad_weight_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Supervised loss straight from hidden states: :math:`L = -\sum_t w_t \log p(y_t)` (survey (3)).

    The gradient is made in the forward pass, as in :func:`linear_policy_loss`, whose kind ``pg`` at A = 1 this is.

    Args:
        hidden, weight, token_ids, bias, mask, cu_seqlens, temperature, softcap, ignore_index, chunk_tokens, tp_group,
            logits_dtype, grad_weight_dtype, backend: as in :func:`linear_policy_loss`.
        aggregation, num_tokens, num_sequences, dp_size, max_length, token_weights: as in :func:`policy_loss`.

    Returns:
        The loss, 0-d in fp32 (fp64 for fp64 input), or like ``token_ids`` for aggregation="none".

    Raises:
        As :func:`linear_policy_loss`.
    """
    check_linear(hidden, weight, bias, sharded=tp_group is not None)
    ones = torch.ones(hidden.shape[:-1], dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    loss, _ = linear_policy_loss(
        hidden, weight, token_ids, None, ones, bias, kind="pg", mask=mask, cu_seqlens=cu_seqlens,
        aggregation=aggregation, num_tokens=num_tokens, num_sequences=num_sequences, dp_size=dp_size,
        max_length=max_length, token_weights=token_weights, temperature=temperature, softcap=softcap,
        ignore_index=ignore_index, chunk_tokens=chunk_tokens, tp_group=tp_group, logits_dtype=logits_dtype,
        grad_weight_dtype=grad_weight_dtype, backend=backend,
    )  # fmt: skip
    return loss


def check_reference(
    hidden: Tensor,
    weight: Tensor,
    ref_logp: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    sharded: bool,
) -> None:
    """Validate the two ways to give a reference: its log-probabilities, or what they are made from."""
    if (ref_hidden is None) != (ref_weight is None):
        given, missing = ("ref_hidden", "ref_weight") if ref_weight is None else ("ref_weight", "ref_hidden")
        raise ValueError(f"{missing}: wanted beside {given}, got None")
    if ref_hidden is None or ref_weight is None:
        if ref_bias is not None:
            raise ValueError("ref_bias: wanted beside ref_hidden and ref_weight, which are None")
        return
    if ref_logp is not None:
        raise ValueError("ref_logp, ref_hidden: two sources of the reference's log-probabilities; give one of them")
    check_linear(ref_hidden, ref_weight, ref_bias, prefix="ref_", sharded=sharded)
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden: wanted {checks.shape(hidden)[:-1]} tokens like hidden, got {checks.shape(ref_hidden)}"
        )
    if ref_weight.shape[0] != weight.shape[0] and not sharded:
        raise ValueError(f"ref_weight: wanted the {weight.shape[0]} rows of weight, got {checks.shape(ref_weight)}")


def slopes_of(loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]], lead: torch.Size) -> Slopes:
    """dL/dlogp and dL/dH (N,) of a loss of log-probabilities and entropies of the shape ``lead``, by autograd."""

    def slopes(logp: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor | None]:
        numbers = [t for t in (logp, entropy) if t is not None]
        with torch.enable_grad():
            leaves = [t.reshape(lead).clone().requires_grad_() for t in numbers]
            loss, _ = loss_of(leaves[0], leaves[1] if entropy is not None else None)
            grad_logp, *rest = torch.autograd.grad(loss, leaves)
        return grad_logp.reshape(-1), rest[0].reshape(-1) if rest else None

    return slopes


def _whole_sequences(mask: Tensor, cu_seqlens: Tensor | None, size: int) -> Units | None:
    if cu_seqlens is None:
        return whole_units(None, [mask.shape[-1]] * mask.shape[0], mask.reshape(-1), size) if mask.dim() == 2 else None
    if mask.device.type != "cpu":
        return None
    return whole_units(None, cu_seqlens.diff().tolist(), mask, size)


def _one_pass(old_logp: Tensor | None, options: dict[str, Any], chosen: str) -> bool:
    """Whether a token's gradient depends on no other token, so that it can be made with the chunk's logits at hand."""
    formula, _ = formula_and_knobs(options["kind"], _knobs(options))
    unknown_omega = old_logp is None and options.get("rollout_level") == "sequence"
    function = formulas.FORMULAS[formula]
    if function.sequence_level:
        return False
    if unknown_omega and options.get("rollout_correction") is not None:
        return False
    named = dispatch.named(options["backend"]) is not None
    return function.builtin or user_losses.prepare(options["kind"], chosen, named) == chosen


# The arguments of policy_loss that are no knobs of a kind. Read here: where Dynamo sees a function's __kwdefaults__
# read, its defaults are no constants to it any more.
_DEFAULTS = dict(policy_loss.__kwdefaults__ or {})


def _knobs(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _DEFAULTS}


def _per_token(
    nothing: Tensor, old_logp: Tensor | None, advantages: Tensor, options: dict[str, Any]
) -> tuple[Any, ...]:
    """The loss's arguments as ``linear_policy_loss_fwd`` takes them, from ``old`` to ``correction``."""
    get = {**_DEFAULTS, **options}
    layout = sequences(nothing, get["cu_seqlens"])
    live = layout.as_rows(get["mask"])

    def rows(tensor: Tensor | None) -> Any:
        return None if tensor is None else layout.as_rows(tensor.detach().to(nothing.dtype))

    now, old, omega = rows(nothing), rows(old_logp), rows(get["rollout_logp"])
    correction = get["rollout_correction"] or ""
    if correction and get["rollout_level"] == "sequence":
        bounds = (get["rollout_cap"], get["rollout_floor"])
        omega, correction = rollout_weights(correction, *bounds, now, old, omega, live, layout), ""
    adv = (
        rows(advantages) if advantages.shape == nothing.shape else layout.spread(advantages.detach().to(nothing.dtype))
    )
    weight = aggregation_weights(
        get["aggregation"], layout, live, now, get["num_tokens"], get["num_sequences"], get["max_length"]
    )
    if get["token_weights"] is not None:
        weight = weight * rows(get["token_weights"])
    formula, values = formula_and_knobs(get["kind"], _knobs(options))
    numbers = {name: get[name] for name in ("dp_size", "kl_coef", "entropy_coef", "rollout_cap", "rollout_floor")}
    # The aggregation is in the weights; its own numbers are not looked at.
    params = pack_params(now, {"num_tokens": -1.0, "num_sequences": 1.0, "max_length": 1.0, **numbers, **values})
    ref = rows(get["ref_logp"])
    kl = "" if ref is None else formulas.kl_variant(get["kl_estimator"], get["kl_gradient"], bool(get["kl_clamp"]))

    def flat(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.expand(layout.rows).reshape(-1).contiguous()

    per_token = [flat(t) for t in (old, adv, ref, omega, weight)]
    return *per_token, params, formulas.FORMULAS[formula].op_name, kl, correction
