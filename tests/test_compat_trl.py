"""Drop-ins for TRL: its numbers, dtypes and edge cases, and the patch. The cases of TRL's own tests are here too."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4llm_fast.compat import trl as ours
from rl4llm_fast.testing import assert_as_good_as_eager

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALVES)


@pytest.fixture(scope="module")
def utils() -> Any:
    pytest.importorskip("trl", reason="TRL is not installed")
    return pytest.importorskip("trl.trainer.utils")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    ours.unpatch()


def close(got: Tensor, wanted: Tensor) -> None:
    tight = {"rtol": 1e-5, "atol": 1e-5} if wanted.dtype in (torch.float32, torch.float64) else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(got, wanted, **tight)


class TestSelectiveLogSoftmax:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("k", [None, 1, 8])
    def test_is_log_softmax_and_gather(self, dtype: torch.dtype, k: int | None) -> None:
        logits = torch.randn(4, 32, 1024).to(dtype)
        index = torch.randint(1024, (4, 32) if k is None else (4, 32, k))
        got = ours.selective_log_softmax(logits, index)
        wanted = logits.log_softmax(-1).gather(-1, index.unsqueeze(-1) if k is None else index)
        assert got.dtype == dtype
        close(got, wanted.squeeze(-1) if k is None else wanted)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    @pytest.mark.parametrize("k", [None, 3])
    def test_equals_trl_with_gradients(self, utils: Any, dtype: torch.dtype, temperature: float, k: int | None) -> None:
        logits = (3 * torch.randn(3, 5, 257)).to(dtype)
        index = torch.randint(257, (3, 5) if k is None else (3, 5, k))
        mask = torch.rand(index.shape) > 0.3
        upstream = torch.randn(index.shape).to(dtype)
        results = []
        for function in (ours.selective_log_softmax, utils.selective_log_softmax):
            leaf = logits.clone().requires_grad_()
            logp = function(leaf, index, temperature, mask)
            logp.backward(upstream)
            results.append((logp.detach(), leaf.grad))
        (logp, grad), (wanted, wanted_grad) = results
        close(logp, wanted)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(grad, wanted_grad, rtol=4 * eps, atol=max(4 * eps, 1e-6))

    def test_golden_values(self) -> None:
        logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, float("-inf"), 0.0, float("-inf")]])
        logp, entropy = ours.selective_log_softmax_and_entropy(logits, torch.tensor([1, 2]))
        torch.testing.assert_close(logp, torch.tensor([4.0, 2.0]).log().neg())
        torch.testing.assert_close(entropy, torch.tensor([4.0, 2.0]).log())

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_masked_rows_may_hold_anything(self, dtype: torch.dtype) -> None:
        logits = torch.randn(2, 3, 11).to(dtype)
        logits[0, 1] = float("nan")
        index = torch.randint(11, (2, 3))
        index[0, 1] = -100
        mask = torch.ones(2, 3, dtype=torch.long)
        mask[0, 1] = 0
        leaf = logits.requires_grad_()
        logp, entropy = ours.selective_log_softmax_and_entropy(leaf, index, True, 1.0, mask)
        (logp.sum() + entropy.sum()).backward()
        assert logp[0, 1] == 0
        assert entropy[0, 1] == 0
        assert leaf.grad is not None
        assert not leaf.grad[0, 1].any()
        assert torch.isfinite(leaf.grad).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_strided_and_empty(self, dtype: torch.dtype) -> None:
        logits, index = torch.randn(2, 6, 33).to(dtype), torch.randint(33, (2, 6))
        whole = ours.selective_log_softmax(logits, index)
        assert torch.equal(ours.selective_log_softmax(logits[:, ::2], index[:, ::2]), whole[:, ::2])
        assert ours.selective_log_softmax(logits[:0], index[:0]).shape == (0, 6)
        assert ours.entropy_from_logits(logits[:, :0]).shape == (2, 0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_compiles_as_one_graph(self, dtype: torch.dtype) -> None:
        logits, index = torch.randn(2, 6, 33).to(dtype), torch.randint(33, (2, 6))

        def both(z: Tensor) -> Tensor:
            logp, entropy = ours.selective_log_softmax_and_entropy(z, index, True, 0.7)
            return logp.float() + 0.1 * entropy.float()

        results = []
        for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
            leaf = logits.clone().requires_grad_()
            value = function(leaf)
            value.sum().backward()
            results.append((value.detach(), leaf.grad))
        for plain, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, plain)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bad_input(self, dtype: torch.dtype) -> None:
        logits, index = torch.randn(2, 7).to(dtype), torch.tensor([0, -100])
        with pytest.raises(ValueError, match="temperature must be positive"):
            ours.selective_log_softmax(logits, index, 0.0)
        with pytest.raises(IndexError, match="-100"):
            ours.selective_log_softmax(logits, index)
        with pytest.raises(ValueError, match="row_mask"):
            ours.selective_log_softmax(logits, index, row_mask=torch.ones(3))
        with pytest.raises(ValueError, match=r"index: wanted \(2,\), or that with K ids"):
            ours.selective_log_softmax(logits, index[:1])
        with pytest.raises(TypeError, match="index: wanted an integer tensor"):
            ours.selective_log_softmax(logits, index.float())
        with pytest.raises(TypeError, match=r"logits: wanted a torch\.Tensor, got NoneType"):
            ours.selective_log_softmax(None, index)


class TestEntropy:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("chunk_size", [1, 16])
    @pytest.mark.parametrize("shape", [(768,), (32, 768), (8, 16, 768), (2, 4, 8, 768)])
    def test_is_minus_p_log_p(self, dtype: torch.dtype, chunk_size: int, shape: tuple[int, ...]) -> None:
        logits = torch.randn(*shape).to(dtype)
        logp = logits.log_softmax(-1)
        close(ours.entropy_from_logits(logits, chunk_size), -(logp.exp() * logp).sum(-1))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_trl_with_gradients(self, utils: Any, dtype: torch.dtype) -> None:
        logits, index = torch.randn(3, 5, 257).to(dtype), torch.randint(257, (3, 5))
        grads = []
        for module in (ours, utils):
            leaf = logits.clone().requires_grad_()
            logp, entropy = module.selective_log_softmax_and_entropy(leaf, index, True, 0.7)
            (logp.float().sum() + 2 * entropy.float().sum()).backward()
            grads.append((logp.detach(), entropy.detach(), leaf.grad))
        for got, wanted in zip(grads[0][:2], grads[1][:2], strict=True):
            close(got, wanted)
        # TRL rounds the probabilities of each step to the dtype; the sum of their errors is what is allowed here.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(grads[0][2], grads[1][2], rtol=8 * eps, atol=max(8 * eps, 1e-6))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_a_logit_of_minus_infinity(self, dtype: torch.dtype, temperature: float) -> None:
        logits = torch.randn(1, 3, 9).to(dtype)
        logits[0, 0, 3] = logits[0, 1, 1:] = float("-inf")
        leaf, index = logits.clone().requires_grad_(), torch.zeros(1, 3, dtype=torch.long)
        _, entropy = ours.selective_log_softmax_and_entropy(leaf, index, True, temperature)
        entropy.sum().backward()
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
        logp = (logits[0, 0, logits[0, 0] > float("-inf")] / temperature).log_softmax(-1)
        tight = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(entropy[0, 0], -(logp.exp() * logp).sum(), rtol=tight, atol=tight)
        assert entropy[0, 1] == 0
        if temperature == 1.0:
            assert torch.equal(ours.entropy_from_logits(logits), entropy)

    def test_without_gradient(self) -> None:
        leaf = torch.randn(2, 9, requires_grad=True)
        logp, entropy = ours.selective_log_softmax_and_entropy(leaf, torch.tensor([1, 2]), False)
        assert logp.requires_grad
        assert not entropy.requires_grad


def fp64_oracle(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None,
    scale: float,
    outputs: tuple[str, ...],
) -> tuple[Tensor | None, ...]:
    z = torch.nn.functional.linear(hidden, weight, bias) * scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    logps = z.log_softmax(-1)
    values = {
        "entropy": -(logps.exp() * logps).sum(-1),
        "log_sum_sq_probs": (2 * logps).logsumexp(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == targets,
    }
    logp = logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logp, *(value if name in outputs else None for name, value in values.items())


class TestChunkedLogProbs:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("outputs", [(), ("entropy",), ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")])
    @pytest.mark.parametrize(("softcap", "scale", "biased"), [(None, 1.0, False), (5.0, 0.25, True)])
    def test_equals_trl(
        self,
        utils: Any,
        dtype: torch.dtype,
        outputs: tuple[str, ...],
        softcap: float | None,
        scale: float,
        biased: bool,
    ) -> None:
        hidden, weight = torch.randn(70, 16).to(dtype), torch.randn(301, 16).to(dtype)
        bias = torch.randn(301).to(dtype) if biased else None
        targets, upstream = torch.randint(301, (70,)), torch.randn(70)
        results = []
        for function in (ours.ChunkedLogProbFunction.apply, utils._ChunkedLogProbFunction.apply, fp64_oracle):
            wide = torch.float64 if function is fp64_oracle else dtype
            leaves = [None if t is None else t.to(wide, copy=True).requires_grad_() for t in (hidden, weight, bias)]
            values = function(*leaves, targets, 0.9, 128, softcap, scale, outputs)
            loss = (values[0] * upstream).sum()
            if values[1] is not None:
                loss = loss + (values[1] * upstream.flip(0)).sum()
            loss.backward()
            results.append((*values, *(None if t is None else t.grad for t in leaves)))
        names = ("logp", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "hidden", "weight", "bias")
        for name, got, wanted, oracle in zip(names, *results, strict=True):
            assert (got is None) == (wanted is None)
            if name == "is_top1" and wanted is not None:
                assert torch.equal(got, wanted)
            elif wanted is not None:
                assert got.dtype == wanted.dtype
                assert_as_good_as_eager(got, oracle, wanted, dtype=dtype, name=name)

    @pytest.mark.parametrize("outputs", [("entropy",), ("entropy", "mean_logits", "is_top1")])
    def test_autocast_and_a_frozen_head(self, utils: Any, outputs: tuple[str, ...]) -> None:
        hidden, weight, targets = torch.randn(70, 16), torch.randn(301, 16), torch.randint(301, (70,))
        results = []
        for function in (ours.ChunkedLogProbFunction, utils._ChunkedLogProbFunction):
            leaf = hidden.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                values = function.apply(leaf, weight, None, targets, 1.0, 128, None, 1.0, outputs)
            (values[0].sum() + values[1].sum()).backward()
            results.append((values[0], values[1], leaf.grad))
        for got, wanted in zip(*results, strict=True):
            assert got.dtype == wanted.dtype == torch.float32
            torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_statistics_change_no_log_probability(self, dtype: torch.dtype, autocast: bool) -> None:
        """DPO's reference is asked for nothing else: at the first step all its rewards are 0."""
        hidden, weight = torch.randn(70, 16).to(dtype), torch.randn(301, 16)
        weight, targets = (weight if autocast else weight.to(dtype)), torch.randint(301, (70,))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            alone, *_ = ours.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 0.9, 64, None, 1.0, ())
            both, *_ = ours.ChunkedLogProbFunction.apply(
                hidden, weight, None, targets, 0.9, 64, None, 1.0, ("entropy", "mean_logits", "is_top1")
            )
        assert torch.equal(alone, both)

    def test_a_negative_scale_is_trls_own(self, utils: Any) -> None:
        theirs = utils._ChunkedLogProbFunction
        arguments = (torch.randn(5, 8), torch.randn(33, 8), None, torch.randint(33, (5,)), 1.0, 64, None, -0.5, ())
        wanted = theirs.apply(*arguments)[0]
        assert torch.equal(ours.ChunkedLogProbFunction.apply(*arguments)[0], wanted)
        with ours.patch():
            assert utils._ChunkedLogProbFunction is not theirs
            assert torch.equal(utils._ChunkedLogProbFunction.apply(*arguments)[0], wanted)

    def test_chunks_of_tokens_add_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        everything = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        hidden, weight, targets = torch.randn(10, 8), torch.randn(33, 8), torch.randint(33, (10,))
        results = []
        for size in (64, 3):
            monkeypatch.setattr("rl4llm_fast.tiles.chunk_rule", lambda *_, size=size: size)
            leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
            values = ours.ChunkedLogProbFunction.apply(*leaves, None, targets, 1.0, 64, None, 1.0, everything)
            (values[0].sum() + values[1].square().sum()).backward()
            results.append((*values, *(t.grad for t in leaves)))
        for one, several in zip(*results, strict=True):
            torch.testing.assert_close(one, several)

    def test_no_tokens(self) -> None:
        hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(33, 8, requires_grad=True)
        for outputs in ((), ("is_top1",)):
            values = ours.ChunkedLogProbFunction.apply(
                hidden, weight, None, torch.zeros(0, dtype=torch.long), 1.0, 64, None, 1.0, outputs
            )
            values[0].sum().backward()
            assert weight.grad is not None
            assert not weight.grad.any()


class TestPatch:
    def test_swaps_every_binding_and_leaves_no_trace(self, utils: Any) -> None:
        import trl.kernels

        user = types.ModuleType("users_module")
        before = {k: getattr(utils, k) for k in ("selective_log_softmax", "_ChunkedLogProbFunction")}
        user.renamed = before["selective_log_softmax"]  # type: ignore[attr-defined]
        sys.modules["users_module"] = user
        try:
            with ours.patch() as report:
                assert not report.skipped
                for place in ("trl.trainer.utils.selective_log_softmax", "users_module.renamed"):
                    assert place in report.swapped
                    assert place in str(report)
                swapped = utils.selective_log_softmax
                assert swapped is user.renamed is not before["selective_log_softmax"]
                assert utils._ChunkedLogProbFunction is trl.kernels.ChunkedLogProbFunction
                assert issubclass(utils._ChunkedLogProbFunction, ours.ChunkedLogProbFunction)
                assert pickle.loads(pickle.dumps(swapped)) is swapped
                later = types.ModuleType("imported_later")
                later.selective_log_softmax = swapped  # type: ignore[attr-defined]
                sys.modules["imported_later"] = later
                from trl.experimental.cpo import cpo_trainer

                assert cpo_trainer.selective_log_softmax is swapped
            assert utils.selective_log_softmax is user.renamed is before["selective_log_softmax"]
            assert later.selective_log_softmax is before["selective_log_softmax"]
            assert cpo_trainer.selective_log_softmax is before["selective_log_softmax"]
            assert utils._ChunkedLogProbFunction is before["_ChunkedLogProbFunction"]
            assert trl.kernels.ChunkedLogProbFunction is before["_ChunkedLogProbFunction"]
            assert ours.selective_log_softmax.__module__ == "rl4llm_fast.compat.trl"
        finally:
            sys.modules.pop("users_module", None)
            sys.modules.pop("imported_later", None)

    def test_patched_functions_answer(self, utils: Any) -> None:
        logits, index = torch.randn(2, 3, 50), torch.randint(50, (2, 3))
        wanted = utils.selective_log_softmax(logits, index)
        with ours.patch():
            torch.testing.assert_close(utils.selective_log_softmax(logits, index), wanted)

    def test_twice_is_refused_and_unpatch_is_not(self, utils: Any) -> None:
        report = ours.patch()
        with pytest.raises(RuntimeError, match="patched already"):
            ours.patch()
        report.unpatch()
        report.unpatch()
        ours.unpatch()

    def test_unknown_version(self, utils: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
        before = utils.selective_log_softmax
        with pytest.raises(ImportError, match=r"trl 99.0: unknown version; known are trl 1\.16"):
            ours.patch()
        assert utils.selective_log_softmax is before

        def renamed(logits: Tensor, targets: Tensor) -> Tensor:
            return logits

        monkeypatch.setattr(utils, "selective_log_softmax", renamed)
        monkeypatch.delattr(utils, "entropy_from_logits")
        with ours.patch(force=True) as report:
            assert "targets" in report.skipped["trl.trainer.utils.selective_log_softmax"]
            assert "does not have it" in report.skipped["trl.trainer.utils.entropy_from_logits"]
            assert utils.selective_log_softmax is renamed

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"trl is not installed; known are trl 1\.16"):
            ours.patch()

    def test_import_imports_no_library(self) -> None:
        code = """
            import sys, rl4llm_fast.compat
            print([m for m in ("trl", "verl", "openrlhf", "transformers", "peft") if m in sys.modules])
        """
        done = subprocess.run([sys.executable, "-c", "\n".join(map(str.strip, code.splitlines()))], capture_output=True)
        assert done.stdout.decode().strip() == "[]", done.stderr.decode()
