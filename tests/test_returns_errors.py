"""Bad input to the returns: every message names its argument."""

from __future__ import annotations

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast import dispatch

GOOD = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3)}
LABELS = torch.tensor([[-100, 5, 7], [-100, 3, 0]])
PACKED = {"rewards": torch.zeros(6), "values": torch.zeros(6)}


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "rewards", {**GOOD, "rewards": torch.zeros(2, 3, dtype=torch.long)}),
        (TypeError, "rewards", {**GOOD, "rewards": [1.0]}),
        (ValueError, "rewards", {**GOOD, "rewards": torch.zeros(2, 4)}),
        (ValueError, "cu_seqlens", PACKED),
        (ValueError, "^rewards", {"rewards": torch.zeros(1, 2, 3), "values": torch.zeros(1, 2, 3)}),
        (ValueError, r"^values: wanted the shape \(2, 3\)", {**GOOD, "values": torch.zeros(2, 4)}),
        (ValueError, "cu_seqlens", {**GOOD, "cu_seqlens": torch.tensor([0, 6])}),
        (ValueError, "cu_seqlens", {**PACKED, "cu_seqlens": torch.tensor([1, 6])}),
        (ValueError, "cu_seqlens", {**PACKED, "cu_seqlens": torch.tensor([0, 5])}),
        (ValueError, "cu_seqlens", {**PACKED, "cu_seqlens": torch.tensor([0, 4, 3, 6])}),
        (ValueError, "cu_seqlens", {**PACKED, "cu_seqlens": torch.tensor([[0, 6]])}),
        (TypeError, "cu_seqlens", {**PACKED, "cu_seqlens": torch.tensor([0.0, 6.0])}),
        (TypeError, "cu_seqlens", {**PACKED, "cu_seqlens": [0, 6]}),
        (ValueError, "mask", {**GOOD, "mask": torch.ones(2, 4, dtype=torch.bool)}),
        (TypeError, "mask", {**GOOD, "mask": torch.ones(2, 3)}),
        (ValueError, "mask: wanted 0 or 1 at every token, got values from -100", {**GOOD, "mask": LABELS}),
        (ValueError, "bootstrap_value", {**GOOD, "bootstrap_value": torch.zeros(3)}),
        (TypeError, "bootstrap_value", {**GOOD, "bootstrap_value": 1.0}),
        (ValueError, "mask_mode", {**GOOD, "mask_mode": "hold"}),
        (TypeError, "gamma", {**GOOD, "gamma": None}),
        (ValueError, r"gamma: wanted a number in \[0, 1\], got 99", {**GOOD, "gamma": 99}),
        (ValueError, r"lam: wanted a number in \[0, 1\]", {**GOOD, "lam": -0.5}),
        (ValueError, "lam", {**GOOD, "lam": torch.zeros(2)}),
        (ValueError, "beta", {**GOOD, "beta": 0.1}),
        (ValueError, r"gamma: wanted a number in \[0, 1\], got 1.5", {**GOOD, "gamma": torch.tensor(1.5)}),
        (ValueError, "^rewards: wanted", {**GOOD, "rewards": torch.zeros(3), "kl": torch.zeros(2, 3), "beta": 0.1}),
        (TypeError, "^rewards: wanted", {**GOOD, "rewards": [1.0], "kl": torch.zeros(2, 3), "beta": 0.1}),
        (ValueError, "backend", {**GOOD, "backend": "tpu"}),
    ],
)
def test_bad_input(error, name, arguments):
    with pytest.raises(error, match=name):
        rf.gae(**arguments)


def test_bad_input_of_the_others():
    r, v = GOOD.values()
    with pytest.raises(ValueError, match="n: wanted"):
        rf.n_step_returns(r, v, 0, gamma=1.0)
    with pytest.raises(TypeError, match="n: wanted"):
        rf.n_step_returns(r, v, 1.5, gamma=1.0)
    for call in (lambda: rf.n_step_returns(r, v, 1, gamma=2), lambda: rf.vtrace(r, r, r, v, gamma=2.0, lam=1.0)):
        with pytest.raises(ValueError, match=r"gamma: wanted a number in \[0, 1\]"):
            call()
    for low in (0.5, torch.tensor(0.5)):
        with pytest.raises(ValueError, match=r"rho_max: wanted at least c_max = 1\.0, got 0\.5"):
            rf.vtrace(r, r, r, v, gamma=1.0, lam=1.0, rho_max=low)
    for bounds in ({"rho_max": -0.5, "c_max": -1}, {"c_max": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(bounds))}: wanted a number >= 0"):
            rf.vtrace(r, r, r, v, gamma=1.0, lam=1.0, **bounds)
    with pytest.raises(ValueError, match="rollout_logp"):
        rf.vtrace(r, r[:1], r, v, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="scores"):
        rf.shape_rewards(torch.zeros(3), r, beta=0.1)
    with pytest.raises(TypeError, match="kl"):
        rf.shape_rewards(torch.zeros(2), None, beta=0.1)


def test_every_returns_op_has_a_cpu_kernel():
    if dispatch.extension is None:
        pytest.skip("the C++ extension is not built here")
    for op in ("gae", "discounted_returns", "lambda_returns", "n_step_returns", "vtrace"):
        assert "cpu" in rf.backends()[op]
