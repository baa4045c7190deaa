"""The token formulas, each written once (docs/math.md sections 3 and 5); "(n)" is the survey's equation.

A formula is a plain function of the maths namespace ``m`` (``symbolic.Maths`` while code is generated, ``EagerMaths``
on tensors) and per-token values:

    logp    log π of the sampled token, now              old   the same under the policy that sampled
    ref     the same under the reference                 adv   the advantage A
    log_s   mean of logp − old over the sequence

and then its knobs. Losses are to be minimised. The derivative with respect to logp is never written: autograd makes it
on the eager backend, ``symbolic`` everywhere else.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

POLICY_INPUTS = ("logp", "old", "ref", "adv", "log_s")
MAX_KNOBS = 4  # what one call of the fused kernels has room for

ESTIMATORS = ("k1", "k2", "k3", "abs")
GRADIENTS = ("value", "straight_through", "importance")


class EagerMaths:
    """The maths namespace over torch tensors; numbers are taken at the dtype of the tensor beside them."""

    exp = staticmethod(torch.exp)
    log = staticmethod(torch.log)
    sigmoid = staticmethod(torch.sigmoid)
    logsigmoid = staticmethod(torch.nn.functional.logsigmoid)
    abs = staticmethod(torch.abs)
    sign = staticmethod(torch.sign)
    where = staticmethod(torch.where)
    detach = staticmethod(torch.detach)

    @staticmethod
    def _tensors(*values: Tensor | float) -> list[Tensor]:
        like = next((v for v in values if isinstance(v, Tensor) and v.dim()), None)
        like = like if like is not None else next(v for v in values if isinstance(v, Tensor))
        return [v if isinstance(v, Tensor) else torch.full((), v, dtype=like.dtype, device=like.device) for v in values]

    @staticmethod
    def minimum(a: Tensor | float, b: Tensor | float) -> Tensor:
        return torch.minimum(*EagerMaths._tensors(a, b))

    @staticmethod
    def maximum(a: Tensor | float, b: Tensor | float) -> Tensor:
        return torch.maximum(*EagerMaths._tensors(a, b))

    @staticmethod
    def clamp(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        value, low, high = EagerMaths._tensors(x, low, high)
        # torch.clamp passes NaN on, but gives it the gradient 0: a NaN is to show in the derivative too.
        return torch.where(value.isnan(), value, torch.clamp(value, low, high))

    @staticmethod
    def with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
        nothing = surrogate - surrogate.detach()  # but for its gradient; ∞ − ∞ would make a NaN of a finite value
        return value.detach() + torch.where(surrogate.isinf(), torch.zeros_like(nothing), nothing)


# Section 3: KL


def kl_estimate(m: Any, logp: Any, ref: Any, old: Any, *, estimator: str, gradient: str, clamp: bool) -> Any:
    """The sampled estimators of KL(π‖ref) (83, 84; Schulman 2020), and the ways for their gradient."""
    diff = ref - logp
    d = m.clamp(diff, -20.0, 20.0) if clamp else diff
    if estimator == "k1":
        kl = -d
    elif estimator == "k2":
        kl = d * d / 2.0
    elif estimator == "k3":
        kl = m.exp(d) - d - 1.0
    else:
        kl = m.abs(d)
    if clamp:
        kl = m.clamp(kl, -10.0, 10.0)
    if gradient == "straight_through":
        return m.with_gradient(kl, diff * diff / 2.0)
    if gradient == "importance":
        rho = m.exp(logp - old)
        weighted = kl * rho
        if estimator == "k3" and not clamp:
            # By the product rule the derivative −d·ρ is a difference of two numbers as large as ρ·exp(d), which leaves
            # nothing of it where d is 17 (fp32) or 37 (fp64); −(d + 1)·ρ has the same derivative.
            return m.with_gradient(weighted, -(d + 1.0) * rho)
        return weighted
    return kl


# Section 5: token-level policy losses


def log_ratio(m: Any, logp: Any, old: Any) -> Any:
    """log ρ, clamped so that exp never overflows."""
    return m.clamp(logp - old, -20.0, 20.0)


def pg(m: Any, logp: Any, adv: Any) -> Any:
    """(2, 4): −logp·A."""
    return -logp * adv


def cpi(m: Any, logp: Any, old: Any, adv: Any) -> Any:
    """(30): −ρ·A."""
    rho = m.exp(log_ratio(m, logp, old))
    return -rho * adv


def clipped_surrogate(m: Any, rho: Any, adv: Any, low: Any, high: Any) -> Any:
    """−min(ρA, clip(ρ, low, high)·A)."""
    surrogate = rho * adv
    clipped = m.clamp(rho, low, high) * adv
    return -m.minimum(surrogate, clipped)


def ppo_clip(m: Any, logp: Any, old: Any, adv: Any, eps_low: Any, eps_high: Any, dual_clip: Any) -> Any:
    """(10): −min(ρA, clip(ρ, 1−ε_lo, 1+ε_hi)·A), and where A < 0 at most −c·A (dual clip; c = inf: none)."""
    rho = m.exp(log_ratio(m, logp, old))
    ppo = clipped_surrogate(m, rho, adv, 1.0 - eps_low, 1.0 + eps_high)
    bound = -dual_clip * adv
    return m.where(adv < 0.0, m.minimum(ppo, bound), ppo)


def gspo(m: Any, logp: Any, adv: Any, log_s: Any, eps_low: Any, eps_high: Any) -> Any:
    """−min(s·A, clip(s)·A), s = exp(log_s); each token of the sequence carries its own share of the gradient of s."""
    s = m.exp(m.clamp(m.with_gradient(log_s, logp), -20.0, 20.0))
    return clipped_surrogate(m, s, adv, 1.0 - eps_low, 1.0 + eps_high)


def cispo(m: Any, logp: Any, old: Any, adv: Any, eps_low: Any, eps_high: Any) -> Any:
    """−sg(clip(ρ, 1−ε_lo, 1+ε_hi))·A·logp."""
    rho = m.exp(log_ratio(m, logp, old))
    weight = m.clamp(rho, 1.0 - eps_low, 1.0 + eps_high)
    return -m.detach(weight) * adv * logp


def cispo_cap(m: Any, logp: Any, old: Any, adv: Any, cap: Any) -> Any:
    """−sg(min(ρ, cap))·A·logp."""
    rho = m.exp(log_ratio(m, logp, old))
    weight = m.minimum(rho, cap)
    return -m.detach(weight) * adv * logp


def sapo(m: Any, logp: Any, old: Any, adv: Any, tau_pos: Any, tau_neg: Any) -> Any:
    """−(4/τ)·sigmoid(τ(ρ−1))·A, τ = τ_pos where A > 0, else τ_neg."""
    rho = m.exp(log_ratio(m, logp, old))
    tau = m.where(adv > 0.0, tau_pos, tau_neg)
    gate = m.sigmoid(tau * (rho - 1.0))
    return -(4.0 / tau) * gate * adv


def kl_pen(m: Any, logp: Any, old: Any, adv: Any, beta: Any) -> Any:
    """(29, 31): −ρA + β·k3(old‖now), k3 = ρ − 1 − log ρ."""
    log_rho = log_ratio(m, logp, old)
    rho = m.exp(log_rho)
    return -rho * adv + beta * (rho - 1.0 - log_rho)


# Section 6: value losses. They run where the policy losses do: V comes as logp, V_old as old, the target as adv.


def value_mse(m: Any, logp: Any, adv: Any, scale: Any) -> Any:
    """(5, 11, 12): (V − V_target)², times ½ or 1."""
    error = logp - adv
    return scale * (error * error)


def clipped_squares(m: Any, logp: Any, old: Any, adv: Any, clip: Any) -> tuple[Any, Any]:
    """(V − V_target)², (clip(V, V_old ± ε) − V_target)²."""
    error = logp - adv
    clipped = m.clamp(logp, old - clip, old + clip)
    clipped_error = m.where(old == old, clipped, old) - adv  # a NaN bound would be passed by where a clamp compares
    return error * error, clipped_error * clipped_error


def value_clipped(m: Any, logp: Any, old: Any, adv: Any, scale: Any, clip: Any) -> Any:
    """max((V − V_target)², (clip(V, V_old ± ε) − V_target)²), times ½ or 1."""
    return scale * m.maximum(*clipped_squares(m, logp, old, adv, clip))


def _value_is_clipped(m: Any, token: Mapping[str, Any], scale: Any, clip: Any) -> Any:
    square, clipped_square = clipped_squares(m, token["logp"], token["old"], token["adv"], clip)
    return m.where(clipped_square > square, 1.0, 0.0)


def _one_plus_minus_eps(eps_low: Any, eps_high: Any, *others: Any) -> tuple[Any, Any]:
    return 1.0 - eps_low, 1.0 + eps_high


@dataclass(frozen=True)
class PolicyFormula:
    """A token-level loss: the function, its knobs in order, and the ratios beyond which it clips (or None)."""

    function: Callable[..., Any]
    clip_range: Callable[..., tuple[Any, Any]] | None = None
    clipped: Callable[..., Any] | None = None  # where there is no such ratio: f(m, token, *knobs), 1 where it clips
    builtin: bool = True
    needs_ref: bool = False
    # What the fused ops know it by; a user's holds a hash of its text, so that a name registered anew is another op's.
    op_name: str = ""
    inputs: tuple[str, ...] = field(init=False)
    knobs: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        names = list(inspect.signature(self.function).parameters)[1:]
        object.__setattr__(self, "inputs", tuple(n for n in names if n in POLICY_INPUTS))
        object.__setattr__(self, "knobs", tuple(n for n in names if n not in POLICY_INPUTS))
        object.__setattr__(self, "op_name", self.op_name or self.function.__name__)

    @property
    def sequence_level(self) -> bool:
        return "log_s" in self.inputs

    def __call__(self, m: Any, token: Mapping[str, Any], *knobs: Any) -> Any:
        named = {name: token[name] for name in self.inputs} | dict(zip(self.knobs, knobs, strict=True))
        return self.function(m, **named)


FORMULAS: dict[str, PolicyFormula] = {
    f.op_name: f
    for f in (
        PolicyFormula(pg),
        PolicyFormula(cpi),
        PolicyFormula(ppo_clip, _one_plus_minus_eps),
        PolicyFormula(gspo, _one_plus_minus_eps),
        PolicyFormula(cispo, _one_plus_minus_eps),
        # No lower bound; a ratio is never below −1.
        PolicyFormula(cispo_cap, lambda cap: (-1.0, cap)),
        PolicyFormula(sapo),
        PolicyFormula(kl_pen),
        PolicyFormula(value_mse),
        PolicyFormula(value_clipped, clipped=_value_is_clipped),
    )
}


# Sampler mismatch: the weight ω of the policy term, from log ω = old − rollout.


def truncate(m: Any, log_omega: Any, cap: Any, floor: Any) -> Any:
    """min(ω, cap)."""
    return m.minimum(m.exp(log_omega), cap)


def mask(m: Any, log_omega: Any, cap: Any, floor: Any) -> Any:
    """ω within [floor, cap], else 0."""
    omega = m.exp(log_omega)
    # Not multiplied by the condition: an ω that overflowed is to be 0, and inf·0 is not.
    return m.where((omega < floor) | (omega > cap), 0.0, omega)


CORRECTIONS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (truncate, mask)}

# The hyperparameters of one policy_loss call, as one fp64 vector; MAX_KNOBS knobs of the formula follow.
# num_tokens < 0: count the live tokens.
PARAMS = (
    "num_tokens",
    "num_sequences",
    "max_length",
    "dp_size",
    "kl_coef",
    "entropy_coef",
    "rollout_cap",
    "rollout_floor",
)
METRICS = (
    "clip_fraction",
    "clip_fraction_low",
    "clip_fraction_high",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "kl_old_k1",
    "kl_old_k3",
    "kl_ref",
    "entropy",
)
TOKEN_METRICS = ("ratio", "clipped_low", "clipped_high", "k1", "k3")


def policy_token(
    m: Any, logp: Any, old: Any, ref: Any, adv: Any, log_s: Any, *knobs: Any, formula: PolicyFormula
) -> tuple[Any, ...]:
    """(loss, *TOKEN_METRICS) of one token: what a kernel computes while the values are in registers."""
    token = {"logp": logp, "old": old, "ref": ref, "adv": adv, "log_s": log_s}
    loss = formula(m, token, *knobs)
    log_rho = log_ratio(m, logp, old)
    rho = m.exp(log_rho)
    ratio = m.exp(m.clamp(log_s, -20.0, 20.0)) if formula.sequence_level else rho
    clipped_low = clipped_high = 0.0
    if formula.clip_range is not None:
        low, high = formula.clip_range(*knobs)
        clipped_low = m.where((ratio < low) & (adv < 0.0), 1.0, 0.0)
        clipped_high = m.where((ratio > high) & (adv > 0.0), 1.0, 0.0)
    if formula.clipped is not None:
        clipped_high = formula.clipped(m, token, *knobs)
    return loss, ratio, clipped_low, clipped_high, -log_rho, rho - 1.0 - log_rho


def kl_variants() -> list[tuple[str, dict[str, Any]]]:
    """(name, choices) of every KL formula: k1_value, k1_value_clamp, … The name is an op's argument."""
    return [
        (kl_variant(e, g, c), {"estimator": e, "gradient": g, "clamp": c})
        for e, g, c in itertools.product(ESTIMATORS, GRADIENTS, (False, True))
    ]


def kl_variant(estimator: str, gradient: str, clamp: bool) -> str:
    return f"{estimator}_{gradient}" + ("_clamp" if clamp else "")


# What policy_loss(kind=...) knows: the knobs that a user gives, with their defaults. formula_of maps them to a formula.
KINDS: dict[str, dict[str, float | None]] = {
    "pg": {},
    "cpi": {},
    "ppo_clip": {"eps_low": 0.2, "eps_high": 0.2, "dual_clip": None, "delta": None},
    "grpo": {"eps_low": 0.2, "eps_high": 0.2, "dual_clip": None, "delta": None},
    "gspo": {"eps_low": 3e-4, "eps_high": 4e-4},
    "cispo": {"eps_low": 0.2, "eps_high": 0.2, "cap": None},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "kl_pen": {"beta": 0.01},
}


def formula_of(kind: str, knobs: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]]:
    """The formula's name and its knobs in order, for a kind with all its knobs filled in."""
    if kind in ("ppo_clip", "grpo"):
        dual = knobs["dual_clip"] if knobs["dual_clip"] is not None else knobs["delta"]
        return "ppo_clip", (knobs["eps_low"], knobs["eps_high"], float("inf") if dual is None else dual)
    if kind == "cispo" and knobs["cap"] is not None:
        return "cispo_cap", (knobs["cap"],)
    return kind, tuple(knobs[name] for name in FORMULAS[kind].knobs)
