"""rf.token_loss: a user's own formula on every backend that runs here, its cache on disk, and what is refused."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast import dispatch, formulas, user_losses
from rl4llm_fast.symbolic import FormulaError
from rl4llm_fast.testing import assert_as_good_as_eager

ROOT = pathlib.Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # tests/test_token_loss_gpu.py runs this file once more there
FUSED = ["triton"] if INTERPRETED else [b for b in rf.backends()["policy_loss"] if b == "cpu"]
CPU = pytest.mark.skipif(
    "cpu" not in rf.backends()["policy_loss"] or shutil.which("g++") is None,
    reason="needs the C++ extension and a compiler",
)
LN2 = math.log(2)


@pytest.fixture(autouse=True)
def apart(tmp_path_factory, monkeypatch):
    """Nothing registered stays registered, nothing compiled stays in the user's own cache."""
    if "RL4LLM_TEST_CACHE" not in os.environ:
        os.environ["RL4LLM_TEST_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("RL4LLM_FAST_CACHE_DIR", os.environ["RL4LLM_TEST_CACHE"])
    before = dict(formulas.FORMULAS), dict(formulas.KINDS)
    yield
    for table, saved in zip((formulas.FORMULAS, formulas.KINDS), before, strict=True):
        table.clear()
        table.update(saved)


def capped(m, logp, old, ref, adv, c):
    """−min(ρ, c)·A: the example of the README."""
    return -m.minimum(m.exp(logp - old), c) * adv


def everything(m, logp, old, ref, adv, double, tl):
    """Every operation of the namespace, and names that C++ or Triton would trip over ("quoted\\")."""
    new = m.log(m.exp(logp) + 0.01)
    clamp = m.clamp(logp - old, -1.0, float("inf"))
    sign = m.where(
        (adv > 0.0) & (logp <= -0.5) | (adv == 0.0), m.logsigmoid(double * (logp - ref)), m.sign(adv) * clamp
    )
    bound = m.minimum(m.abs(new), m.maximum(m.sigmoid(clamp) / tl, 0.1))
    return -sign * adv + m.detach(bound) * logp + m.with_gradient(clamp, new * bound)


def per_sequence(m, logp, adv, log_s):
    return -m.exp(m.with_gradient(log_s, logp)) * adv


USERS = {"capped": (capped, {"c": 1.3}), "everything": (everything, {"double": 0.7, "tl": 1.4}),
         "per sequence": (per_sequence, {})}  # fmt: skip


def sample(B, T, dtype):
    logp = -3 * torch.rand(B, T)
    tensors = {"logp": logp, "old_logp": logp + 0.3 * torch.randn(B, T), "advantages": torch.randn(B, T),
               "ref_logp": logp + 0.3 * torch.randn(B, T)}  # fmt: skip
    return {name: t.to(dtype) for name, t in tensors.items()} | {"mask": torch.rand(B, T) > 0.3}


def run(arguments, backend, dtype=None):
    arguments = {
        n: v.to(dtype) if dtype and isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in arguments.items()
    }
    logp, old, adv = (arguments.pop(n) for n in ("logp", "old_logp", "advantages"))
    leaf = logp.detach().clone().requires_grad_()
    loss, metrics = rf.policy_loss(leaf, old, adv, backend=backend, **arguments)
    loss.sum().backward()
    return {"loss": loss.detach(), "dlogp": leaf.grad, **metrics}


def check(arguments, backend):
    got, oracle = run(arguments, backend), run(arguments, "eager", torch.float64)
    eager = run(arguments, "eager")
    for name, value in got.items():
        assert_as_good_as_eager(value, oracle[name], eager[name], name=name)
    assert torch.all(got["dlogp"][~arguments["mask"]] == 0)
    return got


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] + ([] if INTERPRETED else [torch.float64]))
@pytest.mark.parametrize("name", USERS)
def test_fused(backend, dtype, name):
    function, knobs = USERS[name]
    rf.token_loss(name, knobs=knobs)(function)
    for T in (1, 37, 1500):
        arguments = sample(3, T, dtype) | {"kind": name, "kl_coef": 0.1}
        for aggregation in ("token_mean", "seq_mean_token_mean"):
            check(arguments | {"aggregation": aggregation}, backend)
    for knob in knobs:
        check(arguments | {knob: torch.tensor(0.9)}, backend)


@pytest.mark.parametrize("backend", ["eager", *FUSED])
def test_golden(backend):
    rf.token_loss("capped", knobs={"c": 1.0})(capped)
    logp = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    old = logp.detach() - torch.tensor([[LN2, 0.0, math.nan]])
    mask = torch.tensor([[True, True, False]])
    loss, metrics = rf.policy_loss(
        logp, old, torch.tensor([[3.0, 5.0, 7.0]]), mask=mask, kind="capped", c=1.5, aggregation="token_sum",
        backend=backend,
    )  # fmt: skip
    loss.backward()
    # ρ = 2 capped at 1.5, no gradient: −4.5; ρ = 1: −5, gradient −5
    assert loss.item() == pytest.approx(-9.5)
    assert logp.grad.tolist()[0] == pytest.approx([0.0, -5.0, 0.0])
    assert metrics["ratio_max"].item() == pytest.approx(2.0)
    assert "clip_fraction" not in metrics


@CPU
@pytest.mark.skipif(INTERPRETED, reason="C++ is tested outside of the interpreter")
class TestCpu:
    def test_every_instruction_set(self):
        rf.token_loss("everything", knobs=USERS["everything"][1])(everything)
        for isa in dispatch.extension.build_info()["cpu_instruction_sets"]:
            with contextlib.suppress(ValueError):  # this CPU may not run it
                dispatch.extension.force_cpu_isa(isa)
            try:
                check(sample(3, 100, torch.float32) | {"kind": "everything"}, "cpu")
            finally:
                dispatch.extension.force_cpu_isa(None)

    def test_the_maths_over_the_whole_range(self):
        rf.token_loss("log")(lambda m, logp: m.log(logp))
        rf.token_loss("logsigmoid")(lambda m, logp: m.logsigmoid(logp))
        edges = [0.0, -1.0, math.inf, math.nan, 1e-45, 1e-40, 1.2e-38, 1.0, 0.70710678, 1.41421356, 3e38]
        positive = torch.cat([torch.tensor(edges), torch.logspace(-38, 38, 500), 1 + torch.linspace(-0.4, 0.4, 501)])
        for kind, x, wanted in (
            ("log", positive, positive.double().log()),
            ("logsigmoid", y := torch.linspace(-110, 110, 4001), torch.nn.functional.logsigmoid(y.double())),
        ):
            got, _ = rf.policy_loss(x[None], None, x[None], kind=kind, aggregation="none", backend="cpu")
            torch.testing.assert_close(got[0], wanted.float(), rtol=3e-7, atol=1e-37, equal_nan=True)

    def test_gradcheck(self):
        rf.token_loss("capped", knobs={"c": 1.0})(capped)
        s = sample(2, 5, torch.float64)

        def loss(logp):
            return rf.policy_loss(logp, s["old_logp"], s["advantages"], kind="capped", backend="cpu")[0]

        assert torch.autograd.gradcheck(loss, s["logp"].requires_grad_())

    def test_cache(self, tmp_path, monkeypatch):
        """Compiled once, found again, and rebuilt where the file is damaged."""
        monkeypatch.setenv("RL4LLM_FAST_CACHE_DIR", str(tmp_path))
        rf.token_loss("capped", knobs={"c": 1.25})(capped)
        arguments = sample(2, 9, torch.float32) | {"kind": "capped"}

        def fresh_run():
            user_losses._compiled.cache_clear()
            return run(arguments, "cpu")["loss"]

        wanted = fresh_run()
        (library,) = tmp_path.glob("*.so")
        made = library.stat().st_mtime_ns
        assert fresh_run() == wanted
        assert library.stat().st_mtime_ns == made
        whole = library.read_bytes()
        library.unlink()  # a new file: this process has the old one mapped
        library.write_bytes(whole[: len(whole) // 2])
        assert fresh_run() == wanted
        assert len(library.read_bytes()) == len(whole)
        assert {p.suffix for p in tmp_path.iterdir()} == {".so", ".cpp"}  # nothing half-made is left

    def test_without_a_compiler(self, monkeypatch):
        monkeypatch.setenv("CXX", "/nonexistent/g++")
        user_losses._compiled.cache_clear()
        user_losses._warn_once.cache_clear()
        rf.token_loss("mine", knobs={"c": 0.123})(capped)
        arguments = sample(2, 9, torch.float32) | {"kind": "mine"}
        with pytest.warns(UserWarning, match=r"'mine'.*eager.*no C\+\+ compiler"):
            got = run(arguments, None)
        assert torch.equal(got["loss"], run(arguments, "eager")["loss"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(arguments, None)  # said once
        with pytest.raises(rf.BackendError, match=r"'mine'.*no C\+\+ compiler"):
            run(arguments, "cpu")
        user_losses._compiled.cache_clear()

    def test_a_failing_compiler_is_quoted(self, monkeypatch, tmp_path):
        compiler = tmp_path / "cxx"
        compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho no room >&2; exit 1\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        user_losses._compiled.cache_clear()
        rf.token_loss("mine", knobs={"c": 0.124})(capped)
        with pytest.raises(rf.BackendError, match="cxx failed: no room"):
            run(sample(2, 9, torch.float32) | {"kind": "mine"}, "cpu")
        user_losses._compiled.cache_clear()

    def test_compile_without_breaks_or_recompilation(self):
        graphs = 0

        def count(graph, inputs):
            nonlocal graphs
            graphs += 1
            return graph.forward

        rf.token_loss("capped", knobs={"c": 1.0})(capped)
        s = sample(3, 20, torch.float32)

        def step(logp, c):
            return rf.policy_loss(logp, s["old_logp"], s["advantages"], kind="capped", c=c, backend="cpu")[0]

        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, backend=count)
        for i in range(12):
            c = torch.tensor(0.8 + 0.05 * i)
            leaves = [s["logp"].clone().requires_grad_() for _ in range(2)]
            for function, leaf in zip((step, compiled), leaves, strict=True):
                function(leaf, c).backward()
            assert torch.equal(leaves[0].grad, leaves[1].grad)
        assert graphs == 1
        # Registered anew, the name is another formula: also for what was compiled before.
        rf.token_loss("capped", knobs={"c": 1.0})(lambda m, logp, adv, c: -c * logp * adv)
        x = s["logp"].clone().requires_grad_()
        compiled(x, torch.tensor(2.0)).backward()
        torch.testing.assert_close(x.grad, -2 * s["advantages"] / 60)


@pytest.mark.skipif(INTERPRETED or importlib.util.find_spec("triton") is None, reason="needs Triton's compiler")
def test_triton_compiles_ahead_of_time():
    """In a process of its own: Triton's functions of the interpreter and of the compiler do not mix."""
    script = textwrap.dedent("""
        import sys
        sys.path.insert(0, "tests")
        import rl4llm_fast as rf
        from rl4llm_fast import formulas, user_losses
        from test_user_losses import everything
        from ahead_of_time import compile_kernel
        from test_token_loss_gpu import kernel_cases
        rf.token_loss("everything", knobs={"double": 0.7, "tl": 1.4})(everything)
        formula = user_losses.triton_function(formulas.FORMULAS["everything"].op_name)
        _, kernel, types, constants, warps, *_ = next(iter(kernel_cases()))
        for target in (("cuda", 90, 32), ("hip", "gfx942", 64)):
            assert compile_kernel(kernel, types, constants | {"FORMULA": formula}, warps, target).asm
    """)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


REFUSED = [
    ("tanh", {}, lambda m, logp: m.tanh(logp), "token_loss 'tanh': m.tanh"),
    ("knob", {}, lambda m, logp, c: c * logp, "c is neither an input"),
    ("knob", {"c": 1.0, "d": 2.0}, lambda m, logp, c: c * logp, "no parameter for the knob 'd'"),
    ("knob", {"c": 1.0}, lambda m, logp, c: logp, "the knob 'c' is not used"),
    ("knob", {"c": "1"}, lambda m, logp, c: c * logp, "c: wanted a number as default, got str"),
    ("knob", {"mask": 1.0}, lambda m, logp, mask: mask * logp, "mask is an argument of policy_loss"),
    ("knob", {"temperature": 1.0}, lambda m, logp, temperature: temperature * logp, "argument of linear_policy_loss"),
    ("knob", {"weight": 1.0}, lambda m, logp, weight: weight * logp, "argument of linear_policy_loss"),
    ("knobs", dict.fromkeys("abcde", 1.0), lambda m, logp, a, b, c, d, e: a * b * c * d * e * logp, "at most 4 knobs"),
    ("args", {}, lambda m, *logp: logp[0], r"wanted plain parameters.*\*logp"),
    ("none", {}, lambda: 0.0, "wanted a function of the maths namespace"),
    ("pair", {}, lambda m, logp: (logp, logp), "one value per token, got 2"),
    ("constant", {}, lambda m, logp, adv: adv, "does not depend on logp"),
    ("detached", {}, lambda m, logp, adv: m.detach(logp) * adv, "does not depend on logp"),
    ("mean", {}, lambda m, log_s, adv: -m.exp(log_s) * adv, r"log_s is a constant to it: m.with_gradient\(log_s, logp"),
    ("names", ["c"], lambda m, logp, c: c * logp, "'names': knobs: wanted a dict of defaults, got list"),
    ("default", {}, lambda m, logp, c=0.5: c * logp, r"c is neither an input.*knobs=\{'c': 0.5\}"),
    ("minus", {}, lambda logp, adv: -logp * adv, "'minus': the first parameter is the maths namespace m, got logp"),
    ("list", {}, lambda m, logp: [logp], "got list"),
    ("comparison", {}, lambda m, logp: logp > 0.0, "gt has no derivative.*condition of m.where"),
    ("nothing", {}, lambda m, logp: None, "'nothing': .*got None: does the function return"),
    ("one bound", {}, lambda m, logp: m.clamp(logp, 0.0), "'one bound': .*clamp.*'high'"),
    ("of a number", {}, lambda m, logp: m.exp(0.5) * logp, "fails on tensors: .*must be Tensor, not float"),
    ("grpo", {}, lambda m, logp: logp, "built-in"),
]


@pytest.mark.parametrize(("name", "knobs", "function", "message"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refused_at_registration(name, knobs, function, message):
    with pytest.raises((ValueError, TypeError), match=message):
        rf.token_loss(name, knobs=knobs)(function)
    assert name in ("grpo",) or name not in formulas.KINDS


def test_ref_is_asked_for_where_it_is_used():
    rf.token_loss("capped", knobs={"c": 1.0})(capped)  # has ref, does not use it
    rf.policy_loss(torch.zeros(2, 3), None, torch.zeros(2, 3), kind="capped", backend="eager")
    rf.token_loss("with ref")(lambda m, logp, ref: logp - ref)
    with pytest.raises(ValueError, match="ref_logp: kind 'with ref' uses it"):
        rf.policy_loss(torch.zeros(2, 3), None, torch.zeros(2, 3), kind="with ref")


def test_the_decorator_wants_a_name():
    with pytest.raises(TypeError, match=r"wanted a non-empty str, as in @rf.token_loss\(\"my_loss\"\)"):
        rf.token_loss(lambda m, logp: logp)


def test_the_error_is_a_formula_error():
    with pytest.raises(FormulaError):
        rf.token_loss("tanh")(lambda m, logp: m.tanh(logp))


def test_a_knob_with_the_name_of_a_built_in_one_has_no_bounds():
    rf.token_loss("own_bounds", knobs={"delta": 0.5, "eps_low": 0.0, "dual_clip": 0.5})(
        lambda m, logp, delta, eps_low, dual_clip: (delta + eps_low + dual_clip) * logp
    )
    knobs = {"delta": 0.1, "eps_low": -0.2, "dual_clip": 0.1}
    loss, _ = rf.policy_loss(torch.ones(1, 2), None, torch.ones(1, 2), kind="own_bounds", backend="eager", **knobs)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


# From the README alone.


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="not a source checkout")
def test_the_readme_and_the_example():
    readme = (ROOT / "README.md").read_text()
    block = readme.partition("## Write your own loss")[2].partition("```python\n")[2].partition("```")[0]
    assert "@rf.token_loss" in block
    scope = {}
    exec(block, scope)
    assert torch.isfinite(scope["logp"].grad).all()
    specification = importlib.util.spec_from_file_location("custom_loss", ROOT / "examples" / "custom_loss.py")
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    first, last = example.train()
    assert first < 0.3
    assert last > 0.6
