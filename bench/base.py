"""Another git ref, measured beside the working tree: ``python -m bench.run --base GITREF``.

The ref is checked out into a temporary worktree and built there. A process of its own imports that ref's rl4llm_fast
under this tree's bench, and answers one sample at a time, so that both are interleaved like everyone else.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from .cases import CASES, Case

ROOT = pathlib.Path(__file__).resolve().parent.parent
_MARK = "\x1e"
# bench comes from this tree, rl4llm_fast from the other one: it is imported first, for bench imports it too.
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[2]); import rl4llm_fast; sys.path[0] = sys.argv[1]; "
    "import bench.base; bench.base.serve()"
)


def serve() -> None:
    """The child: a line [case, device] loads a case, an empty list takes one sample."""
    import rl4llm_fast as rf

    from . import measure, ops, peers

    by_name = {case.name: case for case in CASES}
    sampler = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request:
                case, device = by_name[request[0]], request[1]
                function = peers.build(peers.OURS, case, device)
                inputs = ops.make_inputs(case, device)
                input_sets = [inputs] if device == "cpu" else measure.beyond_cache(case, inputs)
                sampler, _ = measure.sampler(case, peers.OURS, function, input_sets, device)
                answer: dict[str, object] = {"loaded": rf.__file__}
            else:
                assert sampler is not None
                answer = {"ms": sampler()}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(_MARK + json.dumps(answer), flush=True)


class Base:
    """A built worktree of ``ref`` and the process that measures it. A context manager: it cleans up after itself."""

    def __init__(self, ref: str, device: str) -> None:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", f"{ref}^{{commit}}"], cwd=ROOT, capture_output=True, text=True
        )
        if commit.returncode:
            raise ValueError(f"base: wanted a git ref, got {ref!r}: {commit.stderr.strip()}")
        self.ref = f"{ref} ({commit.stdout.strip()})"
        self._commit = commit.stdout.strip()
        self._device = device

    def __enter__(self) -> Base:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-base-")
        tree = pathlib.Path(self._folder.name, "tree")
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), self._commit], cwd=ROOT, check=True)
        self._tree = tree
        try:
            print(f"building {self.ref} ...", file=sys.stderr)
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            cuda = {"RL4LLM_FAST_CUDA": "0"} if self._device == "cpu" else {}  # the CPU suites do without nvcc
            subprocess.run(build, cwd=tree, check=True, env={**os.environ, **cuda}, stdout=sys.stderr)
            self._start()
        except BaseException:
            self._remove()
            raise
        return self

    def _start(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-c", _BOOT, str(ROOT), str(self._tree)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self._tree,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )

    def __exit__(self, *_: object) -> None:
        self._child.communicate()
        self._remove()

    def _remove(self) -> None:
        subprocess.run(["git", "worktree", "remove", "--force", str(self._tree)], cwd=ROOT)
        self._folder.cleanup()

    def _ask(self, request: list[str]) -> dict[str, Any]:
        child = self._child
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
        for line in child.stdout:
            if line.startswith(_MARK):
                answer: dict[str, Any] = json.loads(line[1:])
                if "failed" in answer:
                    raise RuntimeError(f"base {self.ref}: {answer['failed']}")
                return answer
        raise RuntimeError(f"base {self.ref}: its process ended")

    def load(self, case: Case, device: str) -> None:
        loaded = str(self._ask([case.name, device])["loaded"])
        if not pathlib.Path(loaded).is_relative_to(self._tree.resolve()):  # else this tree would race itself
            raise RuntimeError(f"base {self.ref}: imported {loaded}, wanted the one in {self._tree}")

    def sample(self) -> float:
        return float(self._ask([])["ms"])
