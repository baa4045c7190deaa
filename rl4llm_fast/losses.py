"""Losses on per-token log-probabilities: the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import checks, dispatch, formulas, reference_losses, user_losses, weights
from .autograd_losses import PolicyLoss, PolicyLossOptions
from .checks import Number
from .formulas import EagerMaths
from .kl import Estimator, Gradient, check_like
from .schemas import accumulation_dtype
from .sequences import Sequences, sequences


def policy_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    *,
    kind: str = "ppo_clip",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logp: Tensor | None = None,
    kl_coef: Number = 0.0,
    kl_estimator: Estimator = "k3",
    kl_gradient: Gradient = "value",
    kl_clamp: bool = False,
    entropy: Tensor | None = None,
    entropy_coef: Number = 0.0,
    rollout_logp: Tensor | None = None,
    rollout_correction: Literal["truncate", "mask"] | None = None,
    rollout_level: Literal["token", "sequence"] = "token",
    rollout_cap: Number = 2.0,
    rollout_floor: Number = 0.0,
    aggregation: str = "token_mean",
    num_tokens: Number | None = None,
    num_sequences: Number | None = None,
    dp_size: Number = 1,
    max_length: Number | None = None,
    token_weights: Tensor | None = None,
    backend: str | None = None,
    **knobs: Number | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Policy loss on per-token log-probabilities, with its derivative and metrics in one pass.

    .. math::
        L = \sum_t w_t\,(\omega_t\,\ell_t + \beta\,\mathrm{kl}_t - c_2 H_t), \qquad
        \rho_t = e^{\mathrm{clamp}(\log\pi_t - \log\pi^{old}_t,\,\pm 20)}

    ====== kinds and their knobs ===========================================================================
    pg          −logp·A (survey (2), (4); Williams 1992)
    cpi         −ρA (30; Kakade & Langford 2002); with the metric ``kl_old_k3`` it serves TRPO (9)
    ppo_clip    −min(ρA, clip(ρ, 1−ε_lo, 1+ε_hi)A) (10; Schulman et al. 2017, eq. 7); eps_low=0.2, eps_high=0.2.
                dual_clip=c > 1: where A < 0 at most −cA (Ye et al. 2020); delta is another name for c (TRL)
    grpo        ppo_clip, usually with ref_logp and kl_coef (82; Shao et al. 2024, eq. 3)
    gspo        −min(sA, clip(s)A), s = exp(mean of log ρ over the sequence) (Zheng et al. 2025, eq. 5); eps_low=3e-4,
                eps_high=4e-4; advantages (B,) give GSPO, per token GSPO-token
    cispo       −sg(clip(ρ))·A·logp (MiniMax 2025, eq. 4); eps_low=0.2, eps_high=0.2; or cap: −sg(min(ρ, cap))·A·logp
    sapo        −(4/τ)·sigmoid(τ(ρ−1))·A; tau_pos=1.0 where A > 0, else tau_neg=1.05 (Gao et al. 2025)
    kl_pen      −ρA + β·k3(old‖now) (29, 31); beta=0.01
    ========================================================================================================

    and whatever :func:`~rl4llm_fast.token_loss` has registered.

    Args:
        logp: (B, T), or packed (N,) with ``cu_seqlens``; fp32, bf16, fp16; fp64 on the eager and CPU backends.
            Differentiable.
        old_logp: log-probabilities of the policy that sampled; None: the detached ``logp`` (on-policy). No gradient
            flows to it, nor to ref, rollout, advantages or weights.
        advantages: like ``logp``, or (B,), one value per sequence.
        kind: see above.
        mask: like ``logp``, bool or 0/1 integers, True for a live token. Whatever stands at other tokens, NaN included,
            changes nothing.
        cu_seqlens: (B+1,) integers, where each packed sequence starts, and N. An empty sequence is fine.
        ref_logp: log-probabilities of the reference, for the KL term.
        kl_coef: β of the KL term; needs ``ref_logp``.
        kl_estimator, kl_gradient, kl_clamp: as in :func:`kl_estimate`.
        entropy: like ``logp``, H_t; differentiable.
        entropy_coef: c₂ of the entropy bonus (33); needs ``entropy``.
        rollout_logp: log-probabilities that the sampler itself reported; needs ``rollout_correction``.
        rollout_correction: ω = exp(old − rollout) weighs the policy term: "truncate": min(ω, rollout_cap); "mask": 0
            outside [rollout_floor, rollout_cap]. None: ω = 1.
        rollout_level: "token", or "sequence": the product of ω over the live tokens of the sequence.
        aggregation: how tokens are weighed: token_mean, seq_mean_token_mean, seq_mean_token_sum,
            seq_mean_token_sum_norm, token_sum, or none (the loss then is like ``logp``); see ``weights``.
        num_tokens: global count of live tokens for token_mean (gradient accumulation, data parallelism); None: this
            call's.
        num_sequences: global count of sequences for seq_mean_*; None: this call's, empty ones too.
        dp_size: multiplies the loss, where gradients are averaged over that many ranks.
        max_length: L_max of seq_mean_token_sum_norm; None: T, or the longest packed sequence.
        token_weights: like ``logp``, multiplies the weights.
        backend: "eager", "cpu", "triton" or "cuda"; None chooses by device.
        **knobs: the kind's. Each, like every number above, may be a 0-d tensor: annealing it recompiles nothing.

    Returns:
        The loss, 0-d in fp32 (fp64 for fp64 input), and metrics over live tokens as 0-d tensors, made without a
        synchronisation: clip_fraction, clip_fraction_low (ρ below the range, A < 0), clip_fraction_high (ρ above it,
        A > 0) for kinds that clip; ratio_mean, ratio_min, ratio_max; kl_old_k1, kl_old_k3; kl_ref (the term as chosen)
        with ``ref_logp``; entropy with ``entropy``. No live token: loss 0, zero gradients, ratios 1, the rest 0.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; an unknown kind, knob or choice, naming what exists.
        BackendError: a backend asked for by name cannot run here.
    """
    checks.is_float("logp", logp)
    checks.choice("aggregation", aggregation, weights.NAMES)
    formula, values = formula_and_knobs(kind, knobs)
    chosen = dispatch.choose("policy_loss", logp, backend)
    if not formulas.FORMULAS[formula].builtin:
        chosen = user_losses.prepare(kind, chosen, dispatch.named(backend) is not None)
    # A GPU's kernels read masks, offsets and every dtype themselves: what would be made here is a launch.
    gpu = chosen in ("triton", "cuda")
    layout = sequences(logp, cu_seqlens, as_given=gpu)
    tensors = {"old_logp": old_logp, "ref_logp": ref_logp, "entropy": entropy, "rollout_logp": rollout_logp}
    for name, tensor in (*tensors.items(), ("token_weights", token_weights)):
        check_like(name, tensor, logp)
    sequence_level = formulas.FORMULAS[formula].sequence_level
    if not layout.known and (aggregation.startswith("seq_") or sequence_level or rollout_level == "sequence"):
        needs = f"kind={kind!r}" if sequence_level else f"aggregation={aggregation!r}, rollout_level={rollout_level!r}"
        raise ValueError(f"cu_seqlens: wanted with packed (N,) tokens for {needs}")
    checks.choice("kl_estimator", kl_estimator, formulas.ESTIMATORS)
    checks.choice("kl_gradient", kl_gradient, formulas.GRADIENTS)
    kl_clamp = checks.flag("kl_clamp", kl_clamp)
    if formulas.FORMULAS[formula].needs_ref and ref_logp is None:
        raise ValueError(f"ref_logp: kind {kind!r} uses it, but it is None")
    _needs("kl_coef", kl_coef, "ref_logp", ref_logp)
    _needs("entropy_coef", entropy_coef, "entropy", entropy)
    mask = checks.live_mask("mask", mask, logp.shape, logp, "logp")
    _check_rollout(rollout_correction, rollout_level, rollout_logp, rollout_cap, rollout_floor)
    check_counts(num_tokens=num_tokens, num_sequences=num_sequences, max_length=max_length, dp_size=dp_size)
    dtype = accumulation_dtype(logp.dtype)

    def rows(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        # What needs nothing is left alone: an op that does nothing costs its dispatch.
        if tensor.dtype != dtype and not (gpu and tensor.dtype != torch.float64):
            tensor = tensor.to(dtype)
        tensor = layout.as_rows(tensor)
        return tensor if tensor.is_contiguous() else tensor.contiguous()

    def fixed(tensor: Tensor | None) -> Any:
        return None if tensor is None else rows(tensor.detach())

    def current() -> Tensor:
        """logp in the accumulation dtype, for what is made outside of the kernels."""
        return layout.as_rows(logp.detach().to(dtype))

    now, old, live = rows(logp), fixed(old_logp), None if mask is None else layout.as_rows(mask).contiguous()
    per_sequence = check_advantages(advantages, layout, logp)
    if formula == "gspo" and per_sequence:
        uneven = token_weights is not None or (rollout_correction is not None and rollout_level == "token")
        if aggregation == "none" or (uneven and not gpu):
            common = {
                "mask": mask, "cu_seqlens": cu_seqlens, "ref_logp": ref_logp, "kl_estimator": kl_estimator,
                "kl_gradient": kl_gradient, "kl_clamp": kl_clamp, "aggregation": aggregation, "num_tokens": num_tokens,
                "num_sequences": num_sequences, "dp_size": dp_size, "max_length": max_length,
                "token_weights": token_weights, "backend": backend,
            }  # fmt: skip
            policy = {
                "kind": kind, "entropy": entropy, "entropy_coef": entropy_coef, "rollout_logp": rollout_logp,
                "rollout_correction": rollout_correction, "rollout_level": rollout_level, "rollout_cap": rollout_cap,
                "rollout_floor": rollout_floor, **knobs,
            }  # fmt: skip
            return _one_ratio(logp, old_logp, advantages, kl_coef, policy, common)
    omega, correction = fixed(rollout_logp), rollout_correction or ""
    sequence_correction = bool(correction) and rollout_level == "sequence"
    weight, how, log_s = fixed(token_weights), aggregation, None
    of_packed = layout.packed and (per_sequence or aggregation.startswith("seq_"))
    in_kernel = gpu and (sequence_level or sequence_correction or of_packed)
    if not per_sequence:
        adv = fixed(advantages)
    elif gpu:
        adv = advantages.detach().unsqueeze(-1)
        adv = (adv.to(dtype) if adv.dtype == torch.float64 else adv).contiguous()
    else:
        adv = layout.spread(advantages.detach())
        adv = rows(adv) if layout.packed else adv.to(dtype).contiguous()
    if not in_kernel:
        if sequence_correction:
            bounds = (rollout_cap, rollout_floor)
            omega = rollout_weights(correction, *bounds, current(), old, omega, live, layout)
            correction = ""
        if sequence_level and chosen == "cpu" and not layout.packed:
            log_s = now.new_empty(0)  # the op makes it
        elif sequence_level:
            log_s = _sequence_mean(current() - (current() if old is None else old), live, layout)
        if layout.packed and aggregation.startswith("seq_"):
            made = aggregation_weights(aggregation, layout, live, current(), num_tokens, num_sequences, max_length)
            weight, how = made if weight is None else weight * made, "token_sum"
    if max_length is None:
        max_length = -1.0 if layout.packed else float(layout.rows[1])
    params = pack_params(
        now,
        {
            "num_tokens": -1.0 if num_tokens is None else num_tokens,
            "num_sequences": float(layout.count) if num_sequences is None else num_sequences,
            "max_length": max_length,
            "dp_size": dp_size,
            "kl_coef": kl_coef,
            "entropy_coef": entropy_coef,
            "rollout_cap": rollout_cap,
            "rollout_floor": rollout_floor,
            **values,
        },
    )
    variant = "" if ref_logp is None else formulas.kl_variant(kl_estimator, kl_gradient, kl_clamp)
    ref, uncertainty = fixed(ref_logp), rows(entropy)
    if uncertainty is now:
        uncertainty = now.view_as(now)  # Dynamo hands no tensor to an autograd function twice
    if chosen == "eager":
        arguments = (now, old, adv, ref, uncertainty, live, omega, weight, log_s, params, formula, variant, how)
        loss, vector = reference_losses.policy_loss(*arguments, correction)
    else:
        entropy_grad = entropy is not None and entropy.requires_grad
        of_sequences = (sequence_level, sequence_correction) if in_kernel else None
        names = (chosen, formulas.FORMULAS[formula].op_name, variant, how, correction)
        options = PolicyLossOptions(*names, entropy_grad, of_sequences)
        offsets = layout.cu_seqlens if in_kernel else None
        loss, vector = PolicyLoss.apply(  # type: ignore[no-untyped-call]
            now, uncertainty, old, adv, ref, live, omega, weight, log_s, offsets, params, options
        )
    loss = loss.reshape(logp.shape) if aggregation == "none" else loss
    clips = formulas.FORMULAS[formula].clip_range is not None
    absent = {"kl_ref": ref_logp is None, "entropy": entropy is None}
    metrics = dict(zip(formulas.METRICS, vector.unbind(), strict=True))
    return loss, {k: v for k, v in metrics.items() if (clips or "clip" not in k) and not absent.get(k, False)}


def _one_ratio(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    kl_coef: Number,
    policy: dict[str, Any],
    common: dict[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO with one advantage per sequence whose tokens do not weigh the same: each of them moves the one ratio.

    It is GSPO-token of x, which has the value of logp and the gradient of its mean over the sequence; the KL term,
    whose gradient is each token's own, is a loss beside it.
    """
    layout, mask = sequences(logp, common["cu_seqlens"]), common["mask"]
    live = None if mask is None else layout.as_rows(mask)
    now = layout.as_rows(logp.to(accumulation_dtype(logp.dtype)))
    mean = _sequence_mean(now, live, layout)
    # 0, and NaN for a mean that is infinite, whose ratio is at its bound and has no gradient.
    x = now.detach() + torch.nan_to_num(mean - mean.detach())
    each = layout.spread(advantages.detach()).expand(layout.rows).reshape(logp.shape)
    old = logp.detach() if old_logp is None else old_logp
    loss, metrics = policy_loss(x.reshape(logp.shape), old, each, **policy, **common)
    if isinstance(kl_coef, Tensor) or kl_coef != 0:
        nothing = torch.zeros_like(now.detach()).reshape(logp.shape)
        loss = loss + policy_loss(logp, old_logp, nothing, kind="cpi", kl_coef=kl_coef, **common)[0]
    return loss, metrics


_MORE_THAN = {"dual_clip": 1.0, "delta": 1.0, "tau_pos": 0.0, "tau_neg": 0.0, "cap": 0.0}
_AT_LEAST_0 = ("eps_low", "eps_high", "beta")


def formula_and_knobs(kind: str, given: dict[str, Any]) -> tuple[str, dict[str, Number]]:
    """The formula's name, and its knobs by name."""
    checks.choice("kind", kind, tuple(formulas.KINDS))
    defaults = formulas.KINDS[kind]
    for name in given:
        if name not in defaults:
            raise ValueError(f"{name}: not a knob of kind {kind!r}, which has {', '.join(defaults) or 'none'}")
    knobs = {**defaults, **given}
    for name, value in knobs.items():
        if value is None and defaults[name] is not None:
            raise ValueError(f"{name}: wanted a number or a 0-d tensor, got None")
    formula, values = formulas.formula_of(kind, knobs)
    if formulas.FORMULAS[formula].builtin:  # a user's knob of such a name has a meaning of its own
        if knobs.get("dual_clip") is not None and knobs.get("delta") is not None:
            raise ValueError("dual_clip, delta: two names of one bound; give one of them")
        unused = [name for name in ("eps_low", "eps_high") if name in given]
        if formula == "cispo_cap" and unused:
            raise ValueError(f"{', '.join(unused)}: not used by kind 'cispo' with cap, whose weight is min(ρ, cap)")
        for name, value in knobs.items():
            if name in _MORE_THAN or name in _AT_LEAST_0:
                checks.in_range(name, value, _MORE_THAN.get(name, 0.0), strict=name in _MORE_THAN)
    return formula, dict(zip(formulas.FORMULAS[formula].knobs, values, strict=True))


def _needs(coefficient: str, value: Number, name: str, tensor: Tensor | None) -> None:
    if tensor is None and (isinstance(value, Tensor) or value != 0):
        raise ValueError(f"{coefficient}: needs {name}, which is None")


def check_counts(**counts: Number | None) -> None:
    """Of the call, or of the global batch."""
    for name, count in counts.items():
        checks.in_range(name, count, 0.0)


def pack_params(logp: Tensor, numbers: dict[str, Number]) -> Tensor:
    """Hyperparameters as one fp64 vector: on the CPU, or on the op's device if the user gave a tensor there."""
    knobs = {name: value for name, value in numbers.items() if name not in formulas.PARAMS}
    ordered = {name: numbers.get(name, 0.0) for name in formulas.PARAMS} | knobs
    return checks.numbers(ordered, len(formulas.PARAMS) + formulas.MAX_KNOBS, logp)


def check_advantages(advantages: Tensor, layout: Sequences, logp: Tensor) -> bool:
    """Whether there is one per sequence."""
    checks.is_float("advantages", advantages)
    checks.same_device("advantages", advantages, logp, "logp")
    if advantages.shape == logp.shape:
        return False
    if layout.known and advantages.dim() == 1 and advantages.shape[0] == layout.count:
        return True
    per_sequence = f", or {(layout.count,)} for one value per sequence" if layout.known else ""
    raise ValueError(f"advantages: wanted {checks.shape(logp)} like logp{per_sequence}; got {checks.shape(advantages)}")


def _check_rollout(correction: str | None, level: str, rollout: Tensor | None, cap: Number, floor: Number) -> None:
    checks.choice("rollout_level", level, ("token", "sequence"))
    if correction is None:
        if rollout is not None:
            raise ValueError("rollout_correction: wanted 'truncate' or 'mask' beside rollout_logp, got None")
        return
    checks.choice("rollout_correction", correction, tuple(formulas.CORRECTIONS))
    if rollout is None:
        raise ValueError(f"rollout_correction={correction!r}: needs rollout_logp, which is None")
    checks.in_range("rollout_cap", cap, 0.0, strict=True)
    checks.in_range("rollout_floor", floor, 0.0)
    if correction == "truncate" and (isinstance(floor, Tensor) or floor != 0):
        raise ValueError(f"rollout_floor: wanted 0 with rollout_correction='truncate', which has none; got {floor}")
    most, least = checks.plain(cap), checks.plain(floor)
    if most is not None and least is not None and least > most:
        raise ValueError(f"rollout_floor: wanted at most rollout_cap = {most}, got {least}")


def _sequence_mean(values: Tensor, live: Tensor | None, layout: Sequences) -> Tensor:
    """The mean over the live tokens of each sequence, spread to what broadcasts against rows."""
    live = torch.ones_like(values, dtype=torch.bool) if live is None else live
    total = layout.sums(torch.where(live, values, torch.zeros((), dtype=values.dtype, device=values.device)))
    return layout.spread(total / layout.sums(live.to(values.dtype)).clamp(min=1)).contiguous()


def rollout_weights(
    correction: str,
    cap: Number,
    floor: Number,
    now: Tensor,
    old: Tensor | None,
    rollout: Tensor,
    live: Tensor | None,
    layout: Sequences,
) -> Tensor:
    """ω of whole sequences (docs/math.md section 5, "sampler mismatch") as rows; kernels make those of tokens."""
    # Numbers stay 0-d tensors on the CPU, which mix with any device: moving them would wait for a GPU.
    bounds = (("rollout_cap", cap), ("rollout_floor", floor))
    upper, lower = (checks.number(name, value, now).to(now.dtype) for name, value in bounds)
    log_omega = (now.detach() if old is None else old) - rollout
    if live is not None:
        log_omega = torch.where(live, log_omega, torch.zeros((), dtype=now.dtype, device=now.device))
    log_omega = layout.spread(layout.sums(log_omega)).expand(layout.rows)
    return reference_losses.importance_weights(log_omega, correction, upper, lower).contiguous()


def aggregation_weights(
    aggregation: str,
    layout: Sequences,
    live: Tensor | None,
    now: Tensor,
    num_tokens: Number | None,
    num_sequences: Number | None,
    max_length: Number | None,
) -> Tensor:
    """w_t of an aggregation as rows like ``now``, where a kernel does not make them by itself."""
    alive = torch.ones_like(now) if live is None else live.to(now.dtype)
    seen = float(layout.count) if num_sequences is None else num_sequences
    tokens = alive.sum() if num_tokens is None else checks.number("num_tokens", num_tokens, now).to(now.dtype)
    if max_length is not None:
        longest = checks.number("max_length", max_length, now).to(now.dtype)
    elif layout.cu_seqlens is not None and layout.count:
        longest = layout.cu_seqlens.diff().amax().to(now)
    else:
        longest = checks.number("max_length", float(layout.rows[1]), now).to(now.dtype)
    count = checks.number("num_sequences", seen, now).to(now.dtype)
    arguments: Sequence[Tensor] = (layout.spread(layout.sums(alive)), tokens, count, longest)
    weight: Tensor | float = weights.AGGREGATIONS[aggregation](EagerMaths, *arguments)
    return torch.ones_like(alive) * weight
