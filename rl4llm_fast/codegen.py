"""Writes the token formulas and their derivatives for Triton and for C++/CUDA, from their one Python source.

    python -m rl4llm_fast.codegen            rewrite kernels/*_formulas_gen.py and csrc/*_formulas_gen.h
    python -m rl4llm_fast.codegen --check    exit 1 if they are not what the formulas give

Equal operations become one; a temporary has the name of the local variable that held it in the formula, a derivative
with respect to logp the same name after ``d_``.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import formulas, weights
from .languages import CALL, CPP, INFIX, LOGIC, PRECEDENCE, TAKEN, TRITON, UNARY, Language, spelled
from .symbolic import Node, Trace

ROOT = Path(__file__).resolve().parent.parent
TRITON_FILE = ROOT / "kernels" / "token_formulas_gen.py"
CPP_FILE = ROOT / "csrc" / "token_formulas_gen.h"


@dataclass(frozen=True)
class Function:
    """A formula traced and differentiated: named outputs over inputs and knobs."""

    name: str
    doc: str
    inputs: tuple[str, ...]
    knobs: tuple[str, ...]
    outputs: tuple[tuple[str, Node], ...]

    def uses(self, name: str) -> bool:
        return any(name in inputs_of(output) for _, output in self.outputs)

    def body(self, language: Language) -> tuple[list[str], list[str]]:
        """The statements, and one expression for each output."""
        return _emit(self, language)


def _reachable(outputs: Iterable[Node]) -> list[Node]:
    """Every node that the outputs need, arguments first, in the order in which they are met."""
    order: list[Node] = []
    seen: set[int] = set()

    def visit(node: Node) -> None:
        if id(node) not in seen:
            seen.add(id(node))
            for argument in node.args:
                visit(argument)
            order.append(node)

    for output in outputs:
        visit(output)
    return order


def inputs_of(output: Node) -> set[str]:
    """The names of the inputs and knobs that a value is made from."""
    return {str(node.value) for node in _reachable([output]) if node.op == "input"}


def _emit(function: Function, language: Language) -> tuple[list[str], list[str]]:
    outputs = [node for _, node in function.outputs]
    nodes = _reachable(outputs)
    users: dict[int, int] = {}
    for node in nodes:
        for argument in node.args:
            users[id(argument)] = users.get(id(argument), 0) + 1
    for node in outputs:
        users[id(node)] = users.get(id(node), 0) + 1

    taken = {*map(spelled, function.inputs), *map(spelled, function.knobs), *TAKEN}
    names: dict[int, str] = {}
    size: dict[int, int] = {}  # operations within the expression that stands for the node
    statements: list[str] = []

    def text(node: Node, above: int, right: bool = False) -> str:
        if id(node) in names:
            return names[id(node)]
        if node.op == "input":
            return spelled(str(node.value))
        if node.op == "const":
            assert isinstance(node.value, float)
            return language.const(node.value)
        if node.op == "neg":
            result, level = f"-{text(node.args[0], UNARY)}", UNARY
        elif node.op in LOGIC:
            result, level = f" {LOGIC[node.op]} ".join(text(a, CALL) for a in node.args), PRECEDENCE[node.op]
        elif node.op in INFIX:
            level = PRECEDENCE[node.op]
            left, other = node.args
            result = f"{text(left, level)} {INFIX[node.op]} {text(other, level, right=True)}"
        else:
            result, level = language.call(node.op, ", ".join(text(a, 0) for a in node.args)), CALL
        # Parentheses on the right of an equal operator: a − (b − c); the order as written is kept.
        return f"({result})" if level < above or (level == above and right) else result

    for node in nodes:
        if node.op in ("input", "const"):
            size[id(node)] = 0
            continue
        size[id(node)] = 1 + sum(0 if id(a) in names else size[id(a)] for a in node.args)
        if node.name is None and users[id(node)] == 1 and (size[id(node)] <= 3 or [node] == outputs):
            continue
        base = node.name or "t"
        name = next(n for n in (base, *(f"{base}{i}" for i in range(2, 1000))) if n not in taken)
        statement = language.declare(node, name, text(node, 0))
        taken.add(name)
        names[id(node)] = name
        statements.append(statement)
    return statements, [text(node, 0) for node in outputs]


def _summary(function: Callable[..., Any]) -> str:
    """The first line of the docstring, in characters that end neither a string nor a comment of either language."""
    return re.sub(r'[\\"]', "'", (inspect.getdoc(function) or "").partition("\n")[0])


def policy_function(name: str, formula: formulas.PolicyFormula) -> Function:
    trace = Trace()
    inputs = formulas.POLICY_INPUTS
    outputs = trace.run(formulas.policy_token, (*inputs, *formula.knobs), formula=formula)
    slope = trace.derivative(outputs[0], "logp") or trace.const(0.0)
    results = map(trace.strip, (outputs[0], slope, *outputs[1:]))
    named = tuple(zip(("loss", "dlogp", *formulas.TOKEN_METRICS), results, strict=True))
    return Function(name, _summary(formula.function), inputs, formula.knobs, named)


@functools.cache
def policy_functions() -> tuple[Function, ...]:
    return tuple(policy_function(name, f) for name, f in formulas.FORMULAS.items() if f.builtin)


@functools.cache
def kl_functions() -> tuple[Function, ...]:
    result = []
    for name, choices in formulas.kl_variants():
        trace = Trace()
        inputs = ("logp", "ref", "old")
        (kl,) = trace.run(formulas.kl_estimate, inputs, **choices)
        slope = trace.derivative(kl, "logp") or trace.const(0.0)
        way = choices["gradient"].replace("_", "-") + (", clamped" if choices["clamp"] else "")
        doc = f"{choices['estimator']} of ref against logp, gradient: {way}."
        result.append(Function(f"kl_{name}", doc, inputs, (), (("kl", trace.strip(kl)), ("dkl", trace.strip(slope)))))
    return tuple(result)


@functools.cache
def weight_functions() -> tuple[Function, ...]:
    result = []
    for name, formula in weights.AGGREGATIONS.items():
        (weight,) = Trace().run(formula, weights.INPUTS)
        result.append(Function(name, _summary(formula), weights.INPUTS, (), (("weight", weight),)))
    return tuple(result)


@functools.cache
def correction_functions() -> tuple[Function, ...]:
    inputs = ("log_omega", "cap", "floor")
    result = []
    for name, formula in formulas.CORRECTIONS.items():
        (omega,) = Trace().run(formula, inputs)
        result.append(Function(f"rollout_{name}", _summary(formula), inputs, (), (("omega", omega),)))
    return tuple(result)


_HEADER = "Generated by `python -m rl4llm_fast.codegen` from rl4llm_fast/formulas.py and weights.py: edit those."

_TRITON_PREAMBLE = f'''"""{_HEADER}

A policy formula gives the loss of a token, its derivative and the metrics; a KL formula its value and derivative, both
with respect to logp; a weight formula the weight of a live token.
"""

import triton
import triton.language as tl

from .tl_math import exp

ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=ALL)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=ALL)


@triton.jit
def clamp(x, low, high):
    return minimum(maximum(x, low), high)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def logsigmoid(x):
    # The logarithm of 1 + u that keeps the bits of a small u.
    u = exp(-tl.abs(x))
    w = 1.0 + u
    return minimum(x, 0.0) - tl.where(w == 1.0, u, tl.log(w) * (u / (w - 1.0)))


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))
'''


def _triton_function(function: Function, parameters: Sequence[str]) -> str:
    statements, results = function.body(TRITON)
    knobs = [f"{spelled(name)} = knobs[{i}]" for i, name in enumerate(function.knobs)]
    lines = [f'"""{function.doc}"""', *knobs, *statements, f"return {', '.join(results)}"]
    head = f"@triton.jit\ndef {function.name}({', '.join(parameters)}):"
    return "\n".join([head, *(f"    {line}" for line in lines)])


def user_triton_source(title: str, function: Function) -> str:
    """The module of a user's own formula, as kernels/token_formulas_gen.py holds the built-in ones."""
    return f'''"""{title}"""

import triton
import triton.language as tl

from rl4llm_fast.kernels.tl_math import exp
from rl4llm_fast.kernels.token_formulas_gen import clamp, logsigmoid, maximum, minimum, sigmoid, sign


{_triton_function(function, (*function.inputs, "knobs"))}
'''


def triton_source() -> str:
    """kernels/token_formulas_gen.py"""
    parts = [_TRITON_PREAMBLE]
    parts += [_triton_function(f, (*f.inputs, "knobs")) for f in policy_functions()]
    parts += [_triton_function(f, f.inputs) for f in (*kl_functions(), *weight_functions(), *correction_functions())]

    def table(name: str, functions: Iterable[Function], prefix: str = "") -> str:
        rows = "\n".join(f'    "{f.name.removeprefix(prefix)}": {f.name},' for f in functions)
        return f"{name} = {{\n{rows}\n}}"

    parts.append(table("POLICY", policy_functions()))
    parts[-1] += "\n" + table("KL", kl_functions(), "kl_") + "\n" + table("WEIGHTS", weight_functions())
    parts[-1] += "\n" + table("CORRECTIONS", correction_functions(), "rollout_")
    return (
        "\n\n".join(part.strip("\n") if i == 0 else "\n" + part for i, part in enumerate(parts)).replace(
            "\n\n\n\n", "\n\n\n"
        )
        + "\n"
    )


_CPP_PREAMBLE = f"""// {_HEADER}
// clang-format off
//
// Every formula is a struct with a static eval<M>, where M is the maths of one processor: M::F the number, or vector of
// numbers M::S, that it computes with, M::c a constant of it, and functions named as in the formulas: M::exp, M::where.
#pragma once

#include "hd.h"

#if defined(__CUDACC__)
#define RL4LLM_FORMULA static __host__ __device__ __forceinline__
#else
#define RL4LLM_FORMULA static inline __attribute__((always_inline))
#endif

namespace rl4llm {{
namespace formulas {{

// The hyperparameters of a call, in the order of the vector that holds them; knob k is at num_params + k.
enum Param {{ {", ".join(f"param_{p}" for p in formulas.PARAMS)}, num_params }};
constexpr int max_knobs = {formulas.MAX_KNOBS};

// The metrics of a call, in the order of the vector that they leave in.
enum Metric {{
  {", ".join(f"metric_{name}" for name in formulas.METRICS[:5])},
  {", ".join(f"metric_{name}" for name in formulas.METRICS[5:])}, num_metrics
}};

// What a policy formula gives for a token: the loss, its derivative with respect to logp, and the metrics.
template <class F>
struct PolicyToken {{
  F loss, dlogp, {", ".join(formulas.TOKEN_METRICS)};
}};

// The value of a KL estimate and its derivative with respect to logp.
template <class F>
struct KlToken {{
  F kl, dkl;
}};
"""


def _cpp_function(function: Function, result: str, knobs: bool = False) -> str:
    statements, results = function.body(CPP)
    parameters = [f"F {name}" if function.uses(name) else f"F /*{name}*/" for name in function.inputs]
    if knobs:
        parameters.append("const typename M::S*" + (" knobs" if function.knobs else " /*knobs*/"))
    lines = [f"const F {spelled(name)} = M::c(knobs[{i}]);" for i, name in enumerate(function.knobs)]
    lines += [*statements, f"return {{{', '.join(results)}}};" if "<" in result else f"return {results[0]};"]
    body = "\n".join(f"    {line}" for line in lines)
    return (
        f"// {function.doc}\nstruct {function.name} {{\n  template <class M, class F = typename M::F>\n"
        f"  RL4LLM_FORMULA {result} eval({', '.join(parameters)}) {{\n{body}\n  }}\n}};"
    )


def user_cpp_source(title: str, function: Function) -> str:
    """The source of a user's own formula: the struct, and its two entry points."""
    entries = "\n\n".join(
        f'extern "C" __attribute__((visibility("default"))) void rl4llm_policy_{name}('
        f"const PolicySegment<{scalar}>& segment, double* sums) {{\n"
        f"  policy<Maths<{scalar}>, formulas::{function.name}>(segment, sums);\n}}"
        for name, scalar in (("fp32", "float"), ("fp64", "double"))
    )
    return (
        f'// {title}\n#include "cpu/token_loss_vec.h"\n\nnamespace rl4llm {{\nnamespace formulas {{\n\n'
        f"{_cpp_function(function, 'PolicyToken<F>', knobs=True)}\n\n}}  // namespace formulas\n\n"
        f"namespace RL4LLM_ISA {{\n\n{entries}\n\n}}  // namespace RL4LLM_ISA\n}}  // namespace rl4llm\n"
    )


def cpp_source() -> str:
    """csrc/token_formulas_gen.h"""
    parts = [_CPP_PREAMBLE.rstrip("\n")]
    parts += [_cpp_function(f, "PolicyToken<F>", knobs=True) for f in policy_functions()]
    parts += [_cpp_function(f, "KlToken<F>") for f in kl_functions()]
    parts += [_cpp_function(f, "F") for f in (*weight_functions(), *correction_functions())]
    parts.append("}  // namespace formulas\n}  // namespace rl4llm")

    def table(name: str, functions: Sequence[Function]) -> str:
        lines = [f"  X({f.name})" for f in functions]
        return f"#define RL4LLM_{name}(X) \\\n" + " \\\n".join(lines)

    parts.append("// X(formula) for each, in one order everywhere.")
    parts.append(table("POLICY_FORMULAS", policy_functions()))
    parts.append(table("KL_FORMULAS", kl_functions()))
    parts.append(table("WEIGHT_FORMULAS", weight_functions()))
    parts.append(table("CORRECTION_FORMULAS", correction_functions()))
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rl4llm_fast.codegen",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    check = parser.parse_args(arguments).check
    from . import codegen_pairs  # which uses this module

    stale = 0
    for path, source in ((TRITON_FILE, triton_source()), (CPP_FILE, cpp_source()), *codegen_pairs.sources()):
        if path.is_file() and path.read_text() == source:
            continue
        stale += 1
        if check:
            print(f"{path.relative_to(ROOT)} is out of date: run python -m rl4llm_fast.codegen", file=sys.stderr)
        else:
            path.write_text(source)
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
