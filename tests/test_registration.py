"""Every op is an ordinary torch op: opcheck, torch.compile without graph breaks, no silent double backward."""

from __future__ import annotations

import inspect

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast import dispatch, machine, schemas

compiled_backend = pytest.mark.skipif(
    "cpu" not in rf.backends()["token_logprobs"], reason="the C++ extension is not built here"
)


def token_logprobs_arguments(dtype=torch.float32, **changes):
    logits = torch.randn(2, 3, 17, dtype=dtype)
    arguments = {
        "logits": logits,
        "token_ids": torch.randint(17, (6,)),
        "mask": torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool),
        "temperature": torch.ones((), dtype=torch.float64),
        "softcap": None,
        "ignore_index": -100,
    }
    return {**arguments, **changes}


@compiled_backend
class TestOpcheck:
    @pytest.mark.parametrize("entropy", [False, True])
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"dtype": torch.bfloat16, "mask": None, "softcap": torch.tensor(5.0, dtype=torch.float64)},
            {"dtype": torch.float64, "temperature": torch.full((6,), 0.5, dtype=torch.float64)},
            {"token_ids": torch.randint(17, (6, 3))},
        ],
        ids=["plain", "bf16-softcap", "fp64-row-temperature", "k-ids"],
    )
    def test_token_logprobs(self, changes, entropy):
        arguments = token_logprobs_arguments(**changes)
        ops = torch.ops.rl4llm_fast
        torch.library.opcheck(ops.token_logprobs_fwd.default, (*arguments.values(), entropy))
        logp, h, row_max, log_sum = ops.token_logprobs_fwd(*arguments.values(), entropy)
        grads = (torch.randn_like(logp), torch.randn_like(h) if entropy else None)
        backward = (*arguments.values(), row_max, log_sum, h if entropy else None, *grads)
        torch.library.opcheck(ops.token_logprobs_bwd.default, backward)
        torch.library.opcheck(ops.token_logprobs_bwd_.default, backward)

    @pytest.mark.parametrize("scale", ["group", "batch", "none"])
    def test_group_advantages(self, scale):
        eps = torch.tensor(1e-6, dtype=torch.float64)
        op = torch.ops.rl4llm_fast.group_advantages.default
        torch.library.opcheck(op, (torch.randn(8), None, 4, scale, "mean", True, eps))
        torch.library.opcheck(op, (torch.randn(8), torch.randint(3, (8,)), 0, scale, "leave_one_out", False, eps))


def test_every_op_is_declared_in_both_namespaces():
    for name in schemas.OPS:
        for namespace in (torch.ops.rl4llm_fast, torch.ops.rl4llm_fast_triton):
            assert torch.Tag.pt2_compliant_tag in getattr(namespace, name).default.tags


def test_every_kernel_of_the_public_ops_exists_in_the_extension():
    if dispatch.extension is None:
        pytest.skip("the C++ extension is not built here")
    for op, kernels in dispatch.OP_KERNELS.items():
        assert dispatch.why_not(op, "cpu", "cpu") is None or not kernels
        assert set(kernels) <= set(schemas.OPS)


@pytest.mark.parametrize("backend", ["eager", pytest.param("cpu", marks=compiled_backend)])
class TestCompile:
    def test_token_logprobs_forward_and_backward(self, backend):
        def loss(logits, ids, tau, cap, mask):
            logp, entropy = rf.token_logprobs(
                logits, ids, temperature=tau, softcap=cap, mask=mask, return_entropy=True, backend=backend
            )
            return (logp * 2 + entropy).sum()

        compiled = torch.compile(loss, fullgraph=True)
        ids = torch.randint(33, (2, 5))
        for tau, cap, mask in [(0.7, None, None), (torch.rand(2, 5) + 0.5, 9.0, torch.rand(2, 5) > 0.3)]:
            logits = torch.randn(2, 5, 33)
            leaves = [logits.clone().requires_grad_() for _ in range(2)]
            expected = loss(leaves[0], ids, tau, cap, mask)
            got = compiled(leaves[1], ids, tau, cap, mask)
            torch.testing.assert_close(got, expected)
            expected.backward()
            got.backward()
            torch.testing.assert_close(leaves[1].grad, leaves[0].grad)

    def test_annealing_a_number_does_not_recompile_per_value(self, backend):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()

        @torch.compile(fullgraph=True, backend=counter)
        def f(logits, ids, tau):
            return rf.token_logprobs(logits, ids, temperature=tau, backend=backend)

        logits, ids = torch.randn(4, 9), torch.randint(9, (4,))
        for step in range(12):
            f(logits, ids, 1.0 - 0.05 * step)
        assert counter.frame_count <= 2  # the first value, then the symbolic one
        counter.frame_count = 0
        for step in range(12):
            f(logits, ids, torch.tensor(1.0 - 0.05 * step))
        assert counter.frame_count == 1

    def test_inplace_backward_is_a_hint(self, backend):
        def loss(x, ids):
            return rf.token_logprobs(x * 2, ids, inplace_backward=True, backend=backend).sum()

        ids = torch.randint(9, (4,))
        leaves = [torch.randn(4, 9).requires_grad_()]
        leaves.append(leaves[0].detach().clone().requires_grad_())
        loss(leaves[0], ids).backward()
        torch.compile(loss, fullgraph=True)(leaves[1], ids).backward()
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


@compiled_backend
class TestDoubleBackward:
    @pytest.mark.parametrize("inplace", [False, True])
    def test_raises(self, inplace):
        logits = torch.randn(2, 5, requires_grad=True)
        logp = rf.token_logprobs(logits * 1, torch.zeros(2, dtype=torch.long), inplace_backward=inplace, backend="cpu")

        def twice():
            (grad,) = torch.autograd.grad(logp.sum(), logits, create_graph=True)
            grad.sum().backward()

        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            twice()


class TestChoice:
    def test_argument_wins_over_context_over_environment(self, monkeypatch):
        x = torch.zeros(1)
        monkeypatch.setenv("RL4LLM_FAST_BACKEND", "nonsense")
        with pytest.raises(ValueError, match="nonsense"):
            dispatch.choose("token_logprobs", x)
        with rf.use_backend("eager"):
            assert dispatch.choose("token_logprobs", x) == "eager"
            with pytest.raises(rf.BackendError, match="cuda"):
                dispatch.choose("token_logprobs", x, "cuda")
        assert dispatch.choose("token_logprobs", x, "eager") == "eager"
        monkeypatch.setenv("RL4LLM_FAST_BACKEND", "eager")
        assert dispatch.choose("token_logprobs", x) == "eager"

    def test_use_backend_refuses_unknown_names_and_restores(self):
        with pytest.raises(ValueError, match="tpu"):
            rf.use_backend("tpu")  # not only where it is entered
        with pytest.raises(KeyError), rf.use_backend("eager"):
            raise KeyError
        assert dispatch._override is None

    def test_blocks_that_end_in_another_order_leave_nothing_behind(self):
        """As those of two threads may."""
        first, second = rf.use_backend("eager"), rf.use_backend("cpu")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert dispatch.named(None) == "cpu"
        second.__exit__(None, None, None)
        assert dispatch._override is None

    def test_every_function_that_takes_a_backend_is_listed(self):
        functions = {name: f for name in rf.__all__ if inspect.isfunction(f := getattr(rf, name))}
        taking = {name for name, f in functions.items() if "backend" in inspect.signature(f).parameters}
        assert taking - {"use_backend"} == set(rf.backends())

    def test_plain_pytorch_refuses_other_backends(self, monkeypatch):
        x, ids = torch.tensor([2.0, 1.0]), torch.arange(2)
        calls = {
            "shape_rewards": lambda **how: rf.shape_rewards(x, torch.zeros(2, 3), beta=0.1, **how),
            "ranked_reward_loss": lambda **how: rf.ranked_reward_loss(x, ids, 0 * ids, **how),
        }
        for op, call in calls.items():
            assert rf.backends()[op] == ["eager"]
            assert torch.equal(call(), call(backend="eager"))
            for name in ("cpu", "triton", "cuda"):
                message = f"backend '{name}' cannot run {op}: {op} exists as plain PyTorch only"
                with pytest.raises(rf.BackendError, match=message):
                    call(backend=name)
                with rf.use_backend(name):  # of the ops that have a choice: a loop inside it may hold these too
                    assert torch.equal(call(), call(backend="eager"))
                monkeypatch.setenv("RL4LLM_FAST_BACKEND", name)
                assert torch.equal(call(), call(backend="eager"))
                monkeypatch.delenv("RL4LLM_FAST_BACKEND")
            with pytest.raises(ValueError, match="backend: wanted one of eager"):
                call(backend="tpu")


class TestDriver:
    @pytest.mark.parametrize(
        ("driver", "built", "refused"),
        [(12_080, "13.0", True), (13_010, "13.0", False), (13_000, "12.8", False), (12_080, "", False)],
    )
    def test_one_of_an_older_cuda_is_named(self, monkeypatch, driver, built, refused):
        """The runtime is linked in: on an older driver every launch would fail, on one of the same major none."""

        class Library:
            def cuDriverGetVersion(self, pointer):
                pointer._obj.value = driver
                return 0

        monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: Library())
        said = machine.driver_too_old.__wrapped__(built)
        assert (said is not None) == refused
        if refused:
            assert said.startswith("its kernels are built with CUDA 13.0, and this machine's driver is of CUDA 12.x")

    def test_none_at_all_is_no_reason(self, monkeypatch):
        def missing(name):
            raise OSError(name)

        monkeypatch.setattr(machine.ctypes, "CDLL", missing)
        assert machine.driver_too_old.__wrapped__("13.0") is None
