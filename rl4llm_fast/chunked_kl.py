"""The exact KL from two pairs of hidden states and heads, a chunk of tokens at a time (see chunked.py)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import fakes, schemas
from .products import Gradients, Projection, cast, large_empty, scatter


class _Head(NamedTuple):
    """One of the two sides: hidden states (N, D) and what turns them into logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def to(self, dtype: torch.dtype) -> _Head:
        return _Head(*cast(dtype, *self))  # type: ignore[arg-type]

    def select(self, mask: Tensor | None, index: Tensor | None) -> _Head:
        """Drop rows (CPU), or zero those that are not live: 0·NaN must not reach dW."""
        if index is not None:
            return self._replace(hidden=self.hidden[index])
        return self if mask is None else self._replace(hidden=self.hidden.masked_fill(~mask.unsqueeze(-1), 0))


def _live_index(mask: Tensor | None) -> Tensor | None:
    """The rows to work on, where finding them costs no synchronisation; None: all."""
    if mask is None or mask.device.type != "cpu" or bool(mask.all()):
        return None
    return mask.nonzero().squeeze(-1)


class _Problem:
    """Both heads in their compute dtype with the rows that are left, and the per-row arguments of a chunk."""

    def __init__(
        self,
        policy: _Head,
        ref: _Head,
        mask: Tensor | None,
        temperature: Tensor,
        compute_dtype: torch.dtype,
        ref_compute_dtype: torch.dtype,
        logits_dtype: torch.dtype | None,
        chunk_tokens: int,
    ) -> None:
        self.index = _live_index(mask)
        self.policy = policy.select(mask, self.index).to(compute_dtype)
        self.ref = ref.select(mask, self.index).to(ref_compute_dtype)
        self.mask = None if self.index is not None or mask is None or mask.device.type == "cpu" else mask
        self.temperature = temperature[self.index] if self.index is not None and temperature.dim() else temperature
        self.count = self.policy.hidden.shape[0]
        rows, vocabulary = min(chunk_tokens, self.count), policy.weight.shape[0]
        self.projections, self.workspaces = [], []
        for head in (self.policy, self.ref):
            dtype = logits_dtype or head.hidden.dtype
            self.projections.append(Projection(head.weight, head.bias, dtype))
            self.workspaces.append(large_empty(head.hidden, (rows, vocabulary), dtype))
        self.chunks = [slice(start, start + chunk_tokens) for start in range(0, self.count, chunk_tokens)]

    def per_row(self, part: slice) -> tuple[Tensor | None, Tensor]:
        tau = self.temperature[part] if self.temperature.dim() else self.temperature
        return None if self.mask is None else self.mask[part], tau

    def logits(self, part: slice) -> tuple[Tensor, Tensor]:
        both = zip((self.policy, self.ref), self.projections, self.workspaces, strict=True)
        policy, ref = (project(head.hidden[part], out[: head.hidden[part].shape[0]]) for head, project, out in both)
        return policy, ref


def _forward(
    kernels: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    direction: str,
    beta: Tensor,
    compute_dtype: torch.dtype,
    ref_compute_dtype: torch.dtype,
    logits_dtype: torch.dtype | None,
    chunk_tokens: int,
) -> tuple[Tensor, ...]:
    heads = _Head(hidden, weight, bias), _Head(ref_hidden, ref_weight, ref_bias)
    problem = _Problem(*heads, mask, temperature, compute_dtype, ref_compute_dtype, logits_dtype, chunk_tokens)
    acc = schemas.wider_accumulation(compute_dtype, ref_compute_dtype)
    outputs = fakes.kl_divergence_results(hidden, problem.count, acc)
    for part in problem.chunks:
        logits, ref_logits = problem.logits(part)
        live, tau = problem.per_row(part)
        pieces = kernels.kl_divergence_fwd(
            logits.unsqueeze(0), ref_logits.unsqueeze(0), live, tau, softcap, direction, beta
        )
        for whole, piece in zip(outputs, pieces, strict=True):
            whole[part] = piece
    return tuple(scatter(whole, problem.index, hidden.shape[0]) for whole in outputs)


def _backward(
    kernels: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor,
    softcap: Tensor | None,
    direction: str,
    beta: Tensor,
    inner: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    ref_row_max: Tensor,
    ref_log_sum: Tensor,
    grad: Tensor,
    compute_dtype: torch.dtype,
    ref_compute_dtype: torch.dtype,
    logits_dtype: torch.dtype | None,
    grad_weight_dtype: torch.dtype | None,
    chunk_tokens: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = _Head(hidden, weight, bias), _Head(ref_hidden, ref_weight, ref_bias)
    problem = _Problem(*heads, mask, temperature, compute_dtype, ref_compute_dtype, logits_dtype, chunk_tokens)
    saved = [
        t if problem.index is None else t[problem.index]
        for t in (inner, row_max, log_sum, ref_row_max, ref_log_sum, grad)
    ]
    policy = problem.policy
    dtypes, needs = (weight.dtype, grad_weight_dtype), (need_hidden, need_weight, need_bias)
    gradients = Gradients(policy.hidden, policy.weight, bias, *dtypes, len(problem.chunks), *needs)
    for part in problem.chunks:
        logits, ref_logits = problem.logits(part)
        live, tau = problem.per_row(part)
        kernels.kl_divergence_bwd_(
            logits.unsqueeze(0), ref_logits.unsqueeze(0), live, tau, softcap, direction, beta, *(t[part] for t in saved)
        )  # the logits are now dlogits
        gradients.add(part, logits)
    return gradients.result(problem.index, hidden)


def register(library: torch.library.Library, namespace: str) -> None:
    """Implement linear_kl_divergence of one namespace by chunks over that namespace's own streaming kernels."""
    kernels = getattr(torch.ops, namespace)

    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _forward(kernels, *args)

    def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(kernels, *args)

    for key in ("CPU", "CUDA"):
        library.impl("linear_kl_divergence_fwd", forward, key)
        library.impl("linear_kl_divergence_bwd", backward, key)
