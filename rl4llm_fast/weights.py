"""Aggregation of per-token losses: loss = Σ w_t ℓ_t. Each way is one line: the weight of a live token.

The same functions run on torch tensors (eager, and packed sequences) and are emitted for every other backend
(``codegen``), so ``m`` is the maths namespace of ``symbolic``.

    length         live tokens of the token's sequence, |o_i|
    num_tokens     live tokens of the (global) batch
    num_sequences  sequences of the (global) batch, empty ones too
    max_length     L_max

A count of zero means that there is no live token to weigh; it is taken as one, so that nothing divides by it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

INPUTS = ("length", "num_tokens", "num_sequences", "max_length")


def token_mean(m: Any, length: Any, num_tokens: Any, num_sequences: Any, max_length: Any) -> Any:
    """1 / Σ m (DAPO; Yu et al. 2025, eq. 8)."""
    return 1.0 / m.maximum(num_tokens, 1.0)


def seq_mean_token_mean(m: Any, length: Any, num_tokens: Any, num_sequences: Any, max_length: Any) -> Any:
    """1 / (B·|o_i|) (81, 82; Shao et al. 2024, eq. 3)."""
    return 1.0 / (m.maximum(num_sequences, 1.0) * m.maximum(length, 1.0))


def seq_mean_token_sum(m: Any, length: Any, num_tokens: Any, num_sequences: Any, max_length: Any) -> Any:
    """1 / B."""
    return 1.0 / m.maximum(num_sequences, 1.0)


def seq_mean_token_sum_norm(m: Any, length: Any, num_tokens: Any, num_sequences: Any, max_length: Any) -> Any:
    """1 / (B·L_max) (Dr.GRPO; Liu et al. 2025)."""
    return 1.0 / (m.maximum(num_sequences, 1.0) * m.maximum(max_length, 1.0))


def token_sum(m: Any, length: Any, num_tokens: Any, num_sequences: Any, max_length: Any) -> Any:
    """1; "none" has the same weight and no sum."""
    return 1.0


AGGREGATIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (token_mean, seq_mean_token_mean, seq_mean_token_sum, seq_mean_token_sum_norm, token_sum)
}
NAMES = (*AGGREGATIONS, "none")
