"""The GPU kernels of the token losses without a GPU: interpreted, compiled ahead of time, and CUDA C++ run on a CPU."""

from __future__ import annotations

import ctypes
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from ahead_of_time import AMD, NVIDIA, assert_fits, compile_kernel, importorskip

from rl4llm_fast import formulas, reference_losses, weights

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
    policy = everything | row | {"mask_ptr": "*i1", "params": numbers, "programs": "i32"}
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
              "segments": "i32", "params": numbers}  # fmt: skip
    tiles = {"WEIGHT": k.WEIGHTS["seq_mean_token_mean"], "TILE_B": 256, "TILE_S": 4}
    yield "finish", k.policy_loss_finish_kernel, finish, tiles, 8, REGISTERS, {}
    on_device = {n: t for n, t in finish.items() if n != "params"} | {"params_ptr": "*fp64"}
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


# CUDA C++, executed on a CPU by tests/cuda_on_cpu/emulator.h: what nvcc compiles, with the launches translated.

ENTRY = r"""
extern "C" int emulated_policy_loss(const rl4llm::PolicyLossTensors* t, const rl4llm::TokenLossParams* p, int formula,
                                    int kl, int weight) {
  return rl4llm::policy_loss_fwd(*t, *p, formula, kl, weight, nullptr);
}
extern "C" int emulated_bwd(const rl4llm::TokenLossGrads* g) { return rl4llm::token_loss_bwd(*g, nullptr); }
extern "C" int emulated_kl(const rl4llm::KlEstimateTensors* t, int kl) {
  return rl4llm::kl_estimate_fwd(*t, kl, nullptr);
}
extern "C" int64_t emulated_partials(int64_t B, int64_t T) { return rl4llm::token_loss_partials(B, T); }
"""
Pointer, Int64, Bool, Double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool, ctypes.c_double


def struct(name, *fields):
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


# csrc/cuda/token_loss.h
Params = struct("Params", ("ptr", Pointer), ("values", Double * (len(formulas.PARAMS) + formulas.MAX_KNOBS)))
Policy = struct(
    "Policy", ("B", Int64), ("T", Int64),
    *((n, Pointer) for n in ("logp", "old", "adv", "ref", "entropy", "mask", "omega", "weights", "log_s")),
    ("one_adv", Bool), ("one_log_s", Bool), ("correction", ctypes.c_int), ("loss", Pointer), ("loss_per_token", Bool),
    *((n, Pointer) for n in ("dlogp", "dentropy", "scale", "metrics", "partial")),
)  # fmt: skip
Grads = struct(
    "Grads", ("B", Int64), ("T", Int64), ("grad", Pointer), ("one_grad", Bool),
    *((n, Pointer) for n in ("scale", "dlogp", "dentropy", "grad_logp", "grad_entropy")),
)  # fmt: skip
Kl = struct("Kl", ("N", Int64), *((n, Pointer) for n in ("logp", "ref", "old", "mask", "kl", "dkl")))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    named = [pathlib.Path(os.environ[n]) for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)]
    homes = [*named, *sorted(pathlib.Path("/usr/local").glob("cuda-*"), reverse=True), pathlib.Path("/usr/local/cuda")]
    headers = next((h / "include" for h in homes if (h / "include" / "cuda_bf16.h").is_file()), None)
    compiler = shutil.which("g++")
    if headers is None or compiler is None:
        pytest.skip("needs g++ and the headers of a CUDA toolkit (CUDA_HOME or /usr/local/cuda*)")
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "cuda").mkdir()
    device = (ROOT / "csrc" / "cuda" / "device.cuh").read_text()
    (folder / "cuda" / "device.cuh").write_text(re.sub(r'asm\("ex2\.approx.*?\);', "y = std::exp2(x);", device))
    launch = re.compile(r"(\w+(?:<[^<>;]*>)?)[\s\\]*<<<([^;]*?),([^;]*?),[^;]*?>>>\(([^;]*)\);")
    source = (ROOT / "csrc" / "cuda" / "token_loss.cu").read_text()
    translated, launches = launch.subn(r"emulator::launch(\2, \3, [&] { \1(\4); });", source)
    assert launches == 5
    (folder / "token_loss.cpp").write_text(translated + ENTRY)
    library = folder / "emulated.so"
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-pthread"]
    command += ["-include", str(ROOT / "tests" / "cuda_on_cpu" / "emulator.h"), f"-I{folder}", f"-I{ROOT / 'csrc'}"]
    command += ["-isystem", str(headers), str(folder / "token_loss.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    loaded = ctypes.CDLL(str(library))
    loaded.emulated_partials.argtypes, loaded.emulated_partials.restype = [Int64, Int64], Int64
    return loaded


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr() or None


def fresh(*shape):
    return torch.full(shape, math.nan)  # what a kernel leaves unwritten shows


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, f in formulas.FORMULAS.items() if f.builtin])
@pytest.mark.parametrize(
    ("B", "T", "aggregation"),
    [(3, 70, "token_mean"), (2, 1100, "seq_mean_token_mean"), (2, 9, "none"), (1, 34_000, "seq_mean_token_sum")],
)
def test_cuda_on_a_cpu(emulated, name, B, T, aggregation):
    if T > 1000 and name not in ("ppo_clip", "gspo")[: 1 if T > 10_000 else 2]:
        pytest.skip("the sums of long rows do not depend on the formula")
    formula = formulas.FORMULAS[name]
    logp = (-3 * torch.rand(B, T)).requires_grad_()
    old, ref = logp.detach() + 0.3 * torch.randn(B, T), logp.detach() + 0.3 * torch.randn(B, T)
    entropy, omega, weight = torch.rand(B, T).requires_grad_(), torch.rand(B, T), torch.rand(B, T)
    adv, log_s, mask = torch.randn(B, 1), 0.3 * torch.randn(B, 1), torch.rand(B, T) > 0.3
    knobs = {"eps_low": 0.2, "eps_high": 0.3, "dual_clip": 1.5, "cap": 1.2, "tau_pos": 1.0, "tau_neg": 1.1, "beta": 0.1,
             "scale": 0.5, "clip": 0.2}  # fmt: skip
    numbers = [-1.0, B, T, 2.0, 0.1, 0.05, 2.0, 0.3, *(knobs[k] for k in formula.knobs)]
    numbers += [0.0] * (len(formulas.PARAMS) + formulas.MAX_KNOBS - len(numbers))

    # What ω is made from in one case of two: one of each correction.
    correction = {70: 0, 1100: 1}.get(T, -1)
    how_corrected = [*formulas.CORRECTIONS, ""][correction]

    def oracle(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (logp, entropy)]
        o, a, r, w, t, s = (x.to(dtype) for x in (old, adv, ref, omega, weight, log_s))
        params = torch.tensor(numbers, dtype=torch.float64)
        loss, metrics = reference_losses.policy_loss(
            leaves[0], o, a, r, leaves[1], mask, w, t, s, params, name, "k3_value", aggregation, how_corrected
        )
        loss.sum().backward()
        return loss.detach(), metrics, leaves[0].grad, leaves[1].grad

    per_token = aggregation == "none"
    loss, dlogp, dentropy = fresh(B, T) if per_token else fresh(1).reshape(()), fresh(B, T), fresh(B, T)
    scale, metrics = fresh(B), fresh(len(formulas.METRICS))
    partial = fresh(emulated.emulated_partials(B, T))
    tensors = Policy(
        B, T, *map(pointer, (logp, old, adv, ref, entropy, mask, omega, weight, log_s)), True, True, correction,
        pointer(loss), per_token, *map(pointer, (dlogp, dentropy, scale, metrics, partial)),
    )  # fmt: skip
    params = Params(None, (Double * len(numbers))(*numbers))
    positions = [n for n, f in formulas.FORMULAS.items() if f.builtin].index(name)
    kl = [n for n, _ in formulas.kl_variants()].index("k3_value")
    how = list(weights.AGGREGATIONS).index("token_sum" if per_token else aggregation)
    assert emulated.emulated_policy_loss(ctypes.byref(tensors), ctypes.byref(params), positions, kl, how) == 0
    grad_logp, grad_entropy, grad = fresh(B, T), fresh(B, T), torch.ones(B, T) if per_token else torch.ones(())
    grads = Grads(B, T, pointer(grad), not per_token, *map(pointer, (scale, dlogp, dentropy, grad_logp, grad_entropy)))
    assert emulated.emulated_bwd(ctypes.byref(grads)) == 0

    from rl4llm_fast.testing import assert_as_good_as_eager

    found, exact, eager = (loss, metrics, grad_logp, grad_entropy), oracle(torch.float64), oracle(torch.float32)
    for what, g, o, e in zip(("loss", "metrics", "dlogp", "dentropy"), found, exact, eager, strict=True):
        assert_as_good_as_eager(g, o, e, name=what)


@pytest.mark.slow
def test_cuda_kl_on_a_cpu(emulated):
    N = 300
    logp = -3 * torch.rand(N)
    ref, old, mask = logp + torch.randn(N), logp + torch.randn(N), torch.rand(N) > 0.3
    for position, (variant, choices) in enumerate(formulas.kl_variants()):
        kl, dkl = fresh(N), fresh(N)
        tensors = Kl(N, *map(pointer, (logp, ref, old, mask, kl, dkl)))
        assert emulated.emulated_kl(ctypes.byref(tensors), position) == 0
        leaf = logp.clone().requires_grad_()
        wanted = reference_losses.kl_estimate(leaf, ref, old, mask, variant)
        wanted.sum().backward()
        torch.testing.assert_close(kl, wanted.detach(), msg=str(choices))
        torch.testing.assert_close(dkl, leaf.grad, msg=str(choices))
