"""verl's functions over this library's ops: import them from here, or ``patch()`` verl.

``register()`` adds this library's policy losses to verl's registry under names of their own; ``patch()`` also puts
them in the place of verl's losses of the same kind.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..advantages import group_advantages
from ..kl import kl_estimate
from ..logprobs import belongs_to_a_leaf, linear_token_logprobs, token_entropy, token_logprobs
from ..returns import gae
from . import patching, rounding
from .patching import Patch, Target
from .verl_losses import POLICY_LOSSES
from .verl_losses import compute_policy_loss_cispo as compute_policy_loss_cispo
from .verl_losses import compute_policy_loss_gpg as compute_policy_loss_gpg
from .verl_losses import compute_policy_loss_gspo as compute_policy_loss_gspo
from .verl_losses import compute_policy_loss_sapo as compute_policy_loss_sapo
from .verl_losses import compute_policy_loss_vanilla as compute_policy_loss_vanilla
from .verl_losses import compute_value_loss as compute_value_loss

VERSIONS = ("0.9",)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """``verl.utils.torch_functional.logprobs_from_logits``: log-probabilities of the labels.

    Args:
        logits: (..., V). labels: integers (...).
        inplace_backward: on a GPU, as with flash-attn's kernel, the gradient is written over the logits, unless they
            are a leaf or a view of one; another consumer of the logits then raises in its backward instead of
            computing nonsense.

    Returns:
        (...): on a CPU in the dtype of the logits, with ``torch.log_softmax``'s bits in bf16 and fp16; on a GPU in
        fp32, and 0 with no gradient where the label is −100, both as flash-attn's kernel does.
    """
    checks.are_tensors(logits=logits, labels=labels)
    if logits.device.type == "cpu":
        return rounding.logprobs_and_entropy(logits, labels, 1.0, None, False, name="labels")[0]
    in_place = inplace_backward and not belongs_to_a_leaf(logits)
    return token_logprobs(logits, labels, inplace_backward=in_place)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """``verl.utils.torch_functional.entropy_from_logits``: (...), in the dtype of the logits (..., V)."""
    checks.is_tensor("logits", logits)
    return token_entropy(logits).to(logits.dtype)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """``verl.utils.torch_functional.entropy_from_logits_with_chunking``: in fp32; ``chunk_size`` bounds nothing."""
    return token_entropy(logits).float()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``, on any device and for any hidden size.

    Args:
        hidden: (..., D). weight: (V, D). labels: integers (...).
        temperature: τ > 0, the divisor of the logits.
        reduction: "none", "sum" or "mean", of the log-probabilities.
        dist_process_group: ``weight`` is this rank's slice of the vocabulary, in rank order; ``labels`` are global.

    Returns:
        (log-probabilities (N,), or their sum or mean, entropy (N,)) with N the tokens of ``hidden``; fp32.
    """
    checks.are_tensors(hidden=hidden, weight=weight, labels=labels)
    reduction = reduction.lower()
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction: wanted 'none', 'sum' or 'mean', got {reduction!r}")
    logp, entropy = linear_token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        ignore_index=rounding.NO_IGNORED_ID,
        return_entropy=True,
        tp_group=dist_process_group,
    )
    reduced = logp if reduction == "none" else logp.sum() if reduction == "sum" else logp.mean()
    return reduced.float(), entropy.float()


@torch.no_grad()
def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """``verl.trainer.ppo.core_algos.compute_gae_advantage_return``: GAE, whitened over the live tokens.

    Args:
        token_level_rewards, values: (B, T). gamma, lam: γ and λ.
        response_mask: (B, T), 0 or 1 of any dtype. Tokens with 0 are skipped.

    Returns:
        (whitened advantages, returns), (B, T) each. A token that is not live carries the advantage of the next live one
        (0 after the last), whitened like the others, and that plus its own value as its return.

    Raises:
        ValueError: fewer than two live tokens, on a CPU; on a GPU, without a synchronisation, NaN.
    """
    checks.are_tensors(token_level_rewards=token_level_rewards, values=values, response_mask=response_mask)
    dtype = torch.promote_types(token_level_rewards.dtype, values.dtype)
    live = response_mask != 0
    at_live, _ = gae(token_level_rewards.to(dtype), values.to(dtype), gamma=gamma, lam=lam, mask=live)
    length = values.shape[-1]
    position = torch.where(live, torch.arange(length, device=live.device), length)
    following = position.flip(-1).cummin(-1).values.flip(-1)  # the next live token, or T
    advantages = torch.nn.functional.pad(at_live, (0, 1)).gather(-1, following)
    returns = advantages + values

    count = live.sum()
    if count.device.type == "cpu" and count < 2:
        raise ValueError(f"response_mask: wanted at least two live tokens to whiten over, got {int(count)}")
    mean = at_live.sum() / count  # zero where not live
    centred = advantages - mean
    variance = torch.where(live, centred, 0.0).square().sum() / (count - 1)
    whitened = centred * torch.rsqrt(variance + 1e-8)
    dtype = torch.promote_types(dtype, response_mask.dtype) if response_mask.is_floating_point() else dtype
    return whitened.to(dtype), returns.to(dtype)


@torch.no_grad()
def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """``verl.trainer.ppo.core_algos.compute_grpo_outcome_advantage``: the sum of a row's rewards against its group's.

    Args:
        token_level_rewards, response_mask: (B, T).
        index: B hashable values (verl's are strings in a numpy array): equal ones form a group.
        epsilon: ε, added to the standard deviation.
        norm_adv_by_std_in_grpo: False divides by nothing (Dr.GRPO).
        config: ignored, as verl does.

    Returns:
        The same tensor twice, (B, T): (R − mean)/(std + ε) at live tokens, 0 elsewhere. A group of one has mean 0 and
        standard deviation 1; equal rewards give exactly 0.
    """
    checks.are_tensors(token_level_rewards=token_level_rewards, response_mask=response_mask)
    scores = token_level_rewards.sum(dim=-1)
    numbers: dict[Any, int] = {}
    ids = [numbers.setdefault(value, len(numbers)) for value in (index.tolist() if hasattr(index, "tolist") else index)]
    if len(ids) != scores.shape[0]:
        raise ValueError(f"index: wanted one value for each of the {scores.shape[0]} answers, got {len(ids)}")
    sizes = [0] * len(numbers)
    for i in ids:
        sizes[i] += 1
    advantages = group_advantages(
        scores,
        group_ids=torch.tensor(ids, dtype=torch.long, device=scores.device),
        scale="group" if norm_adv_by_std_in_grpo else None,
        eps=epsilon,
    )
    alone = torch.tensor([sizes[i] == 1 for i in ids], dtype=torch.bool, device=scores.device)
    by_itself = scores.to(advantages.dtype) / ((1.0 + epsilon) if norm_adv_by_std_in_grpo else 1.0)
    spread = torch.where(alone, by_itself, advantages).to(scores.dtype).unsqueeze(-1) * response_mask
    return spread, spread


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """``verl.trainer.ppo.core_algos.agg_loss``: a matrix of losses to one, differentiable.

    Args:
        loss_mat, loss_mask: (B, T). What stands where the mask is 0, NaN included, changes nothing.
        loss_agg_mode: "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm" or
            "seq-mean-token-mean".
        dp_size: multiplies the loss; more than 1 needs the global count of the mode.
        batch_num_tokens: tokens of the global batch; None: of this one.
        global_batch_size: sequences of the global batch; None: those of this one with a live token.
        loss_scale_factor: the divisor of "…-norm"; None: T.

    Returns:
        0-d. NaN where a count of this batch is wanted and is 0.
    """
    checks.are_tensors(loss_mat=loss_mat, loss_mask=loss_mask)
    losses = torch.where(loss_mask != 0, loss_mat, 0.0)
    if loss_mask.is_floating_point():
        losses = losses * loss_mask
    if loss_agg_mode == "token-sum":
        return losses.sum() * dp_size
    if loss_agg_mode == "token-mean":
        if batch_num_tokens is None and dp_size > 1:
            raise ValueError(f"batch_num_tokens: wanted the global count with dp_size={dp_size}, got None")
        return losses.sum() / (loss_mask.sum() if batch_num_tokens is None else batch_num_tokens) * dp_size
    if loss_agg_mode not in ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        raise ValueError(f"Invalid loss_agg_mode: {loss_agg_mode}")
    if global_batch_size is None and dp_size > 1:
        raise ValueError(f"global_batch_size: wanted the global count with dp_size={dp_size}, got None")
    tokens = loss_mask.sum(dim=-1)
    per_sequence = losses.sum(dim=-1)
    if loss_agg_mode == "seq-mean-token-mean":
        per_sequence = per_sequence / (tokens + 1e-8)
    loss = per_sequence.sum() / ((tokens > 0).sum() if global_batch_size is None else global_batch_size) * dp_size
    if loss_agg_mode == "seq-mean-token-sum-norm":
        loss = loss / (loss_mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return loss


_ESTIMATORS = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """``verl.trainer.ppo.core_algos.kl_penalty``: an estimate of the KL for every token.

    Args:
        logprob, ref_logprob: one shape; no gradient to the latter.
        kl_penalty: "kl" or "k1", "abs", "mse" or "k2", "low_var_kl" or "k3" (clamped); "+" behind the name keeps the
            value and takes the gradient of k2.

    Returns:
        Their shape and common dtype.
    """
    checks.are_tensors(logprob=logprob, ref_logprob=ref_logprob)
    name = kl_penalty.removesuffix("+")
    if name not in _ESTIMATORS:
        raise NotImplementedError(f"kl_penalty: wanted one of {', '.join(_ESTIMATORS)}, got {kl_penalty!r}")
    estimator: Any = _ESTIMATORS[name]
    kl = kl_estimate(
        logprob,
        ref_logprob.detach(),
        estimator,
        gradient="straight_through" if kl_penalty.endswith("+") else "value",
        clamp=estimator == "k3",
    )
    return kl.to(torch.promote_types(logprob.dtype, ref_logprob.dtype))


_CORE, _TORCH = "verl.trainer.ppo.core_algos", "verl.utils.torch_functional"
TARGETS = (
    Target(_TORCH, "logprobs_from_logits", logprobs_from_logits),
    Target(_TORCH, "entropy_from_logits", entropy_from_logits),
    Target(_TORCH, "entropy_from_logits_with_chunking", entropy_from_logits_with_chunking),
    Target(
        "verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", linear_cross_entropy, same_signature=False
    ),
    Target(_CORE, "compute_gae_advantage_return", compute_gae_advantage_return),
    Target(_CORE, "compute_grpo_outcome_advantage", compute_grpo_outcome_advantage),
    Target(_CORE, "agg_loss", agg_loss),
    Target(_CORE, "kl_penalty", kl_penalty),
    Target(_CORE, "compute_value_loss", compute_value_loss),
    *(Target(_CORE, f"compute_policy_loss_{name}", loss) for name, loss in POLICY_LOSSES.items()),
)


def patch(force: bool = False) -> Patch:
    """Swap this module's functions, losses included, inside the installed verl; see ``compat.trl.patch``."""
    return patching.patch("verl", VERSIONS, TARGETS, force=force)


def unpatch() -> None:
    """Undo :func:`patch`; without one, do nothing."""
    patching.unpatch("verl")


def register(prefix: str = "rl4llm_fast_", force: bool = False) -> list[str]:
    """Register the policy losses with verl: ``policy_loss.loss_mode=rl4llm_fast_vanilla`` in its configuration.

    Args:
        prefix: goes before verl's own names: vanilla, gspo, sapo, cispo, gpg.
        force: try a version of verl that this library does not know.

    Returns:
        The names registered. Doing it again replaces them.

    Raises:
        ImportError: verl is not installed, or of an unknown version.
    """
    patching.installed("verl", VERSIONS, force=force)
    register_policy_loss = importlib.import_module(_CORE).register_policy_loss
    for name, loss in POLICY_LOSSES.items():
        register_policy_loss(prefix + name)(loss)
    return [prefix + name for name in POLICY_LOSSES]
