"""The tables of docs/drop-in.md: printed as they are made, and with ``--write`` put between the page's markers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .base import ROOT
from .report import rewrite

PAGE = ROOT / "docs" / "drop-in.md"


class Table:
    """Rows under a head; ``name`` is that of the markers."""

    def __init__(self, name: str, head: Sequence[str]) -> None:
        self.name, self.lines = name, []
        self.add(head)
        self._line("|---" * len(head) + "|")

    def add(self, cells: Sequence[Any]) -> None:
        self._line(f"| {' | '.join(map(str, cells))} |")

    def _line(self, text: str) -> None:
        self.lines.append(text)
        print(text, flush=True)

    def close(self, command: str, write: bool) -> None:
        """Say what was run where; with ``write`` the page has it too."""
        from . import run

        meta = run.environment("cpu")
        modified = ", with local changes" if meta["dirty"] else ""
        where = f"{meta['device']}, {meta['date']}, torch {meta['torch']}, commit {meta['git']}{modified}"
        caption = f"`python -m {command}` on {where}. No GPU was measured."
        print(f"\n{caption}")
        if write:
            rewrite(PAGE, self.name, ["\n".join(self.lines), caption])
            print(f"rewrote the table {self.name} in {PAGE}")
