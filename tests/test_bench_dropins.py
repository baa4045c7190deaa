"""The tables of docs/drop-in.md: each has its place on the page, and is put there with what made it."""

from __future__ import annotations

import pytest

from bench import dropin_page, report


@pytest.mark.parametrize("name", ["trainers", "head", "verl", "openrlhf", "hf"])
def test_the_page_has_a_place_for_each(name: str) -> None:
    text = dropin_page.PAGE.read_text(encoding="utf-8")
    begin, end = report.marks(f"dropin-{name}")
    assert text.count(begin) == text.count(end) == 1
    assert text.index(begin) < text.index(end)


def test_a_table_is_printed_and_written(tmp_path, monkeypatch, capsys) -> None:
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- dropin-hf:begin -->\nold\n<!-- dropin-hf:end -->\n\nBehind.\n", encoding="utf-8")
    monkeypatch.setattr(dropin_page, "PAGE", page)
    for write in (False, True):
        table = dropin_page.Table("dropin-hf", ["what", "theirs", "ours"])
        table.add(["time", "2.00 s", "1.00 s"])
        table.close("bench.dropin_functions hf", write)
        assert "| time | 2.00 s | 1.00 s |" in capsys.readouterr().out
        assert ("old" in page.read_text(encoding="utf-8")) is not write
    text = page.read_text(encoding="utf-8")
    rows = "| what | theirs | ours |\n|---|---|---|\n| time | 2.00 s | 1.00 s |\n"
    assert f"{rows}\n`python -m bench.dropin_functions hf` on " in text
    assert text.startswith("Before.\n")
    assert text.endswith("Behind.\n")
