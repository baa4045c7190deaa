"""The formulas by themselves: values worked by hand, derivatives, ties, and what a user may register."""

from __future__ import annotations

import itertools
import math
import random
import types

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast import codegen, formulas, weights
from rl4llm_fast.formulas import EagerMaths
from rl4llm_fast.symbolic import FormulaError, Node, Trace

INF = math.inf


def number(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


# (formula, logp, old, A, knobs, loss, dloss/dlogp), all by hand. ρ = exp(logp − old).
LN2 = math.log(2)
GOLDEN = [
    ("pg", -0.5, -1.0, 3.0, (), 1.5, -3.0),  # −logp·A = 0.5·3; −A
    ("cpi", -1.0, -1.0 - LN2, 3.0, (), -6.0, -6.0),  # ρ = 2: −2·3
    ("ppo_clip", -1.0, -1.0, 3.0, (0.2, 0.2, INF), -3.0, -3.0),  # ρ = 1, inside: −A, full gradient −ρA
    ("ppo_clip", -1.0, -1.0 - LN2, 3.0, (0.2, 0.2, INF), -3.6, 0.0),  # ρ = 2 > 1.2, A > 0: −1.2·3
    ("ppo_clip", -1.0, -1.0 - LN2, -3.0, (0.2, 0.2, INF), 6.0, 6.0),  # ρ = 2, A < 0: min(−6, −3.6) = −6, unclipped
    ("ppo_clip", -1.0, -1.0 + LN2, -3.0, (0.2, 0.2, INF), 2.4, 0.0),  # ρ = ½ < 0.8, A < 0: −0.8·−3
    ("ppo_clip", -1.0, -1.0 + LN2, 3.0, (0.2, 0.2, INF), -1.5, -1.5),  # ρ = ½, A > 0: min(1.5, 2.4)
    ("ppo_clip", -1.0, -1.0 - LN2, 3.0, (0.2, 0.5, INF), -4.5, 0.0),  # clip-higher: 1.5·3
    ("ppo_clip", -1.0, -1.0 - LN2, -3.0, (0.2, 0.2, 1.5), 4.5, 0.0),  # dual clip: min(6, 1.5·3)
    ("ppo_clip", -1.0, -1.0 - LN2, -3.0, (0.2, 0.2, 4.0), 6.0, 6.0),  # dual clip beyond ρ: nothing
    ("cispo", -1.0, -1.0 - LN2, 3.0, (0.2, 0.2), 3.6, -3.6),  # −sg(1.2)·3·(−1); −1.2·3
    ("cispo_cap", -1.0, -1.0 - LN2, 3.0, (5.0,), 6.0, -6.0),  # −sg(2)·3·(−1)
    ("cispo_cap", -1.0, -1.0 - LN2, 3.0, (1.5,), 4.5, -4.5),
    # ρ = 1: −(4/τ)·½·A = −2A/τ; derivative −(4/τ)·τ·¼·ρ·A = −A
    ("sapo", -1.0, -1.0, 3.0, (1.0, 1.05), -6.0, -3.0),
    ("sapo", -1.0, -1.0, -3.0, (1.0, 2.0), 3.0, 3.0),
    # ρ = 2: −2·3 + 0.1·(2 − 1 − ln 2); derivative −6 + 0.1·(ρ − 1)
    ("kl_pen", -1.0, -1.0 - LN2, 3.0, (0.1,), -6.0 + 0.1 * (1 - LN2), -5.9),
]
# d = ref − logp = ln 2, ρ = exp(logp − old) = 2
GOLDEN_KL = [
    ("k1", "value", -LN2, 1.0),
    ("k2", "value", LN2**2 / 2, -LN2),
    ("k3", "value", 1 - LN2, -1.0),  # 2 − ln 2 − 1; 1 − e^d = −1
    ("abs", "value", LN2, -1.0),
    ("k1", "straight_through", -LN2, -LN2),
    ("k3", "straight_through", 1 - LN2, -LN2),
    ("k1", "importance", -2 * LN2, 2 * (1 - LN2)),  # ρ·k1; ρ·(1 + k1)
    ("k3", "importance", 2 * (1 - LN2), 2 * (-1 + 1 - LN2)),  # ρ·k3; ρ·(−1 + k3)
]


def evaluate(formula, logp, old, adv, knobs):
    x = number(logp).requires_grad_()
    token = {"logp": x, "old": number(old), "adv": number(adv), "log_s": number(logp - old), "ref": None}
    loss = formulas.FORMULAS[formula](EagerMaths, token, *map(number, knobs))
    (slope,) = torch.autograd.grad(loss, x, allow_unused=True)
    return loss.item(), 0.0 if slope is None else slope.item()


@pytest.mark.parametrize(("formula", "logp", "old", "adv", "knobs", "loss", "slope"), GOLDEN)
def test_golden_policy(formula, logp, old, adv, knobs, loss, slope):
    got = evaluate(formula, logp, old, adv, knobs)
    assert got == pytest.approx((loss, slope), abs=1e-12)


@pytest.mark.parametrize(("estimator", "gradient", "value", "slope"), GOLDEN_KL)
def test_golden_kl(estimator, gradient, value, slope):
    x = number(-1.0).requires_grad_()
    kl = formulas.kl_estimate(
        EagerMaths, x, number(-1.0 + LN2), number(-1.0 - LN2), estimator=estimator, gradient=gradient, clamp=False
    )
    (got,) = torch.autograd.grad(kl, x)
    assert (kl.item(), got.item()) == pytest.approx((value, slope), abs=1e-12)


def test_golden_gspo():
    # s = 1.5 with A = 2 and ε_hi = 0.2: clipped to 1.2·2; with A = −2: −1.5·−2, gradient of the share s·A.
    s = math.log(1.5)
    x = number(-1.0).requires_grad_()
    for adv, loss, slope in ((2.0, -2.4, 0.0), (-2.0, 3.0, 3.0)):
        got = formulas.gspo(EagerMaths, x, number(adv), number(s), number(0.2), number(0.2))
        assert (got.item(), torch.autograd.grad(got, x)[0].item()) == pytest.approx((loss, slope), abs=1e-12)


def test_golden_weights():
    # 6 live tokens in 4 sequences, this one has 3, L_max = 8
    arguments = (number(3.0), number(6.0), number(4.0), number(8.0))
    wanted = {
        "token_mean": 1 / 6,
        "seq_mean_token_mean": 1 / 12,
        "seq_mean_token_sum": 1 / 4,
        "seq_mean_token_sum_norm": 1 / 32,
        "token_sum": 1.0,
    }
    got = {name: float(f(EagerMaths, *arguments)) for name, f in weights.AGGREGATIONS.items()}
    assert got == pytest.approx(wanted)
    nothing = (number(0.0),) * 4
    assert all(math.isfinite(float(f(EagerMaths, *nothing))) for f in weights.AGGREGATIONS.values())


# The symbolic derivative against autograd: the trace is run with numbers.


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


NUMERIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "exp": math.exp,
    "log": math.log,
    "sigmoid": sigmoid,
    "logsigmoid": lambda x: math.log(sigmoid(x)),
    "abs": abs,
    "sign": lambda x: math.copysign(1.0, x) if x else 0.0,
    "minimum": min,
    "maximum": max,
    "clamp": lambda x, low, high: min(max(x, low), high),
    "where": lambda c, a, b: a if c else b,
}


def run(node: Node, values: dict[str, float]) -> float:
    if node.op == "input":
        return values[str(node.value)]
    if node.op == "const":
        assert isinstance(node.value, float)
        return node.value
    return NUMERIC[node.op](*(run(a, values) for a in node.args))


POINTS = [
    dict(zip(("logp", "old", "ref", "adv", "log_s"), point, strict=True))
    for point in [
        *itertools.product([-1.0, -0.9, -3.0], [-1.0, -1.6], [-1.0, -2.0], [1.5, -1.5, 0.0], [0.0, 0.3, -0.3]),
        (-30.0, -1.0, -1.0, 1.0, -25.0),  # beyond ±20
        (-1.0, -30.0, -30.0, -1.0, 25.0),
        (-1.0, -21.0, -21.0, 2.0, 20.0),  # at exactly 20: kept
    ]
]
KNOBS = {
    # a knob that this table does not name, at its default
    **{name: value for knobs in formulas.KINDS.values() for name, value in knobs.items() if value is not None},
    "scale": 0.5,
    "clip": 0.3,
    "eps_low": 0.2,
    "eps_high": 0.25,
    "dual_clip": 1.7,
    "cap": 1.3,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "beta": 0.1,
}


@pytest.mark.parametrize("function", codegen.policy_functions(), ids=lambda f: f.name)
def test_derivative_is_autograds(function):
    outputs = dict(function.outputs)
    for point in POINTS:
        knobs = [KNOBS[k] for k in function.knobs]
        loss, slope = evaluate(function.name, point["logp"], point["old"], point["adv"], knobs)
        if function.name == "gspo":
            x = number(point["logp"]).requires_grad_()
            eager = formulas.gspo(EagerMaths, x, number(point["adv"]), number(point["log_s"]), *map(number, knobs))
            loss, slope = eager.item(), torch.autograd.grad(eager, x)[0].item()
        got = [run(outputs[name], point | KNOBS) for name in ("loss", "dlogp")]
        assert got == pytest.approx([loss, slope], rel=1e-12, abs=1e-12), point


@pytest.mark.parametrize("function", codegen.kl_functions(), ids=lambda f: f.name)
def test_kl_derivative_is_autograds(function):
    choices = dict(formulas.kl_variants())[function.name.removeprefix("kl_")]
    outputs = dict(function.outputs)
    for point in POINTS:
        x = number(point["logp"]).requires_grad_()
        kl = formulas.kl_estimate(EagerMaths, x, number(point["ref"]), number(point["old"]), **choices)
        got = [run(outputs["kl"], point), run(outputs["dkl"], point)]
        assert got == pytest.approx([kl.item(), torch.autograd.grad(kl, x)[0].item()], rel=1e-12, abs=1e-12), point


@pytest.mark.parametrize("name", ["minimum", "maximum", "clamp", "abs", "sigmoid", "logsigmoid", "log", "div", "where"])
def test_every_operation_and_its_ties(name):
    """Each operation of the namespace against torch, at ties and off them."""
    programs = {
        "minimum": lambda m, logp: m.minimum(logp, 2.0 * logp - 1.0),  # tie at 1: (1 + 2)/2
        "maximum": lambda m, logp: m.maximum(logp, 2.0 * logp - 1.0),
        "clamp": lambda m, logp: m.clamp(logp, 1.0, 2.0),
        "abs": lambda m, logp: m.abs(logp - 1.0),
        "sigmoid": lambda m, logp: m.sigmoid(3.0 * logp) * m.detach(logp),
        "logsigmoid": lambda m, logp: m.logsigmoid(-logp),
        "log": lambda m, logp: m.log(logp * logp + 1.0),
        "div": lambda m, logp: 1.0 / (logp - 0.25) - (logp - (0.5 - logp)) / 3.0,
        "where": lambda m, logp: m.where((logp > 1.0) | (logp <= 0.5), logp * logp, m.sign(logp) * -logp),
    }
    trace = Trace()
    (node,) = trace.run(programs[name], ("logp",))
    slope = trace.derivative(node, "logp")
    assert slope is not None
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        x = number(value).requires_grad_()
        eager = programs[name](EagerMaths, x)
        wanted = (eager.item(), torch.autograd.grad(eager, x)[0].item())
        point = {"logp": value}
        assert (run(trace.strip(node), point), run(trace.strip(slope), point)) == pytest.approx(wanted, rel=1e-12)


def test_equal_operations_are_one_and_keep_their_names():
    def formula(m, logp, old):
        rho = m.exp(logp - old)
        again = m.exp(logp - old)
        return rho * again

    trace = Trace()
    (node,) = trace.run(formula, ("logp", "old"))
    assert node.args[0] is node.args[1]
    assert node.args[0].name == "rho"


# The emitted text, run as ordinary Python on numbers, must give what the traced operations give: no parenthesis lost.


def python_function(function: codegen.Function):
    statements, results = function.body(codegen.TRITON)
    text = "\n".join([f"def f({', '.join((*function.inputs, *function.knobs))}):", *(f"    {s}" for s in statements)])
    tl = types.SimpleNamespace(log=math.log, abs=abs, where=lambda c, a, b: a if c else b)
    scope = {
        "tl": tl,
        "exp": math.exp,
        "minimum": min,
        "maximum": max,
        "clamp": lambda x, low, high: min(max(x, low), high),
        "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
        "sign": lambda x: (x > 0) - (x < 0),
    }
    exec(text + f"\n    return ({', '.join(results)},)", scope)
    return scope["f"]


@pytest.mark.parametrize(
    "function",
    [*codegen.policy_functions(), *codegen.kl_functions(), *codegen.weight_functions()],
    ids=lambda f: f.name,
)
def test_the_text_says_what_was_traced(function):
    emitted = python_function(function)
    draw = random.Random(0)
    for _ in range(50):
        values = {name: draw.uniform(-2.5, 2.5) for name in function.inputs}
        values |= {name: draw.uniform(0.05, 1.5) for name in function.knobs}
        got = emitted(**values)
        assert got == pytest.approx([run(node, values) for _, node in function.outputs], rel=1e-15, abs=1e-15)


# What a user may register.


@pytest.fixture
def registered():
    before = dict(formulas.FORMULAS), dict(formulas.KINDS)
    yield
    for table, saved in zip((formulas.FORMULAS, formulas.KINDS), before, strict=True):
        table.clear()
        table.update(saved)


def test_a_users_own_loss(registered):
    @rf.token_loss("my_loss", knobs={"c": 1.0})
    def my_loss(m, logp, old, ref, adv, c):
        return -m.minimum(m.exp(logp - old), c) * adv

    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    old = logp.detach() - torch.tensor([[LN2, 0.0]])
    loss, metrics = rf.policy_loss(
        logp, old, torch.tensor([[3.0, 5.0]]), kind="my_loss", c=1.5, aggregation="token_sum"
    )
    loss.backward()
    # ρ = 2 capped at 1.5, no gradient: −4.5; ρ = 1: −5, gradient −5
    assert loss.item() == pytest.approx(-9.5)
    assert logp.grad.tolist()[0] == pytest.approx([0.0, -5.0])
    assert metrics["ratio_max"].item() == pytest.approx(2.0)
    with pytest.raises(ValueError, match="not a knob"):
        rf.policy_loss(logp, old, old, kind="my_loss", d=1.0)
    rf.token_loss("my_loss", knobs={"c": 2.0})(my_loss)  # again: replaces it
    assert formulas.KINDS["my_loss"] == {"c": 2.0}


def bad_torch(m, logp, old):
    return torch.exp(logp - old)


def bad_tanh(m, logp):
    return m.tanh(logp)


def bad_method(m, logp):
    return logp.exp()


def bad_math(m, logp):
    return math.exp(logp)


def bad_power(m, logp):
    return logp**2


def bad_branch(m, logp):
    return logp if logp > 0 else -logp


def bad_bound(m, logp, old):
    return m.clamp(old, logp, 1.0)


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (bad_torch, "torch.exp"),
        (bad_tanh, "m.tanh"),
        (bad_method, ".exp"),
        (bad_math, "math"),
        (bad_power, r"\*\*"),
        (bad_branch, "m.where"),
        (bad_bound, "m.clamp"),
    ],
)
def test_what_the_namespace_cannot_say(registered, function, named):
    with pytest.raises(FormulaError, match=named):
        rf.token_loss("bad")(function)
    assert "bad" not in formulas.KINDS


def test_registration_errors(registered):
    with pytest.raises(ValueError, match="built-in"):
        rf.token_loss("grpo")(lambda m, logp: logp)
    with pytest.raises(ValueError, match="knob"):
        rf.token_loss("x")(lambda m, logp, c: c * logp)
    with pytest.raises(ValueError, match="one value"):
        rf.token_loss("x")(lambda m, logp: (logp, logp))
