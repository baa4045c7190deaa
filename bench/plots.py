"""Plots of a suite's result at README size: how many times faster, and how much memory less."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from .peers import OURS

_COLOURS = {
    OURS: "#0b7a75",
    "eager": "#c8553d",
    "chunked": "#e0a458",
    "compile": "#5b6c9d",
    "trl": "#8f5fa8",
    "liger": "#7a8450",
    "cce": "#3f7cac",
    "torchrl": "#b5446e",
    "verl": "#5f8d4e",
    "quack": "#d08c60",
    "fla": "#6d597a",
    "loop": "#9a9a9a",
    "base": "#7d8590",
}

# File name suffix -> ink and paper: for pages in light and in dark.
_THEMES = {"": ("#1f2328", "#ffffff"), "-dark": ("#d1d7e0", "#0d1117")}

_SHORTEST = 0.1


def draw(result: dict[str, Any], folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """PNG files; none, with a line on stderr, where matplotlib is missing or no case has a figure."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plots: matplotlib is missing (pip install 'rl4llm_fast[bench]')", file=sys.stderr)
        return []
    from .report import title

    rows = [
        (title(record, "\n"), {r["implementation"]: r for r in record["results"]})
        for record in result["cases"]
        if any("speedup" in r for r in record["results"])
    ]
    if not rows:
        print("no plots: no case has a speed-up to show", file=sys.stderr)
        return []
    paths = []
    meta = result["meta"]
    footer = f"{meta['device']}, {meta['date'][:10]}, torch {meta['torch']}, commit {meta['git']}"
    speed = {name: {r: v["speedup"] for r, v in by.items() if "speedup" in v} for name, by in rows}
    memory = {
        name: {r: v["extra_bytes"] / 2**20 for r, v in by.items() if v.get("extra_bytes") is not None}
        for name, by in rows
    }
    for key, values, label in (
        ("speed", speed, "time, in units of rl4llm_fast's (1 = as fast)"),
        ("memory", memory, "peak memory beside the inputs, MiB"),
    ):
        if not any(values.values()):
            continue
        for suffix, (ink, paper) in _THEMES.items():
            colours = dict.fromkeys(
                ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink
            )
            path = folder / f"{stem}-{key}{suffix}.png"
            with plt.rc_context({**colours, "figure.facecolor": paper, "axes.facecolor": paper}):
                _bars(plt, values, label, footer, path)
            paths.append(path)
    return paths


def _number(value: float) -> str:
    if value < _SHORTEST:
        return f"< {_SHORTEST:g}"
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _bars(plt: Any, values: dict[str, dict[str, float]], label: str, footer: str, path: pathlib.Path) -> None:
    names = list(dict.fromkeys(peer for row in values.values() for peer in row))
    figure, axes = plt.subplots(figsize=(9, 1.1 + len(values) * (0.22 + 0.17 * len(names))), dpi=110)
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        at = [row + index * height for row, by in enumerate(values.values()) if name in by]
        true = [by[name] for by in values.values() if name in by]
        wide = [max(value, _SHORTEST) for value in true]  # a logarithmic axis has no zero
        bars = axes.barh(at, wide, height=height * 0.9, color=_COLOURS.get(name, "#888888"), label=name)
        axes.bar_label(bars, labels=[_number(value) for value in true], padding=3, fontsize=7)
    axes.set_xscale("log")
    if label.startswith("time"):
        axes.axvline(1.0, color=_COLOURS[OURS], linewidth=1.5)
    axes.margins(x=0.12, y=0.02)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(values))], list(values), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="upper right", ncols=len(names), fontsize=8, frameon=False)
    figure.text(0.995, 0.005, footer, ha="right", fontsize=6, alpha=0.7)
    figure.tight_layout(rect=(0, 0.01, 1, 1 - 0.35 / figure.get_figheight()))
    figure.savefig(path)
    plt.close(figure)
