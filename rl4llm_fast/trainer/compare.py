"""One training step, fused against plain PyTorch, on the same batch: time and peak memory.

Each variant lives in a process of its own, so that neither sees the other's memory; they take turns, step by step, so
that whatever else the machine does hits both. Run as a module it is such a process: it reads a line, takes a step,
writes what it cost.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .config import GRPOConfig
from .grpo import GRPOTrainer
from .metrics import Phases
from .sampling import Rollout
from .tasks import Task

_READY = "ready"
_ANSWER = "\x1e"


def plain_token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float,
    softcap: float | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What one writes without a library. The library's own eager oracle is slower: it minds −inf, NaN and masks."""
    scores = logits.float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    logp = torch.log_softmax(scores if temperature == 1 else scores / temperature, -1)
    chosen = logp.gather(-1, token_ids[:, None]).squeeze(-1)
    return (chosen, -(logp.exp() * logp).sum(-1)) if return_entropy else chosen


@dataclass
class Cost:
    """Medians over the rounds: seconds of a step and of its loss, peak bytes of a step.

    From hidden states the head is part of the loss, forward and backward; from logits it is not.
    """

    step_seconds: float
    loss_seconds: float
    peak_bytes: int  # of the process (CPU) or the allocator (GPU)
    extra_bytes: int  # over what was there before the step
    loss: float  # of the first step, which both take from the same weights


def write_batch(path: Path, config: GRPOConfig, batch: Batch) -> None:
    """The settings and answers that ``compare`` takes its steps on, as JSON."""
    answers = {"rollout": asdict(batch.rollout), "rewards": batch.rewards, "advantages": batch.advantages.tolist()}
    path.write_text(json.dumps({"config": asdict(config), "batch": answers}), encoding="utf-8")


def compare(path: Path, *, rounds: int = 7) -> dict[str, Cost]:
    """{"fused": ..., "eager": ...}: what a step on the batch in ``path`` costs with the library's ops and without.

    Raises:
        RuntimeError: one of the two processes died; its message says with what.
    """
    module = [sys.executable, "-m", "rl4llm_fast.trainer.compare"]
    workers = {name: Worker(name, [*module, name, str(path)]) for name in ("fused", "eager")}
    try:
        for worker in workers.values():
            worker.wait_until_ready()
        return {name: _cost(steps) for name, steps in take_turns(workers, rounds).items()}
    finally:
        for worker in workers.values():
            worker.stop()


def take_turns(
    workers: dict[str, Worker], rounds: int, failed: dict[str, str] | None = None
) -> dict[str, list[dict[str, float]]]:
    """What each worker says of each of its steps; they are ready.

    ``failed`` takes the name of a worker that dies, with the reason, and the others go on; without it that raises.
    """
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for turn in range(rounds):
        # The order alternates: whoever goes second finds the caches as the first one left them.
        for name in list(rows) if turn % 2 == 0 else list(reversed(rows)):
            try:
                rows[name].append(workers[name].step())
            except RuntimeError as error:
                if failed is None:
                    raise
                failed[name] = str(error)
                del rows[name]
    return rows


def _cost(steps: list[dict[str, float]]) -> Cost:
    timed = steps[1:] or steps  # the first step of a process pays for its memory
    return Cost(
        step_seconds=median(s["seconds"] for s in timed),
        loss_seconds=median(s["loss_seconds"] for s in timed),
        peak_bytes=int(median(s["peak"] for s in timed)),
        extra_bytes=int(median(s["peak"] - s["before"] for s in timed)),
        loss=steps[0]["loss"],
    )


class Worker:
    """A process that takes a step when it is told to; :func:`serve` is its other end."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait_until_ready(self) -> None:
        while (line := self._line()) != _READY:  # whatever a library prints on loading
            print(line)

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        while not (line := self._line()).startswith(_ANSWER):  # whatever a library prints on the way
            print(line)
        values: dict[str, float] = json.loads(line.removeprefix(_ANSWER))
        return values

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of the {self.name} step ended with status {self.process.wait()}")
        return line.rstrip("\n")


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def _reset_peak(device: torch.device) -> int:
    """Start a new peak; returns what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # glibc keeps what the last step freed; given back, what is left is what is in use.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _work(name: str, path: Path) -> None:
    stored = json.loads(path.read_text(encoding="utf-8"))
    # The run that the batch is from may have left a checkpoint, of other settings than the eager step's.
    settings: dict[str, Any] = stored["config"] | {"progress": False, "resume": False}
    if name == "eager":
        settings |= {"backend": "eager", "head": "logits"}
    kept = stored["batch"]
    batch = Batch(Rollout(**kept["rollout"]), kept["rewards"], torch.tensor(kept["advantages"]))
    # The batch is given, so nothing is sampled and no task has to be built.
    trainer = GRPOTrainer(GRPOConfig(**settings), task=Task(train=[[1]], reward=lambda example, answer: 0.0))
    if name == "eager":
        trainer.policy.logprobs_op = plain_token_logprobs
    device = trainer.policy.device

    def step() -> dict[str, float]:
        trainer.phases = Phases(device)
        metrics = trainer.update(batch, step=1)
        seconds = trainer.phases.seconds
        return {"seconds": sum(seconds.values()), "loss_seconds": seconds["loss"], "loss": metrics["loss"]}

    serve(step, device)


def serve(step: Callable[[], dict[str, float]], device: torch.device) -> None:
    """A worker's end: a step for every line, answered with what the step returns and its memory."""
    print(_READY, flush=True)
    for _ in sys.stdin:
        before = _reset_peak(device)
        values = step()
        print(_ANSWER + json.dumps({**values, "before": before, "peak": _peak(device)}), flush=True)


if __name__ == "__main__":
    _work(sys.argv[1], Path(sys.argv[2]))
