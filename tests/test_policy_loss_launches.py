"""How many kernels policy_loss launches; tests/test_token_loss_gpu.py runs this file in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from test_losses import INTERPRETED, sample

import rl4llm_fast as rf


@pytest.mark.skipif(not INTERPRETED, reason="counts Triton's launches")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ppo_clip", "grpo", "cispo", "sapo", "kl_pen"])
@pytest.mark.parametrize("packed", [False, True])
def test_three_launches(monkeypatch, dtype, kind, packed):
    """Forward and backward with every term are three kernels, and nothing else that would launch one."""
    from rl4llm_fast.kernels import token_loss
    from torch.utils._python_dispatch import TorchDispatchMode

    launches, others = [], []
    for name in ("policy_loss_fwd_kernel", "policy_loss_finish_kernel", "token_loss_bwd_kernel"):
        kernel = getattr(token_loss, name)
        counted = type("Counted", (), {"__getitem__": lambda s, g, k=kernel, n=name: launches.append(n) or k[g]})()
        monkeypatch.setattr(token_loss, name, counted)
    free = {"empty", "new_empty", "empty_like", "detach", "view", "_unsafe_view", "unbind", "alias", "lift_fresh",
            "unsqueeze", "policy_loss_fwd", "token_loss_bwd"}  # fmt: skip

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function._schema.name.partition("::")[2]
            if name not in free and not launches[3:]:
                others.append(name)
            return function(*args, **(kwargs or {}))

    s = sample(3, 70, dtype) | {"rollout_logp": -torch.rand(3, 70).to(dtype)}
    s = {n: v.reshape(-1) for n, v in s.items()} if packed else s
    leaves = [s.pop(n).requires_grad_() for n in ("logp", "entropy")]
    old, adv, upstream = s.pop("old_logp"), s.pop("advantages"), torch.ones(())
    with Record():
        loss, _ = rf.policy_loss(
            leaves[0], old, adv, kind=kind, entropy=leaves[1], entropy_coef=0.1, kl_coef=0.1, backend="triton",
            rollout_correction="truncate", **s,
        )  # fmt: skip
        grads = torch.autograd.grad(loss, leaves, upstream)
    assert len(launches) == 3
    assert others == []
    assert all(g.dtype == dtype for g in grads)
