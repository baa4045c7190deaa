"""Drop-ins for verl's functions of logits and hidden states, and the patch of the package."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4llm_fast.compat import verl as ours
from rl4llm_fast.compat.verl_losses import POLICY_LOSSES

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TestLogits:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(3, 5, 130), (7, 130)])
    def test_logprobs(self, functional: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        logits, labels = torch.randn(*shape).to(dtype), torch.randint(130, shape[:-1])
        upstream = torch.randn(shape[:-1]).to(dtype)
        results = []
        for function in (ours.logprobs_from_logits, functional.logprobs_from_logits):
            leaf = logits.clone().requires_grad_()
            logp = function(leaf, labels)
            logp.backward(upstream)
            results.append((logp.detach(), leaf.grad))
        eps = torch.finfo(dtype).eps
        (logp, grad), (wanted, wanted_grad) = results
        exact = dtype in (torch.bfloat16, torch.float16)
        torch.testing.assert_close(logp, wanted, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
        torch.testing.assert_close(grad, wanted_grad, rtol=4 * eps, atol=max(4 * eps, 1e-6))

    def test_logits_may_be_used_twice_on_a_cpu(self) -> None:
        leaf, labels = torch.randn(4, 30, requires_grad=True), torch.randint(30, (4,))
        logits = leaf * 2
        (ours.logprobs_from_logits(logits, labels).sum() + ours.entropy_from_logits(logits).sum()).backward()
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_entropy(self, functional: Any, dtype: torch.dtype) -> None:
        logits = torch.randn(3, 5, 130).to(dtype)
        got, wanted = ours.entropy_from_logits(logits), functional.entropy_from_logits(logits)
        assert got.dtype == wanted.dtype == dtype
        oracle = functional.entropy_from_logits(logits.double())
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), oracle, rtol=eps, atol=max(eps, 1e-6))
        chunked = ours.entropy_from_logits_with_chunking(logits.flatten(0, 1), 4)
        assert chunked.dtype == torch.float32
        torch.testing.assert_close(chunked.double(), oracle.flatten(), rtol=1e-5, atol=1e-5)


class TestLinearCrossEntropy:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    def test_is_log_softmax_of_the_product(self, dtype: torch.dtype, reduction: str) -> None:
        hidden, weight = torch.randn(2, 6, 24).to(dtype), torch.randn(101, 24).to(dtype)
        labels = torch.randint(101, (2, 6))

        def plain(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            logps = torch.nn.functional.linear(x, w).div(0.7).float().log_softmax(-1).flatten(0, 1)
            logp = logps.gather(-1, labels.reshape(-1, 1)).squeeze(-1)
            reduced = {"none": logp, "sum": logp.sum(), "mean": logp.mean()}[reduction]
            return reduced, -(logps.exp() * logps).sum(-1)

        results = []
        for function in (lambda x, w: ours.linear_cross_entropy(x, w, labels, 0.7, reduction), plain):
            leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
            logp, entropy = function(*leaves)
            (logp.sum() + 0.1 * entropy.sum()).backward()
            results.append((logp.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)))
        loose = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.25}
        for got, wanted in zip(*results, strict=True):
            assert got.dtype == wanted.dtype
            assert got.shape == wanted.shape
            torch.testing.assert_close(got, wanted, **loose)
        assert results[0][0].dtype == results[0][1].dtype == torch.float32

    def test_bad_input(self) -> None:
        hidden, weight, labels = torch.randn(3, 8), torch.randn(11, 8), torch.tensor([0, 1, 11])
        with pytest.raises(ValueError, match="reduction"):
            ours.linear_cross_entropy(hidden, weight, labels, 1.0, "max")
        with pytest.raises(IndexError, match="11"):
            ours.linear_cross_entropy(hidden, weight, labels)


class TestPatch:
    def test_registries_and_names_elsewhere(self, core: types.ModuleType, functional: types.ModuleType) -> None:
        worker = types.ModuleType("verl.workers.utils.losses")
        worker.agg_loss = before_agg = core.agg_loss  # type: ignore[attr-defined]
        sys.modules[worker.__name__] = worker
        before_gae = core.compute_gae_advantage_return
        before_losses = {kind: core.POLICY_LOSS_REGISTRY[kind] for kind in POLICY_LOSSES}
        try:
            with ours.patch() as report:
                assert core.compute_gae_advantage_return is not before_gae
                assert core.ADV_ESTIMATOR_REGISTRY["gae"] is core.compute_gae_advantage_return
                assert worker.agg_loss is core.agg_loss is not before_agg
                for kind, before in before_losses.items():
                    assert core.POLICY_LOSS_REGISTRY[kind] is not before
                    assert f"{core.__name__}.POLICY_LOSS_REGISTRY[{kind!r}]" in report.swapped
                # The kernel module is absent here, as it is without a GPU's packages.
                assert "does not import here" in report.skipped[str(ours.TARGETS[3])]
                assert list(report.skipped) == [str(ours.TARGETS[3])]
                mask = torch.ones(2, 3)
                advantages, _ = core.ADV_ESTIMATOR_REGISTRY["gae"](torch.randn(2, 3), torch.randn(2, 3), mask, 1.0, 0.9)
                assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-6)
            assert core.compute_gae_advantage_return is core.ADV_ESTIMATOR_REGISTRY["gae"] is before_gae
            assert worker.agg_loss is core.agg_loss is before_agg
            assert {kind: core.POLICY_LOSS_REGISTRY[kind] for kind in POLICY_LOSSES} == before_losses
        finally:
            ours.unpatch()
            del sys.modules[worker.__name__]

    def test_verl_itself(self) -> None:
        """With verl's needs installed too: nothing is skipped, its workers are reached, and no trace is left."""
        code = """
        import importlib, sys
        from rl4llm_fast.compat import verl as ours
        try:
            for name in ("verl.workers.utils.losses", *(target.module for target in ours.TARGETS)):
                importlib.import_module(name)
        except ImportError as error:
            sys.exit(f"absent: {error}")

        def bound():
            modules = {n: m for n, m in sys.modules.items() if (n + ".").startswith("verl.")}
            names = {(n, k): v for n, m in modules.items() for k, v in vars(m).items()}
            entries = {(*p, k): v for p, d in names.items() if type(d) is dict and p[1] != "__builtins__"
                       for k, v in d.items()}
            return {place: id(value) for place, value in (names | entries).items()}

        before = bound()
        report = ours.patch()
        assert not report.skipped, report
        assert "verl.workers.utils.losses.compute_value_loss" in report.swapped, report
        during = bound()
        assert len(report.swapped) == sum(during[place] != value for place, value in before.items())
        ours.unpatch()
        assert bound() == before
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
        if "absent: " in done.stderr:
            pytest.skip(f"verl is not installed with its needs: {done.stderr[-200:]}")
        assert done.returncode == 0, done.stderr

    def test_missing(self) -> None:
        import importlib.util

        if importlib.util.find_spec("verl") is not None:
            pytest.skip("verl is installed")
        with pytest.raises(ImportError, match=r"verl is not installed; known are verl 0\.9"):
            ours.patch()
        with pytest.raises(ImportError, match=r"verl is not installed; known are verl 0\.9"):
            ours.register()
