"""A trainer's settings, as its help lists them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import tokenize
from typing import Any


def described(kind: type[Any]) -> str:
    """Each setting of a config with its default, its choices and what is said of it: the comment behind its field."""
    said: dict[str, str] = {}
    choices: dict[str, tuple[str, ...]] = {}
    for owner in (c for c in reversed(kind.__mro__) if dataclasses.is_dataclass(c)):
        choices |= vars(owner).get("CHOICES", {})
        said |= {name: comment for name, comment in _comments(owner).items() if comment or name not in said}
    rows = []
    for field in dataclasses.fields(kind):
        name, factory = field.name, field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        notes = [said[name], f"one of {', '.join(choices[name])}" if name in choices else ""]
        note = "; ".join(filter(None, notes))
        rows.append(f"{name} = {_toml(default)}".ljust(36) + (f"  # {note}" if note else ""))
    return "\n".join(row.rstrip() for row in rows)


def _comments(owner: type[Any]) -> dict[str, str]:
    """{field: the comment on its lines} of one class."""
    source = inspect.cleandoc(inspect.getsource(owner))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.removeprefix("# ") for t in tokens if t.type == tokenize.COMMENT}
    (class_node,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    found = {}
    for node in class_node.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found[node.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return found


def _toml(value: Any) -> str:
    """A default as a TOML file would have it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\n", "\\n") + '"'
    return str(list(value)) if isinstance(value, tuple) else str(value)
