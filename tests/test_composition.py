"""Ops inside what users wrap around them: checkpointing, autocast, torch.func, shared logits, fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import rl4llm_fast as rf
from rl4llm_fast import checks

N, D, V = 6, 16, 301
BACKENDS = [b for b in ("eager", "cpu") if b in rf.backends()["token_logprobs"]]


def inputs():
    hidden = torch.randn(N, D, requires_grad=True)
    weight = (torch.randn(V, D) / 4).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,)), torch.randn(N, D), torch.randn(V, D) / 4


def from_logits(hidden, weight, ids, ref_hidden, ref_weight, backend):
    logits, ref = hidden @ weight.t(), ref_hidden @ ref_weight.t()
    logp, entropy = rf.token_logprobs(logits, ids, return_entropy=True, backend=backend)
    return logp + entropy * rf.kl_divergence(logits, ref, backend=backend)


def from_hidden(hidden, weight, ids, ref_hidden, ref_weight, backend):
    logp, entropy = rf.linear_token_logprobs(hidden, weight, ids, return_entropy=True, chunk_tokens=4, backend=backend)
    return logp + entropy * rf.linear_kl_divergence(
        hidden, weight, ref_hidden, ref_weight, chunk_tokens=4, backend=backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [from_logits, from_hidden])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(function, reentrant, backend):
    arguments = inputs()
    plain = function(*arguments, backend)
    upstream = torch.randn_like(plain)
    wanted = torch.autograd.grad((plain * upstream).sum(), arguments[:2])
    again = checkpoint(function, *arguments, backend, use_reentrant=reentrant)
    for tensor in arguments[:2]:
        tensor.grad = None
    (again * upstream).sum().backward()
    assert torch.equal(again, plain)
    for tensor, gradient in zip(arguments[:2], wanted, strict=True):
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled extension is not installed")
@pytest.mark.parametrize("function", [from_logits, from_hidden])
def test_torch_func_is_refused_in_words(function):
    hidden, weight, *rest = inputs()

    def loss(h):
        return function(h, weight, *rest, "cpu").sum()

    with pytest.raises(RuntimeError, match=r"functorch transforms|setup_context"):
        torch.func.grad(loss)(hidden.detach())
    with pytest.raises(RuntimeError, match=r"functorch transforms|setup_context|vmap"):
        torch.func.vmap(loss)(hidden.detach().expand(2, N, D))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_runs_products_in_its_dtype_and_returns_fp32(backend):
    hidden, weight, ids, *_ = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = rf.linear_token_logprobs(hidden, weight, ids, backend=backend)
    by_hand = rf.token_logprobs(hidden.bfloat16() @ weight.bfloat16().t(), ids, backend=backend)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, by_hand)
    logp.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled extension is not installed")
def test_logits_overwritten_in_place_cannot_reach_another_consumer():
    hidden, weight, ids, *_ = inputs()
    logits = hidden @ weight.t()
    other = logits.exp().sum()  # saves exp(logits): unharmed
    squared = logits.pow(2).sum()  # saves the logits themselves
    logp = rf.token_logprobs(logits, ids, inplace_backward=True, backend="cpu")
    logp.sum().backward(retain_graph=True)
    other.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


def test_hyperparameters_are_made_once_and_survive_every_mode():
    with FakeTensorMode():
        loss, _ = rf.policy_loss(torch.zeros(2, 3, requires_grad=True), None, torch.ones(2), eps_low=0.123)
        assert isinstance(loss, FakeTensor)
    with torch.inference_mode():
        rf.policy_loss(torch.zeros(2, 3), None, torch.ones(2), eps_low=0.123)
    for _ in range(2):
        logp = torch.zeros(2, 3, requires_grad=True)
        rf.policy_loss(logp, None, torch.ones(2), eps_low=0.123)[0].backward()
        torch.testing.assert_close(logp.grad, torch.full((2, 3), -1 / 6))
    one, two = (checks.numbers({"a": 0.5, "b": 2}, 4, logp) for _ in range(2))
    assert one is two
    assert one.tolist() == [0.5, 2.0, 0.0, 0.0]
    assert checks.numbers({"a": 0.5, "b": 3}, 4, logp).tolist() == [0.5, 3.0, 0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_default_device_and_dtype_are_of_no_account(backend):
    """Tensors made inside an op are made where its inputs are, and results have the dtype that these give them."""
    torch.manual_seed(0)
    hidden, weight, ids, ref_hidden, ref_weight = inputs()
    logits, rows, mask = (
        torch.randn(2, 5, 37),
        -torch.rand(2, 5),
        torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]]).bool(),
    )
    tokens, packed, cu = torch.randint(37, (2, 5)), -torch.rand(10), torch.tensor([0, 4, 4, 10])
    one, three, cu_of_two = torch.randn(2), torch.randn(3), torch.tensor([0, 2, 6])
    ends, steps = torch.tensor([[1, 4], [2, -1]]), torch.randn(2, 2)
    with_backend = {"backend": backend}

    def results():
        yield rf.token_logprobs(logits, tokens, temperature=0.7, softcap=5.0, mask=mask, **with_backend)
        yield rf.token_entropy(logits, **with_backend)
        yield rf.kl_divergence(logits, logits.flip(0), direction="jsd", **with_backend)
        yield rf.linear_token_logprobs(hidden, weight, ids, softcap=5.0, **with_backend)
        yield rf.linear_kl_divergence(hidden, weight, ref_hidden, ref_weight, **with_backend)
        yield rf.kl_estimate(rows, rows.flip(0), **with_backend)
        for kind in ("ppo_clip", "gspo", "cispo"):
            for aggregation in ("token_mean", "seq_mean_token_mean"):
                how = {"kind": kind, "aggregation": aggregation, "ref_logp": rows, "kl_coef": 0.1, **with_backend}
                yield rf.policy_loss(rows, rows.flip(0), one, mask=mask, **how)
                how["ref_logp"] = packed
                yield rf.policy_loss(packed, packed.flip(0), three, cu_seqlens=cu, **how)
        yield rf.policy_loss(
            rows, rows, one, rollout_logp=rows.flip(0), rollout_correction="truncate", rollout_level="sequence",
            **with_backend,
        )  # fmt: skip
        leaf = hidden.detach().requires_grad_()
        for kind in ("ppo_clip", "gspo"):
            how = {"kind": kind, "cu_seqlens": cu_of_two, **with_backend}
            yield rf.linear_policy_loss(leaf, weight, ids, None, one, **how)
        yield rf.linear_sft_loss(leaf, weight, ids, **with_backend)
        pair = (leaf.view(2, 3, D), weight, ids.view(2, 3))
        yield rf.linear_preference_loss(*pair, ref_logp=rows[:, :3], **with_backend)
        yield rf.linear_preference_loss(leaf, weight, ids, cu_seqlens=cu_of_two, kind="simpo", **with_backend)
        for kind in ("dpo", "simpo", "orpo"):
            ref = () if kind != "dpo" else (rows, rows)
            yield rf.preference_loss(rows, rows.flip(0), *ref, kind=kind, mask_chosen=mask, **with_backend)
        yield rf.kto_loss(rows, rows.flip(0), torch.tensor([True, False], device="cpu"), mask=mask, **with_backend)
        yield rf.reward_model_loss(one, one.flip(0), **with_backend)
        yield rf.ranked_reward_loss(three, cu[:3], torch.zeros(3, dtype=torch.long, device="cpu"))
        yield rf.value_loss(rows, rows.flip(0), old_values=rows, clip=0.2, mask=mask, **with_backend)
        yield rf.sft_loss(packed, cu_seqlens=cu, aggregation="seq_mean_token_mean", **with_backend)
        for mode in ("skip", "zero"):
            yield rf.gae(rows, rows.flip(0), gamma=0.9, mask=mask, mask_mode=mode, **with_backend)
        yield rf.gae(one, rows, kl=rows, beta=0.1, **with_backend)
        yield rf.lambda_returns(packed, packed, gamma=0.9, lam=0.5, cu_seqlens=cu, **with_backend)
        yield rf.n_step_returns(rows, rows, n=2, gamma=0.9, **with_backend)
        yield rf.vtrace(rows, rows.flip(0), rows, rows, gamma=0.9, lam=0.9, **with_backend)
        yield rf.shape_rewards(one, rows, beta=0.1, mask=mask)
        yield rf.group_advantages(one, group_size=2, **with_backend)
        yield rf.process_advantages(steps, ends, group_size=2, length=5, **with_backend)
        yield rf.whiten(rows, mask, **with_backend)

    def flat(result):
        if isinstance(result, dict):
            return [t for value in result.values() for t in flat(value)]
        return [t for value in result for t in flat(value)] if isinstance(result, tuple) else [result]

    wanted = [flat(result) for result in results()]
    checks._kept_tensor.cache_clear()
    with torch.device("meta"):
        got = [flat(result) for result in results()]
    torch.set_default_dtype(torch.float64)
    try:
        wide = [flat(result) for result in results()]
    finally:
        torch.set_default_dtype(torch.float32)
    for here, *others in zip(wanted, got, wide, strict=True):
        for there in others:
            for a, b in zip(here, there, strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)
