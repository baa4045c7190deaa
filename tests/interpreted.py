"""Triton's interpreter, quicker: for processes in which nothing but the interpreter runs."""

from __future__ import annotations

from collections.abc import Callable


class _Kept:
    """In place of the record by which the interpreter takes its patches back."""

    def restore(self) -> None:
        pass


def patch_once() -> None:
    """triton.language patched once a module: the interpreter does it anew at each call of each device function.

    That is a third of its time, and changes nothing: what a device function's first call patches stays so.
    """
    from triton.runtime import interpreter

    patch: Callable[[Callable], object] | None = getattr(interpreter, "_patch_lang", None)
    if patch is None:  # a later Triton, whose interpreter does this in another way
        return
    patched: set[str] = set()

    def once(function: Callable) -> _Kept:
        if function.__module__ not in patched:
            patch(function)
            patched.add(function.__module__)
        return _Kept()

    interpreter._patch_lang = once
