"""Traces a formula written against the maths namespace ``m``, and differentiates it.

The tracer keeps the order of operations as written: no term is moved, so that generated code rounds as the eager
formula does. Ties follow PyTorch: half of the gradient to each side of ``minimum`` and ``maximum``, all of it on the
closed interval of ``clamp``. Pure Python, imports nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any


class FormulaError(ValueError):
    """A formula uses an operation that the maths namespace does not have."""


class Node:
    """One operation; equal operations of a trace are one Node, so identity is equality."""

    __slots__ = ("args", "name", "op", "value")

    def __init__(self, op: str, args: tuple[Node, ...], value: float | str | None) -> None:
        self.op = op  # an operation of Maths, "const" or "input"
        self.args = args
        self.value = value  # the number of a const, the name of an input
        self.name: str | None = None  # the local variable that held it


def _refuse(operation: str) -> Callable[..., Any]:
    def method(*args: Any, **kwargs: Any) -> Any:
        raise FormulaError(f"{operation} is not in the maths namespace of token formulas; it has: {', '.join(NAMES)}")

    return method


class Expr:
    """What a formula computes with while it is traced."""

    __slots__ = ("node", "trace")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, trace: Trace, node: Node) -> None:
        self.trace = trace
        self.node = node

    def _binary(self, op: str, other: Any, swap: bool = False) -> Expr:
        left, right = self.trace.lift(self), self.trace.lift(other)
        return Expr(self.trace, self.trace.node(op, *((right, left) if swap else (left, right))))

    def __add__(self, other: Any) -> Expr:
        return self._binary("add", other)

    def __radd__(self, other: Any) -> Expr:
        return self._binary("add", other, swap=True)

    def __sub__(self, other: Any) -> Expr:
        return self._binary("sub", other)

    def __rsub__(self, other: Any) -> Expr:
        return self._binary("sub", other, swap=True)

    def __mul__(self, other: Any) -> Expr:
        return self._binary("mul", other)

    def __rmul__(self, other: Any) -> Expr:
        return self._binary("mul", other, swap=True)

    def __truediv__(self, other: Any) -> Expr:
        return self._binary("div", other)

    def __rtruediv__(self, other: Any) -> Expr:
        return self._binary("div", other, swap=True)

    def __neg__(self) -> Expr:
        return Expr(self.trace, self.trace.node("neg", self.node))

    def __lt__(self, other: Any) -> Expr:
        return self._binary("lt", other)

    def __le__(self, other: Any) -> Expr:
        return self._binary("le", other)

    def __gt__(self, other: Any) -> Expr:
        return self._binary("gt", other)

    def __ge__(self, other: Any) -> Expr:
        return self._binary("ge", other)

    def __eq__(self, other: object) -> Expr:  # type: ignore[override]
        return self._binary("eq", other)

    def __and__(self, other: Any) -> Expr:
        return self._binary("and", other)

    def __or__(self, other: Any) -> Expr:
        return self._binary("or", other)

    def __getattr__(self, name: str) -> Any:
        raise FormulaError(f".{name} is not in the maths namespace of token formulas; it has: {', '.join(NAMES)}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _refuse(f"torch.{getattr(func, '__name__', func)}")()

    def __array_ufunc__(self, ufunc: Any, *args: Any, **kwargs: Any) -> Any:
        return _refuse(f"numpy.{ufunc.__name__}")()

    __bool__ = _refuse("a Python branch on a tensor (if, and, or, not; use m.where)")
    __float__ = __int__ = __index__ = _refuse("conversion to a Python number (math.*, float, int)")
    __pow__ = __rpow__ = _refuse("** (multiply instead)")
    __mod__ = __rmod__ = _refuse("%")
    __floordiv__ = __rfloordiv__ = _refuse("//")
    __matmul__ = __rmatmul__ = _refuse("@")
    __abs__ = _refuse("abs() (use m.abs)")
    __getitem__ = _refuse("indexing")
    __len__ = __iter__ = _refuse("iteration")
    __ne__ = _refuse("!=")
    __invert__ = _refuse("~")


class Maths:
    """The namespace ``m`` of a trace; ``formulas.EagerMaths`` is the same over torch tensors."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def _call(self, op: str, *args: Any) -> Expr:
        trace = self._trace
        return Expr(trace, trace.node(op, *(trace.lift(a) for a in args)))

    def exp(self, x: Any) -> Expr:
        return self._call("exp", x)

    def log(self, x: Any) -> Expr:
        return self._call("log", x)

    def sigmoid(self, x: Any) -> Expr:
        return self._call("sigmoid", x)

    def logsigmoid(self, x: Any) -> Expr:
        return self._call("logsigmoid", x)

    def abs(self, x: Any) -> Expr:
        return self._call("abs", x)

    def sign(self, x: Any) -> Expr:
        return self._call("sign", x)

    def minimum(self, a: Any, b: Any) -> Expr:
        return self._call("minimum", a, b)

    def maximum(self, a: Any, b: Any) -> Expr:
        return self._call("maximum", a, b)

    def clamp(self, x: Any, low: Any, high: Any) -> Expr:
        return self._call("clamp", x, low, high)

    def where(self, condition: Any, a: Any, b: Any) -> Expr:
        return self._call("where", condition, a, b)

    def detach(self, x: Any) -> Expr:
        return self._call("detach", x)

    def with_gradient(self, value: Any, surrogate: Any) -> Expr:
        """``value``, whose derivative is that of ``surrogate``."""
        return self._call("with_gradient", value, surrogate)

    def __getattr__(self, name: str) -> Any:
        return _refuse(f"m.{name}")()


_METHODS = tuple(n for n, f in vars(Maths).items() if callable(f) and not n.startswith("_"))
NAMES = (*(f"m.{n}" for n in _METHODS), "+", "-", "*", "/", "<", "<=", ">", ">=", "==", "&", "|")


class Trace:
    """The operations of one formula, in the order in which they were first written."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[Any, ...], Node] = {}

    def node(self, op: str, *args: Node, value: float | str | None = None) -> Node:
        key = (op, value, *map(id, args))
        if key not in self._nodes:
            self._nodes[key] = Node(op, args, value)
        return self._nodes[key]

    def const(self, value: float) -> Node:
        return self.node("const", value=float(value))

    def input(self, name: str) -> Expr:
        return Expr(self, self.node("input", value=name))

    def lift(self, value: Any) -> Node:
        if isinstance(value, Expr):
            if value.trace is not self:
                raise FormulaError("a value of another formula leaked into this one")
            return value.node
        if isinstance(value, (int, float)):
            return self.const(value)
        got = "None: does the function return its result?" if value is None else type(value).__name__
        if isinstance(value, Maths):
            got = "m itself: a function's first parameter is the maths namespace"
        raise FormulaError(f"wanted a number or a value of the formula, got {got}")

    def run(
        self, formula: Callable[..., Any], inputs: Sequence[str], /, maths: type[Maths] = Maths, **static: Any
    ) -> tuple[Node, ...]:
        """The outputs of ``formula(m, *inputs, **static)``; operations take the names of the locals that held them."""

        def name_locals(frame: FrameType, event: str, argument: Any) -> None:
            if event == "return" and frame.f_code.co_filename != __file__:
                for name, value in frame.f_locals.items():
                    if isinstance(value, Expr) and value.trace is self:
                        node = self.strip(value.node)
                        if node.op not in ("input", "const") and node.name is None:
                            node.name = name

        before = sys.getprofile()
        sys.setprofile(name_locals)
        try:
            result = formula(maths(self), *map(self.input, inputs), **static)
        finally:
            sys.setprofile(before)
        return tuple(self.lift(r) for r in (result if isinstance(result, tuple) else (result,)))

    # The derivative, forward through the graph: None stands for 0, so that nothing is added to or multiplied by it.

    def derivative(self, node: Node, name: str, memo: dict[int, Node | None] | None = None) -> Node | None:
        """d node / d (the input ``name``), as operations of this trace."""
        memo = {} if memo is None else memo
        if id(node) not in memo:
            result = self._differentiate(node, lambda n: self.derivative(n, name, memo))
            value = self.strip(node)
            if result is not None and result.name is None and value.name and result.op not in ("const", "input"):
                result.name = f"d_{value.name}"
            memo[id(node)] = result
        found = memo[id(node)]
        return self.const(1.0) if node.op == "input" and node.value == name else found

    def _differentiate(self, node: Node, d: Callable[[Node], Node | None]) -> Node | None:
        op, args = node.op, node.args
        if op in ("input", "const", "detach", "sign"):
            return None
        if op == "with_gradient":
            return d(args[1])
        if op == "where":
            yes, no = d(args[1]), d(args[2])
            return None if yes is no is None else self._where(args[0], yes, no)
        if op in ("minimum", "maximum"):
            a, b = args
            da, db = d(a), d(b)
            if da is db is None:
                return None
            half = self._times(self.const(0.5), self._plus(da, db))
            first, second = ("lt", "gt") if op == "minimum" else ("gt", "lt")
            # Not a >= b last: a NaN must reach the derivative too, and it fails every comparison.
            return self._where(self.node(first, a, b), da, self._where(self.node(second, a, b), db, half))
        if op == "clamp":
            x, low, high = args
            if d(low) is not None or d(high) is not None:
                raise FormulaError("m.clamp: its bounds must not depend on logp (use m.minimum, m.maximum)")
            dx = d(x)
            inside = self.node("and", self.node("ge", x, low), self.node("le", x, high))
            return None if dx is None else self._where(inside, dx, None)
        if op in ("add", "sub"):
            da, db = d(args[0]), d(args[1])
            if da is not None and db is not None:
                return self.node(op, da, db)
            return da or (self._minus(db) if op == "sub" else db)
        if op == "neg":
            return self._minus(d(args[0]))
        if op == "mul":
            return self._plus(self._times(d(args[0]), args[1]), self._times(args[0], d(args[1])))
        if op == "div":
            da, db = d(args[0]), d(args[1])
            if db is not None:
                da = self._plus(da, self._minus(self._times(node, db)))
            return None if da is None else self.node("div", da, args[1])
        dx = d(args[0])
        if dx is None:
            return None
        if op == "exp":
            return self._times(node, dx)
        if op == "log":
            return self.node("div", dx, args[0])
        if op == "log1p":
            return self.node("div", dx, self.node("add", self.const(1.0), args[0]))
        if op == "expm1":
            return self._times(self.node("add", node, self.const(1.0)), dx)
        if op == "abs":
            return self._times(self.node("sign", args[0]), dx)
        if op == "sigmoid":
            return self._times(self.node("mul", node, self.node("sub", self.const(1.0), node)), dx)
        if op == "logsigmoid":
            return self._times(self.node("sigmoid", self.node("neg", args[0])), dx)
        raise FormulaError(f"{op} has no derivative: it is a condition of m.where, not a number")

    def _where(self, condition: Node, yes: Node | None, no: Node | None) -> Node:
        zero = self.const(0.0)
        return self.node("where", condition, yes or zero, no or zero)

    def _plus(self, a: Node | None, b: Node | None) -> Node | None:
        if a is None or b is None:
            return a or b
        return self.node("sub", a, b.args[0]) if b.op == "neg" else self.node("add", a, b)

    def _minus(self, a: Node | None) -> Node | None:
        if a is None:
            return None
        if a.op == "const":
            assert isinstance(a.value, float)
            return self.const(-a.value)
        return a.args[0] if a.op == "neg" else self.node("neg", a)

    def _times(self, a: Node | None, b: Node | None) -> Node | None:
        if a is None or b is None:
            return None
        for one, other in ((a, b), (b, a)):
            if one.op == "const" and one.value in (1.0, -1.0):
                return other if one.value == 1.0 else self._minus(other)
        return self.node("mul", a, b)

    def strip(self, node: Node) -> Node:
        """The operations that give a node's value: detach and with_gradient matter to derivatives only."""
        if node.op in ("detach", "with_gradient"):
            return self.strip(node.args[0])
        stripped = self.node(node.op, *map(self.strip, node.args), value=node.value)
        stripped.name = stripped.name or node.name
        return stripped
