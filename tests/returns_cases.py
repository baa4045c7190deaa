"""What the tests of returns share: the ops with their numbers, inputs and masks."""

from __future__ import annotations

import pytest
import torch

import rl4llm_fast as rf

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MODES = ["skip", "zero"]
BACKENDS = rf.backends().get("gae", ["eager"])
KERNELS = [b for b in BACKENDS if b != "eager"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_kernel = pytest.mark.parametrize("backend", KERNELS)


def gae(inputs, **options):
    return rf.gae(inputs["rewards"], inputs["values"], gamma=0.97, lam=0.9, **options)


def discounted(inputs, **options):
    return (rf.discounted_returns(inputs["rewards"], gamma=0.97, **options),)


def lambda_returns(inputs, **options):
    return (rf.lambda_returns(inputs["rewards"], inputs["values"], gamma=0.97, lam=0.9, **options),)


def n_step(inputs, **options):
    return (rf.n_step_returns(inputs["rewards"], inputs["values"], 5, gamma=0.97, **options),)


def vtrace(inputs, **options):
    names = ("logp", "rollout_logp", "rewards", "values")
    return rf.vtrace(*(inputs[n] for n in names), gamma=0.97, lam=0.9, rho_max=1.2, c_max=0.9, **options)


OPS = {f.__name__: f for f in (gae, discounted, lambda_returns, n_step, vtrace)}
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def inputs_of(*shape, dtype=torch.float32):
    names = ("rewards", "values", "logp", "rollout_logp")
    return {name: (torch.randn(*shape) * (0.3 if "logp" in name else 1.0)).to(dtype) for name in names}


def random_mask(*shape, live=0.6):
    """Holes, dead ends and dead starts, and a row without a live token."""
    mask = torch.rand(*shape) < live
    if len(shape) == 2 and shape[0] > 2:
        mask[0, shape[1] // 2 :] = False
        mask[1, : shape[1] // 2] = False
        mask[2] = False
    return mask
