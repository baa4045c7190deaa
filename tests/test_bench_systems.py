"""The table of systems is filled from the folders of runs."""

from __future__ import annotations

import json
import pathlib

from bench import end_to_end, report, run, systems


def test_figures_come_from_runs(tmp_path: pathlib.Path) -> None:
    runs = tmp_path / "runs"
    rows = [
        {"step": 0, "heldout_loss": 2.0},
        {"step": 1, "seconds": 3.0},
        {"step": 2, "seconds": 1.0, "heldout_loss": 1.5},
    ]
    (runs / "sft_film_reviews").mkdir(parents=True)
    (runs / "sft_film_reviews" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (runs / "dpo_family").mkdir()
    held = [{f"heldout_{name}": value for name in ("accuracy", "margin", "kl")} for value in (0.0, 0.75)]
    family = [{"method": "ipo", "seed": 3, "steps": 24, "seconds_a_step": 2.0, "before": held[0], "after": held[1]}]
    (runs / "dpo_family" / "table.json").write_text(json.dumps(family))
    page, record = tmp_path / "page.md", tmp_path / "record.json"
    names = ("SFT", "IPO", "KTO", "unknown")
    page.write_text("\n".join(["text", *(f"| {name} | f | e | c | m | – | – |" for name in names)]), encoding="utf-8")
    arguments = [str(runs), "--page", str(page), "--record", str(record), "--note", "n"]
    assert systems.main(arguments) == 0
    first = page.read_text(encoding="utf-8")
    lines = first.split("\n")[1:]
    assert lines[0].startswith("| SFT | f | e | c | m | loss 2 → 1.5 in 2 steps, 3.0 s a step | 0, 20")
    assert lines[1].startswith(
        "| IPO | f | e | c | m | accuracy 0 → 0.75, margin 0 → 0.75, kl 0 → 0.75 in 24 steps, 2.0"
    )
    assert " | 3, 20" in lines[1]
    assert lines[2:] == ["| KTO | f | e | c | m | not run yet | – |", "| unknown | f | e | c | m | – | – |"]
    assert json.loads(record.read_text())["SFT"]["note"] == "n"
    assert systems.main([str(tmp_path / "none"), *arguments[1:]]) == 0  # what is recorded stays
    assert page.read_text(encoding="utf-8") == first
    begin, end = report.marks("steps")
    page.write_text(f"{begin}\n{end}\n{first}", encoding="utf-8")
    meta = {**run.environment("cpu"), "command": "c", "precision": "fp32", "trl": "1", "sizes": end_to_end.SIZES["cpu"]}
    row = {"trainer": "sft", "variant": "fused", "status": "failed", "reason": "r"}
    (tmp_path / "steps.json").write_text(json.dumps({"meta": meta, "rows": [row]}))
    assert systems.main([*arguments, "--steps", str(tmp_path / "steps.json")]) == 0
    assert "| sft | fused | failed: r |" in page.read_text(encoding="utf-8").split(end)[0]
    (runs / "dpo_family" / "table.md").write_text("| of all losses |\n")
    (runs / "dpo_family" / systems.PLOT).write_bytes(b"png")
    page.write_text("\n".join(report.marks("dpo_family")) + first, encoding="utf-8")
    assert systems.main(arguments) == 0
    begin, end = report.marks("dpo_family")
    assert page.read_text(encoding="utf-8") == f"{begin}\n| of all losses |\n{end}{first}"
    assert (page.parent / systems.PLOT).read_bytes() == b"png"


def test_tables_between_marks_are_left_alone(tmp_path: pathlib.Path) -> None:
    """grpo_kinds.py names its rows as the table of systems does."""
    page, (begin, end) = tmp_path / "page.md", report.marks("grpo_kinds")
    kinds = "| GSPO | 0.24 | 0.67 | 0.39 -> 0.89 | 7.1 | 3.7 | 0.6 | 0.2 |"
    page.write_text(f"{begin}\n{kinds}\n{end}\n| GSPO | f | e | c | m | – | – |", encoding="utf-8")
    run = {"figure": "accuracy 1", "seed": 0, "date": "today", "seconds_a_step": None}
    assert systems.write(page, {"GSPO": run}) == []
    assert page.read_text(encoding="utf-8") == (
        f"{begin}\n{kinds}\n{end}\n| GSPO | f | e | c | m | accuracy 1 | 0, today |"
    )


def test_every_row_of_the_page_has_a_source() -> None:
    page = (pathlib.Path(systems.ROOT) / "docs" / "systems.md").read_text(encoding="utf-8")
    names = {line.split(" | ")[0].removeprefix("| ") for line in page.split("\n") if line.count(" | ") == 6}
    assert set(systems.SOURCES) | {"system", "sampler mismatch"} == names


def test_stages_in_a_row(tmp_path: pathlib.Path) -> None:
    rows = [{"heldout_accuracy": value, "seconds": 60.0} for value in (0.0, 0.5)]
    (tmp_path / "r1").mkdir()
    (tmp_path / "r1" / "r1.json").write_text(json.dumps(rows))
    run = systems.found(tmp_path, "r1", ("accuracy",))
    assert run is not None
    assert run["figure"] == "accuracy 0.00 → 0.50 (the first model, then each stage), 2 minutes"
    assert systems.found(tmp_path, "distill", ("accuracy",)) is None
