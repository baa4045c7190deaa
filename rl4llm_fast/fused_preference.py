"""Preference losses straight from hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, chunked, dispatch, reference, tiles
from .autograd_losses import PrecomputedGradients
from .checks import Number
from .chunked_losses import IGNORED, Units, loss_of_units, whole_units
from .fused import check_reference, slopes_of
from .heads import check_chunk, check_dtypes, check_linear, product_dtype
from .kl import check_like
from .logprobs import check_temperature, flat_ids, flat_rows, linear_token_logprobs
from .preference import KINDS, WITHOUT_REFERENCE, preference_loss
from .schemas import accumulation_dtype
from .sequences import packed_offsets

# Arguments of preference_loss that take another form here.
_OF_ONE_SIDE = {
    f"{name}_{side}": here
    for name, here in (("ref", "ref_logp"), ("mask", "mask"), ("cu_seqlens", "cu_seqlens"))
    for side in ("chosen", "rejected")
}


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kind: str = "dpo",
    beta: Number = 0.1,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logp: Tensor | None = None,
    average: bool = False,
    prob: Tensor | None = None,
    temperature: Number = 1.0,
    softcap: Number | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    tp_group: Any = None,
    logits_dtype: torch.dtype | None = None,
    grad_weight_dtype: torch.dtype | None = None,
    backend: str | None = None,
    **knobs: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Preference loss straight from hidden states: :func:`preference_loss` of the log-probabilities of x Wᵀ + b.

    A pair's gradient depends on all tokens of both answers. Where each pair fits a chunk, chunks of whole pairs make it
    in the forward pass: three matrix products in all. Elsewhere there are two passes, of which the second makes the
    logits again (four products): where a pair has more tokens than ``chunk_tokens``, for packed answers on a GPU, under
    torch.compile and with a ``tp_group`` (survey (46), (68), (75)).

    Args:
        hidden: (2B, T, D), the chosen answers and behind them the rejected ones, in the same order; or packed (N, D)
            with ``cu_seqlens``.
        weight, bias, temperature, softcap, chunk_tokens, logits_dtype, grad_weight_dtype, tp_group: as in
            :func:`linear_token_logprobs`.
        token_ids: (2B, T) or (N,). One that is ``ignore_index`` is not live.
        mask: like ``token_ids``, bool or 0/1 integers, True for a live token; what stands at others reaches nothing.
        cu_seqlens: (2B+1,) integers, where each packed answer starts, and N. Not for 2d_dpo.
        kind, beta, average, prob, **knobs: as in :func:`preference_loss`.
        ref_hidden, ref_weight, ref_bias: (2B, T, D') or (N, D'), (V, D'), (V,) or None: the reference, in chunks and
            without gradient; or ref_logp, like ``token_ids``.
        backend: "eager", "cpu" or "triton"; None chooses by device.

    Returns:
        The loss, 0-d in fp32 (fp64 for fp64 input), and the metrics of :func:`preference_loss`.

    Raises:
        As :func:`preference_loss` and :func:`linear_token_logprobs`; nothing has run by then but checks of the
        arguments.
    """
    compute_dtype = check_linear(hidden, weight, bias, sharded=tp_group is not None)
    check_dtypes(compute_dtype, logits_dtype, grad_weight_dtype)
    compute_dtype = product_dtype(compute_dtype, hidden, logits_dtype, grad_weight_dtype)
    chunk_tokens = check_chunk(chunk_tokens)
    for name in knobs:
        if name in _OF_ONE_SIDE:
            raise ValueError(
                f"{name}: both answers come in one tensor here; wanted {_OF_ONE_SIDE[name]} of all of them"
            )
    lead = hidden.shape[:-1]
    if hidden.dim() != (2 if cu_seqlens is not None else 3):
        raise ValueError(f"hidden: wanted (2B, T, D), or packed (N, D) with cu_seqlens; got {checks.shape(hidden)}")
    checks.is_integer("token_ids", token_ids)
    checks.has_shape("token_ids", token_ids, lead, "hidden without D")
    checks.same_device("token_ids", token_ids, hidden, "hidden")
    mask = checks.live_mask("mask", mask, lead, hidden, "hidden without D")
    kept = token_ids != checks.integer("ignore_index", ignore_index)
    mask = kept if mask is None else kept & mask
    if tp_group is None:
        reference.check_token_ids(token_ids, mask, ignore_index, weight.shape[0])
    if ref_logp is not None:
        check_like("ref_logp", ref_logp, torch.zeros(lead, device=hidden.device))
    check_reference(hidden, weight, ref_logp, ref_hidden, ref_weight, ref_bias, tp_group is not None)
    if cu_seqlens is None:
        halves = _padded_halves(lead[0], mask)
    elif kind == "2d_dpo":
        raise ValueError("cu_seqlens: wanted None for kind '2d_dpo', whose segments are counted in rows (2B, T)")
    else:
        halves = _packed_halves(packed_offsets(token_ids, cu_seqlens, "token_ids"), mask)
    _check_kind(kind, ref_logp, ref_hidden)
    (first, chosen_options), (second, rejected_options) = halves
    options: dict[str, Any] = {
        "kind": kind,
        "beta": beta,
        "average": average,
        "prob": prob,
        "backend": backend,
        **knobs,
    }
    options |= {f"{name}_chosen": value for name, value in chosen_options.items()}
    options |= {f"{name}_rejected": value for name, value in rejected_options.items()}

    def loss_of(logp: Tensor, ref: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        refs = (None, None) if ref is None else (ref[first], ref[second])
        return preference_loss(logp[first], logp[second], *refs, **options)

    if not torch.compiler.is_compiling():  # before any product, as in linear_policy_loss
        nothing = torch.zeros(lead, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
        loss_of(nothing, nothing if ref_hidden is not None else ref_logp)
    head: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "chunk_tokens": chunk_tokens}
    head |= {"mask": mask, "ignore_index": ignore_index, "tp_group": tp_group, "backend": backend}
    head |= {"logits_dtype": logits_dtype, "grad_weight_dtype": grad_weight_dtype}
    if ref_hidden is not None and ref_weight is not None:
        with torch.no_grad():
            ref_logp = linear_token_logprobs(ref_hidden, ref_weight, token_ids, ref_bias, **head)
    chosen = dispatch.choose("linear_preference_loss", hidden, backend)
    gradient = torch.is_grad_enabled()
    needs = tuple(t is not None and t.requires_grad and gradient for t in (hidden, weight, bias))
    units = None
    if chosen != "eager" and tp_group is None and any(needs) and not torch.compiler.is_compiling():
        size = chunk_tokens or tiles.chunk_rule(weight.shape[0], compute_dtype, hidden.device.type, logits_dtype)
        units = _whole_pairs(mask, cu_seqlens, size)
    if units is None:
        return loss_of(linear_token_logprobs(hidden, weight, token_ids, bias, **head), ref_logp)
    rows = chunked.Rows(
        hidden.reshape(-1, hidden.shape[-1]),
        flat_ids(token_ids.masked_fill(~kept, IGNORED), hidden),
        *flat_rows(mask, check_temperature(temperature, hidden)),
    )
    cap = None if softcap is None else checks.number("softcap", softcap, hidden, positive=True)
    slopes = slopes_of(lambda logp, entropy: loss_of(logp, ref_logp), lead)
    dtypes = (compute_dtype, logits_dtype, grad_weight_dtype)
    with torch.no_grad():
        logp, _, grad_hidden, *gradients = loss_of_units(
            dispatch.ops(chosen), rows, weight, bias, cap, units, slopes, False, *dtypes, needs
        )
        loss, metrics = loss_of(logp.reshape(lead), ref_logp)
    grad_hidden = grad_hidden.reshape(hidden.shape) if needs[0] else grad_hidden
    loss = PrecomputedGradients.apply(  # type: ignore[no-untyped-call]
        loss, hidden, weight, bias, grad_hidden, *gradients, chosen
    )
    return loss, metrics


def _check_kind(kind: str, ref_logp: Tensor | None, ref_hidden: Tensor | None) -> None:
    """A reference where the kind has one, by the names that it has here."""
    checks.choice("kind", kind, tuple(KINDS))
    if kind in WITHOUT_REFERENCE:
        for name, given in (("ref_logp", ref_logp), ("ref_hidden", ref_hidden)):
            if given is not None:
                raise ValueError(f"{name}: kind {kind!r} wants no reference, got a tensor")
    elif ref_logp is None and ref_hidden is None:
        raise ValueError(
            f"ref_logp, ref_hidden: kind {kind!r} wants the reference's log-probabilities, or hidden states to make "
            f"them from; got None"
        )


def _whole_pairs(mask: Tensor, cu_seqlens: Tensor | None, size: int) -> Units | None:
    if cu_seqlens is None:
        pairs, length = mask.shape[0] // 2, mask.shape[1]
        unit = torch.arange(pairs, device=mask.device).repeat(2).repeat_interleave(length)
        return whole_units(unit, [2 * length] * pairs, mask.reshape(-1), size)
    if mask.device.type != "cpu":
        return None
    lengths = cu_seqlens.diff()
    pairs = lengths.shape[0] // 2
    unit = torch.arange(pairs, device="cpu").repeat(2).repeat_interleave(lengths)
    return whole_units(unit, (lengths[:pairs] + lengths[pairs:]).tolist(), mask, size)


_Halves = tuple[tuple[slice, dict[str, Any]], tuple[slice, dict[str, Any]]]


def _padded_halves(rows: int, mask: Tensor) -> _Halves:
    if rows % 2:
        raise ValueError(f"hidden: wanted (2B, T, D), as many chosen answers as rejected ones; got {rows} answers")
    halves = slice(rows // 2), slice(rows // 2, None)
    return (halves[0], {"mask": mask[halves[0]]}), (halves[1], {"mask": mask[halves[1]]})


def _packed_halves(offsets: Tensor, mask: Tensor) -> _Halves:
    """Both sides see all tokens, the other one's as dead ones: where the cut is, only the device knows."""
    answers, total = offsets.shape[0] - 1, mask.shape[0]
    if answers % 2:
        raise ValueError(f"cu_seqlens: wanted (2B+1,), as many chosen answers as rejected ones; got {answers} answers")
    pairs, everything = answers // 2, slice(None)
    is_chosen = torch.arange(total, device=mask.device) < offsets[pairs]
    chosen, rejected = offsets[: pairs + 1].clone(), offsets[pairs:].clone()
    if pairs:
        chosen[-1], rejected[0] = total, 0
    return (
        (everything, {"mask": mask & is_chosen, "cu_seqlens": chosen}),
        (everything, {"mask": mask & ~is_chosen, "cu_seqlens": rejected}),
    )
