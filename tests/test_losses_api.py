"""policy_loss as an op and as a function: registration, compilation, messages; and rivals' own losses."""

from __future__ import annotations

import collections
import contextlib
import math
import types

import numpy as np
import pytest
import torch
from test_losses import check, run

import rl4llm_fast as rf
from rl4llm_fast import dispatch

INF = math.inf
BACKENDS = rf.backends()["policy_loss"]


def sample(B, T):
    logp = -3 * torch.rand(B, T)
    return {
        "logp": logp,
        "old_logp": logp + 0.3 * torch.randn(B, T),
        "advantages": torch.randn(B, T),
        "ref_logp": logp + 0.3 * torch.randn(B, T),
        "entropy": torch.rand(B, T),
        "mask": torch.rand(B, T) > 0.3,
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "how", [{}, {"kind": "gspo"}, {"rollout_level": "sequence"}, {"aggregation": "seq_mean_token_sum"}]
)
def test_cuda_takes_everything_as_it_is_given(packed, how):
    """In every dtype, masks and offsets too: before the one op nothing runs that would launch a kernel."""
    if dispatch.why_not("policy_loss", "cuda", "cuda"):
        pytest.skip(str(dispatch.why_not("policy_loss", "cuda", "cuda")))
    from torch._subclasses import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function._schema.name.partition("::")[2])
            return function(*args, **(kwargs or {}))

    with FakeTensorMode():
        device = {"device": "cuda"}
        logp, old, ref, rollout, weights = torch.empty(5, 3, 70, dtype=torch.bfloat16, **device).unbind()
        s = {"old_logp": old, "ref_logp": ref, "rollout_logp": rollout, "token_weights": weights}
        s["mask"] = torch.empty(3, 70, dtype=torch.bool, **device)
        if packed:
            logp, s = logp.reshape(-1), {n: v.reshape(-1) for n, v in s.items()}
            s["cu_seqlens"] = torch.empty(4, dtype=torch.int32, **device)
        adv = torch.empty(3, dtype=torch.bfloat16, **device)
        with Record():
            old = s.pop("old_logp")
            rf.policy_loss(logp, old, adv, kl_coef=0.1, rollout_correction="mask", backend="cuda", **s, **how)
    op = "policy_loss_sequences_fwd" if packed or how.keys() & {"kind", "rollout_level"} else "policy_loss_fwd"
    free = {"empty", "detach", "view", "unsqueeze", "unbind", "lift_fresh", "device", "alias"}
    assert set(seen) - free == {op}


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built here")
class TestRegistration:
    def test_opcheck(self):
        ops, s = torch.ops.rl4llm_fast, sample(3, 20)
        params = torch.tensor([-1.0, 3, 20, 1, 0.1, 0.01, 2.0, 0.0, 0.2, 0.2, INF, 0], dtype=torch.float64)
        tensors = [s[n] for n in ("logp", "old_logp", "advantages", "ref_logp", "entropy", "mask")]
        arguments = (*tensors, None, torch.rand(3, 20), None, params, "ppo_clip", "k3_value", "token_mean", "", True)
        torch.library.opcheck(ops.policy_loss_fwd.default, arguments)
        torch.library.opcheck(ops.policy_loss_fwd.default, (*arguments[:-3], "none", "", False))
        _, dlogp, dentropy, scale, _ = ops.policy_loss_fwd(*arguments)
        torch.library.opcheck(
            ops.token_loss_bwd.default, (torch.ones(()), s["logp"], s["entropy"], scale, dlogp, dentropy)
        )

    def test_double_backward_raises(self):
        logp = torch.randn(2, 3, requires_grad=True)
        loss, _ = rf.policy_loss(logp, None, torch.randn(2, 3), backend="cpu")
        (grad,) = torch.autograd.grad(loss, logp, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            (loss + grad.square().sum()).backward()

    def test_compile_without_breaks_or_recompilation(self):
        graphs = 0

        def count(graph, inputs):
            nonlocal graphs
            graphs += 1
            return graph.forward

        def step(logp, old, adv, mask, eps, beta):
            loss, metrics = rf.policy_loss(
                logp, old, adv, mask=mask, kind="grpo", eps_low=eps, ref_logp=old, kl_coef=beta, entropy=-logp,
                entropy_coef=beta, backend="cpu", aggregation="seq_mean_token_mean",
            )  # fmt: skip
            return loss, metrics["ratio_mean"]

        compiled = torch.compile(step, fullgraph=True, backend=count)
        s = sample(3, 20)
        for i in range(12):  # the ninth recompilation would raise
            knobs = (0.1 + 0.01 * i, 0.05 * i + 0.01)
            results = []
            for function in (step, compiled):
                leaf = s["logp"].clone().requires_grad_()
                loss, ratio = function(leaf, s["old_logp"], s["advantages"], s["mask"], *knobs)
                loss.backward()
                results.append((loss, ratio, leaf.grad))
            for wanted, got in zip(*results, strict=True):
                torch.testing.assert_close(wanted, got)
        assert graphs <= 2  # the numbers as constants once, then as symbols
        as_tensors = torch.compile(step, fullgraph=True, backend=count)
        torch._dynamo.reset()
        graphs = 0
        for i in range(3):
            tensors = [s[n] for n in ("logp", "old_logp", "advantages", "mask")]
            as_tensors(*tensors, torch.tensor(0.1 * i), torch.tensor(0.1))
        assert graphs == 1


ROLLOUT = {"rollout_logp": torch.zeros(2, 3), "rollout_correction": "mask"}
ERRORS = [
    ({"kind": "dpo"}, "kind: wanted one of 'pg', 'cpi'"),
    ({"kind": ["pg"]}, "kind: wanted one of"),
    ({"kind": "pg", "eps_low": 0.1}, "eps_low: not a knob of kind 'pg'"),
    ({"epsilon": 0.1}, "epsilon: not a knob.*eps_low"),
    ({"aggregation": "mean"}, "aggregation: wanted one of"),
    ({"kl_coef": 0.1}, "kl_coef: needs ref_logp"),
    ({"kl_coef": torch.tensor(0.1)}, "kl_coef: needs ref_logp"),
    ({"entropy_coef": 0.1}, "entropy_coef: needs entropy"),
    ({"advantages": torch.zeros(5)}, r"advantages: wanted \(2, 3\).*\(2,\)"),
    ({"old_logp": torch.zeros(3)}, "old_logp: wanted the shape"),
    ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask: wanted the shape"),
    ({"mask": torch.ones(2, 3)}, r"mask: wanted a bool.*got torch.float32: mask.bool\(\)\?"),
    ({"logp": torch.zeros(2, 3, 4)}, r"logp: wanted \(B, T\)"),
    ({"logp": torch.zeros(2, 3, dtype=torch.long)}, "logp: wanted float32"),
    ({"logp": torch.zeros(2, 3).to_sparse()}, "logp: wanted a dense tensor"),
    ({"cu_seqlens": torch.tensor([0, 6])}, "logp: wanted packed tokens"),
    ({"rollout_logp": torch.zeros(2, 3)}, "rollout_correction: wanted"),
    ({"rollout_correction": "truncate"}, "needs rollout_logp"),
    ({"dual_clip": 3.0, "delta": 3.0}, "dual_clip, delta"),
    ({"dual_clip": 0.5}, "dual_clip: wanted a number > 1"),
    ({"eps_low": torch.zeros(2)}, "eps_low: wanted a number or a 0-d tensor"),
    ({"eps_low": "0.2"}, "eps_low: wanted a number"),
    ({"eps_low": None}, "eps_low: wanted a number"),
    ({"eps_low": -0.2}, "eps_low: wanted a number >= 0, got -0.2"),
    ({"kind": "gspo", "eps_high": math.nan}, "eps_high: wanted a number >= 0, got nan"),
    ({"eps_low": torch.tensor(-0.5)}, "eps_low: wanted a number >= 0, got -0.5"),
    ({"ref_logp": torch.zeros(2, 3), "kl_coef": torch.tensor(1j)}, "kl_coef: wanted a real number"),
    ({"ref_logp": torch.zeros(2, 3), "kl_coef": torch.tensor(True)}, "kl_coef: wanted a real.*torch.bool"),
    ({"ref_logp": torch.zeros(2, 3), "kl_coef": np.bool_(True)}, "kl_coef: wanted a number or a 0-d tensor, got bool"),
    ({"kl_clamp": "yes"}, "kl_clamp: wanted a bool, got str"),
    ({"kind": "kl_pen", "beta": -1.0}, "beta: wanted a number >= 0"),
    ({"kind": "cispo", "cap": 0.0}, "cap: wanted a number > 0"),
    ({"kind": "cispo", "cap": 5.0, "eps_low": 0.2, "eps_high": 0.2}, "eps_low, eps_high: not used.*with cap"),
    ({"num_tokens": -3}, "num_tokens: wanted a number >= 0, got -3"),
    ({"num_tokens": torch.tensor(-4.0)}, "num_tokens: wanted a number >= 0, got -4"),
    ({"num_sequences": -1}, "num_sequences: wanted a number >= 0"),
    ({"max_length": -1.0}, "max_length: wanted a number >= 0"),
    ({"dp_size": -2}, "dp_size: wanted a number >= 0"),
    ({**ROLLOUT, "rollout_cap": -1.0}, "rollout_cap: wanted a number > 0"),
    ({**ROLLOUT, "rollout_floor": -0.5}, "rollout_floor: wanted a number >= 0"),
    ({**ROLLOUT, "rollout_floor": 2.5}, "rollout_floor: wanted at most rollout_cap = 2.0, got 2.5"),
    ({**ROLLOUT, "rollout_correction": "truncate", "rollout_floor": 0.5}, "rollout_floor: wanted 0 with.*'truncate'"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[m[:24] for _, m in ERRORS])
def test_messages(changes, message):
    arguments = {"logp": torch.zeros(2, 3), "old_logp": None, "advantages": torch.zeros(2, 3)} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        rf.policy_loss(**arguments)


def test_numbers_of_numpy():
    tokens = [torch.randn(2, 3) for _ in range(4)]

    def loss(whole, number):
        options = {"eps_low": number(0.25), "kl_coef": number(0.5), "num_tokens": whole(6)}
        return rf.policy_loss(*tokens[:3], ref_logp=tokens[3], **options)[0]

    for whole, number in ((np.int64, np.float32), (np.int32, np.float64), (int, np.float16)):
        assert torch.equal(loss(whole, number), loss(int, float))


def _policy_loss(cu_seqlens):
    return rf.policy_loss(torch.zeros(6), None, torch.zeros(6), cu_seqlens=cu_seqlens)[0]


def _preference_loss(cu_seqlens):
    offsets = {"cu_seqlens_chosen": cu_seqlens, "cu_seqlens_rejected": cu_seqlens}
    return rf.preference_loss(*torch.zeros(4, 6), **offsets)[0]


def _gae(cu_seqlens):
    return rf.gae(torch.arange(6.0), torch.zeros(6), lam=1.0, cu_seqlens=cu_seqlens)[0]


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "without the extension"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16], ids=str)
@pytest.mark.parametrize("function", [_policy_loss, _preference_loss, _gae])
@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([1, 6], "from 0 to the 6 tokens, got 1 to 6"),
        ([0, 5], "from 0 to the 6 tokens, got 0 to 5"),
        ([0, 4, 3, 6], "never decrease, got 4, 3 at position 1"),
        ([0], r"at least one sequence for 6 tokens, got \(1,\)"),
        ([[0, 6]], r"wanted \(B\+1,\)"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens, message, function, dtype, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr("rl4llm_fast.dispatch.extension", None)
        monkeypatch.setenv("RL4LLM_FAST_BACKEND", "eager")
    with pytest.raises(ValueError, match=message):
        function(torch.tensor(cu_seqlens, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_offsets_of_any_integer_dtype_and_stride(dtype):
    for offsets in (torch.tensor([0, 4, 4, 6], dtype=dtype), torch.tensor([0, 9, 4, 9, 4, 9, 6], dtype=dtype)[::2]):
        assert _gae(offsets).tolist() == [6.0, 6.0, 5.0, 3.0, 9.0, 5.0]  # sums of what follows, lambda = 1


def test_sequences_must_be_known():
    for changes in ({"aggregation": "seq_mean_token_mean"}, {"kind": "gspo"}):
        with pytest.raises(ValueError, match="cu_seqlens: wanted"):
            rf.policy_loss(torch.zeros(6), None, torch.zeros(6), **changes)


def test_trpo():
    """(9): the surrogate is kind cpi, its metric kl_old_k3 the measured KL, and the caller refuses a step too far."""
    old = torch.log(torch.tensor([[0.5, 0.25]]))
    logp = torch.log(torch.tensor([[0.6, 0.2]])).requires_grad_()
    loss, metrics = rf.policy_loss(logp, old, torch.tensor([[2.0, -1.0]]), kind="cpi")
    (grad,) = torch.autograd.grad(loss, logp)
    # rho = 1.2, 0.8: -(1.2*2 - 0.8)/2, and the gradient is -rho*A/2
    assert loss.item() == pytest.approx(-0.8)
    assert grad.tolist()[0] == pytest.approx([-1.2, 0.4])
    kl = ((1.2 - 1 - math.log(1.2)) + (0.8 - 1 - math.log(0.8))) / 2
    assert metrics["kl_old_k3"].item() == pytest.approx(kl, abs=1e-6)
    assert rf.trust_region_exceeded(metrics["kl_old_k3"], kl - 1e-3)
    assert not rf.trust_region_exceeded(metrics["kl_old_k3"], kl + 1e-3)


# Rivals' own losses.


# TRL's vllm_importance_sampling_mode, and policy_loss's names for it
CORRECTIONS = {f"{level}_{how}": (how, level) for level in ("token", "sequence") for how in ("truncate", "mask")}


@pytest.mark.parametrize(
    "loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "delta", "sequence", *CORRECTIONS]
)
def test_agrees_with_trl(loss_type):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed").GRPOTrainer
    s = sample(4, 12)
    s["mask"][1, 0] = True  # TRL's own metrics divide by the length of every sequence
    adv, beta, high = torch.randn(4), 0.04, 1.1 if loss_type == "cispo" else 0.28
    theirs = s["logp"].clone().requires_grad_()
    special = "grpo" if loss_type in ("delta", "sequence", *CORRECTIONS) else loss_type
    accelerator = types.SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x, gather_for_metrics=lambda x: x
    )
    fake = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (theirs, s["entropy"], None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=beta,
        use_vllm=loss_type in CORRECTIONS, vllm_importance_sampling_correction=True,
        importance_sampling_level="sequence" if loss_type == "sequence" else "token", loss_type=special,
        epsilon_low=0.2, epsilon_high=high, max_completion_length=32, accelerator=accelerator,
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=1.5 if loss_type == "delta" else None,
                                   sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, steps_per_generation=1),
        model=types.SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False, _metrics={"train": collections.defaultdict(list)},
    )  # fmt: skip
    ids = torch.zeros(4, 12, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": s["mask"].long(),
        "advantages": adv, "old_per_token_logps": s["old_logp"], "ref_per_token_logps": s["ref_logp"],
        "num_items_in_batch": s["mask"].sum(),
    }  # fmt: skip
    correction = {}
    if loss_type in CORRECTIONS:
        # The ratio is made where TRL generates; math.md section 5, "sampler mismatch", is its definition too.
        how, level = CORRECTIONS[loss_type]
        rollout = s["old_logp"] - 0.3 * torch.randn(4, 12)
        log_omega = (s["old_logp"] - rollout) * s["mask"]
        omega = (log_omega.sum(-1, keepdim=True) if level == "sequence" else log_omega).exp()
        inside = (omega >= 0.7) & (omega <= 1.3)
        inputs["importance_sampling_ratio"] = omega.clamp(max=1.3) if how == "truncate" else omega * inside
        correction = {"rollout_logp": rollout, "rollout_correction": how, "rollout_level": level, "rollout_cap": 1.3}
        correction |= {"rollout_floor": 0.7} if how == "mask" else {}
    wanted = trainer._compute_loss(fake, None, inputs)
    wanted.backward()

    knobs = {
        "cispo": {"kind": "cispo", "cap": high},
        "sapo": {"kind": "sapo"},
        "delta": {"kind": "grpo", "eps_high": high, "delta": 1.5},
        "sequence": {"kind": "gspo", "eps_low": 0.2, "eps_high": high},
    }.get(loss_type, {"kind": "grpo", "eps_high": high})
    aggregations = {
        "bnpo": "token_mean",
        "dapo": "token_mean",
        "cispo": "token_mean",
        "dr_grpo": "seq_mean_token_sum_norm",
    }
    ours = s["logp"].clone().requires_grad_()
    loss, metrics = rf.policy_loss(
        ours, s["old_logp"], adv, mask=s["mask"], ref_logp=s["ref_logp"], kl_coef=beta, max_length=32,
        aggregation=aggregations.get(loss_type, "seq_mean_token_mean"), **knobs, **correction,
    )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)
    if loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        assert metrics["clip_fraction"].item() == pytest.approx(fake._metrics["train"]["clip_ratio/region_mean"][0])
        assert metrics["kl_ref"].item() == pytest.approx(fake._metrics["train"]["kl"][0], rel=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "sequence"])
def test_agrees_with_liger(loss_type):
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="liger-kernel is not installed")
    B, T, D, V = 3, 7, 8, 19
    hidden, weight, ids = torch.randn(B, T, D), torch.randn(V, D), torch.randint(V, (B, T))
    mask, adv, high = torch.rand(B, T) > 0.2, torch.randn(B), 1.1 if loss_type == "cispo" else 0.28
    mask[:, 0] = True
    logp = torch.log_softmax(hidden @ weight.t(), -1).gather(-1, ids[..., None]).squeeze(-1)
    old, ref = logp + 0.3 * torch.randn(B, T), logp + 0.3 * torch.randn(B, T)
    theirs = hidden.clone().requires_grad_()
    function = liger.LigerFusedLinearGRPOLoss(
        beta=0.04, compiled=False, epsilon_low=0.2, epsilon_high=high, max_completion_length=16,
        loss_type="grpo" if loss_type == "sequence" else loss_type,
        importance_sampling_level="sequence" if loss_type == "sequence" else "token",
    )  # fmt: skip
    wanted, _ = function(theirs, weight, ids, mask.long(), adv, ref_per_token_logps=ref, old_per_token_logps=old)
    wanted.backward()

    ours = hidden.clone().requires_grad_()
    logp = rf.token_logprobs(ours @ weight.t(), ids)
    knobs = {"cispo": {"kind": "cispo", "cap": high}, "sapo": {"kind": "sapo"}}.get(loss_type, {"eps_high": high})
    if loss_type == "sequence":
        knobs = {"kind": "gspo", "eps_low": 0.2, "eps_high": high}
    how = {"bnpo": "token_mean", "dapo": "token_mean", "cispo": "token_mean", "dr_grpo": "seq_mean_token_sum_norm"}
    loss, _ = rf.policy_loss(
        logp, old, adv, mask=mask, ref_logp=ref, kl_coef=0.04, max_length=16,
        aggregation=how.get(loss_type, "seq_mean_token_mean"), **knobs,
    )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss, wanted.reshape(()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_stretches_on_every_instruction_set(dtype):
    """Whole vectors without a live token are passed over: zeros there, NaN in them reaches nothing."""
    mask = torch.zeros(2, 1100, dtype=torch.bool)
    mask[0, 100:141] = mask[0, 700] = mask[1, 1027:1090] = True
    arguments = {n: t.to(dtype).masked_fill(~mask, math.nan) for n, t in sample(2, 1100).items() if n != "mask"}
    arguments |= {"mask": mask, "kind": "grpo", "kl_coef": 0.1, "entropy_coef": 0.1}
    extension = dispatch.extension
    for isa in extension.build_info()["cpu_instruction_sets"]:
        with contextlib.suppress(ValueError):  # this CPU may not run it
            extension.force_cpu_isa(isa)
        try:
            check(arguments, "cpu")
            one_by_one = run(arguments | {"aggregation": "none"}, "cpu")
        finally:
            extension.force_cpu_isa(None)
        assert torch.all(one_by_one["loss"][~mask] == 0)
        assert torch.all(one_by_one["loss"][mask] != 0)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built here")
def test_a_gradient_that_was_handed_on_is_never_silently_changed():
    """The backward pass of a loss that nobody scaled hands on what the forward pass made."""
    leaf = (-torch.rand(3, 7)).requires_grad_()
    loss, _ = rf.policy_loss(leaf, leaf.detach() + 0.1, torch.randn(3), mask=torch.rand(3, 7) > 0.3, backend="cpu")
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, leaf, retain_graph=True)
    assert torch.equal(twice, 2 * first)
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, twice)
    first.mul_(3)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 1.5 * twice)
