"""The pair formulas, each written once (docs/math.md section 7): one preference pair to its loss.

A formula is a plain function of the maths namespace ``m`` (``PairMaths`` while code is generated, ``EagerPairMaths`` on
tensors) and of one number per pair:

    chosen, rejected   x of either answer: π(y|x) less the reference's where there is one, the sum over its live tokens
                       or their mean; or its reward
    nll                −Σπ_w·B/Σ|y_w|, whose mean over the batch is the mean NLL of its chosen tokens
    prob, margin, desirable, weight   what a caller may give for each pair, at most one of them
    beta               β (τ of ipo), and then the formula's own knobs

``kto`` has no pairs: its answers come as ``chosen``. Derivatives are made as those of the token formulas are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .formulas import EagerMaths
from .symbolic import Expr, Maths

ANSWERS = ("chosen", "rejected", "nll")
PER_PAIR = ("prob", "margin", "desirable", "weight")
MAX_KNOBS = 3
# The numbers of one call, as one fp64 vector; MAX_KNOBS knobs of the formula follow. per_pair stands for the pairs'
# prob, margin, … where the call has no tensor of them.
PARAMS = ("beta", "per_pair")
METRICS = ("reward_chosen", "reward_rejected", "accuracy", "margin")
LABELLED_METRICS = (*METRICS, "weight_ratio")  # of answers that are desirable or not, without pairs
LEAST_MEAN = -1e-7  # ORPO's cap on a mean log-probability: the odds of a certain answer are infinite


class PairMaths(Maths):
    """What pair formulas may say besides: they are evaluated in fp64 on every backend."""

    def log1p(self, x: Any) -> Expr:
        return self._call("log1p", x)

    def expm1(self, x: Any) -> Expr:
        return self._call("expm1", x)


class EagerPairMaths(EagerMaths):
    log1p = staticmethod(torch.log1p)
    expm1 = staticmethod(torch.expm1)


def bradley_terry(m: Any, chosen: Any, rejected: Any, margin: Any) -> Any:
    """(13, 38): −log σ(r_w − r_l − margin)."""
    return -m.logsigmoid(chosen - rejected - margin)


def dpo(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    """(46): −log σ(βh)."""
    return -m.logsigmoid(beta * (chosen - rejected))


def dpo_soft(m: Any, chosen: Any, rejected: Any, prob: Any, beta: Any) -> Any:
    """(53): −p·log σ(βh) − (1−p)·log σ(−βh); label smoothing ε is p = 1 − ε."""
    z = beta * (chosen - rejected)
    return -prob * m.logsigmoid(z) - (1.0 - prob) * m.logsigmoid(-z)


def dpo_weighted(m: Any, chosen: Any, rejected: Any, weight: Any, beta: Any) -> Any:
    """(79): −w·log σ(βh), a pair of segments; w = 0 for one that does not exist."""
    return -weight * m.logsigmoid(beta * (chosen - rejected))


def robust(m: Any, chosen: Any, rejected: Any, beta: Any, label_smoothing: Any) -> Any:
    """(−(1−ε)·log σ(βh) + ε·log σ(−βh))/(1−2ε)."""
    z = beta * (chosen - rejected)
    right, flipped = m.logsigmoid(z), m.logsigmoid(-z)
    return (label_smoothing * flipped - (1.0 - label_smoothing) * right) / (1.0 - 2.0 * label_smoothing)


def ipo(m: Any, chosen: Any, rejected: Any, prob: Any, beta: Any) -> Any:
    """(68), (60): (h − (2p−1)/(2τ))²."""
    distance = chosen - rejected - (2.0 * prob - 1.0) / (2.0 * beta)
    return distance * distance


def hinge(m: Any, chosen: Any, rejected: Any, beta: Any) -> Any:
    """max(0, 1 − βh); at βh = 1 the gradient is 0."""
    missing = 1.0 - beta * (chosen - rejected)
    return m.where(missing <= 0.0, 0.0, missing)


def cpo(m: Any, chosen: Any, rejected: Any, beta: Any, alpha: Any) -> Any:
    """(75-78): −log σ(β(π_w − π_l)) − α·π_w."""
    return -m.logsigmoid(beta * (chosen - rejected)) - alpha * chosen


def cpo_token(m: Any, chosen: Any, rejected: Any, nll: Any, beta: Any, alpha: Any) -> Any:
    """−log σ(β(π_w − π_l)) + α·nll_w, nll_w the mean over all chosen tokens of the batch."""
    return -m.logsigmoid(beta * (chosen - rejected)) + alpha * nll


def simpo(m: Any, chosen: Any, rejected: Any, beta: Any, gamma: Any) -> Any:
    """−log σ(β(π_w/|y_w| − π_l/|y_l|) − γ)."""
    return -m.logsigmoid(beta * (chosen - rejected) - gamma)


def log_odds(m: Any, mean: Any) -> Any:
    """a − log(1 − e^a), a the mean log-probability, at most LEAST_MEAN."""
    a = m.where(mean > LEAST_MEAN, LEAST_MEAN, mean)
    # Each of the two forms only where it keeps its digits, and where the other one's argument is harmless.
    near = m.log(-m.expm1(m.where(a > -0.6931471805599453, a, -0.6931471805599453)))
    far = m.log1p(-m.exp(a))
    return a - m.where(a > -0.6931471805599453, near, far)


def orpo(m: Any, chosen: Any, rejected: Any, nll: Any, lam: Any) -> Any:
    """nll_w − λ·log σ(log odds_w − log odds_l)."""
    ratio = log_odds(m, chosen) - log_odds(m, rejected)
    return nll - lam * m.logsigmoid(ratio)


def kto(m: Any, chosen: Any, desirable: Any, beta: Any, kl: Any, lambda_d: Any, lambda_u: Any) -> Any:
    """(69-74): w·(1 − v), v = σ(r − z) where desirable, else σ(z − r); w = λ_D or λ_U."""
    advantage = beta * chosen - kl
    wanted = lambda_d * m.sigmoid(-advantage)  # 1 − σ(x) = σ(−x), without the cancellation
    unwanted = lambda_u * m.sigmoid(advantage)
    return m.where(desirable > 0.5, wanted, unwanted)


@dataclass(frozen=True)
class PairFormula:
    """A pair formula and what it takes, by the names of its parameters."""

    function: Callable[..., Any]

    @property
    def name(self) -> str:
        return self.function.__name__

    @functools.cached_property  # a signature takes 20 µs to read, and these are asked for in every call
    def parameters(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.function).parameters)[1:]

    @property
    def knobs(self) -> tuple[str, ...]:
        return tuple(p for p in self.parameters if p not in (*ANSWERS, *PER_PAIR, "beta"))

    @property
    def per_pair(self) -> str | None:
        return next((p for p in self.parameters if p in PER_PAIR), None)

    @property
    def token_nll(self) -> bool:
        return "nll" in self.parameters

    @functools.cached_property
    def labelled(self) -> bool:
        """Whether its answers have labels in place of pairs: ``per_pair`` says which are desirable."""
        return "desirable" in self.parameters

    @functools.cached_property
    def metrics(self) -> tuple[str, ...]:
        return LABELLED_METRICS if self.labelled else METRICS

    def __call__(self, m: Any, pair: Mapping[str, Any], *knobs: Any) -> Any:
        """``pair`` holds the answers, beta, and ``per_pair``."""
        named = {p: pair["per_pair" if p in PER_PAIR else p] for p in self.parameters if p not in self.knobs}
        return self.function(m, **named, **dict(zip(self.knobs, knobs, strict=True)))


FORMULAS: dict[str, PairFormula] = {
    f.__name__: PairFormula(f)
    for f in (
        bradley_terry,
        dpo,
        dpo_soft,
        dpo_weighted,
        robust,
        ipo,
        hinge,
        cpo,
        cpo_token,
        simpo,
        orpo,
        kto,
    )
}


def pair_loss(
    m: Any, chosen: Any, rejected: Any, nll: Any, per_pair: Any, beta: Any, *knobs: Any, formula: PairFormula
) -> Any:
    """The loss of one pair: what a kernel computes from the sums of its two answers."""
    pair = {"chosen": chosen, "rejected": rejected, "nll": nll, "per_pair": per_pair, "beta": beta}
    return formula(m, pair, *knobs)
