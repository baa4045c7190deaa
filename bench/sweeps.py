"""How time grows with one size: the sweeps of a result, and the exponents fitted to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .cases import size_of
from .peers import OURS


@dataclass
class Sweep:
    """One op along one size; by implementation, (size, median ms) and (size, bytes over the inputs)."""

    op: str
    mode: str
    dtype: str
    axis: str
    shapes: list[list[int]] = field(default_factory=list)
    time: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    memory: dict[str, list[tuple[int, int]]] = field(default_factory=dict)


def of(result: dict[str, Any]) -> list[Sweep]:
    """The sweeps of a result, sizes ascending. Where ours is wrong there is no point of anybody."""
    found: dict[tuple[str, str], Sweep] = {}
    for record in result["cases"]:
        op, axis = record["op"], record["axis"]
        sweep = found.setdefault((op, axis), Sweep(op, record["mode"], record["dtype"], axis))
        sweep.shapes.append(record["shape"])
        size = size_of(op, axis, record["shape"])
        right = any(r["implementation"] == OURS and r.get("correct") for r in record["results"])
        for r in record["results"]:
            if "median_ms" in r and right:
                sweep.time.setdefault(r["implementation"], []).append((size, r["median_ms"]))
            if r.get("extra_bytes") is not None:
                sweep.memory.setdefault(r["implementation"], []).append((size, r["extra_bytes"]))
    for sweep in found.values():
        for points in (*sweep.time.values(), *sweep.memory.values()):
            points.sort()
    return list(found.values())


def exponent(points: Sequence[tuple[int, float]]) -> float | None:
    """The slope of log time over log size, by least squares; None with fewer than two sizes."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    mean_x, mean_y = sum(xs) / max(len(xs), 1), sum(ys) / max(len(ys), 1)
    spread = sum((x - mean_x) ** 2 for x in xs)
    if not spread:
        return None
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def last_decade(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points within a factor of ten of the largest size: where fixed costs no longer count."""
    return [point for point in points if point[0] * 10 >= points[-1][0]]


def _shape(sweep: Sweep) -> str:
    sizes = [sorted({shape[i] for shape in sweep.shapes}) for i in range(len(sweep.shapes[0]))]
    return " x ".join(f"{s[0]:,}" if len(s) == 1 else f"{sweep.axis} {s[0]:,} - {s[-1]:,}" for s in sizes)


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def markdown(result: dict[str, Any]) -> str:
    """A row a sweep: the range, the time at both ends, and the exponents over all sizes and over the last decade."""
    meta = result["meta"]
    lines = [
        "| sweep | time at the ends | exponent | over the last decade | eager's, over the last decade |",
        "|---|---|---|---|---|",
    ]
    for sweep in of(result):
        ours, eager = sweep.time.get(OURS, []), sweep.time.get("eager", sweep.time.get("loop", []))
        if not ours:
            continue
        last = [_two(exponent(last_decade(points))) if points else "–" for points in (ours, eager)]
        ends = f"{ours[0][1]:.3g} – {ours[-1][1]:.4g} ms"
        what = f"{sweep.op} {sweep.mode} {sweep.dtype}, {_shape(sweep)}"
        lines.append(f"| {what} | {ends} | {_two(exponent(ours))} | {last[0]} | {last[1]} |")
    commit = meta["git"] + (", with local changes" if meta["dirty"] else "")
    lines += [
        "",
        f"`{meta['command']}` on {meta['device']}, {meta['date']}, torch {meta['torch']}, commit {commit}. "
        "Slope of log time over log size; gae's rival is the loop over positions.",
    ]
    return "\n".join(lines)
