"""Plots of a suite's result, made for the width of a README, each in light and in dark.

speed, memory: a row a case, a mark a peer. roofline: FLOP/s over FLOPs a byte, under the ceilings of the same run.
Of sweeps: time against each size, and peak memory against the number of tokens. Of whole steps: time and memory, a row
a trainer; of the longest context, peak memory against the length of the answers.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from typing import Any

from . import sweeps
from .peers import OURS

_COLOURS = {
    OURS: "#0b8a83",
    "eager": "#d1603d",
    "chunked": "#e0a458",
    "compile": "#5b7bbd",
    "trl": "#9a62b5",
    "liger": "#7f8c46",
    "cce": "#3f9bd1",
    "torchrl": "#c24f7e",
    "verl": "#5f9d4e",
    "quack": "#d08c60",
    "fla": "#7d699a",
    "loop": "#9a9a9a",
    "base": "#7d8590",
    "triton": "#3a7ca5",
    "cuda": "#76b041",
}
_MARKS = dict(zip(_COLOURS, "osDv^<>PXhp*d8H", strict=True))
_OP_COLOURS = ("#0b8a83", "#d1603d", "#5b7bbd", "#9a62b5", "#e0a458", "#7f8c46", "#c24f7e", "#3f9bd1")
_OP_MARKS = ("o", "s", "^", "D")
_AXES = {"N": "tokens N", "V": "vocabulary V", "D": "width of the hidden states D", "T": "positions T", "B": "rows B"}

# File name suffix -> ink and paper: for pages in light and in dark.
_THEMES = {"": ("#1f2328", "#ffffff"), "-dark": ("#d1d7e0", "#0d1117")}
_WIDTH, _DPI = 9.0, 110
_MIB = 2**20

Draw = Callable[[Any], Any]  # pyplot -> figure


def draw(result: dict[str, Any], folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """PNG files; none, with a line on stderr, where matplotlib is missing or no case has a figure."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plots: matplotlib is missing (pip install 'rl4llm_fast[bench]')", file=sys.stderr)
        return []
    kinds = {"sweep": _of_sweeps, "end-to-end": _of_steps, "context": _of_context}
    suite = result["meta"]["suite"]
    drawn = next((make for name, make in kinds.items() if suite.startswith(name)), _of_cases)(result)
    if not drawn:
        print("no plots: no case has a speed-up to show", file=sys.stderr)
    meta = result["meta"]
    footer = f"{meta['device']}, {meta['date'][:10]}, torch {meta['torch']}, commit {meta['git']}"
    paths = []
    for key, make in drawn.items():
        for suffix, (ink, paper) in _THEMES.items():
            inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
            small = {"font.size": 8, "axes.labelsize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5}
            style = {**dict.fromkeys(inked, ink), **small, "grid.alpha": 0.18, "axes.axisbelow": True}
            style["figure.dpi"] = _DPI  # the width of a text depends on it, and is laid out before it is drawn
            with plt.rc_context({**style, "figure.facecolor": paper, "axes.facecolor": paper}):
                figure = make(plt)
                figure.text(0.995, 0.04 / figure.get_figheight(), footer, ha="right", fontsize=6, alpha=0.7)
                path = folder / f"{stem}-{key}{suffix}.png"
                figure.savefig(path, dpi=_DPI)
                plt.close(figure)
            paths.append(path)
    return paths


def _of_cases(result: dict[str, Any]) -> dict[str, Draw]:
    from .report import title

    records = [record for record in result["cases"] if any("speedup" in r for r in record["results"])]
    speed, memory = {}, {}
    for record in records:
        name = title(record).replace("forward+backward", "fwd+bwd")
        by = {r["implementation"]: r for r in record["results"]}
        # ours is there only beside a peer: a ratio of one says nothing alone
        speed[name] = {OURS: 1.0, **{peer: r["speedup"] for peer, r in by.items() if "speedup" in r}}
        memory[name] = {p: r["extra_bytes"] / _MIB for p, r in by.items() if r.get("extra_bytes") is not None}
    drawn: dict[str, Draw] = {}
    if speed:
        drawn["speed"] = lambda plt: _marks(plt, speed, "how many times as long as rl4llm_fast it takes")
    if any(memory.values()):
        drawn["memory"] = lambda plt: _marks(plt, memory, "peak memory beside the inputs, MiB", floor=0.1)
    if records and "ceilings_flops_per_s" in result:
        drawn["roofline"] = lambda plt: _roofline(plt, records, result)
    return drawn


def _of_steps(result: dict[str, Any]) -> dict[str, Draw]:
    seconds: dict[str, dict[str, float]] = {}
    memory: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        if row["status"] == "ok":
            name, variant = (
                row["trainer"] + (f", {row['layers']} layers" if "layers" in row else ""),
                _who(row["variant"]),
            )
            seconds.setdefault(name, {})[variant] = row["median_s"]
            memory.setdefault(name, {})[variant] = row["peak_bytes"] / 2**30
    if not seconds:
        return {}
    return {
        "step-time": lambda plt: _marks(plt, seconds, "seconds of a step"),
        "step-memory": lambda plt: _marks(plt, memory, "peak memory of a step, GiB"),
    }


def _of_context(result: dict[str, Any]) -> dict[str, Draw]:
    found = {name: [probe for probe in of["probes"] if probe["fits"]] for name, of in result["variants"].items()}
    found = {name: sorted(probes, key=lambda probe: probe["answer"]) for name, probes in found.items() if probes}
    return {"context": lambda plt: _contexts(plt, found, result["meta"]["memory_bytes"])} if found else {}


def _who(variant: str) -> str:
    return OURS if variant == "fused" else variant


def _of_sweeps(result: dict[str, Any]) -> dict[str, Draw]:
    swept = [sweep for sweep in sweeps.of(result) if len(sweep.time.get(OURS, ())) > 1]
    by_tokens = [sweep for sweep in swept if sweep.axis == "N" and sweep.memory.get(OURS)]
    drawn: dict[str, Draw] = {"time": lambda plt: _times(plt, swept)} if swept else {}
    if by_tokens:
        drawn["peak"] = lambda plt: _peaks(plt, by_tokens)
    return drawn


def _finish(figure: Any, handles: list[Any], labels: list[str], columns: int) -> Any:
    """The legend above, room for the footer below."""
    height = figure.get_figheight()
    legend_rows = -(-len(labels) // columns)
    figure.legend(handles, labels, loc="upper center", ncols=columns, frameon=False, handletextpad=0.4)
    figure.tight_layout(rect=(0, 0.1 / height, 1, 1 - (0.12 + 0.18 * legend_rows) / height))
    return figure


def _marks(plt: Any, values: dict[str, dict[str, float]], label: str, floor: float = 0.0) -> Any:
    """A row a case on a logarithmic axis; values below the floor stand on it."""
    names = [peer for peer in _COLOURS if any(peer in row for row in values.values())]
    figure, axes = plt.subplots(figsize=(_WIDTH, 1.0 + 0.2 * len(values)))
    for place, by in enumerate(values.values()):
        known = [max(value, floor) for value in by.values()]
        if known:
            axes.plot([min(known), max(known)], [place, place], color="#888888", linewidth=0.8, alpha=0.5, zorder=1)
    for name in reversed(names):  # ours last, on top
        at = [place for place, by in enumerate(values.values()) if name in by]
        wide = [max(by[name], floor) for by in values.values() if name in by]
        size = 38 if name == OURS else 24
        axes.scatter(wide, at, s=size, marker=_MARKS[name], color=_COLOURS[name], label=name, zorder=3)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.grid(axis="x", which="major")
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlabel(label)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    return _finish(figure, handles[::-1], labels[::-1], min(len(labels), 9))


def _roofline(plt: Any, records: list[dict[str, Any]], result: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(figsize=(_WIDTH, 4.6))
    copy, products = result["ceilings_bytes_per_s"]["copy"], result["ceilings_flops_per_s"]
    ops = list(dict.fromkeys(record["op"] for record in records))
    points: list[tuple[float, float]] = []
    for i, op in enumerate(ops):  # as many as there are: when the colours are used up, in another shape
        colour, mark = _OP_COLOURS[i % len(_OP_COLOURS)], _OP_MARKS[i // len(_OP_COLOURS) % len(_OP_MARKS)]
        for name, face in (("eager", "none"), (OURS, colour)):
            at = [
                (record["flops"] / record["bytes"], record["flops"] / (r["median_ms"] * 1e-3))
                for record in records
                for r in record["results"]
                if record["op"] == op and r["implementation"] == name and "median_ms" in r
            ]
            points += at
            if at:
                xs, ys = zip(*at, strict=True)
                label = op if name == OURS else None
                axes.scatter(xs, ys, s=30, marker=mark, facecolor=face, edgecolor=colour, label=label, zorder=3)
    low, high = min(x for x, _ in points) / 2, max(x for x, _ in points) * 3
    fastest = max(products.values())
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    axes.plot(xs, [min(x * copy, fastest) for x in xs], color="#888888", linewidth=1.2, zorder=1)
    axes.annotate(
        f"copy: {copy / 1e9:,.0f} GB/s", (low, low * copy), xytext=(4, 8), textcoords="offset points", fontsize=7
    )
    for name, rate in products.items():
        start = min(rate / copy, high)
        axes.plot([start, high], [rate, rate], color="#888888", linewidth=1.2, linestyle="--", zorder=1)
        text = f"{name} products: {rate / 1e12:,.2f} TFLOP/s"
        axes.annotate(text, (high, rate), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    _frame(axes, "FLOPs a byte, by the formulas of bench/work.py", "FLOP/s (filled: rl4llm_fast, hollow: eager)")
    handles, labels = axes.get_legend_handles_labels()
    return _finish(figure, handles, labels, 4)


def _logarithmic(axes: Any, xlabel: str, ylabel: str | None) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, high / 30), high)  # a decade and a half at least, so that some line bears a number
    _frame(axes, xlabel, ylabel)


def _frame(axes: Any, xlabel: str, ylabel: str | None) -> None:
    axes.grid(which="major")
    axes.set_xlabel(xlabel)
    if ylabel:
        axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)


def _times(plt: Any, swept: list[sweeps.Sweep]) -> Any:
    """A panel a size; a colour an op."""
    names = [axis for axis in _AXES if any(sweep.axis == axis for sweep in swept)]
    colours = dict(zip(dict.fromkeys(sweep.op for sweep in swept), _OP_COLOURS, strict=False))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(_WIDTH, 0.7 + 2.6 * rows), squeeze=False)
    lines: dict[str, Any] = {}
    for place, axis in enumerate(names):
        axes = grid[place // columns][place % columns]
        for sweep in (s for s in swept if s.axis == axis):
            for name, style in ((OURS, "o-"), ("eager" if "eager" in sweep.time else "loop", "--")):
                if sweep.time.get(name):
                    xs, ys = zip(*sweep.time[name], strict=True)
                    (line,) = axes.plot(xs, ys, style, color=colours[sweep.op], linewidth=1.3, markersize=3.5)
                    lines.setdefault(sweep.op, line)
        _logarithmic(axes, _AXES[axis], "ms (dashed: eager or a loop)" if place % columns == 0 else None)
    for place in range(len(names), rows * columns):
        grid[place // columns][place % columns].set_axis_off()
    return _finish(figure, list(lines.values()), list(lines), 4)


def _peaks(plt: Any, swept: list[sweeps.Sweep]) -> Any:
    """Peak memory over the inputs against N, beside what no implementation avoids: the gradients of the inputs."""
    figure, grid = plt.subplots(1, len(swept), figsize=(_WIDTH, 3.2), squeeze=False)
    lines: dict[str, Any] = {}
    for place, (axes, sweep) in enumerate(zip(grid[0], swept, strict=True)):
        for name in [peer for peer in _COLOURS if sweep.memory.get(peer)]:
            xs, ys = zip(*((size, max(extra / _MIB, 0.01)) for size, extra in sweep.memory[name]), strict=True)
            (line,) = axes.plot(xs, ys, f"{_MARKS[name]}-", color=_COLOURS[name], linewidth=1.3, markersize=3.5)
            lines.setdefault(name, line)
        sizes = sorted({shape[0] for shape in sweep.shapes})
        _, *rest = sweep.shapes[0]
        least = [_gradients(sweep.op, size, rest) / _MIB for size in sizes]
        (line,) = axes.plot(sizes, least, ":", color="#888888", linewidth=1.5, zorder=1)
        lines.setdefault("the gradients alone", line)
        axes.set_title(sweep.op, fontsize=8)
        _logarithmic(axes, _AXES["N"], "peak memory over the inputs, MiB" if place == 0 else None)
    return _finish(figure, list(lines.values()), list(lines), 5)


def _contexts(plt: Any, found: dict[str, list[dict[str, Any]]], memory: int) -> Any:
    """Peak memory against the answers' length; the last mark of each is the longest that fits."""
    figure, axes = plt.subplots(figsize=(_WIDTH, 3.4))
    for variant, probes in found.items():
        name = _who(variant)
        xs, ys = [probe["answer"] for probe in probes], [probe["peak_bytes"] / 2**30 for probe in probes]
        axes.plot(xs, ys, f"{_MARKS[name]}-", color=_COLOURS[name], linewidth=1.3, markersize=4, label=name)
        axes.annotate(
            f"{xs[-1]:,}", (xs[-1], ys[-1]), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7
        )
    axes.axhline(memory / 2**30, color="#888888", linestyle=":", linewidth=1.5, label="memory of the GPU")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_ylim(0, memory / 2**30 * 1.12)
    _frame(axes, "tokens of an answer", "peak memory of a GRPO step, GiB")
    handles, labels = axes.get_legend_handles_labels()
    return _finish(figure, handles, labels, 5)


def _gradients(op: str, tokens: int, rest: list[int]) -> int:
    """Bytes of the gradients in fp32: of the logits, or of the hidden states and the head."""
    if op.startswith("linear_"):
        width, vocabulary = rest
        return 4 * (tokens + vocabulary) * width
    return 4 * tokens * rest[-1]
