"""Every Triton launch of the public functions up to the launch itself, for an H100 that is not here.

What Triton does with the arguments of a launch (binding by name, specialisation, packing) is neither in its interpreter
nor in a compilation ahead of time. Here it runs on CPU tensors, each kernel is compiled once as bound first, and
nothing is executed: results are what lay in memory. A process of its own (tests/test_triton_launches.py): it puts
itself in the place of Triton's launch. Prints the kernels it bound, with how many specialisations of each.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import torch
import triton
from rl4llm_fast.kernels import register
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

import rl4llm_fast as rf
from rl4llm_fast import dispatch, formulas, kernels, pair_formulas, preference
from rl4llm_fast.schemas import TRITON_NAMESPACE

TARGET = GPUTarget("cuda", 90, 32)
BACKEND = make_backend(TARGET)
bound: dict[str, set[str]] = defaultdict(set)
TRITON: dict[str, Any] = {"backend": "triton"}


def launch(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
    assert all(type(size) is int and 0 < size < 2**31 for size in grid), grid
    options |= {"debug": False, "instrumentation_mode": ""}
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    arguments, specialization, rest = binder(*args, **options)
    known, signature, constants, attributes = kernel._pack_args(BACKEND, options, arguments, specialization, rest)
    if not bound[kernel.__name__]:
        source = ASTSource(kernel, signature, constants, attributes)
        triton.compile(source, target=TARGET, options=known.__dict__)
    bound[kernel.__name__].add(f"{specialization}{rest}")


def take_tritons_place() -> torch.library.Library:
    """The launchers take CPU tensors from here on, as in the interpreter, and end in ``launch``."""
    jit.JITFunction.run = launch
    library = torch.library.Library(TRITON_NAMESPACE, "IMPL")
    for name, launcher in register.LAUNCHERS.items():
        library.impl(name, launcher, "CPU")
    os.environ["TRITON_INTERPRET"] = "1"
    dispatch._triton_error = None
    dispatch._build_tables()
    del os.environ["TRITON_INTERPRET"]
    return library


def pointers_for_numbers() -> None:
    """As if every hyperparameter were a tensor on the device."""
    for module in vars(kernels).values():
        if hasattr(module, "number_or_pointer"):
            module.number_or_pointer = lambda x: (x, None)
        if hasattr(module, "numbers_or_pointer"):
            module.numbers_or_pointer = lambda x: (x, None)


def leaf(*shape: int) -> torch.Tensor:
    return (-torch.rand(shape)).requires_grad_()


def rows() -> None:
    per_row = {"temperature": torch.rand(3, 4) + 0.3, "softcap": 5.0, "mask": torch.rand(3, 4) > 0.4}
    for vocabulary, options in ((1, {}), (127, {}), (40_017, {}), (40_017, per_row), (151_936, {})):
        for dtype in (torch.float32, torch.bfloat16):
            z = torch.randn(3, 4, vocabulary).to(dtype).requires_grad_()
            ids = torch.randint(vocabulary, (3, 4))
            for result in rf.token_logprobs(z, ids, return_entropy=True, **options, **TRITON):
                result.sum().backward(retain_graph=True)
            for direction in ("reverse", "forward", "jsd"):
                other = torch.randn(3, 4, vocabulary)
                rf.kl_divergence(z, other, direction=direction, beta=0.3, **options, **TRITON).sum().backward()
    rf.token_logprobs(leaf(3, 9_000), torch.randint(9_000, (3, 40)), **TRITON).sum().backward()
    dispatch.ops("triton").scale_gradient_(torch.randn(100), torch.tensor(2.0))
    rf.token_logprobs(leaf(3, 90) * 1, torch.randint(90, (3,)), inplace_backward=True, **TRITON).sum().backward()
    ids = torch.arange(7)
    for estimator in ("k1", "k2", "k3", "abs"):
        rf.kl_estimate(
            leaf(7), torch.randn(7), estimator=estimator, mask=torch.rand(7) > 0.3, **TRITON
        ).sum().backward()


def policy_losses() -> None:
    for kind in formulas.KINDS:
        options = {"ref_logp": -torch.rand(4, 37), "kl_coef": 0.1, "entropy": leaf(4, 37), "entropy_coef": 0.1}
        old, mask = -torch.rand(4, 37), torch.rand(4, 37) > 0.3
        loss, _ = rf.policy_loss(leaf(4, 37), old, torch.randn(4, 37), kind=kind, mask=mask, **options, **TRITON)
        (2 * loss).backward()
    for aggregation in (*rf.weights.NAMES, "none"):
        loss, _ = rf.policy_loss(leaf(2, 3_000), None, torch.randn(2), aggregation=aggregation, **TRITON)
        loss.sum().backward()
    offsets = torch.tensor([0, 5, 9, 30])
    sequence_level = {"rollout_logp": -torch.rand(30), "rollout_level": "sequence", "rollout_correction": "mask"}
    for kind in ("gspo", "grpo"):
        for correction in ({}, sequence_level):
            options = {"cu_seqlens": offsets, "aggregation": "seq_mean_token_mean", **correction, **TRITON}
            rf.policy_loss(leaf(30), -torch.rand(30), torch.randn(3), kind=kind, **options)[0].backward()
    rf.value_loss(leaf(3, 9), torch.randn(3, 9), clip=0.2, old_values=torch.randn(3, 9), **TRITON)[0].backward()
    rf.sft_loss(leaf(3, 9), **TRITON).backward()


def preference_losses() -> None:
    for kind in preference.KINDS.keys() - {"2d_dpo", "bradley_terry"}:
        refs = () if kind in preference.WITHOUT_REFERENCE else (-torch.rand(4, 12), -torch.rand(4, 12))
        rf.preference_loss(leaf(4, 12), leaf(4, 12), *refs, kind=kind, **TRITON)[0].backward()
    offsets = torch.tensor([0, 5, 9, 30])
    packed = {"cu_seqlens_chosen": offsets, "cu_seqlens_rejected": offsets}
    rf.preference_loss(leaf(30), leaf(30), leaf(30).detach(), leaf(30).detach(), **packed, **TRITON)[0].backward()
    rf.kto_loss(leaf(300, 70), -torch.rand(300, 70), torch.rand(300) > 0.5, kl=0.25, **TRITON)[0].backward()
    rf.reward_model_loss(leaf(4), torch.randn(4), **TRITON).backward()
    assert pair_formulas.FORMULAS.keys() >= {"dpo", "kto"}


def scans() -> None:
    offsets = torch.tensor([0, 5, 5, 9_000], dtype=torch.int32)
    for shape, cu in (((3, 1), None), ((3, 127), None), ((3, 9_000), None), ((9_000,), offsets)):
        for dtype in (torch.float32, torch.bfloat16):
            for mask in (None, torch.rand(shape) > 0.4):
                r, v, logp, other = (torch.randn(shape).to(dtype) for _ in range(4))
                options = {"mask": mask, "cu_seqlens": cu, "bootstrap_value": torch.randn(3).to(dtype), **TRITON}
                advantages, _ = rf.gae(r.requires_grad_(), v.requires_grad_(), gamma=0.97, lam=0.9, **options)
                advantages.sum().backward()
                rf.discounted_returns(r.detach(), gamma=0.97, **options)
                rf.n_step_returns(r.detach(), v.detach(), 5, gamma=0.97, **options)
                rf.vtrace(logp, other, r.detach(), v.detach(), gamma=0.97, lam=0.9, **options)


def groups() -> None:
    for options in ({}, {"scale": "batch"}, {"baseline": "leave_one_out"}):
        rf.group_advantages(torch.randn(5_000), group_ids=torch.randint(700, (5_000,)), **options, **TRITON)
        rf.group_advantages(torch.randn(5_000), group_size=8, **options, **TRITON)
    ends = torch.rand(64, 300).argsort(1)[:, :9].sort(1).values
    rf.process_advantages(torch.randn(64, 9), ends, group_size=8, length=300, **TRITON)
    rf.whiten(torch.randn(9, 1_300), torch.rand(9, 1_300) < 0.5, **TRITON)


def main() -> None:
    library = take_tritons_place()
    for hyperparameters in ("numbers", "pointers"):
        if hyperparameters == "pointers":
            pointers_for_numbers()
        for part in (rows, policy_losses, preference_losses, scans, groups):
            part()
    assert library is not None
    for name in sorted(bound):
        print(name, len(bound[name]))


if __name__ == "__main__":
    main()
