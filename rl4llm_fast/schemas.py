"""Every op of the library, once: its schema and its fake (the shape function, in fakes.py).

The same table is registered under two namespaces, so that a user and Dynamo see ordinary torch ops:

- ``torch.ops.rl4llm_fast.*``         compiled: C++ for CPU tensors, CUDA C++ for CUDA tensors (``csrc/``)
- ``torch.ops.rl4llm_fast_triton.*``  Triton kernels (``kernels/``)

Conventions, so that kernels need no shape logic of their own:

- Rows come as ``(B, T, V)`` with ``stride(2) == 1`` and any other strides; per-row data is contiguous ``(N,)``,
  N = B*T.
- A hyperparameter is a 0-d tensor, never a float argument (a float recompiles per value under torch.compile):
  fp64 on the CPU when it came as a number (captured by CUDA graphs as it stands), or on the op's device when the
  user gave a tensor (read when the kernel runs).
- Sums are made in the accumulation dtype: fp64 for fp64 input, fp32 for everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import fakes
from .fakes import accumulation_dtype, wider_accumulation

__all__ = ["NAMESPACE", "OPS", "TRITON_NAMESPACE", "Op", "accumulation_dtype", "wider_accumulation"]

NAMESPACE = "rl4llm_fast"
TRITON_NAMESPACE = "rl4llm_fast_triton"


@dataclass(frozen=True)
class Op:
    """A schema without its name, and the function that gives the outputs' shapes."""

    schema: str
    fake: Callable[..., Any]
    no_double_backward: bool = False  # a backward op: differentiating it again must raise, not be silently wrong


_TOKEN_LOGPROBS_BWD = (
    "Tensor token_ids, Tensor? mask, Tensor temperature, Tensor? softcap, int ignore_index, "
    "Tensor row_max, Tensor log_sum, Tensor? entropy, Tensor? grad_logp, Tensor? grad_entropy)"
)

_KL_DIVERGENCE_BWD = (
    "Tensor ref_logits, Tensor? mask, Tensor temperature, Tensor? softcap, str direction, Tensor beta, Tensor inner, "
    "Tensor row_max, Tensor log_sum, Tensor ref_row_max, Tensor ref_log_sum, Tensor grad)"
)

OPS: dict[str, Op] = {
    # logits (B, T, V); token_ids (N,) or (N, K) int64; mask (N,) bool; temperature 0-d or (N,); softcap 0-d.
    # -> logp like token_ids, entropy (N,) or (0,), row_max (N,) = max of the softcapped logits (before the
    #    temperature), log_sum (N,) = log Σ exp((z' - row_max)/τ); all in the accumulation dtype.
    "token_logprobs_fwd": Op(
        "(Tensor logits, Tensor token_ids, Tensor? mask, Tensor temperature, Tensor? softcap, int ignore_index, "
        "bool return_entropy) -> (Tensor, Tensor, Tensor, Tensor)",
        fakes.token_logprobs_fwd,
    ),
    # entropy is the forward's (needed with grad_entropy); -> dlogits (B, T, V), contiguous, in the logits' dtype.
    "token_logprobs_bwd": Op(f"(Tensor logits, {_TOKEN_LOGPROBS_BWD} -> Tensor", fakes.token_logprobs_bwd, True),
    # The same, written over the logits; the mutation in the schema makes every later use of them an error.
    "token_logprobs_bwd_": Op(f"(Tensor(a!) logits, {_TOKEN_LOGPROBS_BWD} -> ()", fakes.token_logprobs_bwd_, True),
    # hidden (N, D), weight (V, D), bias (V,); the rest as above. Products run in compute_dtype, chunk_tokens rows at a
    # time; their logits are kept in logits_dtype (None: the same), dW is added up in grad_weight_dtype (None: the
    # accumulation dtype); chunk_tokens 0: by the rule of tiles.py. -> logp, entropy, row_max, log_sum as above; with
    # keep_logits also the workspace, in which the last tile's logits lie, and, where tiles.has_room, memory for dW
    # (V, D), in which more of them do
    "linear_token_logprobs_fwd": Op(
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? mask, Tensor temperature, "
        "Tensor? softcap, int ignore_index, bool return_entropy, ScalarType compute_dtype, ScalarType? logits_dtype, "
        "int chunk_tokens, bool keep_logits, bool need_weight, str group) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        fakes.linear_token_logprobs_fwd,
    ),
    # With a process group by its name the weight is this rank's slice, token_ids are those of vocab_parallel_ids, and
    # the results are those of the whole vocabulary; "" for none, and then only keep_logits.
    # kept_logits are overwritten, and weight_room with dW, which is then not among the results. -> dhidden, dweight,
    # dbias; (0,) for what is not needed
    "linear_token_logprobs_bwd": Op(
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? mask, Tensor temperature, "
        "Tensor? softcap, int ignore_index, Tensor row_max, Tensor log_sum, Tensor? entropy, Tensor? grad_logp, "
        "Tensor? grad_entropy, Tensor(a!)? kept_logits, Tensor(b!)? weight_room, ScalarType compute_dtype, "
        "ScalarType? logits_dtype, ScalarType? grad_weight_dtype, int chunk_tokens, bool need_hidden, "
        "bool need_weight, bool need_bias, str group) -> (Tensor, Tensor, Tensor)",
        fakes.linear_token_logprobs_bwd,
        True,
    ),
    # Ids of the whole vocabulary, (N,) or (N, K), as ids of this rank's slice and its phantom (vocab_parallel.py);
    # ignore_index becomes ``ignored``. Collective over the group.
    "vocab_parallel_ids": Op(
        "(Tensor token_ids, Tensor? mask, Tensor weight, int ignore_index, int ignored, str group) -> Tensor",
        fakes.vocab_parallel_ids,
    ),
    # hidden, weight, bias as above; every other tensor per token (N,): token_ids int64, -100 for a token that is not
    # live; token_weights w_t; omega, params, formula, kl, correction as in policy_loss_fwd, of the loss Σ w_t ℓ_t.
    # -> logp (N,), entropy (N,) or (0,), dhidden, dweight, dbias; (0,) for what is not needed
    "linear_policy_loss_fwd": Op(
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? mask, Tensor temperature, "
        "Tensor? softcap, Tensor? old, Tensor advantages, Tensor? ref, Tensor? omega, Tensor token_weights, "
        "Tensor params, str formula, str kl, str correction, bool with_entropy, "
        "ScalarType compute_dtype, ScalarType? logits_dtype, ScalarType? grad_weight_dtype, int chunk_tokens, "
        "bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        fakes.linear_policy_loss_fwd,
    ),
    # grad 0-d; gradient of the loss towards factor -> grad·gradient. The factor is not read: it is there so that
    # differentiating again raises.
    "scaled_gradient": Op("(Tensor grad, Tensor factor, Tensor gradient) -> Tensor", fakes.scaled_gradient, True),
    # The same over the gradient's own storage, for a backward that is the last to read it.
    "scale_gradient_": Op("(Tensor(a!) gradient, Tensor grad) -> ()", fakes.scale_gradient_),
    # Memory without contents on like's device; on the CPU from the blocks that large results are kept in.
    "kept_empty": Op("(Tensor like, int[] shape, ScalarType dtype) -> Tensor", fakes.kept_empty),
    # logits, ref_logits (B, T, V) of possibly different dtypes; mask (N,); temperature 0-d or (N,); softcap, beta 0-d;
    # direction "reverse"|"forward"|"jsd". -> kl (N,); inner (N, 2) fp64: what the backend's own gradient subtracts,
    # whatever that is, and what it multiplies the JSD's mixture by; then row_max and log_sum (N,) of both sides as in
    # token_logprobs_fwd, but in the reverse direction the reference's may count from its logit at the policy's
    # likeliest token.
    "kl_divergence_fwd": Op(
        "(Tensor logits, Tensor ref_logits, Tensor? mask, Tensor temperature, Tensor? softcap, str direction, "
        "Tensor beta) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        fakes.kl_divergence_fwd,
    ),
    # grad (N,) -> dlogits (B, T, V), contiguous, in the logits' dtype; ref_logits get none.
    "kl_divergence_bwd": Op(f"(Tensor logits, {_KL_DIVERGENCE_BWD} -> Tensor", fakes.kl_divergence_bwd, True),
    "kl_divergence_bwd_": Op(f"(Tensor(a!) logits, {_KL_DIVERGENCE_BWD} -> ()", fakes.kl_divergence_bwd_, True),
    # The same from hidden states (N, D), (N, D') and heads (V, D), (V, D'), as in linear_token_logprobs_fwd and _bwd.
    "linear_kl_divergence_fwd": Op(
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, "
        "Tensor? mask, Tensor temperature, Tensor? softcap, str direction, Tensor beta, ScalarType compute_dtype, "
        "ScalarType ref_compute_dtype, ScalarType? logits_dtype, int chunk_tokens) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        fakes.linear_kl_divergence_fwd,
    ),
    "linear_kl_divergence_bwd": Op(
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, "
        "Tensor? mask, Tensor temperature, Tensor? softcap, str direction, Tensor beta, Tensor inner, Tensor row_max, "
        "Tensor log_sum, Tensor ref_row_max, Tensor ref_log_sum, Tensor grad, ScalarType compute_dtype, "
        "ScalarType ref_compute_dtype, ScalarType? logits_dtype, ScalarType? grad_weight_dtype, int chunk_tokens, "
        "bool need_hidden, bool need_weight, bool need_bias) "
        "-> (Tensor, Tensor, Tensor)",
        fakes.linear_kl_divergence_bwd,
        True,
    ),
    # rewards (B,); group_ids (B,) int64 or None (then consecutive groups of group_size); scale "group"|"batch"|"none";
    # baseline "mean"|"leave_one_out" -> advantages (B,)
    "group_advantages": Op(
        "(Tensor rewards, Tensor? group_ids, int group_size, str scale, str baseline, bool unbiased, Tensor eps)"
        " -> Tensor",
        fakes.group_advantages,
    ),
    # Returns. tokens: (B, T) with any strides, or packed (N,) with cu_seqlens (B+1,) int64 in [0, N] (on the CPU int32
    # too, and looked at); all of one float dtype. mask like the tokens, bool; bootstrap (B,); gamma, lam, beta 0-d.
    # mask_mode "skip"|"zero". Every token gets its result, 0 where it is not live; contiguous, in the accumulation
    # dtype.
    # values None: 0. With kl, rewards are scores like kl, or (B,) for the last live token of each sequence, less β·kl.
    # -> advantages, (0,) unless wanted; returns
    "gae_fwd": Op(
        "(Tensor rewards, Tensor? values, Tensor? mask, Tensor? cu_seqlens, Tensor? bootstrap, Tensor? kl, "
        "Tensor gamma, Tensor lam, Tensor beta, str mask_mode, bool advantages) -> (Tensor, Tensor)",
        fakes.gae_fwd,
    ),
    # grads contiguous, in the accumulation dtype -> drewards, dvalues, dbootstrap (B,)
    "gae_bwd": Op(
        "(Tensor? grad_advantages, Tensor? grad_returns, Tensor? mask, Tensor? cu_seqlens, Tensor gamma, Tensor lam, "
        "str mask_mode) -> (Tensor, Tensor, Tensor)",
        fakes.gae_bwd,
        True,
    ),
    # -> advantages, value targets
    "vtrace": Op(
        "(Tensor logp, Tensor rollout_logp, Tensor rewards, Tensor values, Tensor? mask, Tensor? cu_seqlens, "
        "Tensor? bootstrap, Tensor gamma, Tensor lam, Tensor rho_max, Tensor c_max, str mask_mode) -> (Tensor, Tensor)",
        fakes.vtrace,
    ),
    "n_step_returns": Op(
        "(Tensor rewards, Tensor values, Tensor? mask, Tensor? cu_seqlens, Tensor? bootstrap, int n, Tensor gamma, "
        "str mask_mode) -> Tensor",
        fakes.n_step_returns,
    ),
    # step_rewards (B, K); step_ends (B, K) int64, -1 where there is no step; groups as above -> advantages (B, length)
    "process_advantages": Op(
        "(Tensor step_rewards, Tensor step_ends, Tensor? group_ids, int group_size, int length, Tensor eps) -> Tensor",
        fakes.process_advantages,
    ),
    # x, mask alike, contiguous -> (3,) fp64: the number of live tokens, their mean, Σ (x − mean)²
    "whiten_stats": Op("(Tensor x, Tensor? mask, Tensor? minus=None) -> Tensor", fakes.whiten_stats),
    # stats as above, perhaps of several ranks
    "whiten_apply": Op(
        "(Tensor x, Tensor? mask, Tensor stats, Tensor eps, bool shift_mean) -> Tensor", fakes.whiten_apply
    ),
    # logp, old, ref, entropy, policy_weights, token_weights (B, T); advantages, log_s (B, T) or (B, 1); mask (B, T)
    # bool; all contiguous, in the accumulation dtype, or on a GPU in fp32, bf16, fp16. policy_weights are ω, or with a
    # correction (one of formulas.CORRECTIONS, else "") the sampler's log-probabilities, from which ω is made. params
    # (len(formulas.PARAMS) + MAX_KNOBS,) fp64, on the CPU or on the op's device. formula: a name of formulas.FORMULAS,
    # or the op_name of a registered one; kl: one of formulas.kl_variants(), "" without ref. log_s (0,), on the CPU
    # only: the op makes each row's.
    # -> loss 0-d ((B, T) for "none"); dlogp (B, T) and dentropy (B, T) or (0,), to be multiplied by scale (B,), the
    #    weight of their sequence (the CPU counts tokens first: there they have it, and scale is 1);
    #    metrics (len(formulas.METRICS),)
    "policy_loss_fwd": Op(
        "(Tensor logp, Tensor? old, Tensor advantages, Tensor? ref, Tensor? entropy, Tensor? mask, "
        "Tensor? policy_weights, Tensor? token_weights, Tensor? log_s, Tensor params, str formula, str kl, "
        "str aggregation, str correction, bool entropy_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        fakes.policy_loss_fwd,
    ),
    # A GPU's, where a token's loss takes something of its whole sequence. (B, T), or packed (1, N) with cu_seqlens
    # (B+1,) of any integer dtype; advantages like logp, or (B, 1). sequence_ratio: log_s is the mean of logp − old over
    # the sequence; sequence_correction: ω is made of the sum of old − policy_weights. max_length < 0 in params: the
    # longest packed sequence. The rest, and the results, as above; for packed tokens scale is (1,).
    "policy_loss_sequences_fwd": Op(
        "(Tensor logp, Tensor? old, Tensor advantages, Tensor? ref, Tensor? entropy, Tensor? mask, "
        "Tensor? policy_weights, Tensor? token_weights, Tensor? cu_seqlens, Tensor params, str formula, str kl, "
        "str aggregation, str correction, bool sequence_ratio, bool sequence_correction, bool entropy_grad) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        fakes.policy_loss_sequences_fwd,
    ),
    # logp, ref, old, mask (N,); variant: one of formulas.kl_variants() -> kl, dkl/dlogp (N,)
    "kl_estimate_fwd": Op(
        "(Tensor logp, Tensor ref, Tensor? old, Tensor? mask, str variant) -> (Tensor, Tensor)", fakes.kl_estimate_fwd
    ),
    # grad 0-d, or like dlogp; scale (B,) for dlogp (B, T), or None -> grad·scale·dlogp, grad·scale·dentropy
    # in the dtypes of logp and entropy. Those are not read otherwise, but there: so that differentiating again, of
    # which dlogp knows nothing, raises.
    "token_loss_bwd": Op(
        "(Tensor grad, Tensor logp, Tensor? entropy, Tensor? scale, Tensor dlogp, Tensor dentropy) -> (Tensor, Tensor)",
        fakes.token_loss_bwd,
        True,
    ),
    # chosen, rejected: (B, T) of any T each, or packed (N,) with cu_* (B+1,) int64 in [0, N]; ref_*, mask_* alike; all
    # contiguous, in the accumulation dtype. rejected None: no pairs (kto). per_pair (B,): the formula's prob, margin, …
    # params (len(PARAMS) + MAX_KNOBS,) fp64 as in policy_loss_fwd; formula: a name of pair_formulas.FORMULAS;
    # average: means of the live tokens in place of sums.
    # -> loss 0-d; slopes (2, B), the derivative in every live token of either answer; metrics, as many as the formula
    #    has; with gradients (the CPU alone makes them here) what preference_loss_bwd gives for a grad of 1, else (0,)
    #    twice
    "preference_loss_fwd": Op(
        "(Tensor chosen, Tensor? rejected, Tensor? ref_chosen, Tensor? ref_rejected, Tensor? mask_chosen, "
        "Tensor? mask_rejected, Tensor? cu_chosen, Tensor? cu_rejected, Tensor? per_pair, Tensor params, str formula, "
        "bool average, bool gradients) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        fakes.preference_loss_fwd,
    ),
    # grad 0-d -> dchosen, drejected ((0,) without): grad·slope at live tokens, 0 at others
    # Of chosen and rejected only the shapes are read, as in token_loss_bwd.
    "preference_loss_bwd": Op(
        "(Tensor grad, Tensor slopes, Tensor chosen, Tensor? rejected, Tensor? mask_chosen, Tensor? mask_rejected, "
        "Tensor? cu_chosen, Tensor? cu_rejected) -> (Tensor, Tensor)",
        fakes.preference_loss_bwd,
        True,
    ),
}
