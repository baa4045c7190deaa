"""How Triton and C++ spell what a token formula can say: data for ``codegen``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .symbolic import NAMES, Node

INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "=="}
LOGIC = {"and": "&", "or": "|"}
PRECEDENCE = {"or": 1, "and": 1, "lt": 2, "le": 2, "gt": 2, "ge": 2, "eq": 2, "add": 3, "sub": 3, "mul": 4, "div": 4}
UNARY, CALL = 5, 6
BOOLEAN = {*LOGIC, "lt", "le", "gt", "ge", "eq"}


@dataclass(frozen=True)
class Language:
    """How one language spells what a formula can say."""

    const: Callable[[float], str]
    call: Callable[[str, str], str]  # (operation, arguments)
    declare: Callable[[Node, str, str], str]  # (node, name, expression) -> a statement


# What a name of a formula may not be in the generated text: C++'s words that are no Python keywords, what the generated
# text itself says, and the operations.
_CPP_WORDS = """
    alignas alignof and_eq asm auto bitand bitor bool case catch char char16_t char32_t char8_t co_await co_return
    co_yield compl concept const const_cast consteval constexpr constinit decltype default delete do double
    dynamic_cast enum explicit export extern float friend goto inline int long mutable namespace new noexcept not_eq
    nullptr operator or_eq private protected public register reinterpret_cast requires short signed sizeof static
    static_assert static_cast struct switch template this thread_local throw true false typedef typeid typename union
    unsigned using virtual void volatile wchar_t xor xor_eq F M tl triton knobs ALL user_formula
"""
TAKEN = {*_CPP_WORDS.split(), *(name.removeprefix("m.") for name in NAMES)}


def spelled(name: str) -> str:
    return f"{name}_" if name in TAKEN else name


_TRITON_CALLS = {"log": "tl.log", "abs": "tl.abs", "where": "tl.where"}
TRITON = Language(
    const=lambda x: repr(x) if math.isfinite(x) else f'float("{x}")',
    call=lambda op, args: f"{_TRITON_CALLS.get(op, op)}({args})",
    declare=lambda node, name, text: f"{name} = {text}",
)
_CPP_NOT_FINITE = {"inf": "infinity(0.0f)", "-inf": "-infinity(0.0f)", "nan": "not_a_number(0.0f)"}
CPP = Language(
    const=lambda x: f"M::c({x!r})" if math.isfinite(x) else f"M::c({_CPP_NOT_FINITE[repr(x)]})",
    call=lambda op, args: f"M::{op}({args})",
    declare=lambda node, name, text: f"const {'auto' if node.op in BOOLEAN else 'F'} {name} = {text};",
)
