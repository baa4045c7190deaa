"""Returns and advantages along a sequence: one reverse scan x_t = a_t + b_t·x_{t+1}, in its several clothes.

Every function takes padded tokens (B, T), or packed ones (N,) with ``cu_seqlens``, and knows two meanings of a mask
(``mask_mode``), for masks with holes anywhere and rows without a live token:

- ``"skip"``: a token that is not live is not there; V and A are carried across it (a tool's output in a multi-turn
  answer). The same as deleting it.
- ``"zero"``: r and V of such tokens are 0, and the plain recurrence runs over them, up to the last live one.

The bootstrap value follows the last live token in both, and results at tokens that are not live are 0. Whatever stands
at such tokens, NaN included, changes nothing; a NaN at a live token stays in its own sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch, reference_returns
from .autograd_returns import Gae, GaeOptions
from .checks import Number
from .schemas import accumulation_dtype
from .sequences import check_layout, packed_offsets

MaskMode = Literal["skip", "zero"]


class _Tokens(NamedTuple):
    """Validated arguments that every function here shares."""

    backend: str
    tensors: list[Tensor]  # of one float dtype
    mask: Tensor | None
    cu_seqlens: Tensor | None
    bootstrap: Tensor | None


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: Number = 1.0,
    lam: Number = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap_value: Tensor | None = None,
    mask_mode: MaskMode = "skip",
    kl: Tensor | None = None,
    beta: Number = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Generalised advantage estimation, and the returns that a value function is fitted to, in one pass.

    .. math::
        \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad A_t = \delta_t + \gamma\lambda A_{t+1}, \qquad
        R_t = A_t + V_t

    (survey (19), (25), (28), (12); Schulman et al. 2016, eq. 16.) λ = 1 is the Monte-Carlo return less V, λ = 0 the TD
    error.

    Args:
        rewards: (B, T), or packed (N,) with ``cu_seqlens``; fp32, bf16, fp16, and fp64 on the eager and CPU backends;
            any strides. Differentiable.
        values: like ``rewards``, V_t. Differentiable.
        gamma: γ, a number or a 0-d tensor.
        lam: λ, likewise.
        mask: like ``rewards``, bool or 0/1 integers, True for a live token.
        cu_seqlens: (B+1,) integers: where each packed sequence starts, and N. An empty sequence is fine.
        bootstrap_value: (B,), V after the last live token of each sequence (truncated answers); None: 0.
            Differentiable.
        mask_mode: "skip" or "zero", see this module's text.
        kl: like ``values``. With it the rewards are shaped in the same pass, as :func:`shape_rewards` does: ``rewards``
            may then be scores (B,). No gradient then flows to rewards or kl.
        beta: β of the shaped reward; needs ``kl``.
        backend: "eager", "cpu", "triton" or "cuda"; None chooses by device.

    Returns:
        (advantages, returns), both like ``values`` in fp32 (fp64 for fp64 input).

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; γ or λ outside [0, 1]; cu_seqlens that do not start at 0,
            ever decrease, or do not end at N.
        BackendError: a backend asked for by name cannot run here.
    """
    if kl is None:
        if isinstance(beta, Tensor) or beta != 0:
            raise ValueError("beta: needs kl, which is None")
        tensors = {"rewards": rewards, "values": values}
        given = _tokens("gae", tensors, mask, cu_seqlens, bootstrap_value, mask_mode, backend)
        reward, value, penalty = *given.tensors, None
    else:
        tensors = {"values": values, "kl": kl}
        reward, (value, penalty), given = _shaped(
            "gae", rewards, tensors, mask, cu_seqlens, bootstrap_value, mask_mode, backend, name="rewards"
        )
    return _gae("gae", reward, value, penalty, given, (gamma, lam, beta), mask_mode)


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: Number,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap_value: Tensor | None = None,
    mask_mode: MaskMode = "skip",
    backend: str | None = None,
) -> Tensor:
    r"""Monte-Carlo returns G_t = r_t + γ·G_{t+1} (survey (15); Williams 1992), G after the last live token being the
    bootstrap value.

    Arguments, errors: as :func:`gae`. With ``mask_mode="zero"`` a masked token still costs a factor γ.

    Returns:
        G, like ``rewards``, fp32 (fp64 for fp64 input); differentiable in ``rewards`` and ``bootstrap_value``.
    """
    op = "discounted_returns"
    given = _tokens(op, {"rewards": rewards}, mask, cu_seqlens, bootstrap_value, mask_mode, backend)
    return _gae(op, given.tensors[0], None, None, given, (gamma, 1.0, 0.0), mask_mode)[1]


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: Number,
    lam: Number,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap_value: Tensor | None = None,
    mask_mode: MaskMode = "skip",
    backend: str | None = None,
) -> Tensor:
    r"""λ-returns G_t = r_t + γ·((1−λ)·V_{t+1} + λ·G_{t+1}) (survey (22); Sutton & Barto 2018, eq. 12.18).

    Arguments, errors: as :func:`gae`, whose returns they are.

    Returns:
        G, like ``rewards``, fp32 (fp64 for fp64 input); differentiable in rewards, values and bootstrap_value.
    """
    op, tensors = "lambda_returns", {"rewards": rewards, "values": values}
    given = _tokens(op, tensors, mask, cu_seqlens, bootstrap_value, mask_mode, backend)
    reward, value = given.tensors
    return _gae(op, reward, value, None, given, (gamma, lam, 0.0), mask_mode)[1]


def n_step_returns(
    rewards: Tensor,
    values: Tensor,
    n: int,
    *,
    gamma: Number,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap_value: Tensor | None = None,
    mask_mode: MaskMode = "skip",
    backend: str | None = None,
) -> Tensor:
    r"""n-step returns (survey (21), (24); Sutton & Barto 2018, eq. 7.1).

    .. math::
        G^{(n)}_t = \sum_{k<n} \gamma^k r_{t+k} + \gamma^n V_{t+n}

    Where fewer than n live tokens follow, all of them, and then the bootstrap value. Â^(n) = G^(n) − V.

    Args:
        n: steps, at least 1. With ``mask_mode="skip"`` live tokens are counted.
        others: as :func:`gae`. No gradient flows.

    Returns:
        G^(n), like ``rewards``, fp32 (fp64 for fp64 input).
    """
    n = checks.integer("n", n)
    if n < 1:
        raise ValueError(f"n: wanted at least 1, got {n}")
    op, tensors = "n_step_returns", {"rewards": rewards, "values": values}
    given = _tokens(op, tensors, mask, cu_seqlens, bootstrap_value, mask_mode, backend, detach=True)
    kernel: Any = reference_returns if given.backend == "eager" else dispatch.ops(given.backend)
    discount = checks.discount("gamma", gamma, given.tensors[0])
    result: Tensor = kernel.n_step_returns(
        *given.tensors, given.mask, given.cu_seqlens, given.bootstrap, n, discount, mask_mode
    )
    return result


def vtrace(
    logp: Tensor,
    rollout_logp: Tensor,
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: Number,
    lam: Number,
    rho_max: Number = 1.0,
    c_max: Number = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap_value: Tensor | None = None,
    mask_mode: MaskMode = "skip",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""V-trace: advantages and value targets for samples of a policy that lags (Espeholt et al. 2018, eq. 1, §4.2).

    .. math::
        \rho_t = \min(\bar\rho, \pi/\mu), \quad c_t = \lambda \min(\bar c, \pi/\mu), \quad
        v_t - V_t = \rho_t(r_t + \gamma V_{t+1} - V_t) + \gamma c_t (v_{t+1} - V_{t+1}), \quad
        A_t = \rho_t (r_t + \gamma v_{t+1} - V_t)

    Args:
        logp, rollout_logp: like ``rewards``: log π and log μ of the sampled tokens. With ``mask_mode="zero"`` π/μ
            counts as 1 at tokens that are not live.
        rho_max, c_max: ρ̄ and c̄; ρ̄ ≥ c̄.
        others: as :func:`gae`; v after the last live token is the bootstrap value. No gradient flows.

    Returns:
        (advantages, value targets v), like ``rewards``, fp32 (fp64 for fp64 input).
    """
    checks.in_range("rho_max", rho_max, 0.0)
    checks.in_range("c_max", c_max, 0.0)
    rho, c = checks.plain(rho_max), checks.plain(c_max)
    if rho is not None and c is not None and rho < c:
        raise ValueError(f"rho_max: wanted at least c_max = {c}, got {rho}")
    tensors = {"rewards": rewards, "values": values, "logp": logp, "rollout_logp": rollout_logp}
    given = _tokens("vtrace", tensors, mask, cu_seqlens, bootstrap_value, mask_mode, backend, detach=True)
    r, v, now, rollout = given.tensors
    kernel: Any = reference_returns if given.backend == "eager" else dispatch.ops(given.backend)
    discounts = checks.discount("gamma", gamma, r), checks.discount("lam", lam, r)
    bounds = checks.number("rho_max", rho_max, r), checks.number("c_max", c_max, r)
    advantages, targets = kernel.vtrace(
        now, rollout, r, v, given.mask, given.cu_seqlens, given.bootstrap, *discounts, *bounds, mask_mode
    )
    return advantages, targets


def shape_rewards(
    scores: Tensor,
    kl: Tensor,
    *,
    beta: Number,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Per-token rewards with a KL penalty, r_t = −β·kl_t, the score coming on top of it (survey (7), (81)).

    :func:`gae` does the same in its own pass when it is given ``kl``.

    Args:
        scores: (B,), for the last live token of each sequence; or like ``kl``, the score of every prefix.
        kl: (B, T), or packed (N,) with ``cu_seqlens``; for instance ``kl_estimate(old, ref, "k1")``.
        beta: β, a number or a 0-d tensor.
        mask: like ``kl``, True for a live token; others get 0.
        cu_seqlens: (B+1,), as in :func:`gae`.
        backend: "eager" or None: plain PyTorch on every device, whatever ``use_backend`` names. Any other raises.

    Returns:
        Rewards like ``kl``, fp32 (fp64 for fp64 input). No gradient flows. A sequence without a live token gets no
        score.
    """
    score, (penalty,), given = _shaped(
        "shape_rewards", scores, {"kl": kl}, mask, cu_seqlens, None, "skip", backend or "eager"
    )
    return reference_returns.shape_rewards(
        score, penalty, checks.number("beta", beta, penalty), given.mask, given.cu_seqlens
    )


def _tokens(
    op: str,
    tensors: dict[str, Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    mask_mode: str,
    backend: str | None,
    detach: bool = False,
) -> _Tokens:
    """Validation; per-token tensors of one dtype (the widest that came), a bool mask, offsets as the backend takes
    them."""
    (first, tokens), *others = tensors.items()
    checks.is_float(first, tokens)
    for name, tensor in others:
        checks.is_float(name, tensor)
        checks.has_shape(name, tensor, tokens.shape, first)
        checks.same_device(name, tensor, tokens, first)
    if cu_seqlens is not None:
        check_layout(tokens, cu_seqlens, first)
        count = cu_seqlens.shape[0] - 1
    elif tokens.dim() == 2:
        count = tokens.shape[0]
    else:
        got = checks.shape(tokens)
        raise ValueError(f"{first}: wanted (B, T), or packed (N,) with cu_seqlens; got {got} without cu_seqlens")
    live = checks.live_mask("mask", mask, tokens.shape, tokens, first)
    checks.choice("mask_mode", mask_mode, ("skip", "zero"))
    if bootstrap is not None:
        checks.is_float("bootstrap_value", bootstrap)
        checks.has_shape("bootstrap_value", bootstrap, (count,), "the sequences")
        checks.same_device("bootstrap_value", bootstrap, tokens, first)
    dtype = _widest([*tensors.values()])
    cast = [t.detach() if detach else t for t in tensors.values()]
    cast = [t if t.dtype == dtype else t.to(dtype) for t in cast]  # an op that does nothing costs its dispatch
    chosen = dispatch.choose(op, cast[0], backend)
    if cu_seqlens is not None and not (chosen == "cpu" and _takes_as_given(cu_seqlens, bootstrap, *cast)):
        cu_seqlens = packed_offsets(tokens, cu_seqlens, first)
    if bootstrap is not None:
        bootstrap = (bootstrap.detach() if detach else bootstrap).to(accumulation_dtype(dtype)).contiguous()
    return _Tokens(chosen, cast, live, cu_seqlens, bootstrap)


def _takes_as_given(cu_seqlens: Tensor, *tensors: Tensor | None) -> bool:
    """Whether the compiled op looks at the offsets itself, and no backward pass needs them to stay what they are."""
    known = cu_seqlens.dtype in (torch.int32, torch.int64) and cu_seqlens.is_contiguous()
    return known and not _differentiable(*tensors)


def _differentiable(*tensors: Tensor | None) -> bool:
    if not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0:
        return True  # the autograd function says that it has no forward mode; the bare op would drop the tangents
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _shaped(
    op: str,
    scores: Tensor,
    tensors: dict[str, Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    mask_mode: str,
    backend: str | None,
    name: str = "scores",
) -> tuple[Tensor, list[Tensor], _Tokens]:
    """Scores (B,) in the accumulation dtype, or one a token in the dtype of the rest; the rest, "kl" being the last.

    ``name``: what the caller's user calls the scores."""
    checks.is_float(name, scores)
    checks.is_tensor("kl", tensors["kl"])
    tensors = {**tensors, "kl": tensors["kl"].detach()}
    first, tokens = next(iter(tensors.items()))
    if scores.shape == tokens.shape:
        tensors = {**tensors, name: scores.detach()}
        given = _tokens(op, tensors, mask, cu_seqlens, bootstrap, mask_mode, backend)
        return given.tensors[-1], given.tensors[:-1], given
    given = _tokens(op, tensors, mask, cu_seqlens, bootstrap, mask_mode, backend)
    count = tokens.shape[0] if given.cu_seqlens is None else given.cu_seqlens.shape[0] - 1
    if checks.shape(scores) != (count,):
        wanted = f"{(count,)} for one score a sequence, or {checks.shape(tokens)} like {first}"
        raise ValueError(f"{name}: wanted {wanted}; got {checks.shape(scores)}")
    checks.same_device(name, scores, tokens, first)
    return scores.detach().to(accumulation_dtype(given.tensors[0].dtype)).contiguous(), given.tensors, given


def _gae(
    op: str,
    rewards: Tensor,
    values: Tensor | None,
    kl: Tensor | None,
    given: _Tokens,
    gamma_lam_beta: tuple[Number, Number, Number],
    mask_mode: str,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), the first for ``gae`` only."""
    tokens = rewards if kl is None else kl
    chosen = given.backend
    gamma, lam, beta = gamma_lam_beta
    gamma, lam = checks.discount("gamma", gamma, tokens), checks.discount("lam", lam, tokens)
    beta = checks.number("beta", beta, tokens)
    mask, offsets, last = given.mask, given.cu_seqlens, given.bootstrap
    if chosen == "eager":
        return reference_returns.gae(rewards, values, mask, offsets, last, kl, gamma, lam, beta, mask_mode)
    if not _differentiable(rewards, values, last):
        numbers = (gamma, lam, beta, mask_mode, op == "gae")
        advantages, returns = dispatch.ops(chosen).gae_fwd(rewards, values, mask, offsets, last, kl, *numbers)
        return advantages, returns
    options = GaeOptions(chosen, mask_mode, op == "gae")
    advantages, returns = Gae.apply(  # type: ignore[no-untyped-call]
        rewards, values, last, mask, offsets, kl, gamma, lam, beta, options
    )
    return advantages, returns
