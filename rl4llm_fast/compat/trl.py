"""TRL's functions over this library's ops: import them from here, or ``patch()`` TRL.

TRL's trainers (1.16) take their log-probabilities from ``ChunkedLogProbFunction``, straight from hidden states; the
functions of logits serve its experimental trainers and users' own code. ``patch()`` swaps all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, chunked, heads, products, tiles
from ..logprobs import linear_token_logprobs, token_logprobs
from . import patching, rounding
from .patching import Patch, Target
from .rounding import NO_IGNORED_ID

VERSIONS = ("1.16",)


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    r"""``trl.trainer.utils.selective_log_softmax``: :math:`\log\mathrm{softmax}(z/\tau)` at the chosen tokens.

    Args:
        logits: (..., V), any float dtype.
        index: integers, (...) or (..., K).
        temperature: τ > 0.
        row_mask: the shape of ``index``; where it is 0 the result is 0, and no gradient flows.

    Returns:
        The shape of ``index``, in the dtype of TRL's own result: that of the logits, and fp32 where TRL runs its Triton
        kernel (fp32, bf16, fp16 on a GPU, one id a row). In bf16 and fp16 on a CPU the bits are those of
        ``torch.log_softmax``, which TRL returns; the gradient comes from this library's kernel, which keeps no copy
        of the log-probabilities.

    Raises:
        ValueError: temperature <= 0, shapes that do not fit. IndexError: an id out of range, on the CPU.
    """
    return _logp_and_entropy(logits, index, temperature, row_mask, entropy=False)[0]


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """``trl.trainer.utils.entropy_from_logits``: the entropy in nats of every row.

    Args:
        logits: (..., V).
        chunk_size: rows at a time in bf16 and fp16 on a CPU; no other path makes an intermediate that it could bound.

    Returns:
        (...), in the dtype of TRL's own result (see :func:`selective_log_softmax`). Rows with −inf logits have their
        finite entropy, where TRL gives NaN.
    """
    return rounding.entropy(logits, chunk_size).to(_result_dtype(logits))


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``trl.trainer.utils.selective_log_softmax_and_entropy``: both in one pass over the logits.

    Args:
        logits, index, temperature, row_mask: as :func:`selective_log_softmax`.
        entropy_requires_grad: False detaches the entropy.

    Returns:
        The log-probabilities, like ``index``, and the entropy (...) of the distribution at that temperature.
    """
    logp, entropy = _logp_and_entropy(logits, index, temperature, row_mask, entropy=True)
    assert entropy is not None
    return logp, entropy if entropy_requires_grad else entropy.detach()


class ChunkedLogProbFunction:
    """``trl.kernels.ChunkedLogProbFunction``, what TRL's trainers call, over :func:`linear_token_logprobs`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Log-probabilities of ``targets`` from hidden states, and what else ``outputs`` names; None for the rest.

        Args:
            hidden: (N, D). weight: (V, D). bias: (V,) or None. targets: (N,).
            temperature: τ, the divisor of the logits.
            chunk_size: ignored; chunks are of tokens, by :func:`linear_token_logprobs`'s rule.
            final_logit_softcapping: c of c·tanh(z/c), before the temperature.
            logit_scale: multiplies the logits before that.
            outputs: any of "entropy" (differentiable), "log_sum_sq_probs", "mean_logits", "is_top1".

        Returns:
            (log-probabilities, entropy, log Σ p², mean logit, is the target the first maximum), each (N,), fp32.
        """
        if logit_scale <= 0 or hasattr(weight, "ds_id"):
            # Negative scales have no temperature, and DeepSpeed's partitioned weights must be gathered: TRL's own.
            theirs = patching.original("trl", "trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
            options = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
            return theirs.apply(hidden, weight, bias, targets, *options)  # type: ignore[no-any-return]
        if not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        # The scale is a temperature and another cap: s·z/τ = z/(τ/s), c·tanh(s·z/c) = s·(c/s)·tanh(z/(c/s)).
        tau = temperature / logit_scale
        cap = None if final_logit_softcapping is None else final_logit_softcapping / logit_scale
        if any(name in outputs for name in ("log_sum_sq_probs", "mean_logits", "is_top1")):
            logp, entropy, *more = _LogprobsAndMore.apply(  # type: ignore[no-untyped-call]
                hidden, weight, bias, targets, tau, cap, outputs
            )
            return logp, entropy, more[0], more[1], more[2]
        result: Any = linear_token_logprobs(
            hidden,
            weight,
            targets,
            bias,
            temperature=tau,
            softcap=cap,
            ignore_index=NO_IGNORED_ID,
            return_entropy="entropy" in outputs,  # type: ignore[call-overload]
        )
        if "entropy" in outputs:
            return result[0], result[1], None, None, None
        return result, None, None, None, None


class _LogprobsAndMore(torch.autograd.Function):
    """The chunks of linear_token_logprobs, with statistics taken from each chunk's logits while they are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        tau: float,
        cap: float | None,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        compute = heads.product_dtype(compute, hidden)  # like the op, from which a reference's log-probabilities come
        size = tiles.chunk_rule(weight.shape[0], compute, device)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.options = tau, cap, compute, size, "entropy" in outputs
        ctx.set_materialize_grads(False)
        rows, w = [], weight.to(compute)
        for part in _parts(hidden, targets, size):
            logits = _logits(hidden[part], w, bias, compute)
            logp, entropy = _chunk_logprobs(logits, targets[part], tau, cap, "entropy" in outputs)
            rows.append((logp, entropy, *_statistics(logits, targets[part], tau, cap, outputs)))
        columns = [None if column[0] is None else torch.cat(column) for column in zip(*rows, strict=True)]
        ctx.mark_non_differentiable(*(column for column in columns[2:] if column is not None))
        return tuple(columns)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> Any:
        hidden, weight, bias, targets = ctx.saved_tensors
        tau, cap, compute, size, with_entropy = ctx.options
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        given = [(i, g) for i, g in enumerate((grad_logp, grad_entropy)) if g is not None]
        if not given:
            return (None,) * 7
        wide = torch.float64 if compute == torch.float64 else torch.float32
        parts = _parts(hidden, targets, size)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = products.WeightGradient(weight, weight.dtype, len(parts), wide) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
        w = weight.detach().to(compute)
        for part in parts:
            with torch.enable_grad():
                logits = _logits(hidden[part].detach(), w, bias, compute).detach().requires_grad_()
                both = _chunk_logprobs(logits, targets[part], tau, cap, with_entropy)
            results = [r for i, _ in given if (r := both[i]) is not None]
            (dz,) = torch.autograd.grad(results, logits, [g[part] for _, g in given])
            if grad_hidden is not None:
                grad_hidden[part] = torch.mm(dz, w)
            if grad_weight is not None:
                grad_weight.add(dz, hidden[part].to(compute))
            if grad_bias is not None:
                grad_bias += dz.sum(0, dtype=wide)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.result(),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 4,
        )


def _parts(hidden: Tensor, targets: Tensor, size: int) -> list[slice]:
    """The chunks of the op, for a product's bits depend on its rows; at least one, an empty one."""
    rows = chunked.Rows(hidden, targets, None, hidden.new_empty(()))
    return [part for part, _ in chunked.chunks_of(rows, size)] or [slice(0, 0)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> Tensor:
    x = hidden.to(compute)
    with torch.autocast(x.device.type, enabled=False):  # which would make 16 bits of fp32 factors again
        return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias.to(compute), x, weight.t())


def _chunk_logprobs(
    logits: Tensor, ids: Tensor, tau: float, cap: float | None, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    if entropy:
        return token_logprobs(
            logits, ids, temperature=tau, softcap=cap, ignore_index=NO_IGNORED_ID, return_entropy=True
        )
    return token_logprobs(logits, ids, temperature=tau, softcap=cap, ignore_index=NO_IGNORED_ID), None


def _statistics(
    logits: Tensor, ids: Tensor, tau: float, cap: float | None, outputs: tuple[str, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(log Σ p², mean logit, is the target the first maximum) of a chunk."""
    squares = mean = None
    if "log_sum_sq_probs" in outputs or "mean_logits" in outputs:
        u = logits.float() if cap is None else cap * torch.tanh(logits.float() / cap)
        mean = u.mean(-1) / tau if "mean_logits" in outputs else None
        if "log_sum_sq_probs" in outputs:
            u = u / tau
            squares = torch.logsumexp(2 * u, -1) - 2 * torch.logsumexp(u, -1)
    # The cap and the temperature keep the order of the logits, and argmax gives the first maximum.
    return squares, mean, logits.argmax(-1) == ids if "is_top1" in outputs else None


def _result_dtype(logits: Tensor, index: Tensor | None = None, row_mask: Tensor | None = None) -> torch.dtype:
    """fp32 where TRL would run its own Triton kernel, else the dtype of the logits."""
    one_id = index is None or index.shape == logits.shape[:-1]
    masks = row_mask is None or row_mask.dtype in (torch.bool, torch.int32, torch.int64)
    halves = logits.dtype in (torch.bfloat16, torch.float16)
    kernel = logits.device.type != "cpu" and logits.dim() <= 3 and logits.stride(-1) == 1 and one_id and masks
    return torch.float32 if kernel and halves else logits.dtype


def _logp_and_entropy(
    logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    checks.are_tensors(logits=logits, index=index)
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if row_mask is not None and row_mask.shape != index.shape:
        raise ValueError(f"row_mask: wanted the shape {tuple(index.shape)} of index, got {tuple(row_mask.shape)}")
    several = index.dim() == logits.dim()
    live = None if row_mask is None else row_mask != 0
    mask = live.any(-1) if live is not None and several else live
    logp, uncertainty = rounding.logprobs_and_entropy(logits, index, temperature, mask, entropy, name="index")
    dtype = _result_dtype(logits, index, row_mask)
    logp = logp.to(dtype)
    if several and live is not None:
        logp = logp.masked_fill(~live, 0.0)
    return logp, None if uncertainty is None else uncertainty.to(dtype)


_UTILS = "trl.trainer.utils"
TARGETS = (
    Target(_UTILS, "selective_log_softmax", selective_log_softmax),
    Target(_UTILS, "entropy_from_logits", entropy_from_logits),
    Target(_UTILS, "selective_log_softmax_and_entropy", selective_log_softmax_and_entropy),
    Target("trl.kernels.chunked_logprob", "ChunkedLogProbFunction", ChunkedLogProbFunction),
)


def patch(force: bool = False) -> Patch:
    """Swap this module's functions inside the installed TRL, wherever it has bound them.

    Args:
        force: try a version of TRL that this library does not know.

    Returns:
        What was swapped and what was not, and why; ``with patch(): ...`` undoes it at the end of the block.

    Raises:
        ImportError: TRL is not installed, or of an unknown version.
        RuntimeError: it is patched already.
    """
    return patching.patch("trl", VERSIONS, TARGETS, force=force)


def unpatch() -> None:
    """Undo :func:`patch`; without one, do nothing."""
    patching.unpatch("trl")
