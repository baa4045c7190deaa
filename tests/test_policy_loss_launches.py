"""How many kernels policy_loss launches.

tests/test_token_loss_gpu.py runs this file in Triton's interpreter, tests/test_cuda_on_cpu.py with emulated CUDA C++.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from test_losses import INTERPRETED, check, sample

import rl4llm_fast as rf

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts the launches of interpreted or emulated kernels")
EMULATED = bool(os.environ.get("RL4LLM_FAST_EMULATED"))
# What launches nothing.
FREE = {"empty", "new_empty", "empty_like", "detach", "view", "_unsafe_view", "unbind", "alias", "lift_fresh",
        "unsqueeze", "policy_loss_fwd", "policy_loss_sequences_fwd", "token_loss_bwd"}  # fmt: skip


class Counted:
    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(self.kernel)
        return self.kernel[grid]


def counter(monkeypatch):
    """A function that says how many kernels were launched since now."""
    if EMULATED:
        from plugin import library

        before = library.launches()
        return lambda: library.launches() - before
    from rl4llm_fast.kernels import token_loss, token_loss_sequences

    launches = []
    for module in (token_loss, token_loss_sequences):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), launches))
    return lambda: len(launches)


def launches_of(monkeypatch, arguments, dtype):
    """How many kernels forward and backward launch, and the names of other ops that would launch one."""
    from torch.utils._python_dispatch import TorchDispatchMode

    launches, others = counter(monkeypatch), []
    monkeypatch.setattr("rl4llm_fast.checks.unseen", lambda tensor: True)  # as on a GPU

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function._schema.name.partition("::")[2]
            if name not in FREE:
                others.append(name)
            return function(*args, **(kwargs or {}))

    arguments = dict(arguments)
    leaves = [arguments.pop(n).requires_grad_() for n in ("logp", "entropy")]
    old, adv, upstream = arguments.pop("old_logp"), arguments.pop("advantages"), torch.ones(())
    with Record():
        loss, _ = rf.policy_loss(
            leaves[0], old, adv, entropy=leaves[1], entropy_coef=0.1, kl_coef=0.1, backend="triton", **arguments
        )
        grads = torch.autograd.grad(loss, leaves, upstream)
    assert all(g.dtype == dtype for g in grads)
    return launches(), others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ppo_clip", "grpo", "cispo", "sapo", "kl_pen"])
@pytest.mark.parametrize("packed", [False, True])
def test_three_launches(monkeypatch, dtype, kind, packed):
    """Forward and backward with every term are three kernels, and nothing else that would launch one."""
    s = sample(3, 70, dtype) | {"rollout_logp": -torch.rand(3, 70).to(dtype)}
    s = {n: v.reshape(-1) for n, v in s.items()} if packed else s
    s |= {"kind": kind, "rollout_correction": "truncate"}
    assert launches_of(monkeypatch, s, dtype) == (3, [])


OF_SEQUENCES = {
    "gspo": {"kind": "gspo"},
    "sequence correction": {"rollout_correction": "mask", "rollout_level": "sequence"},
    "seq_mean_token_mean": {"aggregation": "seq_mean_token_mean"},
    "seq_mean_token_sum_norm": {"aggregation": "seq_mean_token_sum_norm"},
}


@pytest.mark.parametrize("how", OF_SEQUENCES)
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("layout", ["rows", "offsets"])
def test_three_launches_for_what_sees_whole_sequences(monkeypatch, how, per_sequence, layout):
    dtype = torch.bfloat16
    s = sample(3, 70, dtype) | {"rollout_logp": -torch.rand(3, 70).to(dtype), "rollout_correction": "truncate"}
    s["token_weights"] = torch.rand(3, 70).to(dtype)
    if layout == "offsets":
        s = {n: v.reshape(-1) if isinstance(v, torch.Tensor) else v for n, v in s.items()}
        s["cu_seqlens"] = torch.tensor([0, 20, 20, 210], dtype=torch.int32)
    if per_sequence:
        s["advantages"] = torch.randn(3).to(dtype)
    assert launches_of(monkeypatch, s | OF_SEQUENCES[how], dtype) == (3, [])


@pytest.mark.parametrize("how", OF_SEQUENCES)
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("layout", ["rows", "offsets"])
def test_what_sees_whole_sequences_is_right(how, per_sequence, layout):
    """Long and empty sequences, one without a live token, NaN in dead tokens, every number given or not."""
    s = sample(2, 2600) | {"rollout_logp": -3 * torch.rand(2, 2600), "rollout_correction": "truncate", "kl_coef": 0.1}
    s |= {"token_weights": torch.rand(2, 2600), "entropy_coef": 0.1, "rollout_cap": 1.5} | OF_SEQUENCES[how]
    s["rollout_logp"] = s["old_logp"] + 0.001 * torch.randn(2, 2600)
    s["token_weights"] = s["token_weights"].masked_fill(~s["mask"], math.nan)
    if per_sequence:
        s["advantages"] = torch.randn(2)
    if layout == "offsets":
        s = {n: v.reshape(-1) if isinstance(v, torch.Tensor) else v for n, v in s.items()}
        s["cu_seqlens"] = torch.tensor([0, 0, 1, 1200, 1300, 2700, 5200, 5200])
        if per_sequence:
            s["advantages"] = torch.randn(7)
    check(s, "triton")
    check(s | {"num_tokens": 999, "num_sequences": 16, "max_length": 512, "dp_size": 2}, "triton")
    check(s | {"aggregation": "none"}, "triton")
    without = {n: v for n, v in s.items() if n not in ("mask", "token_weights", "ref_logp", "kl_coef")} | {
        "old_logp": None
    }
    if how != "gspo":
        check(without, "triton")


def test_a_sequence_is_the_same_bits_in_any_batch():
    s = sample(2, 1500) | {"mask": torch.rand(2, 1500) > 0.3}

    def found(rows):
        logp, old, adv, mask = (s[n][rows].clone() for n in ("logp", "old_logp", "advantages", "mask"))
        logp.requires_grad_()
        loss, _ = rf.policy_loss(logp, old, adv, mask=mask, kind="gspo", aggregation="none", backend="triton")
        return loss.detach(), *torch.autograd.grad(loss.sum(), logp)

    for both, alone in zip(found(slice(0, 2)), found(slice(1, 2)), strict=True):
        assert torch.equal(both[1:], alone)
