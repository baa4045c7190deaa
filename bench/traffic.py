"""The bytes that the Triton kernels of an op ask for, counted in Triton's interpreter, beside the formula.

    TRITON_INTERPRET=1 python -m bench.traffic      prints JSON: {case: [bytes loaded and stored, bytes by the formula]}

The interpreter executes every load and store; what counts is each lane whose mask lets it through. Small shapes: what a
kernel asks for of each logit or token does not depend on how many there are, beside a few numbers a row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import torch

import rl4llm_fast as rf

from . import ops, peers
from .base import ROOT
from .cases import BACKWARD, BOTH, FORWARD, IN_PLACE, Case

_ROWS = (4, 4_096)  # rows × vocabulary, sequences × tokens


def cases() -> Iterator[Case]:
    """One of each op that has Triton kernels and a formula for its bytes."""
    for call in ("token_logprobs", "token_logprobs_entropy"):
        for mode in (FORWARD, BACKWARD, BOTH, IN_PLACE):
            yield Case("token_logprobs", call, mode, torch.float32, _ROWS, ())
    for op, mode, variant in (
        ("kl_divergence", FORWARD, "reverse"),
        ("kl_divergence", BOTH, "reverse"),
        ("policy_loss", BOTH, "grpo k3"),
        ("preference_loss", BOTH, "dpo"),
        ("kl_estimate", BOTH, "k3"),
        ("value_loss", BOTH, "clipped"),
        ("gae", FORWARD, "padded"),
        ("vtrace", FORWARD, "padded"),
        ("n_step_returns", FORWARD, "padded"),
        ("whiten", FORWARD, "masked"),
    ):
        yield Case(op, op, mode, torch.float32, _ROWS, (), (), variant)


class Counter:
    """Bytes of the loads and stores that the interpreter makes from now on."""

    def __init__(self) -> None:
        from triton.runtime.interpreter import interpreter_builder

        self.bytes = 0
        load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

        def counted_load(ptrs, mask, other, *rest):  # type: ignore[no-untyped-def]
            self._count(ptrs, mask)
            return load(ptrs, mask, other, *rest)

        def counted_store(ptrs, value, mask, *rest):  # type: ignore[no-untyped-def]
            self._count(ptrs, mask)
            return store(ptrs, value, mask, *rest)

        interpreter_builder.create_masked_load = counted_load
        interpreter_builder.create_masked_store = counted_store

    def _count(self, ptrs, mask) -> None:  # type: ignore[no-untyped-def]
        bits = ptrs.dtype.scalar.element_ty.primitive_bitwidth
        self.bytes += int(mask.data.sum()) * max(1, bits // 8)


def count() -> dict[str, tuple[int, int]]:
    """{case: (bytes counted, bytes by the formula)}; in a process with TRITON_INTERPRET=1."""
    counter, found = Counter(), {}
    with rf.use_backend("triton"):
        for case in cases():
            inputs = ops.make_inputs(case, "cpu")
            step = ops.step(case, peers.build(peers.OURS, case, "cpu"), inputs, ops.overwrites(case, peers.OURS))
            state = step.prepare()
            counter.bytes = 0
            step.run(state)
            found[case.name] = (counter.bytes, case.bytes)
    return found


def counted() -> dict[str, list[int]]:
    """The same from a process of its own: the interpreter must be asked for before Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench.traffic"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"counting bytes in the interpreter failed: {done.stderr[-2000:]}")
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("TRITON_INTERPRET=1 must be set: the bytes are counted in Triton's interpreter")
    print(json.dumps(count()))
