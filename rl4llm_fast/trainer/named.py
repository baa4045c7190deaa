"""Functions by dotted name: how a config says which of the user's functions to call."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def named_function(name: str, setting: str) -> Callable[..., Any]:
    """The function ``package.module.function`` (or ``package.module:function``), also from the current folder.

    Raises:
        ValueError: no such module or function, naming ``setting``.
    """
    module, _, function = name.rpartition(":" if ":" in name else ".")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)  # a console script does not look there by itself
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise ValueError(f"config: {setting}: no function {name!r}: {error}") from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    if not callable(found):
        raise ValueError(f"config: {setting}: wanted a function, {name!r} is {type(found).__name__}")
    return found  # type: ignore[no-any-return]
