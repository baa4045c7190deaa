"""What a run leaves to read: a line of JSON a step, the seconds of each phase, and a plot of the rewards."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .distributed import Ranks

PHASES = ("sample", "reward", "logprobs", "forward", "loss", "backward", "optimizer")


class Phases:
    """Seconds by phase: ``mark(name)`` gives the time since the last mark to ``name``.

    On a GPU a mark is an event in the stream that was current when this was made, also where the mark comes from a hook
    of the backward pass, whose thread is another. So a phase is the time between two points of the GPU's work (or of
    the CPU's, where the GPU waits for it), and nobody waits for anybody before ``seconds`` is read.
    """

    def __init__(self, device: torch.device) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._pending: list[tuple[str, Any, Any]] = []  # phase, the events that it lies between
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._last = self._now()

    def _now(self) -> Any:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def mark(self, phase: str) -> None:
        """What came since the last mark was ``phase``."""
        now = self._now()
        if self._stream is None:
            self._seconds[phase] += now - self._last
        else:
            self._pending.append((phase, self._last, now))
        self._last = now

    @property
    def seconds(self) -> dict[str, float]:
        """Of each phase so far; on a GPU it waits for the last mark, so read it once a step."""
        if self._pending:
            self._last.synchronize()
            for phase, begin, end in self._pending:
                self._seconds[phase] += begin.elapsed_time(end) / 1e3
            self._pending.clear()
        return dict(self._seconds)


class Averages:
    """Metrics of several micro-batches as one: means by number of tokens; minima, maxima and losses as such."""

    def __init__(self) -> None:
        self._values: dict[str, list[tuple[Tensor, float]]] = defaultdict(list)

    def add(self, metrics: dict[str, Tensor], tokens: int) -> None:
        for name, value in metrics.items():
            self._values[name].append((value.detach(), float(tokens)))

    def join(self, other: Averages) -> None:
        """Take in the micro-batches of ``other``."""
        for name, pairs in other._values.items():
            self._values[name] += pairs

    def largest(self, name: str) -> float:
        """The largest value of ``name`` so far, NaN if there is one; −inf without any."""
        values = [value.float() for value, _ in self._values.get(name, ())]
        return float(torch.stack(values).max()) if values else -math.inf

    def _numbers(self) -> dict[str, list[float]]:
        """The values of each metric, by one copy off each device."""
        found: dict[str, list[float]] = {key: [0.0] * len(pairs) for key, pairs in self._values.items()}
        by_device: dict[torch.device, list[tuple[str, int, Tensor]]] = defaultdict(list)
        for key, pairs in self._values.items():
            for i, (value, _) in enumerate(pairs):
                by_device[value.device].append((key, i, value))
        for group in by_device.values():
            numbers = torch.stack([value.float() for _, _, value in group]).tolist()
            for (key, i, _), number in zip(group, numbers, strict=True):
                found[key][i] = number
        return found

    def result(self, ranks: Ranks = Ranks()) -> dict[str, float]:  # noqa: B008
        """Over the micro-batches of all processes."""
        own = [(key, numbers, [weight for _, weight in self._values[key]]) for key, numbers in self._numbers().items()]
        found: dict[str, tuple[list[float], list[float]]] = {}
        for name, more, counts in ranks.gather(own):
            known = found.setdefault(name, ([], []))
            known[0].extend(more)
            known[1].extend(counts)
        out = {}
        for name, (numbers, counts) in found.items():
            values = torch.tensor(numbers)
            if name.endswith("_min"):
                out[name] = float(values.min())
            elif name.endswith("_max"):
                out[name] = float(values.max())
            else:
                weights = torch.tensor(counts)
                out[name] = float((values * weights).sum() / weights.sum())
        return out


class History:
    """``metrics.jsonl``: appended to as the run goes, cut back to the checkpoint when it goes on.

    With ``events`` also TensorBoard's events, in the folder ``tensorboard`` beside it; those of steps that are taken
    again are marked as overtaken.
    """

    def __init__(self, path: Path, keep_steps: int, *, events: bool = False, write: bool = True) -> None:
        self.path = path
        self.write = write  # False: in memory only, for processes beside the first
        self.events: Any = None
        self.rows: list[dict[str, Any]] = []
        if not write:
            return
        if events:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(path.parent / "tensorboard"), purge_step=keep_steps + 1)
        if keep_steps and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that was being written when the run was cut off
                if row["step"] <= keep_steps:
                    self.rows.append(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        partial.replace(path)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if not self.write:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            # JSON has no NaN: a reader in another language must be able to parse the file.
            clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            file.write(json.dumps(clean) + "\n")
        if self.events is not None:
            for key, value in row.items():
                if key != "step" and isinstance(value, (int, float)):
                    self.events.add_scalar(key, value, row["step"])
            self.events.flush()

    def close(self) -> None:
        if self.events is not None:
            self.events.close()


def phase_table(rows: list[dict[str, Any]]) -> str:
    """Where the time went: mean seconds a step and share, by phase."""
    rows = [row for row in rows if "seconds" in row]  # the row of step 0 has no step's time
    totals = {phase: sum(row.get(f"seconds_{phase}", 0.0) for row in rows) for phase in PHASES}
    totals = {phase: total for phase, total in totals.items() if total}
    whole = sum(totals.values()) or 1.0
    lines = [f"  {'phase':<12}{'s/step':>8}{'share':>8}"]
    lines += [f"  {p:<12}{t / max(len(rows), 1):>8.3f}{t / whole:>8.0%}" for p, t in totals.items()]
    lines.append(f"  {'all':<12}{whole / max(len(rows), 1):>8.3f}")
    return "\n".join(lines)


def plot_rewards(rows: list[dict[str, Any]], path: Path, title: str) -> bool:
    """The reward of each step, its running mean, and the held-out accuracy, as a PNG; False without matplotlib."""
    if not rows or importlib.util.find_spec("matplotlib") is None:
        return False
    figure, (axes,) = _figure(1)
    trained = [row for row in rows if "reward_mean" in row]  # the row of step 0 has held-out measures alone
    steps, rewards = [row["step"] for row in trained], [row["reward_mean"] for row in trained]
    smooth: list[float] = []
    for reward in rewards:
        smooth.append(reward if not smooth else 0.8 * smooth[-1] + 0.2 * reward)
    axes.plot(steps, rewards, color="tab:blue", alpha=0.35, linewidth=1, label="mean reward of the step's answers")
    axes.plot(steps, smooth, color="tab:blue", linewidth=2, label="its running mean")
    held = [(row["step"], row["heldout_accuracy"]) for row in rows if "heldout_accuracy" in row]
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color="tab:orange", label="held-out accuracy (greedy)")
    axes.set(xlabel="step", ylabel="reward", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def plot_curves(rows: list[dict[str, Any]], path: Path, title: str, panels: dict[str, dict[str, str]]) -> bool:
    """A PNG with one panel for each of ``panels``, {y label: {key of a row: legend}}; False without matplotlib."""
    if not rows or importlib.util.find_spec("matplotlib") is None:
        return False
    figure, all_axes = _figure(len(panels))
    figure.suptitle(title)
    for axes, (label, curves) in zip(all_axes, panels.items(), strict=True):
        for key, legend in curves.items():
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o-" if key.startswith("heldout") else "-", label=legend)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(loc="best")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def _figure(panels: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * panels**0.5, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, panels, 1 + i) for i in range(panels)]
