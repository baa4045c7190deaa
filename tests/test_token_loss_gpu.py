"""Triton's kernels of the token losses without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
from ahead_of_time import AMD, NVIDIA, assert_fits, compile_kernel, importorskip

from rl4llm_fast import formulas

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_triton_in_the_interpreter():
    """TRITON_INTERPRET=1 must be set before Triton is imported: a process of its own runs the ops' tests."""
    pytest.importorskip("triton", reason="triton is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-k",
         "(triton or launches) and not trl and not packed", "tests/test_losses.py", "tests/test_kl_estimate.py",
         "tests/test_user_losses.py", "tests/test_policy_loss_launches.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) > 150, done.stdout[-2000:]


# Triton, ahead of time.

REGISTERS = 96  # two programs of 256 threads an SM, and more than ptxas uses when it may
SEQUENCE_REGISTERS = 128  # the same for a program that keeps a sequence's sums beside
FP32 = "*fp32"


def kernel_cases():
    """(name, kernel, types, constants, warps, register budget, options for NVIDIA)"""
    importorskip()
    from rl4llm_fast.kernels import kl_estimate, token_loss_sequences
    from rl4llm_fast.kernels import token_loss as k

    numbers = ("fp32",) * (len(formulas.PARAMS) + formulas.MAX_KNOBS)
    row = {"T": "i32", "segments": "i32"}
    everything = dict.fromkeys(("logp_ptr", "old_ptr", "adv_ptr", "ref_ptr", "entropy_ptr", "policy_weights_ptr",
                                "token_weights_ptr", "dlogp_ptr", "dentropy_ptr", "partial_ptr"), FP32)  # fmt: skip
    policy = everything | row | {"mask_ptr": "*i1", "numbers": numbers, "programs": "i32"}
    choices = {
        "ONE_ADV": True,
        "ONE_LOG_S": True,
        "CORRECTION": k.CORRECTIONS["mask"],
        "BLOCK_T": k.SEGMENT,
        "KL_FORMULA": k.KL["k3_importance_clamp"],
    }
    for name, formula in k.POLICY.items():
        kernel, constants = k.policy_loss_fwd_kernel, choices | {"FORMULA": formula}
        yield f"policy_{name}", kernel, policy, constants, k.WARPS, REGISTERS, k.REGISTERS
    sequences = {n: t for n, t in policy.items() if n != "segments"} | {"N": "i32"}
    of_sequence = {n: c for n, c in choices.items() if n != "ONE_LOG_S"} | {"TILE": token_loss_sequences.TILE_B}
    of_sequence |= {"ONE_OMEGA": True, "WEIGHT": k.WEIGHTS["seq_mean_token_sum_norm"]}
    for name in ("gspo", "ppo_clip", "kl_pen"):
        for offsets in ("*i32", "*i64", None):
            types = sequences if offsets is None else sequences | {"cu_ptr": offsets}
            constants = of_sequence | {
                "FORMULA": k.POLICY[name],
                "SEQUENCE_RATIO": name == "gspo",
                "ONE_SLOPE": name == "gspo",
            }
            kernel = token_loss_sequences.policy_loss_sequences_kernel
            options = token_loss_sequences.REGISTERS
            yield f"sequences_{name}_{offsets}", kernel, types, constants, k.WARPS, SEQUENCE_REGISTERS, options
    finish = {"partial_ptr": FP32, "loss_ptr": FP32, "scale_ptr": FP32, "metrics_ptr": FP32, "B": "i32",
              "segments": "i32", "numbers": numbers}  # fmt: skip
    tiles = {"WEIGHT": k.WEIGHTS["seq_mean_token_mean"], "TILE_B": 256, "TILE_S": 4}
    yield "finish", k.policy_loss_finish_kernel, finish, tiles, 8, REGISTERS, {}
    on_device = {n: t for n, t in finish.items() if n != "numbers"} | {"params_ptr": "*fp64"}
    yield "finish_device", k.policy_loss_finish_kernel, on_device, tiles, 8, REGISTERS, {}
    names = ("grad_ptr", "scale_ptr", "dlogp_ptr", "dentropy_ptr", "grad_logp_ptr", "grad_entropy_ptr")
    grads = dict.fromkeys(names, FP32)
    yield "bwd", k.token_loss_bwd_kernel, grads | row, {"ONE_GRAD": True, "BLOCK_T": k.SEGMENT}, k.WARPS, REGISTERS, {}
    kl = dict.fromkeys(("logp_ptr", "ref_ptr", "old_ptr", "kl_ptr", "dkl_ptr"), FP32) | {"mask_ptr": "*i1", "N": "i32"}
    for variant in ("k3_value", "k3_importance_clamp"):
        constants = {"KL_FORMULA": k.KL[variant], "BLOCK_N": k.SEGMENT}
        yield f"kl_{variant}", kl_estimate.kl_estimate_fwd_kernel, kl, constants, k.WARPS, REGISTERS, {}


@pytest.mark.parametrize("target", [*NVIDIA, AMD], ids=str)
def test_triton_compiles_without_spills(target):
    for name, kernel, types, constants, warps, budget, options in kernel_cases():
        compiled = compile_kernel(kernel, types, constants, warps, target, nvidia=options)
        assert_fits(compiled, budget, name)
