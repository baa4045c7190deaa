"""Sampled estimates of the KL divergence, and the controller that adapts its coefficient."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from . import checks, dispatch, formulas, reference_losses
from .autograd_losses import KlEstimate, KlEstimateOptions
from .checks import Number
from .schemas import accumulation_dtype

Estimator = Literal["k1", "k2", "k3", "abs"]
Gradient = Literal["value", "straight_through", "importance"]


def kl_estimate(
    logp: Tensor,
    ref_logp: Tensor,
    estimator: Estimator = "k3",
    *,
    gradient: Gradient = "value",
    old_logp: Tensor | None = None,
    clamp: bool = False,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Per-token estimate of KL(π‖ref) from the sampled tokens' log-probabilities.

    With :math:`d = \log\pi_{ref} - \log\pi`:

    .. math::
        k_1 = -d, \qquad k_2 = d^2/2, \qquad k_3 = e^d - d - 1, \qquad \text{abs} = |d|

    k1 and k3 are unbiased for samples from π, k2 is not (survey (83), (84), §6.4; Schulman 2020, "Approximating KL
    divergence"; k3 in GRPO: Shao et al. 2024, eq. 4).

    Args:
        logp: log-probabilities now, any shape; fp32, bf16, fp16; fp64 on the eager and CPU backends. Differentiable.
        ref_logp: the reference's, same shape. No gradient.
        estimator: "k1", "k2", "k3" or "abs".
        gradient: "value": the derivative of the estimate. "straight_through": the value of the estimate, the gradient
            −d (k2's, which on-policy is that of the reverse KL). "importance": the estimate times
            exp(logp − old_logp), differentiated through the ratio too, for samples from an older policy.
        old_logp: log-probabilities under the policy that sampled, same shape; used by "importance" only. None: the
            detached ``logp``.
        clamp: d to [−20, 20], then the estimate to [−10, 10], before any ratio; no gradient strictly outside.
        mask: same shape, bool or 0/1 integers, True for a live token. Others give 0 and an exactly zero gradient,
            whatever stands there, NaN included.
        backend: "eager", "cpu", "triton" or "cuda"; None chooses by device.

    Returns:
        The estimate, the shape of ``logp``, in fp32 (fp64 for fp64 input).

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; an unknown estimator or gradient.
    """
    checks.is_float("logp", logp)
    checks.is_float("ref_logp", ref_logp)
    check_like("ref_logp", ref_logp, logp)
    check_like("old_logp", old_logp, logp)
    checks.choice("estimator", estimator, formulas.ESTIMATORS)
    checks.choice("gradient", gradient, formulas.GRADIENTS)
    live = checks.live_mask("mask", mask, logp.shape, logp, "logp")
    variant = formulas.kl_variant(estimator, gradient, checks.flag("clamp", clamp))
    chosen = dispatch.choose("kl_estimate", logp, backend)
    dtype = accumulation_dtype(logp.dtype)
    old = old_logp if gradient == "importance" else None

    def flat(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().to(dtype).reshape(-1).contiguous()

    values = logp.to(dtype).reshape(-1).contiguous()
    flat_live = None if live is None else live.reshape(-1).contiguous()
    if chosen == "eager":
        kl = reference_losses.kl_estimate(values, flat(ref_logp), flat(old), flat_live, variant)
    else:
        options = KlEstimateOptions(chosen, variant)
        kl = KlEstimate.apply(values, flat(ref_logp), flat(old), flat_live, options)  # type: ignore[no-untyped-call]
    return kl.reshape(logp.shape)


def check_like(name: str, tensor: Tensor | None, tokens: Tensor, like: str = "logp") -> None:
    """A float tensor of the tokens' shape and device, or None."""
    if tensor is not None:
        checks.is_float(name, tensor)
        checks.has_shape(name, tensor, tokens.shape, like)
        checks.same_device(name, tensor, tokens, like)


class AdaptiveKLController:
    r"""The coefficient β of the KL penalty, adapted after every update (survey (32); Schulman et al. 2017, §4).

    .. math::
        d < d_{target}/1.5: \beta \leftarrow \beta/2, \qquad d > 1.5\,d_{target}: \beta \leftarrow 2\beta

    Args:
        beta: the coefficient to start with, > 0.
        target: d_target, > 0.
    """

    def __init__(self, beta: float, target: float) -> None:
        self.beta = checks.scalar("beta", beta)
        self.target = checks.scalar("target", target)
        for name, value in (("beta", self.beta), ("target", self.target)):
            checks.in_range(name, value, 0.0, strict=True)

    def update(self, kl: Number) -> float:
        """The coefficient for the next update, given the mean KL of this one."""
        d = checks.scalar("kl", kl)
        if d < self.target / 1.5:
            self.beta /= 2
        elif d > 1.5 * self.target:
            self.beta *= 2
        return self.beta

    def state_dict(self) -> dict[str, float]:
        return {"beta": self.beta, "target": self.target}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.beta, self.target = float(state["beta"]), float(state["target"])


def trust_region_exceeded(kl: Number, delta: Number) -> bool:
    """Whether a step left the trust region (survey (9); Schulman et al. 2015): KL(old‖now) > δ, or the KL is NaN.

    The caller refuses such a step. ``kl`` is the metric ``kl_old_k3`` of ``policy_loss`` or a mean of the exact KL; a
    tensor on a GPU is read back here, which waits for it.
    """
    return not checks.scalar("kl", kl) <= checks.scalar("delta", delta)
