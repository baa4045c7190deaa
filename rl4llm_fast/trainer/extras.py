"""Optional packages: a missing one is an ImportError that names the command which brings it."""

from __future__ import annotations

import importlib.util


def require(*packages: str, extra: str) -> None:
    """Raise ImportError naming the pip command of ``extra`` if one of ``packages`` is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{', '.join(missing)} missing: this part of rl4llm_fast needs the extra {extra!r}: "
            f"pip install 'rl4llm_fast[{extra}]'"
        )
