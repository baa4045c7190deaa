"""Preference losses on the log-probabilities of whole answers: the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch, pair_formulas, reference_preference
from .answers import Answers, run_pairs
from .checks import Number
from .schemas import accumulation_dtype
from .segments import segment_sums
from .sequences import layout_of

# The knobs of every kind, with their defaults; None: nothing unless given.
KINDS: dict[str, dict[str, Any]] = {
    "dpo": {"label_smoothing": 0.0},
    "robust": {"label_smoothing": 0.1},
    "ipo": {},
    "hinge": {},
    "cpo": {"alpha": 1.0, "nll": "sequence"},
    "simpo": {"gamma": 0.5},
    "orpo": {"lam": 0.1},
    "2d_dpo": dict.fromkeys(("segments_chosen", "segments_rejected", "weights_chosen", "weights_rejected")),
    "bradley_terry": {"margin": None},
}
WITHOUT_REFERENCE = ("cpo", "simpo", "orpo", "bradley_terry")
_AVERAGES = ("simpo", "orpo")  # of means by definition
_WITH_PROB = ("dpo", "ipo")


def preference_loss(
    logp_chosen: Tensor,
    logp_rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    kind: str = "dpo",
    beta: Number = 0.1,
    mask_chosen: Tensor | None = None,
    mask_rejected: Tensor | None = None,
    cu_seqlens_chosen: Tensor | None = None,
    cu_seqlens_rejected: Tensor | None = None,
    average: bool = False,
    prob: Tensor | None = None,
    backend: str | None = None,
    **knobs: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Loss over pairs of answers: the sums over their tokens, the pair formula and its derivative in one pass.

    .. math::
        L = \frac{1}{B} \sum_i \ell(h_i), \qquad
        h = (\pi_w - \mathrm{ref}_w) - (\pi_l - \mathrm{ref}_l), \qquad \pi(y|x) = \sum_{t\ live} \log\pi_t

    ============== kinds and their knobs ======================================================================
    dpo            −log σ(βh) (survey (46); Rafailov et al. 2023, eq. 7); label_smoothing=ε: −(1−ε)·log σ(βh) −
                   ε·log σ(−βh) (Mitchell 2023); ``prob`` p: −p·log σ(βh) − (1−p)·log σ(−βh) (53). With the last
                   round's policy as the reference and pairs ordered from the widest rank gap down: Curry-DPO (80)
    robust         (−(1−ε)·log σ(βh) + ε·log σ(−βh))/(1−2ε), label_smoothing=0.1 < ½ (Chowdhury et al. 2024)
    ipo            (h − 1/(2τ))², β is τ (68; Azar et al. 2023, eq. 17); ``prob`` p: target (2p−1)/(2τ) (60)
    hinge          max(0, 1 − βh) (SLiC; Zhao et al. 2023)
    cpo            −log σ(β(π_w − π_l)) + α·nll_w, no reference, alpha=1.0 (75–78; Xu et al. 2024); nll="sequence":
                   the mean of −π_w (76); "token": −Σπ_w/Σ|y_w| over the batch
    simpo          −log σ(β(π_w/|y_w| − π_l/|y_l|) − γ), no reference, gamma=0.5 (Meng et al. 2024, eq. 6)
    orpo           nll_w − λ·log σ(log odds_w − log odds_l), lam=0.1, no reference, nll_w = −Σπ_w/Σ|y_w|, log odds =
                   a − log(1 − e^a), a the mean log-probability, at most −1e-7 (Hong et al. 2024, eq. 6)
    2d_dpo         −Σ_k log σ(β·a_k − β·b_k), a_k the weight of the chosen answer's segment k times the sum of its
                   tokens' log π − ref, b_k the rejected one's (79); segments_chosen, segments_rejected (B, K, 2):
                   first token and end (not included), counted from the answer's first, −1 where there is none;
                   weights_chosen, weights_rejected (B, K), 1 where not given
    bradley_terry  −log σ(r_w − r_l − margin) of rewards in place of log-probabilities (13, 38); margin: number or (B,)
    =============================================================================================================

    Args:
        logp_chosen: log-probabilities per token, (B, T), or packed (N,) with ``cu_seqlens_chosen``; or of whole
            answers (B,), which are used as they are. fp32, bf16, fp16; fp64 on the eager and CPU backends.
            Differentiable.
        logp_rejected: the other answers', in any of these forms, T its own. Differentiable.
        ref_chosen, ref_rejected: the reference's, like the above; for the kinds with a reference model. No gradient.
        kind: see above.
        beta: β (τ of ipo).
        mask_chosen, mask_rejected: like the answers' tokens, bool or 0/1 integers, True for a live token. Whatever
            stands at other tokens, NaN included, changes nothing.
        cu_seqlens_chosen, cu_seqlens_rejected: (B+1,) integers, where each packed answer starts, and N.
        average: means over live tokens in place of sums, as in some papers; simpo and orpo always do, 2d_dpo never. An
            answer without a live token counts as one token of log-probability 0.
        prob: (B,), the probability that the chosen answer is preferred; for dpo and ipo.
        backend: "eager", "cpu" or "triton"; None chooses by device.
        **knobs: the kind's. Those that are numbers, and ``beta``, may be 0-d tensors: annealing recompiles nothing.

    Returns:
        The loss, 0-d in fp32 (fp64 for fp64 input), the mean over the B pairs; and as 0-d tensors, made without a
        synchronisation: reward_chosen and reward_rejected, the mean implicit rewards β·(π − ref) (β·π for cpo, β times
        the mean for simpo and orpo, the rewards themselves for bradley_terry), accuracy, the share of pairs whose
        chosen answer has the strictly larger one, and margin, the mean difference. No pairs: all 0.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; an unknown kind or knob; a reference that the kind lacks or
            needs.
        BackendError: a backend asked for by name cannot run here.
    """
    given = _knobs(kind, knobs)
    chosen = Answers("chosen", "logp_chosen", logp_chosen, ref_chosen, mask_chosen, cu_seqlens_chosen)
    rejected = Answers("rejected", "logp_rejected", logp_rejected, ref_rejected, mask_rejected, cu_seqlens_rejected)
    checks.same_device("logp_rejected", logp_rejected, logp_chosen, "logp_chosen")
    if rejected.count != chosen.count:
        forgotten = "; packed tokens want their cu_seqlens" if chosen.whole or rejected.whole else ""
        raise ValueError(
            f"logp_rejected: wanted {chosen.count} answers like logp_chosen, got {rejected.count} from the shape "
            f"{checks.shape(logp_rejected)}{forgotten}"
        )
    for name, ref in (("ref_chosen", ref_chosen), ("ref_rejected", ref_rejected)):
        if (ref is None) != (kind in WITHOUT_REFERENCE):
            wanted = "no reference" if kind in WITHOUT_REFERENCE else "the reference's log-probabilities"
            raise ValueError(f"{name}: kind {kind!r} wants {wanted}, got {'None' if ref is None else 'a tensor'}")
    if prob is not None:
        if kind not in _WITH_PROB:
            raise ValueError(f"prob: kind {kind!r} has none; kinds that have: {', '.join(_WITH_PROB)}")
        _check_per_pair("prob", prob, chosen)
        prob = checks.at_every("prob", prob.detach(), lambda p: (p >= 0) & (p <= 1), "probabilities in [0, 1]")
    average = checks.flag("average", average)
    if average and kind == "2d_dpo":
        raise ValueError("average: wanted False for kind '2d_dpo', which weighs the sums of segments; got True")
    checks.in_range("beta", beta, 0.0, strict=kind == "ipo")
    dtype = torch.promote_types(accumulation_dtype(logp_chosen.dtype), accumulation_dtype(logp_rejected.dtype))
    if kind == "2d_dpo":
        return _two_dimensional(chosen, rejected, beta, given, dtype, backend)
    formula, per_pair, numbers = _formula(kind, beta, prob, given, chosen)
    average = average or kind in _AVERAGES
    return run_pairs("preference_loss", formula, chosen, rejected, per_pair, numbers, average, dtype, backend)


def kto_loss(
    logp: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    *,
    beta: Number = 0.1,
    kl: Number | None = None,
    lambda_d: Number = 1.0,
    lambda_u: Number = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""KTO: answers that are desirable or not, without pairs (survey (69)–(74); Ethayarajh et al. 2024, eq. 8).

    .. math::
        L = \frac{1}{B} \sum_i w_i\,(1 - v_i), \quad r = \beta(\pi - \mathrm{ref}), \quad
        v = \sigma(r - z) \text{ if desirable, else } \sigma(z - r), \quad w = \lambda_D \text{ or } \lambda_U

    Args:
        logp: log-probabilities per token (B, T), or of whole answers (B,). Differentiable.
        ref_logp: the reference's, same shape. No gradient.
        desirable: (B,), bool or 0/1 integers.
        beta: β.
        kl: z, β already in it: max(0, the mean over the global batch of β·(π − ref) on mismatched pairs of prompt and
            answer), a number or a 0-d tensor. None: 0. No gradient.
        lambda_d, lambda_u: λ_D, λ_U.
        mask: like ``logp`` (B, T), True for a live token.
        backend: "eager", "cpu" or "triton"; None chooses by device.

    Returns:
        The loss, 0-d, and as 0-d tensors reward_chosen and reward_rejected, the mean rewards r of the desirable and of
        the undesirable answers (0 where there is none), margin, their difference, accuracy, the share of answers with
        v > ½, and weight_ratio, λ_D·n_D/(λ_U·n_U), which should lie in [1, 3/2] (74).

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    answers = Answers("", "logp", logp, ref_logp, mask, None)
    if ref_logp is None:
        raise TypeError("ref_logp: wanted a torch.Tensor, got NoneType")
    wanted = checks.live_mask("desirable", desirable, (answers.count,), logp, "one per answer")
    if wanted is None:
        raise TypeError("desirable: wanted a torch.Tensor, got NoneType")
    z: Number = 0.0 if kl is None else kl.detach() if isinstance(kl, Tensor) else kl
    for name, value in (("beta", beta), ("kl", z), ("lambda_d", lambda_d), ("lambda_u", lambda_u)):
        checks.in_range(name, value, 0.0)
    dtype = accumulation_dtype(logp.dtype)
    labels = wanted.to(dtype)
    numbers = {"beta": beta, "per_pair": 0.0, "kl": z, "lambda_d": lambda_d, "lambda_u": lambda_u}
    return run_pairs("kto_loss", "kto", answers, None, labels, numbers, False, dtype, backend)


def reward_model_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Number | None = None, backend: str | None = None
) -> Tensor:
    """Bradley–Terry loss of a reward model, the mean of −log σ(r_w − r_l − margin) (survey (13), (38)).

    Args:
        chosen, rejected: rewards (B,) of the better and the worse answer. Differentiable.
        margin: by how much r_w should exceed r_l, a number or (B,) (Touvron et al. 2023, eq. 2); None: 0.
        backend: "eager", "cpu" or "triton"; None chooses by device.

    Returns:
        The loss, 0-d in fp32 (fp64 for fp64 input).

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    for name, reward in (("chosen", chosen), ("rejected", rejected)):
        checks.is_float(name, reward)
        if reward.dim() != 1:
            raise ValueError(f"{name}: wanted one reward per answer (B,), got {checks.shape(reward)}")
    checks.has_shape("rejected", rejected, checks.shape(chosen), "chosen")
    return preference_loss(chosen, rejected, kind="bradley_terry", margin=margin, backend=backend)[0]


def ranked_reward_loss(scores: Tensor, ranks: Tensor, prompt_ids: Tensor, *, backend: str | None = None) -> Tensor:
    """Bradley–Terry loss over all pairs of K ranked answers to a prompt (survey (13), (38); Ouyang et al. 2022, eq. 1).

    The mean of −log σ(s_better − s_worse) over the pairs of each prompt, then over the prompts that have a pair. Plain
    PyTorch: each answer beside those that follow it when they are sorted by prompt, as many as the largest prompt has
    answers; on a GPU, where looking at that number would be a synchronisation, as many as there are answers at all.

    Args:
        scores: (B,), the reward model's. Differentiable.
        ranks: (B,) integers, 0 is best; only their order within a prompt counts, equal ranks make no pair.
        prompt_ids: (B,) integers, in any order: which answers belong together.
        backend: "eager" or None: plain PyTorch on every device, whatever ``use_backend`` names.

    Returns:
        The loss, 0-d in fp32 (fp64 for fp64 input); 0 without a pair.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device. BackendError: any other ``backend``.
    """
    checks.is_float("scores", scores)
    if scores.dim() != 1:
        raise ValueError(f"scores: wanted (B,), got {checks.shape(scores)}")
    for name, tensor in (("ranks", ranks), ("prompt_ids", prompt_ids)):
        checks.is_integer(name, tensor)
        checks.has_shape(name, tensor, checks.shape(scores), "scores")
        checks.same_device(name, tensor, scores, "scores")
    dispatch.choose("ranked_reward_loss", scores, backend or "eager")
    count = scores.shape[0]
    if count == 0:
        return scores.to(accumulation_dtype(scores.dtype)).sum()
    order = torch.argsort(prompt_ids, stable=True)
    prompt, rank, score = prompt_ids[order], ranks[order], scores.to(accumulation_dtype(scores.dtype))[order]
    new = torch.nn.functional.pad(prompt[1:] != prompt[:-1], (1, 0))
    group = new.long().cumsum(0)  # 0, 1, 2, ... by prompt
    window = count
    if scores.device.type == "cpu" and not torch.compiler.is_compiling():
        window = int(torch.bincount(group).max())

    def following(x: Tensor) -> Tensor:
        """(B, window): each answer and those behind it; zeros behind the last."""
        return torch.nn.functional.pad(x, (0, window - 1)).unfold(0, window, 1)

    here = torch.arange(count, device=scores.device).unsqueeze(1) + torch.arange(window, device=scores.device)
    same = (following(group) == group.unsqueeze(1)) & (here < count)
    worse, better = (compare(following(rank), rank.unsqueeze(1)) & same for compare in (torch.gt, torch.lt))
    pair = worse | better
    difference = score.unsqueeze(1) - following(score)
    gap = torch.where(worse, difference, torch.where(better, -difference, torch.zeros_like(difference)))
    loss = torch.where(pair, -torch.nn.functional.logsigmoid(gap), 0.0).sum(1)
    pairs = torch.zeros_like(group).index_add(0, group, pair.sum(1))  # of each prompt, in whole numbers
    return (loss / pairs[group].clamp(min=1)).sum() / (pairs > 0).sum().clamp(min=1)


def _knobs(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """The kind's knobs with their defaults, checked as far as Python numbers go."""
    checks.choice("kind", kind, tuple(KINDS))
    defaults = KINDS[kind]
    for name, value in given.items():
        if name not in defaults:
            raise ValueError(f"{name}: not a knob of kind {kind!r}, which has {', '.join(defaults) or 'none'}")
        if value is None and defaults[name] is not None:
            raise ValueError(f"{name}: wanted a number or a 0-d tensor, got None")
    knobs = {**defaults, **given}
    if kind == "cpo":
        checks.choice("nll", knobs["nll"], ("sequence", "token"))
    if kind == "robust":
        checks.in_range("label_smoothing", knobs["label_smoothing"], 0.0, 0.5)
    if kind == "dpo":
        checks.in_range("label_smoothing", knobs["label_smoothing"], 0.0, 1.0)
    return knobs


def _check_per_pair(name: str, tensor: Tensor, chosen: Answers) -> None:
    checks.is_float(name, tensor)
    checks.has_shape(name, tensor, (chosen.count,), "one per pair")
    checks.same_device(name, tensor, chosen.logp, chosen.name)


def _formula(
    kind: str, beta: Number, prob: Tensor | None, knobs: dict[str, Any], chosen: Answers
) -> tuple[str, Tensor | None, dict[str, Number]]:
    """The formula's name, its number per pair, and its parameters in the order of ``pair_formulas``."""
    name, per_pair = kind, prob
    default: Number = 1.0
    values = {n: v for n, v in knobs.items() if n != "nll"}
    if kind == "dpo":
        smoothing = checks.real("label_smoothing", values.pop("label_smoothing"), chosen.logp)
        smooth = isinstance(smoothing, Tensor) or smoothing != 0
        if smooth and prob is not None:
            raise ValueError("label_smoothing, prob: two ways to say how sure a pair is; give one of them")
        if smooth or prob is not None:
            name, default = "dpo_soft", 1.0 - smoothing
    elif kind == "cpo" and knobs["nll"] == "token":
        name = "cpo_token"
    elif kind == "bradley_terry":
        # β has no part in it, and 1 makes its reward the reward itself.
        margin, beta, default = values.pop("margin"), 1.0, 0.0
        if isinstance(margin, Tensor) and margin.dim() > 0:
            _check_per_pair("margin", margin, chosen)
            per_pair = margin
        elif margin is not None:
            default = checks.real("margin", margin, chosen.logp)
    return name, per_pair, {"beta": beta, "per_pair": default, **values}


def _two_dimensional(
    chosen: Answers, rejected: Answers, beta: Number, knobs: dict[str, Any], dtype: torch.dtype, backend: str | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """2d_dpo: every pair of segments is a pair of its own, of weight K where it exists, so that their mean over B·K is
    the sum over k and the mean over B."""
    sums, rewards = [], []
    for side, answers in (("chosen", chosen), ("rejected", rejected)):
        if answers.whole:
            raise ValueError(f"{answers.name}: kind '2d_dpo' wants log-probabilities per token, got {(answers.count,)}")
        logp, ref, mask, offsets = answers.prepared(dtype)
        layout = layout_of(logp, offsets)
        names = f"segments_{side}", f"weights_{side}"
        found, live = segment_sums(logp, ref, mask, layout, *names, *(knobs[name] for name in names))
        sums.append((found, live))
        with torch.no_grad():
            total, _ = reference_preference.answer_sums(logp, ref, mask, layout)
            rewards.append(checks.number("beta", beta, logp).to(dtype) * total)
    (won, live), (lost, other) = sums
    checks.has_shape("segments_rejected", lost, checks.shape(won), "segments_chosen, less the last dimension")
    if not checks.unseen(live) and not torch.equal(live, other):
        pair = int((live != other).any(1).nonzero()[0])
        raise ValueError(
            f"segments_rejected: wanted the segments of segments_chosen, {int(live[pair].sum())} for pair {pair}, "
            f"got {int(other[pair].sum())}"
        )
    both = live & other
    weight = (both.to(dtype) * max(both.shape[1], 1)).flatten()
    sides = [Answers(s, f"logp_{s}", x.flatten(), None, None, None) for s, x in (("chosen", won), ("rejected", lost))]
    numbers: dict[str, Number] = {"beta": beta, "per_pair": 0.0}
    loss, _ = run_pairs("preference_loss", "dpo_weighted", sides[0], sides[1], weight, numbers, False, dtype, backend)
    pairs = max(chosen.count, 1)
    better, worse = rewards
    values = (better, worse, (better > worse).to(dtype), better - worse)
    return loss, {n: v.sum() / pairs for n, v in zip(pair_formulas.METRICS, values, strict=True)}
