"""The losses from hidden states on a GPU, against the fp64 oracle on the CPU. Skipped, with the reason, without one."""

from __future__ import annotations

import math

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast import dispatch
from rl4llm_fast.testing import assert_as_good_as_eager

pytestmark = pytest.mark.gpu

B, T, D, V = 4, 12, 64, 1_031
LOSSES = ["grpo", "gspo", "sft", "dpo", "simpo"]


PAIRS = ("dpo", "simpo")


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    kind = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind")
    op = "linear_preference_loss" if kind in PAIRS else "linear_policy_loss"
    reason = dispatch.why_not(op, request.param, "cuda")
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def inputs(dtype):
    factors = [t.to(dtype) for t in (torch.randn(B, T, D), torch.randn(V, D) / 4, torch.randn(V))]
    mask = torch.rand(B, T) > 0.3
    factors[0][~mask] = math.nan
    numbers = {"advantages": torch.randn(B), "ref": -7 - torch.rand(B, T)}
    return factors, numbers, {"ids": torch.randint(V, (B, T)), "mask": mask}


def loss_of(kind, leaves, numbers, integers, **options):
    ids, (x, w, b) = integers["ids"], leaves
    options["mask"] = integers["mask"]
    if kind == "sft":
        return rf.linear_sft_loss(x, w, ids, b, **options)
    if kind == "simpo":
        return rf.linear_preference_loss(x, w, ids, b, kind=kind, **options)[0]
    if kind == "dpo":
        return rf.linear_preference_loss(x, w, ids, b, kind=kind, ref_logp=numbers["ref"], **options)[0]
    options |= {"kind": kind, "ref_logp": numbers["ref"], "kl_coef": 0.05, "entropy_coef": 0.01}
    return rf.linear_policy_loss(x, w, ids, None, numbers["advantages"], b, **options)[0]


def run(kind, data, device, dtype, grad=1.0, **options):
    factors, numbers, integers = data
    leaves = [f.to(device, dtype, copy=True).requires_grad_() for f in factors]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    numbers = {name: t.to(device, wide) for name, t in numbers.items()}
    loss = loss_of(kind, leaves, numbers, {name: t.to(device) for name, t in integers.items()}, **options)
    (grad * loss).backward()
    return [t.cpu() for t in (loss.detach(), *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_tokens", [None, 32, 5])
def test_agrees_with_the_oracle(backend, kind, dtype, chunk_tokens):
    """In one chunk; in chunks of whole sequences and pairs; in chunks that cut them, which take two passes."""
    data = inputs(dtype)
    got = run(kind, data, "cuda", dtype, 1.7, backend=backend, chunk_tokens=chunk_tokens)
    oracle = run(kind, data, "cpu", torch.float64, 1.7, backend="eager")
    eager = run(kind, data, "cuda", dtype, 1.7, backend="eager")
    for name, g, o, e in zip(("loss", "dx", "dW", "db"), got, oracle, eager, strict=True):
        assert_as_good_as_eager(g, o, e, dtype=dtype, name=name)


@pytest.mark.parametrize("kind", LOSSES)
def test_dtypes_of_logits_and_accumulation(backend, kind):
    data, bf16 = inputs(torch.bfloat16), torch.bfloat16
    options = {"logits_dtype": torch.float32, "chunk_tokens": 32}
    got = run(kind, data, "cuda", bf16, backend=backend, **options)
    oracle = run(kind, data, "cpu", torch.float64, backend="eager")
    eager = run(kind, data, "cuda", bf16, backend="eager", logits_dtype=torch.float32)
    exact = run(kind, data, "cuda", torch.float32, backend="eager")
    assert_as_good_as_eager(got[0], oracle[0], exact[0], dtype=torch.float32, name="loss")
    for name, g, o, e in zip(("dx", "dW", "db"), got[1:], oracle[1:], eager[1:], strict=True):
        assert_as_good_as_eager(g, o, e, dtype=bf16, name=name)
    narrow = run(kind, data, "cuda", bf16, backend=backend, grad_weight_dtype=bf16, **options)
    for i in (0, 1, 3):
        assert torch.equal(narrow[i], got[i])
    assert (narrow[2].double() - oracle[2]).norm() < 0.02 * oracle[2].norm()


@pytest.mark.parametrize("kind", LOSSES)
def test_no_synchronisation_and_graphs(backend, kind):
    factors, numbers, integers = ({n: t.cuda() for n, t in part.items()} if isinstance(part, dict) else part
                                  for part in inputs(torch.bfloat16))  # fmt: skip
    leaves = [f.cuda().requires_grad_() for f in factors]

    def step():
        loss = loss_of(kind, leaves, numbers, integers, backend=backend, chunk_tokens=32)
        return [loss.detach(), *torch.autograd.grad(2 * loss, leaves)]

    wanted = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, wanted, strict=True):
        assert torch.equal(a, b)


def test_the_last_backward_scales_in_place(backend):
    factors, numbers, integers = inputs(torch.bfloat16)
    leaves = [f.cuda().requires_grad_() for f in factors]
    on_gpu = [{n: t.cuda() for n, t in part.items()} for part in (numbers, integers)]
    for scale in (1.0, -2.5):
        loss = loss_of("grpo", leaves, *on_gpu, backend=backend)
        made = [t.clone() for t in loss.grad_fn.saved_tensors[3:]]
        place = loss.grad_fn.saved_tensors[4].data_ptr()
        found = torch.autograd.grad(scale * loss, leaves)
        assert found[1].data_ptr() == place
        for got, once in zip(found, made, strict=True):
            assert torch.equal(got, (once.float() * scale).to(got.dtype).view_as(got))


def test_out_of_range_ids_give_nan(backend):
    factors, _, integers = inputs(torch.float32)
    integers["mask"][:], factors[0] = True, torch.randn(B, T, D)
    integers["ids"][1, 2] = V
    logp = rf.linear_token_logprobs(*(f.cuda() for f in factors[:2]), integers["ids"].cuda(), backend=backend)
    assert logp.isnan().nonzero().tolist() == [[1, 2]]
