"""What the systems of docs/systems.md reached, from the folders of their runs into its table.

    python -m bench.systems RUNS [--note "one thread, other work beside it"] [--steps FILE.json]
                                 [--page docs/systems.md]

RUNS holds what the commands of the table wrote (``runs`` where they were started). What is found there goes into
bench/results/systems.json, in place of what it had of the same system; the table's last two columns are then written
from that file. Nothing is typed by hand: a system that was not run says so. FILE.json is what ``bench.end_to_end``
wrote of the trainers' steps; its table goes between the page's marks, and so do those of the two examples that write
tables of their own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from . import end_to_end, report
from .base import ROOT

RECORD = ROOT / "bench" / "results" / "systems.json"
FAMILY, KINDS = "dpo_family", "grpo_kinds"  # folders of examples/dpo_family.py and examples/grpo_kinds.py
PLOT = "ipo_settles.png"  # of the former
# The first cell of a row: where its figures lie, and which they are (heldout_NAME).
SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "SFT": ("sft_film_reviews", ("loss",)),
    "Reward model: pairs, K ranked answers, the bias of §4.1.5": ("rm_film_reviews", ("accuracy", "loss")),
    "DPO; label smoothing, soft labels": ("dpo_film_reviews", ("accuracy", "margin", "kl")),
    "robust DPO": (f"{FAMILY}/robust", ("accuracy", "margin", "kl")),
    "IPO": (f"{FAMILY}/ipo", ("accuracy", "margin", "kl")),
    "SLiC hinge": (f"{FAMILY}/hinge", ("accuracy", "margin", "kl")),
    "CPO": (f"{FAMILY}/cpo", ("accuracy", "margin", "kl")),
    "SimPO": (f"{FAMILY}/simpo", ("accuracy", "margin", "kl")),
    "ORPO": (f"{FAMILY}/orpo", ("accuracy", "margin", "kl")),
    "2D-DPO": (f"{FAMILY}/2d_dpo", ("accuracy", "margin", "kl")),
    "Curry-DPO": (f"{FAMILY}/curry", ("accuracy", "margin", "kl")),
    "KTO": (f"{FAMILY}/kto", ("accuracy", "margin", "kl")),
    "PPO, InstructGPT's third step; TRPO's refusal; kl_pen; PPO-ptx; one trunk, two heads": (
        "ppo_film_reviews",
        ("reward", "lexicon", "kl_ref_answer"),
    ),
    "GRPO, outcome supervision": ("chain_sum", ("accuracy",)),
    "GRPO, process supervision": (f"{KINDS}/process", ("accuracy",)),
    "the KL term": (f"{KINDS}/KL in the loss", ("accuracy",)),
    "Dr.GRPO": (f"{KINDS}/Dr.GRPO", ("accuracy",)),
    "leave-one-out (RLOO)": (f"{KINDS}/leave-one-out", ("accuracy",)),
    "DAPO: clip-higher, dynamic sampling, overlong answers": (f"{KINDS}/DAPO", ("accuracy",)),
    "GSPO": (f"{KINDS}/GSPO", ("accuracy",)),
    "CISPO": (f"{KINDS}/CISPO", ("accuracy",)),
    "SAPO": (f"{KINDS}/SAPO", ("accuracy",)),
    "sampler mismatch": ("sampler_mismatch", ("accuracy",)),
    "R1-Zero": ("r1_zero", ("format", "accuracy")),
    "R1: cold start, reasoning RL, rejection sampling and SFT, final RL": ("r1", ("accuracy", "format", "language")),
    "distillation": ("distill", ("accuracy",)),
}


def found(runs: pathlib.Path, source: str, names: Sequence[str]) -> dict[str, Any] | None:
    """{"figure", "seed", "date", "seconds_a_step"} of a system's run; None where there is none."""
    folder, _, method = source.partition("/")
    if method:
        path = runs / folder / "table.json"
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        row = next((row for row in rows if row.get("method", row.get("kind")) == method), None)
        if row is None:
            return None
        if folder == KINDS:
            before, after = {"heldout_accuracy": row["before"]}, row
        else:
            before, after = row["before"], row["after"]
        return {
            **_figure(before, after, names, row["steps"]), "seed": row.get("seed", 0), "date": _date(path),
            "seconds_a_step": row.get("seconds_a_step", row.get("seconds")),
        }  # fmt: skip
    if source == "r1":
        path = runs / folder / "r1.json"
        return _stages(path, names) if path.is_file() else None
    path = runs / folder / "metrics.jsonl"
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    held = [row for row in rows if f"heldout_{names[0]}" in row]
    if not held:
        return None
    seconds = sorted(row["seconds"] for row in rows if "seconds" in row)
    first = held[0] if held[0]["step"] == 0 else None
    result = _figure(first, held[-1], names, rows[-1]["step"])
    if first is None and f"reward_{names[0]}" in rows[0]:  # what it drew in its first step, before it had learned
        result["figure"] += f"; of the first step's samples {names[0]} {rows[0][f'reward_{names[0]}']:.2f}"
    return {**result, "seed": 0, "date": _date(path), "seconds_a_step": seconds[len(seconds) // 2]}


def _figure(before: dict[str, Any] | None, after: dict[str, Any], names: Sequence[str], steps: int) -> dict[str, str]:
    parts = []
    for name in names:
        start = "" if before is None else f"{_short(before[f'heldout_{name}'])} → "
        parts.append(f"{name.replace('_', ' ')} {start}{_short(after[f'heldout_{name}'])}")
    return {"figure": f"{', '.join(parts)} in {steps} steps"}


def _short(value: float) -> str:
    return f"{round(value, 4) + 0.0:.3g}"  # a rounding error is 0, and has no sign


def _stages(path: pathlib.Path, names: Sequence[str]) -> dict[str, Any]:
    """A figure for the first model and after each stage."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    parts = [f"{name} {' → '.join(format(row[f'heldout_{name}'], '.2f') for row in rows)}" for name in names]
    minutes = sum(row["seconds"] for row in rows) / 60
    figure = f"{'; '.join(parts)} (the first model, then each stage), {minutes:.0f} minutes"
    return {"figure": figure, "seed": 0, "date": _date(path), "seconds_a_step": None}


def _date(path: pathlib.Path) -> str:
    return datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.timezone.utc).strftime("%Y-%m-%d")


def write(page: pathlib.Path, record: dict[str, dict[str, Any]]) -> list[str]:
    """Fill the last two cells of the page's rows; the names of rows that have no run.

    Tables between marks are other tables, whose rows may have the same first cell: they are left alone.
    """
    lines, missing, marked = page.read_text(encoding="utf-8").split("\n"), [], False
    for i, line in enumerate(lines):
        if line.startswith("<!-- "):
            marked = line.endswith(":begin -->")
        if marked:
            continue
        cells = [cell.strip() for cell in line.split(" | ")]
        name = cells[0].removeprefix("|").strip()
        if len(cells) < 7 or name not in SOURCES:
            continue
        run = record.get(name)
        if run is None:
            missing.append(name)
        figure = "not run yet" if run is None else run["figure"]
        if run is not None and run["seconds_a_step"]:
            figure += f", {run['seconds_a_step']:.1f} s a step"
        when = "–" if run is None else f"{run['seed']}, {run['date']}"
        lines[i] = " | ".join([*line.split(" | ")[:5], figure, f"{when} |"])
    page.write_text("\n".join(lines), encoding="utf-8")
    return missing


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.systems", description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=pathlib.Path, help="the folder that the commands wrote their runs into")
    parser.add_argument("--note", default="", help="what else to say of these runs, kept with each")
    parser.add_argument("--page", type=pathlib.Path, default=ROOT / "docs" / "systems.md")
    parser.add_argument("--steps", type=pathlib.Path, help="whole steps, measured by bench.end_to_end")
    parser.add_argument("--record", type=pathlib.Path, default=RECORD)
    arguments = parser.parse_args(argv)
    record = json.loads(arguments.record.read_text(encoding="utf-8")) if arguments.record.is_file() else {}
    for name, (source, names) in SOURCES.items():
        run = found(arguments.runs, source, names)
        if run is not None:
            record[name] = {**run, "note": arguments.note}
            print(f"{name}: {run['figure']}")
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    arguments.record.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.steps is not None:
        result = json.loads(arguments.steps.read_text(encoding="utf-8"))
        report.rewrite(arguments.page, "steps", [end_to_end.markdown(result)])
    for folder in (FAMILY, KINDS):
        table = arguments.runs / folder / "table.md"
        if table.is_file():
            report.rewrite(arguments.page, folder, [table.read_text(encoding="utf-8").strip()])
    plot = arguments.runs / FAMILY / PLOT
    if plot.is_file():
        shutil.copyfile(plot, arguments.page.parent / PLOT)
    for name in write(arguments.page, record):
        print(f"{name}: no run in {arguments.runs}, and none recorded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
