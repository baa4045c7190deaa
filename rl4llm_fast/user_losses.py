"""A user's own token loss: registered and checked here, and made into the kernels' formula at its first use.

The text comes from ``codegen``, as that of the built-in formulas does. For Triton it is a module, whose function the
kernel takes as its constexpr formula. For the CPU it is compiled with the system's compiler against the library's own
headers, once for each instruction set, and its two entry points are handed to the extension. Both are kept in a folder
on disk: RL4LLM_FAST_CACHE_DIR, else rl4llm_fast under XDG_CACHE_HOME (by default ~/.cache).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import inspect
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import dispatch
from ._version import __version__
from .errors import BackendError
from .formulas import FORMULAS, KINDS, MAX_KNOBS, POLICY_INPUTS, EagerMaths, PolicyFormula
from .symbolic import FormulaError, Trace

if TYPE_CHECKING:
    from . import codegen

_PACKAGE = Path(__file__).resolve().parent
_FUNCTION = "user_formula"
_DIGEST = 32  # bytes of SHA-256 behind a shared object, which the loader does not look at

_functions: dict[str, codegen.Function] = {}  # by op name; never forgotten, a compiled graph may still call one


def token_loss(
    name: str, knobs: Mapping[str, float] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a token-level policy loss under ``policy_loss(kind=name)``, fused like the built-in ones.

    The decorated function ``f(m, logp, old, ref, adv, *knobs)`` gives the loss of one token, to be minimised. It is
    written against the maths namespace ``m``: m.exp, log, sigmoid, logsigmoid, abs, sign, minimum, maximum, clamp,
    where, detach, with_gradient, comparisons, & | + − * /. Its inputs are found by name, any of logp, old, ref, adv
    (and log_s, the mean of logp − old over the sequence, which carries no gradient of its own); all others are knobs.

    The function is traced and differentiated here, so that what the namespace cannot say is an error now and not in the
    middle of a training run. Numbers that it takes from elsewhere are read now. It runs on the eager, CPU and Triton
    backends; on the CPU it is compiled at its first use (a second or two, kept on disk). Without a C++ compiler it runs
    on eager, and a warning says so once.

    Args:
        name: the kind; a name of the library's own is refused, registering one's own again replaces it.
        knobs: the knobs' defaults, at most four. A knob may be a number or a 0-d tensor in every call.

    Raises:
        TypeError, ValueError: an operation outside the namespace, a knob without a default or without a use, a result
            that is not one number per token or does not depend on logp, or a name that is taken.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f'name: wanted a non-empty str, as in @rf.token_loss("my_loss"), got {name!r}')
    if knobs is not None and not isinstance(knobs, Mapping):
        raise TypeError(f"token_loss {name!r}: knobs: wanted a dict of defaults, got {type(knobs).__name__}")
    defaults = dict(knobs or {})

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        from . import codegen  # needed by no one who registers nothing

        if (name in KINDS and name not in FORMULAS) or (name in FORMULAS and FORMULAS[name].builtin):
            raise ValueError(f"token_loss: {name!r} is the name of a built-in loss")
        _check_signature(name, function, defaults)
        needs_ref = _check_formula(name, function, tuple(defaults))
        plain = PolicyFormula(function, builtin=False)
        traced = codegen.policy_function(_FUNCTION, plain)
        text = codegen.user_cpp_source("", traced)
        op_name = f"{name}.{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        _functions[op_name] = traced
        FORMULAS[name] = PolicyFormula(function, builtin=False, needs_ref=needs_ref, op_name=op_name)
        KINDS[name] = {knob: float(value) for knob, value in defaults.items()}
        return function

    return register


def _check_signature(name: str, function: Callable[..., Any], defaults: Mapping[str, Any]) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    for parameter in parameters:
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            raise ValueError(f"token_loss {name!r}: wanted plain parameters (m, inputs, knobs), got {parameter}")
    if not parameters:
        raise ValueError(f"token_loss {name!r}: wanted a function of the maths namespace m, inputs and knobs")
    if parameters[0].name in POLICY_INPUTS:
        raise ValueError(f"token_loss {name!r}: the first parameter is the maths namespace m, got {parameters[0].name}")
    knobs = [p.name for p in parameters[1:] if p.name not in POLICY_INPUTS]
    for parameter in parameters[1:]:
        if parameter.name in knobs and parameter.name not in defaults:
            value = "..." if parameter.default is inspect.Parameter.empty else repr(parameter.default)
            raise ValueError(
                f"token_loss {name!r}: {parameter.name} is neither an input ({', '.join(POLICY_INPUTS)}) nor a knob "
                f"with a default: knobs={{{parameter.name!r}: {value}}}"
            )
    taken = _arguments()
    for knob, value in defaults.items():
        if knob not in knobs:
            raise ValueError(f"token_loss {name!r}: the function has no parameter for the knob {knob!r}")
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"token_loss {name!r}: {knob}: wanted a number as default, got {type(value).__name__}")
        if knob in taken:
            raise ValueError(f"token_loss {name!r}: {knob} is an argument of {taken[knob]} itself; rename the knob")
    if len(knobs) > MAX_KNOBS:
        raise ValueError(f"token_loss {name!r}: wanted at most {MAX_KNOBS} knobs, got {len(knobs)}: {', '.join(knobs)}")


def _arguments() -> dict[str, str]:
    """The names that mean something else in a call with knobs, and whose they are."""
    from .fused import linear_policy_loss  # both import this module
    from .losses import policy_loss

    found: dict[str, str] = {}
    for function in (linear_policy_loss, policy_loss):
        parameters = inspect.signature(function).parameters.values()
        own = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
        found |= dict.fromkeys(own, function.__name__)
    return found


def _check_formula(name: str, function: Callable[..., Any], knobs: tuple[str, ...]) -> bool:
    """Whether the formula needs ref; an error for what cannot be a loss."""
    from . import codegen

    parameters = list(inspect.signature(function).parameters)[1:]
    trace = Trace()
    try:
        outputs = trace.run(function, parameters)
        slope = trace.derivative(outputs[0], "logp") if outputs else None
    except (FormulaError, TypeError) as error:
        raise FormulaError(f"token_loss {name!r}: {error}") from error
    if len(outputs) != 1:
        raise FormulaError(f"token_loss {name!r}: wanted one value per token, got {len(outputs)}")
    if slope is None:
        hint = "; log_s is a constant to it: m.with_gradient(log_s, logp)" if "log_s" in parameters else ""
        raise FormulaError(f"token_loss {name!r}: the result does not depend on logp, or only through m.detach{hint}")
    used = codegen.inputs_of(outputs[0])
    for knob in knobs:
        if knob not in used:
            raise FormulaError(f"token_loss {name!r}: the knob {knob!r} is not used")
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    try:
        result = function(EagerMaths, *(one if p in POLICY_INPUTS else one[0] for p in parameters))
    except (AttributeError, RuntimeError, TypeError) as error:
        raise FormulaError(f"token_loss {name!r} fails on tensors: {error}") from error
    if not isinstance(result, torch.Tensor) or result.shape != one.shape or result.dtype != one.dtype:
        raise FormulaError(f"token_loss {name!r}: wanted one number per token, got {result!r} for one token")
    return "ref" in used


# The choice of a backend, and what it needs.


def prepare(kind: str, chosen: str, named: bool) -> str:
    """The backend that runs a registered kind where a built-in one would run on ``chosen``, ready to be called.

    Raises:
        BackendError: ``chosen`` was asked for by name and cannot run it.
    """
    op_name = FORMULAS[kind].op_name
    if chosen == "cuda":
        reason: str | None = "registered formulas run on Triton, the CPU and eager; CUDA C++ holds the built-in ones"
        if not named and dispatch.why_not("policy_loss", "triton", "cuda") is None:
            return "triton"
    elif chosen == "cpu":
        assert dispatch.extension is not None
        reason = _compiled(op_name, dispatch.extension.build_info()["cpu_instruction_set_in_use"])
    else:
        return chosen
    if reason is None:
        return chosen
    if named:
        raise BackendError(f"backend {chosen!r} cannot run kind {kind!r}: {reason}")
    _warn_once(kind, reason)
    return "eager"


# What torch.compiler.assume_constant_result does: Dynamo calls it while it traces, and keeps the answer. Importing
# torch.compiler's other half for one attribute would cost every user a second.
prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _warn_once(kind: str, reason: str) -> None:
    warnings.warn(f"policy_loss(kind={kind!r}) runs on the eager backend: {reason}", stacklevel=2)


def cache_folder() -> Path:
    """Where generated sources and compiled formulas are kept; created here."""
    named = os.environ.get("RL4LLM_FAST_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(named) if named else Path(base) / "rl4llm_fast"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(path: Path, content: bytes) -> None:
    """By a rename, so that another process sees the whole file or none."""
    descriptor, fresh = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    os.replace(fresh, path)


def _title(op_name: str) -> str:
    kind = "".join(c if c.isalnum() or c in " -_." else "_" for c in op_name.rpartition(".")[0])
    return f"The token loss {kind}, generated by rl4llm_fast {__version__}."


# Triton


@functools.cache
def triton_function(op_name: str) -> Any:
    """The formula as a triton.jit function: imported from a file, because Triton reads the source."""
    from . import codegen

    text = codegen.user_triton_source(_title(op_name), _functions[op_name]).encode()
    name = f"triton_{hashlib.sha256(text).hexdigest()[:32]}"
    path = cache_folder() / f"{name}.py"
    if not path.is_file() or path.read_bytes() != text:
        _write(path, text)
    spec = importlib.util.spec_from_file_location(f"rl4llm_fast_user_losses.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, _FUNCTION)


# C++


@functools.cache
def _compiled(op_name: str, isa: str) -> str | None:
    """None once the extension has the formula for this instruction set, else why it cannot."""
    from . import codegen

    assert dispatch.extension is not None
    compiler = _compiler()
    headers = _headers()
    if compiler is None:
        return "no C++ compiler was found (CXX, g++, c++, clang++)"
    if headers is None:
        return "the library's C++ headers are not installed"
    info = dispatch.extension.build_info()
    flags = dict(zip(info["cpu_instruction_sets"], info["cpu_instruction_set_flags"], strict=True))[isa]
    arguments = [*shlex.split(info["cpu_flags"]), *shlex.split(flags), "-shared", "-w"]
    arguments += [f"-DRL4LLM_ISA={isa}", f"-DRL4LLM_ISA_{isa.upper()}=1", f"-I{headers}"]
    text = codegen.user_cpp_source(_title(op_name), _functions[op_name])
    try:
        about = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60).stdout.decode()
        headers_text = [f.read_text() for f in _header_files(headers)]
        # The headers' contents, not where they lie: hence without -I.
        parts: list[str] = [__version__, *compiler, about, *arguments[:-1], text, *headers_text]
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
        library = _library(cache_folder() / f"cpu_{isa}_{key}", text, [*compiler, *arguments])
    except subprocess.CalledProcessError as error:
        message = (error.stderr or b"").decode(errors="replace").strip()
        return f"{shlex.join(compiler)} failed: {message[:2000]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"it could not be compiled: {error}"
    fp32, fp64 = (ctypes.cast(getattr(library, f"rl4llm_policy_{d}"), ctypes.c_void_p).value for d in ("fp32", "fp64"))
    dispatch.extension.register_policy_formula(op_name, isa, fp32, fp64)
    return None


def _library(path: Path, text: str, command: list[str]) -> ctypes.CDLL:
    """The shared object of ``text``, from the cache if a whole one lies there."""
    compiled = path.with_suffix(".so")
    content = compiled.read_bytes() if compiled.is_file() else b""
    if hashlib.sha256(content[:-_DIGEST]).digest() != content[-_DIGEST:]:
        source = path.with_suffix(".cpp")
        _write(source, text.encode())
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fresh = Path(folder) / compiled.name
            subprocess.run([*command, str(source), "-o", str(fresh)], capture_output=True, check=True, timeout=300)
            content = fresh.read_bytes()
        _write(compiled, content + hashlib.sha256(content).digest())
    return ctypes.CDLL(str(compiled))


def _compiler() -> list[str] | None:
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [["g++"], ["c++"], ["clang++"]]
    return next((c for c in candidates if c and shutil.which(c[0])), None)


def _headers() -> Path | None:
    """csrc in the installed package, or beside it in a checkout."""
    return next((f for f in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if (f / "hd.h").is_file()), None)


def _header_files(folder: Path) -> list[Path]:
    names = ("hd.h", "token_formulas_gen.h", "cpu/isa.h", "cpu/token_loss.h", "cpu/token_loss_vec.h")
    return [folder / name for name in names]
