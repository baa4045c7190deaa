"""Swapping functions of an installed package for drop-ins, and back without a trace.

A function is swapped wherever its object is bound: in the module that defines it, under whatever name other modules
imported it, and in the package's own registries (module-level dicts). What a module imports later comes from the
swapped binding; ``unpatch`` looks for the drop-ins again and so finds those bindings too. Out of reach are objects held
in closures, default arguments and instances; nothing in the supported versions holds one there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Target:
    """One object of a package and its drop-in."""

    module: str  # the module that defines it
    name: str  # its name there; "Class.method" for a method
    replacement: Any
    same_signature: bool = True  # False where Python cannot tell the original's (a bound builtin)

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Patch:
    """What a ``patch()`` did; as a context manager it is undone at the end of the block.

    ``swapped`` lists every binding that now holds a drop-in, ``skipped`` what was left alone and why.
    """

    package: str
    version: str
    swapped: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    _pairs: list[tuple[Any, Any]] = field(default_factory=list, repr=False)  # (original, drop-in)
    _methods: list[tuple[type, str, Any]] = field(default_factory=list, repr=False)

    def unpatch(self) -> None:
        """Restore the package, names bound to the drop-ins since included. Does nothing the second time."""
        for original, dropin in self._pairs:
            for _, namespace, key in _bindings(dropin, self.package):
                namespace[key] = original
        for owner, name, original in self._methods:
            if original is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        self._pairs.clear()
        self._methods.clear()
        if _active.get(self.package) is self:
            del _active[self.package]

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unpatch()

    def __str__(self) -> str:
        lines = [f"{self.package} {self.version}: {len(self.swapped)} bindings swapped"]
        lines += [f"  {name}" for name in self.swapped]
        lines += [f"  not {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


_active: dict[str, Patch] = {}
_INHERITED = object()  # stands for a method that the class itself did not have


def patch(package: str, versions: Sequence[str], targets: Sequence[Target], *, force: bool) -> Patch:
    """Swap ``targets`` inside an installed package.

    Args:
        package: its name, also that of its distribution.
        versions: what is known to work, as prefixes: "1.16" is every 1.16.x.
        targets: what to swap.
        force: take other versions too; what they lack, or what has another signature there, is skipped.

    Raises:
        ImportError: the package is not installed, or, without ``force``, of an unknown version.
        RuntimeError: it is patched already.
    """
    if package in _active:
        raise RuntimeError(f"{package} is patched already; unpatch() first")
    version = installed(package, versions, force=force)
    done = Patch(package, version)
    _active[package] = done
    try:
        for target in targets:
            reason = _swap(target, done)
            if reason is not None:
                done.skipped[str(target)] = reason
    except BaseException:
        done.unpatch()
        raise
    return done


def installed(package: str, versions: Sequence[str], *, force: bool) -> str:
    """The version of a package; ImportError where it is missing or, without ``force``, of an unknown version."""
    supported = f"known are {package} {', '.join(v + '.*' for v in versions)}"
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{package} is not installed; {supported}")
    version = _version(package)
    if not force and not any(version == v or version.startswith(v + ".") for v in versions):
        raise ImportError(f"{package} {version}: unknown version; {supported}; force=True tries anyway")
    return version


def unpatch(package: str) -> None:
    """Undo the package's ``patch()``; without one, do nothing."""
    if package in _active:
        _active[package].unpatch()


def original(package: str, module: str, name: str) -> Any:
    """The package's own object, whether it is patched or not."""
    found = getattr(importlib.import_module(module), name)
    for theirs, dropin in _active[package]._pairs if package in _active else ():
        if dropin is found:
            return theirs
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # on the path without being installed
        return str(getattr(importlib.import_module(package), "__version__", "of unknown version"))


def _swap(target: Target, done: Patch) -> str | None:
    """Swap one target everywhere; the reason where that was not possible."""
    try:
        module = importlib.import_module(target.module)
    except Exception as error:  # an optional part of the package may fail in any way where its own needs are missing
        return f"{target.module} does not import here ({type(error).__name__}: {error})"
    owner_name, _, name = target.name.rpartition(".")
    owner = getattr(module, owner_name, None) if owner_name else module
    theirs = getattr(owner, name, None)
    if theirs is None:
        return "this version does not have it"
    if target.same_signature and _parameters(theirs) != _parameters(target.replacement):
        return f"its arguments are {_parameters(theirs)}, the drop-in's {_parameters(target.replacement)}"
    dropin = _copy(target.replacement, theirs)
    if owner_name:
        assert isinstance(owner, type)
        done._methods.append((owner, name, owner.__dict__.get(name, _INHERITED)))
        setattr(owner, name, dropin)
        done.swapped.append(str(target))
        return None
    done._pairs.append((theirs, dropin))
    for place, namespace, key in _bindings(theirs, done.package):
        namespace[key] = dropin
        done.swapped.append(place)
    return None


def _copy(replacement: Any, theirs: Any) -> Any:
    """A drop-in of its own for one patch, under the original's name (so that it pickles by reference).

    A copy, because ``unpatch`` finds bindings by identity and must leave alone the names that users bound to the
    functions of ``rl4llm_fast.compat`` themselves.
    """
    if isinstance(replacement, type):
        copied: Any = type(replacement.__name__, (replacement,), {"__doc__": replacement.__doc__})
    else:
        copied = types.FunctionType(
            replacement.__code__,
            replacement.__globals__,
            replacement.__name__,
            replacement.__defaults__,
            replacement.__closure__,
        )
        copied.__dict__.update(replacement.__dict__)
        copied.__kwdefaults__, copied.__doc__ = replacement.__kwdefaults__, replacement.__doc__
    copied.__module__ = getattr(theirs, "__module__", None) or replacement.__module__
    copied.__qualname__ = getattr(theirs, "__qualname__", replacement.__qualname__)
    return copied


def _parameters(thing: Callable[..., Any] | type) -> list[str]:
    """Names of the arguments; of ``apply`` for an autograd.Function, and for a class that stands in for one."""
    if not isinstance(thing, type):
        return list(inspect.signature(thing).parameters)
    forward = getattr(thing, "forward", None)
    return _parameters(thing.apply) if forward is None else _parameters(forward)[1:]  # type: ignore[attr-defined]


def _bindings(value: Any, package: str) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    """(place, namespace, key) of every module's name, and every entry of the package's registries, for a value."""
    for module_name, module in list(sys.modules.items()):
        namespace = getattr(module, "__dict__", None)
        if not isinstance(namespace, dict) or (module_name + ".").startswith("rl4llm_fast."):
            continue
        registries = (module_name + ".").startswith(package + ".")
        for key, item in list(namespace.items()):
            if item is value:
                yield f"{module_name}.{key}", namespace, key
            elif registries and type(item) is dict and key != "__builtins__":
                for entry, held in list(item.items()):
                    if held is value:
                        yield f"{module_name}.{key}[{entry!r}]", item, entry
