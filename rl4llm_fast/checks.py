"""Validation of arguments, before any kernel runs: every message names the argument, what came and what was wanted.

Also the two conversions that every op needs: a number or 0-d tensor to a hyperparameter tensor, and logits of any
leading shape and strides to rows (B, T, V).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_KEYS = torch._C._TorchDispatchModeKey
_WITHOUT_CONTENTS = (_KEYS.FAKE, _KEYS.PROXY, _KEYS.FUNCTIONAL)

# Number: a hyperparameter as the user gives it. A 0-d tensor may change between steps without a recompilation.
Number = float | int | Tensor


# Asked at every call: os.environ raises two exceptions to say no, 45 µs from a cold cache; the dict behind it takes 3.
_environment: Any = getattr(os.environ, "_data", os.environ)


def environment_key(name: str) -> Any:
    """What :func:`environment` calls a variable."""
    return name if _environment is os.environ else os.environ.encodekey(name)


def environment(name: str, key: Any) -> str:
    """An environment variable; "" where it is not set."""
    return os.environ[name] if key in _environment else ""


_DEBUG = "RL4LLM_FAST_DEBUG"
_debug_key = environment_key(_DEBUG)


def debug() -> bool:
    """Whether checks of a GPU tensor's contents are wanted, at the price of a synchronisation."""
    return environment(_DEBUG, _debug_key) == "1"


def shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def is_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: wanted a torch.Tensor, got {type(value).__name__}")


def are_tensors(**values: object) -> None:
    """Each a tensor, named as it is here."""
    for name, value in values.items():
        is_tensor(name, value)


def is_float(name: str, tensor: Tensor) -> None:
    """A dense floating-point tensor of a dtype that the library computes in."""
    is_tensor(name, tensor)
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: wanted a dense tensor (torch.strided), got {tensor.layout}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: wanted float32, bfloat16, float16 or float64, got {tensor.dtype}")


def is_integer(name: str, tensor: Tensor) -> None:
    is_tensor(name, tensor)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: wanted an integer tensor, got {tensor.dtype}")


def has_shape(name: str, tensor: Tensor, wanted: Sequence[int], like: str) -> None:
    if tensor.shape != wanted and shape(tensor) != tuple(wanted):
        raise ValueError(f"{name}: wanted the shape {tuple(wanted)} of {like}, got {shape(tensor)}")


def same_device(name: str, tensor: Tensor, reference: Tensor, like: str) -> None:
    if tensor.device != reference.device:
        raise ValueError(f"{name}: wanted the device {reference.device} of {like}, got {tensor.device}")


def live_mask(name: str, mask: Tensor | None, wanted: Sequence[int], reference: Tensor, like: str) -> Tensor | None:
    """A token mask as bool. Masks are bool or 0/1 integers; a float mask is an error, because 0.5 would be a guess."""
    if mask is None:
        return None
    is_tensor(name, mask)
    if mask.dtype != torch.bool:
        if mask.dtype.is_floating_point or mask.dtype.is_complex:
            raise TypeError(f"{name}: wanted a bool or 0/1 integer tensor, got {mask.dtype}: {name}.bool()?")
        _zeros_and_ones(name, mask)
        mask = mask != 0
    has_shape(name, mask, wanted, like)
    same_device(name, mask, reference, like)
    return mask


def _zeros_and_ones(name: str, mask: Tensor) -> None:
    """Labels or segment numbers are no mask. Looked at where that costs no synchronisation."""
    if unseen(mask) or not mask.numel():
        return
    low, high = (int(value) for value in mask.aminmax())
    if low < 0 or high > 1:
        raise ValueError(f"{name}: wanted 0 or 1 at every token, got values from {low} to {high}")


def without_contents() -> bool:
    """Whether a mode is in force whose tensors hold nothing to look at: fake ones, those of make_fx.

    Other modes, as those that count operations, have tensors like any.
    """
    return bool(_dispatch_modes()) and any(torch._C._get_dispatch_mode(key) is not None for key in _WITHOUT_CONTENTS)


def unseen(tensor: Tensor) -> bool:
    """Whether nobody may look at what a tensor holds: while a graph is made, or on a GPU, where it costs a wait."""
    if torch.compiler.is_compiling() or without_contents() or tensor.device.type == "meta":
        return True
    return tensor.device.type != "cpu" and not debug()


def at_every(name: str, tensor: Tensor, right: Callable[[Tensor], Tensor], wanted: str) -> Tensor:
    """``tensor``; an error with the first value, and its place, at which ``right`` of it is False.

    Not looked at where it is ``unseen``; but on a CPU, a compiled graph looks when it runs.
    """
    if torch.compiler.is_compiling() and tensor.device.type == "cpu":
        result: Tensor = torch.ops.rl4llm_fast.at_every(tensor, right(tensor), name, wanted)
        return result
    if not unseen(tensor):
        _look(tensor, right(tensor), name, wanted)
    return tensor


def _look(tensor: Tensor, right: Tensor, name: str, wanted: str) -> None:
    if not bool(right.all()):
        place = tuple((~right).nonzero()[0].tolist())
        raise ValueError(f"{name}: wanted {wanted}, got {tensor[place].item():g} at position {place}")


@torch.library.custom_op("rl4llm_fast::at_every", mutates_args=())
def _at_every(tensor: Tensor, right: Tensor, name: str, wanted: str) -> Tensor:
    _look(tensor, right, name, wanted)
    return tensor.clone()


@_at_every.register_fake
def _(tensor: Tensor, right: Tensor, name: str, wanted: str) -> Tensor:
    return torch.empty_like(tensor)


def flag(name: str, value: object) -> bool:
    """A bool, or a number in its place; a word would be true whatever it says."""
    if isinstance(value, (bool, Real)) or type(value).__name__ in ("bool", "bool_"):  # NumPy's, under two names
        return bool(value)
    raise TypeError(f"{name}: wanted a bool, got {type(value).__name__}")


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: wanted one of {', '.join(map(repr, allowed))}, got {value!r}")


def _tensor(plain: float | tuple[float, ...]) -> Tensor:
    with torch.inference_mode(False):  # or autograd could not save it
        return torch.tensor(plain, dtype=torch.float64, device="cpu")


# A run calls with the same numbers over and over, and a tensor from Python numbers takes 80 µs from a cold cache.
_kept_tensor = functools.lru_cache(maxsize=256)(_tensor)


def _of_plain(plain: float | tuple[float, ...]) -> Tensor:
    """Plain numbers as fp64 on the CPU, not to be written to. Inside a dispatch mode a tensor is the mode's own."""
    return _tensor(plain) if _dispatch_modes() else _kept_tensor(plain)


def number(name: str, value: Number, reference: Tensor, *, positive: bool = False) -> Tensor:
    """A hyperparameter as the 0-d tensor that ops take (see ``schemas``).

    A float becomes fp64 on the CPU; under Dynamo by an arithmetic that it keeps symbolic: no recompilation per value. A
    0-d tensor goes in as it is; one on the CPU that requires a gradient, or has more elements, is an error.
    ``positive`` refuses what is not finite too: infinity is no temperature, and no cap is None.
    """
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name}: wanted a number or a 0-d tensor, got a tensor of shape {shape(value)}")
        if value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{name}: wanted a real number, got a tensor of {value.dtype}")
        if value.requires_grad:
            raise ValueError(f"{name}: gets no gradient, but came as a tensor that requires one; pass {name}.detach()")
        if value.device.type != "cpu":
            same_device(name, value, reference, "its op")
            return value.to(torch.float32)
        if positive and not torch.compiler.is_compiling() and not 0 < value.item() < math.inf:
            raise ValueError(f"{name}: wanted a finite number > 0, got {value.item()}")
        return value.to(torch.float64)
    if isinstance(value, bool) or not isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: wanted a number or a 0-d tensor, got {type(value).__name__}")
        value = float(value)  # NumPy's
    # Of a number that Dynamo keeps symbolic only the sign is looked at.
    if positive and not (value > 0 if torch.compiler.is_compiling() else 0 < value < math.inf):
        raise ValueError(f"{name}: wanted a finite number > 0, got {value}")
    if type(value) in (float, int) and not torch.compiler.is_compiling():
        return _of_plain(value)
    return torch.ones((), dtype=torch.float64, device="cpu") * value


def plain(value: object) -> Any:
    """The number that a check may look at: a plain one, or that of a 0-d tensor on the CPU. None: there is none, or
    looking at it would wait for a GPU or break a graph."""
    if value is None or type(value) in (float, int):
        return value
    if isinstance(value, Tensor):
        if value.dim() or value.device.type != "cpu" or unseen(value):
            return None
        return None if value.dtype.is_complex or value.dtype == torch.bool else value.item()
    if isinstance(value, bool):
        return None
    return value if isinstance(value, (int, float)) else float(value) if isinstance(value, Real) else None


def real(name: str, value: Number, reference: Tensor) -> Number:
    """A number that goes on under another name, refused by the one that the user knows: a plain one, or 0-d tensor."""
    if type(value) in (float, int):
        return value
    checked = number(name, value, reference)
    return checked if isinstance(value, Tensor) else float(value) if isinstance(value, Real) else value


def scalar(name: str, value: object) -> float:
    """A number that is wanted at once; of a tensor with one element on a GPU that waits for it."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{name}: wanted a number, got a tensor of shape {shape(value)} and {value.dtype}")
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: wanted a number or a 0-d tensor, got {type(value).__name__}")
    return float(value)


def in_range(name: str, value: object, least: float, below: float | None = None, *, strict: bool = False) -> None:
    """least <= value < below, or least < value, for what ``plain`` can see."""
    if value is None:
        return
    seen: Any = value if type(value) is float else plain(value)
    if seen is None:
        return
    if not (seen > least if strict else seen >= least) or (below is not None and not seen < below):
        upper = "" if below is None else f" and < {below:g}"
        raise ValueError(f"{name}: wanted a number {'>' if strict else '>='} {least:g}{upper}, got {seen}")


def discount(name: str, value: Number, reference: Tensor) -> Tensor:
    """γ or λ as ``number`` gives it; it must lie in [0, 1]."""
    seen = plain(value)
    if seen is not None and not 0 <= seen <= 1:
        raise ValueError(f"{name}: wanted a number in [0, 1], got {seen}")
    return number(name, value, reference)


def integer(name: str, value: Any) -> int:
    """An int, NumPy's made one."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Integral)):
        raise TypeError(f"{name}: wanted an int, got {type(value).__name__}")
    return cast(int, value) if isinstance(value, (int, torch.SymInt)) else int(value)


def numbers(values: dict[str, Number], room: int, reference: Tensor) -> Tensor:
    """Hyperparameters as one fp64 vector (room,), zeros last: on the CPU, or on the device of a tensor among them."""
    spare = room - len(values)
    if {type(v) for v in values.values()} <= {float, int} and not torch.compiler.is_compiling():
        plain: tuple[Any, ...] = (*values.values(), *(0.0,) * spare)
        return _of_plain(plain)
    packed = [number(name, value, reference).double() for name, value in values.items()]
    device = next((p.device for p in packed if p.device.type != "cpu"), None)
    if device is not None:
        # A fill, not a copy from the host: it can be captured in a CUDA graph and waits for nothing.
        packed = [
            p if p.device == device else torch.full((), float(v), dtype=torch.float64, device=device)
            for p, v in zip(packed, values.values(), strict=True)
        ]
    return torch.cat([torch.stack(packed), packed[0].new_zeros(max(spare, 0))])


def as_rows(logits: Tensor) -> Tensor:
    """Logits (..., V) as (B, T, V) with unit stride over V: a view wherever strides allow one, else a copy.

    Two leading dimensions are kept apart because the commonest strided logits, ``logits[:, :-1]``, are no matrix.
    """
    vocabulary = logits.shape[-1]
    if logits.dim() == 1:
        rows = logits.view(1, 1, vocabulary)
    elif logits.dim() == 2:
        rows = logits.unsqueeze(0)
    elif logits.dim() == 3:
        rows = logits
    else:
        rows = logits.flatten(0, -3)
    # clone: an empty tensor counts as contiguous whatever its strides, and would keep them
    return rows if rows.stride(-1) == 1 or vocabulary <= 1 else rows.clone(memory_format=torch.contiguous_format)
