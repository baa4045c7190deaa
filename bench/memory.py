"""Peak extra memory of every implementation on the CPU, in this process of its own.

``bench.run`` starts ``python -m bench.memory`` and sends one case name and the peers a line; one JSON line comes back
for each pair, as soon as it is known, so that a crash loses that pair only.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch

from . import ops, peers, timing
from .cases import CASES, Case

_FEW_ROWS = 64
_COMPILED = ("compile", "liger", "cce")  # for the shape, at the first call


@functools.lru_cache(maxsize=1)  # all peers of a case come one after the other
def _inputs(case: Case) -> ops.Inputs:
    return ops.make_inputs(case, "cpu")


def _call(case: Case, peer: str, inputs: ops.Inputs) -> Callable[[], object]:
    made = ops.step(case, peers.build(peer, case, "cpu"), inputs, ops.overwrites(case, peer))
    return lambda: made.run(made.prepare())


def probe(case: Case, peer: str, long: bool = False) -> int:
    """Bytes; raises whatever the peer raises.

    A ``long`` call is warmed up on a few rows, where these run the same code.
    """
    torch._dynamo.reset()  # compiled functions of earlier cases keep buffers and count towards the recompile limit
    warm = None
    if long and peer not in _COMPILED:
        few = dataclasses.replace(case, shape=(min(_FEW_ROWS, case.shape[0]), *case.shape[1:]))
        warm = _call(few, peer, ops.make_inputs(few, "cpu"))
    return timing.cpu_extra_bytes(_call(case, peer, _inputs(case)), warm)


def _serve() -> None:
    by_name = {case.name: case for case in CASES}
    for line in sys.stdin:
        name, *question = json.loads(line)
        try:
            answer: dict[str, object] = {"bytes": probe(by_name[name], *question)}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print("\x1e" + json.dumps(answer), flush=True)  # a mark of its own: libraries print too


class Prober:
    """The child process; started at the first question."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None

    def ask(self, case: Case, peer: str, long: bool = False) -> int | None:
        """The peak in bytes, or None where the child could not tell (killed for memory, say)."""
        if self._child is None or self._child.poll() is not None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "bench.memory"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                # Without kept blocks: a result's own memory is to be seen in every call (csrc/cpu/memory.cpp).
                env={**os.environ, "PYTHONUNBUFFERED": "1", "RL4LLM_FAST_CPU_CACHE_MIB": "0"},
                cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
            )
        child = self._child
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps([case.name, peer, long]) + "\n")
            child.stdin.flush()
        except BrokenPipeError:
            return None
        for line in child.stdout:
            if line.startswith("\x1e"):
                answer = json.loads(line[1:])
                return answer.get("bytes")
        return None

    def close(self) -> None:
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.close()
            self._child.wait()


if __name__ == "__main__":
    _serve()
