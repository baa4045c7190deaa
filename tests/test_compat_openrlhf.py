"""Drop-ins for OpenRLHF, against its own file where it is installed, else against a restatement; and the patch.

The restatement follows the documentation token by token.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rl4llm_fast as rf
from rl4llm_fast.compat import openrlhf as ours

UTILS, MAKER = ours.TARGETS[0].module, ours.TARGETS[2].module


def restated_log_probs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    if temperature != 1.0:
        logits.div_(temperature)
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def restated_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    d = log_probs.float() - log_probs_base.float()
    value = {"k1": d, "k2": d * d / 2, "k3": (-d.clamp(min=-10)).exp() - 1 + d.clamp(min=-10)}[kl_estimator]
    value = value.clamp(-10, 10)
    if not unbiased_gradient:
        return value
    w = 1.0 if log_probs_old is None else (log_probs - log_probs_old).float().exp().clamp(max=10).detach()
    surrogate = w * d * d / 2
    return value.detach() + surrogate - surrogate.detach()


class Maker:
    """Stands in for OpenRLHF's experience maker, whose module imports Ray."""

    @torch.no_grad()
    def get_advantages_and_returns(
        self, values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float
    ) -> tuple[Tensor, Tensor]:
        values, rewards = values * action_mask, rewards * action_mask
        advantages = torch.zeros_like(values)
        for i in range(values.shape[0]):
            later = value = 0.0
            for t in reversed(range(values.shape[1])):
                later = float(rewards[i, t]) + gamma * value - float(values[i, t]) + gamma * lambd * later
                advantages[i, t], value = later, float(values[i, t])
        return advantages, advantages + values


def module(name: str, **contents: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__spec__ = importlib.util.spec_from_loader(name, None)
    made.__path__ = []
    vars(made).update(contents)
    return made


@pytest.fixture(scope="module", params=["restated", "openrlhf"])
def utils(request: pytest.FixtureRequest) -> Iterator[types.ModuleType]:
    spec = importlib.util.find_spec("openrlhf")
    names = ["openrlhf", "openrlhf.models", "openrlhf.trainer", "openrlhf.trainer.ppo_utils"]
    modules = {name: module(name) for name in names}
    modules["openrlhf"].__version__ = "0.11.2"  # type: ignore[attr-defined]
    modules[MAKER] = module(MAKER, RemoteExperienceMaker=Maker)
    modules[UTILS] = module(UTILS, log_probs_from_logits=restated_log_probs, compute_approx_kl=restated_kl)
    before = {name: sys.modules.get(name) for name in (*modules, "deepspeed")}
    if request.param == "openrlhf":
        if spec is None or spec.origin is None:
            pytest.skip("OpenRLHF is not installed")
        sys.modules["deepspeed"] = module("deepspeed")  # for a function that is not tested here
        own = importlib.util.spec_from_file_location(UTILS, Path(spec.origin).parent / "models" / "utils.py")
        assert own is not None
        assert own.loader is not None
        modules[UTILS] = importlib.util.module_from_spec(own)
        own.loader.exec_module(modules[UTILS])
    sys.modules.update(modules)
    yield modules[UTILS]
    ours.unpatch()
    for name, held in before.items():
        sys.modules.pop(name, None)
        if held is not None:
            sys.modules[name] = held


class TestLogProbs:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_equals_openrlhf(self, utils: Any, dtype: torch.dtype, temperature: float) -> None:
        base, labels = torch.randn(3, 5, 130).to(dtype), torch.randint(130, (3, 5))
        upstream = torch.randn(3, 5).to(dtype)
        results = []
        for function in (ours.log_probs_from_logits, utils.log_probs_from_logits):
            leaf = base.clone().requires_grad_()
            logits = leaf * 2
            logp = function(logits, labels, temperature)
            logp.backward(upstream)
            results.append((logp.detach(), logits.detach(), leaf.grad))
        (logp, logits, grad), (wanted, wanted_logits, wanted_grad) = results
        assert torch.equal(logits, wanted_logits)  # divided in place
        exact = dtype in (torch.bfloat16, torch.float16)
        torch.testing.assert_close(logp, wanted, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(grad, wanted_grad, rtol=4 * eps, atol=max(8 * eps, 1e-6))

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="temperature"):
            ours.log_probs_from_logits(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), 0.0)
        for logits in (torch.ones(2, 3), torch.ones(2, 3).bfloat16()):
            with pytest.raises(ValueError, match="labels: wanted"):
                ours.log_probs_from_logits(logits, torch.zeros(1, dtype=torch.long), 2.0)
            assert torch.equal(logits, torch.ones_like(logits))  # not divided for nothing
        rows = torch.zeros(1, 3)
        for name, call in (
            ("logits", lambda: ours.log_probs_from_logits([[0.0]], rows)),
            ("labels", lambda: ours.log_probs_from_logits(rows, [0])),
            ("log_probs_base", lambda: ours.compute_approx_kl(rows, [0.0])),
            ("log_probs_old", lambda: ours.compute_approx_kl(rows, rows, [0.0], unbiased_gradient=True)),
            ("rewards", lambda: ours.get_advantages_and_returns(rows, [0.0], None, 1.0, 1.0)),
            ("action_mask", lambda: ours.get_advantages_and_returns(rows, rows, [1], 1.0, 1.0)),
        ):
            with pytest.raises(TypeError, match=f"^{name}: wanted a torch.Tensor, got list"):
                call()


class TestKl:
    @pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
    @pytest.mark.parametrize("unbiased", [False, True])
    @pytest.mark.parametrize("off_policy", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_openrlhf(
        self, utils: Any, estimator: str, unbiased: bool, off_policy: bool, dtype: torch.dtype
    ) -> None:
        now, base = 2 * torch.randn(4, 9), torch.randn(4, 9)
        now[0, :4] = torch.tensor([60.0, -60.0, 9.0, -9.0])  # beyond the clamps, and at them
        old = (now + torch.randn(4, 9)).to(dtype) if off_policy else None
        results = []
        for function in (ours.compute_approx_kl, utils.compute_approx_kl):
            leaf = now.to(dtype, copy=True).requires_grad_()
            kl = function(leaf, base.to(dtype), old, estimator, unbiased)
            kl.backward(torch.ones_like(kl))
            results.append((kl.detach(), leaf.grad))
        for got, wanted in zip(*results, strict=True):
            assert got.dtype == wanted.dtype
            torch.testing.assert_close(got, wanted, rtol=1e-5 if dtype == torch.float32 else 0.01, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("unbiased", [False, True])
    def test_k3_far_out(self, dtype: torch.dtype, unbiased: bool) -> None:
        """As OpenRLHF's own test has it: against the formula in fp64, where e^−d overflows too."""
        d = torch.tensor([-100.0, -90.0, -11.0, -10.0, -3.0, -1.0, -0.1, 0.0], dtype=dtype, requires_grad=True)
        kl = ours.compute_approx_kl(d, torch.zeros_like(d), kl_estimator="k3", unbiased_gradient=unbiased)
        kl.sum().backward()
        wide = d.detach().double().requires_grad_()
        wanted = ((-wide).exp() - 1 + wide).clamp(-10, 10)
        wanted.sum().backward()
        torch.testing.assert_close(kl, wanted.float(), rtol=1e-5, atol=1e-6)
        wanted_grad = wide.detach() if unbiased else wide.grad
        torch.testing.assert_close(d.grad, wanted_grad.to(dtype), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("unbiased", [False, True])
    def test_k3_has_the_bits_of_its_formula(self, unbiased: bool) -> None:
        now, base = torch.randn(64), torch.randn(64)
        now[:8] = base[:8] + 1e-4  # where e^−d − 1 + d keeps few digits
        d = now - base
        wanted = ((-d).exp() - 1 + d).clamp(-10, 10)
        assert torch.equal(ours.compute_approx_kl(now, base, None, "k3", unbiased), wanted)

    def test_third_argument_of_older_versions(self) -> None:
        now, base = torch.randn(4), torch.randn(4)
        assert torch.equal(
            ours.compute_approx_kl(now, base, "k3"), ours.compute_approx_kl(now, base, kl_estimator="k3")
        )
        with pytest.raises(ValueError, match="kl_estimator"):
            ours.compute_approx_kl(now, base, kl_estimator="k4")


class TestAdvantages:
    @pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
    def test_equals_openrlhf_at_masked_tokens_too(self, mask_dtype: torch.dtype) -> None:
        values, rewards = torch.randn(5, 8), torch.randn(5, 8)
        mask = torch.rand(5, 8) > 0.3
        mask[1] = False
        got = ours.get_advantages_and_returns(values, rewards, mask.to(mask_dtype), 0.9, 0.8)
        wanted = Maker().get_advantages_and_returns(values, rewards, mask, 0.9, 0.8)
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        for dtype in (torch.float64, torch.bfloat16):
            arguments = values.to(dtype), rewards.to(dtype), mask.to(mask_dtype), 0.9, 0.8
            wide = Maker().get_advantages_and_returns(*arguments)[0].dtype
            assert {t.dtype for t in ours.get_advantages_and_returns(*arguments)} == {wide}
        everything = ours.get_advantages_and_returns(values, rewards, None, 0.9, 0.8)
        torch.testing.assert_close(everything[0], rf.gae(rewards, values, gamma=0.9, lam=0.8)[0])


class TestPatch:
    def test_functions_and_the_method(self, utils: types.ModuleType) -> None:
        maker = sys.modules[MAKER].RemoteExperienceMaker
        before = utils.compute_approx_kl, maker.__dict__["get_advantages_and_returns"]
        values, rewards, mask = torch.randn(2, 4), torch.randn(2, 4), torch.ones(2, 4)
        wanted = maker().get_advantages_and_returns(values, rewards, mask, 0.9, 0.8)
        with ours.patch() as report:
            assert not report.skipped, report
            assert f"{MAKER}.RemoteExperienceMaker.get_advantages_and_returns" in report.swapped
            assert utils.compute_approx_kl is not before[0]
            got = maker().get_advantages_and_returns(values, rewards, mask, 0.9, 0.8)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        assert (utils.compute_approx_kl, maker.__dict__["get_advantages_and_returns"]) == before

    def test_an_inherited_method_is_inherited_again(self, utils: types.ModuleType) -> None:
        maker = sys.modules[MAKER]

        class Child(Maker):
            pass

        maker.RemoteExperienceMaker = Child  # type: ignore[attr-defined]
        try:
            with ours.patch():
                assert "get_advantages_and_returns" in vars(Child)
            assert "get_advantages_and_returns" not in vars(Child)
        finally:
            maker.RemoteExperienceMaker = Maker  # type: ignore[attr-defined]
