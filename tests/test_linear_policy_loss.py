"""linear_policy_loss and linear_sft_loss: the composition they replace, masks, frozen factors, rivals, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from test_losses import KINDS

import rl4llm_fast as rf
from rl4llm_fast.testing import assert_as_good_as_eager

BACKENDS = [b for b in rf.backends()["linear_policy_loss"] if b in ("eager", "cpu")]
compiled_backend = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built here")

B, T, D, V = 3, 7, 12, 53


def inputs(dtype=torch.float64):
    """Hidden states, head, sampled tokens, and the per-token numbers of a policy that has moved a little."""
    hidden = torch.randn(B, T, D).to(dtype)
    weight = (torch.randn(V, D) / math.sqrt(D) * 2).to(dtype)
    bias = torch.randn(V).to(dtype)
    ids = torch.randint(V, (B, T))
    logp = rf.linear_token_logprobs(hidden.double(), weight.double(), ids, bias.double(), backend="eager")
    noise = [logp + 0.2 * torch.randn(B, T) for _ in range(3)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    old, ref, rollout = (n.to(wide) for n in noise)
    mask = torch.rand(B, T) > 0.3
    mask[1] = False
    return hidden, weight, bias, ids, {"old": old, "ref": ref, "rollout": rollout, "mask": mask}


def run(factors, ids, old, advantages, *, grad=1.0, composed=False, **options):
    """Loss, gradients and metrics of the fused function, or of the two functions that it stands for."""
    leaves = [t.detach().clone().requires_grad_() for t in factors]
    if composed:
        options.pop("chunk_tokens", None)
        head = {n: options.pop(n) for n in ("temperature", "softcap") if n in options}
        with_entropy = "entropy_coef" in options
        found = rf.linear_token_logprobs(
            leaves[0], leaves[1], ids, leaves[2], mask=options.get("mask"), return_entropy=with_entropy,
            backend="eager", **head,
        )  # fmt: skip
        logp, entropy = found if with_entropy else (found, None)
        options["backend"] = "eager"
        loss, metrics = rf.policy_loss(logp, old, advantages, entropy=entropy, **options)
    else:
        loss, metrics = rf.linear_policy_loss(leaves[0], leaves[1], ids, old, advantages, leaves[2], **options)
    loss.backward(torch.full_like(loss, grad))
    return {"loss": loss.detach(), **metrics, **{f"d{n}": x.grad for n, x in zip("xwb", leaves, strict=True)}}


def assert_same(got, wanted, **tolerance):
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], msg=lambda text, n=name: f"{n}: {text}", **tolerance)


EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("extra", ["plain", "regularised", "rollout token", "rollout sequence"])
def test_is_the_composition(backend, kind, on_policy, extra):
    *factors, ids, s = inputs()
    options = {
        "plain": {"aggregation": "seq_mean_token_sum"},
        "regularised": {
            "ref_logp": s["ref"], "kl_coef": 0.1, "kl_estimator": "k2", "entropy_coef": 0.05, "temperature": 0.7,
            "softcap": 5.0,
        },
        "rollout token": {"rollout_correction": "truncate", "rollout_cap": 1.05, "dp_size": 4},
        "rollout sequence": {"rollout_correction": "mask", "rollout_cap": 1.2, "rollout_level": "sequence"},
    }[extra]  # fmt: skip
    if "rollout" in extra:
        options["rollout_logp"] = s["rollout"]
    arguments = (factors, ids, None if on_policy else s["old"], torch.randn(B, dtype=torch.float64))
    options |= {"kind": kind, "mask": s["mask"], "grad": 1.7}
    got = run(*arguments, backend=backend, chunk_tokens=4, **options)
    assert_same(got, run(*arguments, composed=True, **options), **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "aggregation",
    ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "token_sum", "none"],
)
@pytest.mark.parametrize("counts", [{}, {"num_tokens": 40, "num_sequences": 6, "max_length": 9, "dp_size": 2}])
@pytest.mark.parametrize("packed", [False, True])
def test_aggregations_padded_and_packed(backend, aggregation, counts, packed):
    hidden, weight, bias, ids, s = inputs()
    options = {"aggregation": aggregation, "mask": s["mask"], "token_weights": torch.rand(B, T).double(), **counts}
    advantages, old = torch.randn(B, dtype=torch.float64), s["old"]
    if packed:
        hidden, ids, old = hidden.flatten(0, 1), ids.flatten(), old.flatten()
        options |= {n: options[n].flatten() for n in ("mask", "token_weights")}
        options["cu_seqlens"] = torch.tensor([0, 5, 5, B * T], dtype=torch.int32)
    arguments = ((hidden, weight, bias), ids, old, advantages)
    got = run(*arguments, backend=backend, chunk_tokens=5, **options)
    assert_same(got, run(*arguments, composed=True, **options), **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reference_from_its_own_hidden_states(backend):
    *factors, ids, s = inputs()
    ref_hidden, ref_weight = torch.randn(B, T, 5).double(), torch.randn(V, 5).double()
    options = {"kl_coef": 0.3, "mask": s["mask"], "temperature": 0.8}
    advantages = torch.randn(B, T).double()
    from_hidden = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": factors[2]}
    got = run(factors, ids, s["old"], advantages, backend=backend, chunk_tokens=4, **options, **from_hidden)
    ref = rf.linear_token_logprobs(ref_hidden, ref_weight, ids, factors[2], temperature=0.8, backend="eager")
    assert_same(got, run(factors, ids, s["old"], advantages, composed=True, ref_logp=ref, **options), **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_of_ones_own(backend):
    @rf.token_loss("linear_own", knobs={"c": 1.0})
    def linear_own(m, logp, old, adv, c):
        return -m.minimum(m.exp(logp - old), c) * adv

    *factors, ids, s = inputs()
    arguments = (factors, ids, s["old"], torch.randn(B).double())
    options = {"kind": "linear_own", "c": 1.1, "mask": s["mask"]}
    assert_same(run(*arguments, chunk_tokens=4, **options), run(*arguments, composed=True, **options), **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_error_rule(backend, dtype, kind):
    *factors, ids, s = inputs(dtype)
    if kind == "gspo":  # its clipping range is far narrower than half precision's error
        factors = [f.float() for f in factors]
        dtype = torch.float32
    options = {"kind": kind, "mask": s["mask"], "ref_logp": s["ref"], "kl_coef": 0.1, "entropy_coef": 0.01}
    advantages = torch.randn(B)
    # No ratio near a clipping bound, where a rounding decides between a gradient and none.
    old = rf.linear_token_logprobs(*factors[:2], ids, factors[2]).detach() + torch.randn(B, T).sign() * 0.05
    got = run(factors, ids, old, advantages, backend=backend, chunk_tokens=4, **options)
    eager = run(factors, ids, old, advantages, composed=True, **options)
    wide = {n: o.double() if isinstance(o, torch.Tensor) and o.is_floating_point() else o for n, o in options.items()}
    oracle = run([f.double() for f in factors], ids, old.double(), advantages.double(), composed=True, **wide)
    for name in ("loss", "dx", "dw", "db", "ratio_mean", "kl_ref", "entropy"):
        assert_as_good_as_eager(got[name], oracle[name], eager[name], dtype=dtype, name=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_at_dead_tokens_reaches_nothing(backend):
    hidden, weight, bias, ids, s = inputs(torch.float32)
    options = {"mask": s["mask"], "backend": backend, "entropy_coef": 0.1, "chunk_tokens": 4}
    advantages = torch.randn(B, T)
    clean = run((hidden, weight, bias), ids, s["old"], advantages, **options)
    dead = ~s["mask"]
    hidden[dead], ids[dead], s["old"][dead], advantages[dead] = math.nan, 10**9, math.nan, math.inf
    dirty = run((hidden, weight, bias), ids, s["old"], advantages, **options)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name
    assert (dirty["dx"][dead] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_ids_are_dead_tokens(backend):
    *factors, ids, s = inputs()
    ids[ids == 7] = 8
    arguments = (s["old"], torch.randn(B, T).double())
    wanted = run(factors, ids, *arguments, mask=s["mask"], backend=backend)
    got = run(factors, ids.masked_fill(~s["mask"], 7), *arguments, ignore_index=7, backend=backend)
    assert_same(got, wanted, **EXACT)
    nothing = run(factors, torch.full_like(ids, -100), *arguments, backend=backend)
    assert nothing["loss"] == 0
    assert all((nothing[f"d{n}"] == 0).all() for n in "xwb")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(0, 4), (3, 0), (0,)])
def test_empty(backend, lead):
    factors = [torch.randn(*lead, D), torch.randn(V, D), torch.randn(V)]
    got = run(factors, torch.zeros(lead, dtype=torch.long), None, torch.zeros(lead), backend=backend)
    assert got["loss"] == 0
    assert all((got[f"d{n}"] == 0).all() for n in "xwb")
    assert got["ratio_mean"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided(backend):
    hidden, weight = torch.randn(B, T + 1, 2 * D).double()[:, :-1, ::2], torch.randn(V * 2, D).double()[::2]
    bias, ids = torch.randn(2 * V).double()[::2], torch.randint(V, (T, B)).t()
    arguments = ((hidden, weight, bias), ids, torch.rand(T, B).double().t(), torch.randn(B).double())
    got = run(*arguments, backend=backend, chunk_tokens=4)
    assert_same(got, run(*arguments, composed=True), **EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["kl_pen", "gspo"])
def test_gradcheck(backend, kind):
    hidden, weight, bias = (torch.randn(*shape).double().requires_grad_() for shape in ((2, 3, 4), (6, 4), (6,)))
    ids, old, advantages = torch.randint(6, (2, 3)), -2 - torch.rand(2, 3).double(), torch.randn(2).double()
    assert torch.autograd.gradcheck(
        lambda x, w, b: rf.linear_policy_loss(
            x, w, ids, old, advantages, b, kind=kind, entropy_coef=0.1, softcap=3.0, chunk_tokens=2, backend=backend
        )[0],
        (hidden, weight, bias),
    )


@compiled_backend
@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_compiles_without_graph_breaks(kind):
    *factors, ids, s = inputs(torch.float32)
    advantages = torch.randn(B)

    def step(hidden, weight, bias):
        loss, metrics = rf.linear_policy_loss(
            hidden, weight, ids, s["old"], advantages, bias, kind=kind, mask=s["mask"], entropy_coef=0.01,
            ref_logp=s["ref"], kl_coef=0.1, chunk_tokens=4,
        )  # fmt: skip
        return 3 * loss, metrics["ratio_mean"]

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaves = [f.clone().requires_grad_() for f in factors]
        loss, ratio = function(*leaves)
        loss.backward()
        results.append((loss, ratio, *(leaf.grad for leaf in leaves)))
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@compiled_backend
def test_opcheck():
    *factors, ids, s = inputs(torch.float32)
    hidden, weight, bias = factors
    one = torch.ones((), dtype=torch.float64)
    params = torch.tensor([-1.0, 3, 20, 1, 0.1, 0.01, 2.0, 0.0, 0.2, 0.2, math.inf, 0], dtype=torch.float64)
    flat = {n: t.flatten() for n, t in s.items()}
    ops = torch.ops.rl4llm_fast
    common = (hidden.flatten(0, 1), weight, bias, ids.flatten(), flat["mask"], one, None)
    for old, needs in ((flat["old"], (True, True, True)), (None, (False, True, False))):
        arguments = (
            *common, old, torch.randn(B * T), flat["ref"], flat["rollout"], torch.rand(B * T), params,
            "ppo_clip", "k3_value", "truncate", old is None, torch.float32, None, None, 4, *needs,
        )  # fmt: skip
        torch.library.opcheck(ops.linear_policy_loss_fwd.default, arguments)
    torch.library.opcheck(ops.scaled_gradient.default, (torch.tensor(2.0), weight, torch.randn(V, D)))
    torch.library.opcheck(ops.scale_gradient_.default, (torch.randn(V, D), torch.tensor(2.0)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    hidden, weight, _, ids, s = inputs(torch.float32)
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = rf.linear_policy_loss(*leaves, ids, s["old"], torch.randn(B, T), kind="pg", backend=backend)
    loss.backward()
    assert loss.dtype == leaves[0].grad.dtype == leaves[1].grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "none"])
def test_sft(backend, aggregation):
    hidden, weight, bias, ids, s = inputs()
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    loss = rf.linear_sft_loss(*leaves[:2], ids, leaves[2], mask=s["mask"], aggregation=aggregation, backend=backend)
    loss.sum().backward()
    wanted = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    nll = torch.nn.functional.cross_entropy(
        (wanted[0] @ wanted[1].t() + wanted[2]).transpose(1, 2), ids, reduction="none"
    )
    live = s["mask"].double()
    by_hand = {
        "token_mean": (nll * live).sum() / live.sum(),
        "seq_mean_token_mean": ((nll * live).sum(1) / live.sum(1).clamp(min=1)).mean(),
        "none": nll * live,
    }[aggregation]
    by_hand.sum().backward()
    torch.testing.assert_close(loss, by_hand)
    for got, expected in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


def test_one_token_by_hand():
    """Two tokens of equal logits: p = ½, so dz = −A·(1 − ½, −½) = (−1, 1) for A = 2, on-policy."""
    hidden = torch.tensor([[[3.0]]], requires_grad=True)
    weight = torch.zeros(2, 1, requires_grad=True)
    loss, metrics = rf.linear_policy_loss(hidden, weight, torch.tensor([[0]]), None, torch.tensor([2.0]))
    loss.backward()
    assert loss.item() == -2.0
    assert weight.grad.flatten().tolist() == [-3.0, 3.0]
    assert hidden.grad.item() == 0.0
    assert metrics["ratio_mean"] == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo"])
def test_liger(loss_type):
    """Liger's chunked GRPO, with a reference, in fp32 on the CPU."""
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    hidden, weight, bias, ids, s = inputs(torch.float32)
    mask = torch.arange(T) < torch.tensor([[3], [7], [5]])
    advantages = torch.randn(B)
    theirs = chunked_loss.LigerFusedLinearGRPOLoss(
        beta=0.04, loss_type=loss_type, compiled=False, use_ref_model=True, chunk_size=1,
        epsilon_high=5.0 if loss_type == "cispo" else 0.2,
    )  # fmt: skip
    wanted = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    expected, _ = theirs(
        wanted[0], wanted[1], ids, mask.float(), advantages, wanted[2], ref_per_token_logps=s["ref"],
        old_per_token_logps=s["old"],
    )  # fmt: skip
    expected.backward()
    options = {"kind": "cispo", "cap": 5.0} if loss_type == "cispo" else {"kind": "grpo"}
    options["aggregation"] = "seq_mean_token_mean" if loss_type == "grpo" else "token_mean"
    got = run((hidden, weight, bias), ids, s["old"], advantages, mask=mask, ref_logp=s["ref"], kl_coef=0.04, **options)
    torch.testing.assert_close(got["loss"], expected.detach(), rtol=1e-6, atol=1e-6)
    for name, leaf in zip("xwb", wanted, strict=True):
        torch.testing.assert_close(got[f"d{name}"], leaf.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "weight: wanted", {"weight": torch.zeros(7, 9)}),
        (TypeError, "bias: wanted", {"bias": torch.zeros(7).double()}),
        (ValueError, "token_ids: wanted", {"token_ids": torch.zeros(2, 4, dtype=torch.long)}),
        (TypeError, "token_ids: wanted", {"token_ids": torch.zeros(2, 3)}),
        (IndexError, r"token_ids: 9 at position \(1, 2\)", {"token_ids": torch.tensor([[0, 0, 0], [0, 0, 9]])}),
        (ValueError, "kind: wanted one of", {"kind": "dpo"}),
        (TypeError, "ignore_index: wanted an int, got bool", {"ignore_index": True}),
        (TypeError, "ignore_index: wanted an int, got str", {"ignore_index": "-100"}),
        (ValueError, "epsilon: not a knob", {"epsilon": 0.1}),
        (ValueError, "entropy: made here", {"entropy": torch.zeros(2, 3)}),
        (ValueError, "kl_coef: needs ref_logp", {"kl_coef": 0.1}),
        (ValueError, "ref_weight: wanted beside", {"ref_hidden": torch.zeros(2, 3, 8)}),
        (ValueError, "ref_hidden: wanted beside", {"ref_weight": torch.zeros(7, 8)}),
        (ValueError, "ref_hidden: wanted", {"ref_hidden": torch.zeros(2, 4, 8), "ref_weight": torch.zeros(7, 8)}),
        (ValueError, "ref_weight: wanted the 7", {"ref_hidden": torch.zeros(2, 3, 8), "ref_weight": torch.zeros(9, 8)}),
        (ValueError, "advantages: wanted", {"advantages": torch.zeros(5)}),
        (ValueError, "chunk_tokens: wanted", {"chunk_tokens": 0}),
        (ValueError, "temperature: wanted", {"temperature": 0.0}),
        (ValueError, "rollout_correction: wanted", {"rollout_logp": torch.zeros(2, 3)}),
    ],
)
def test_bad_input(error, message, changes):
    good = {
        "hidden": torch.randn(2, 3, 8),
        "weight": torch.randn(7, 8),
        "token_ids": torch.zeros(2, 3, dtype=torch.long),
        "old_logp": None,
        "advantages": torch.zeros(2),
    }
    with pytest.raises(error, match=message):
        rf.linear_policy_loss(**{**good, **changes})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upstream", [math.inf, math.nan])
def test_an_upstream_that_is_not_finite_reaches_no_dead_token(backend, dtype, upstream):
    hidden = torch.randn(1, 2, D).to(dtype).requires_grad_()
    weight, mask = torch.randn(V, D).to(dtype), torch.tensor([[True, False]])
    for keep in (True, False):
        loss = rf.linear_sft_loss(hidden, weight, torch.tensor([[1, 2]]), mask=mask, backend=backend)
        (grad,) = torch.autograd.grad(loss * upstream, hidden, retain_graph=keep)
        assert not grad[0, 0].isfinite().any()
        assert not grad[0, 1].any()
