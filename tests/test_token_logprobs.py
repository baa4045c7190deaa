"""token_logprobs: every backend that runs here against the fp64 oracle; every edge case of docs/math.md section 1."""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast.testing import assert_as_good_as_eager

INF = math.inf
# GPU backends: tests/test_gpu.py. tests/test_triton_interpret.py runs this file once more in Triton's interpreter.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else [b for b in rf.backends()["token_logprobs"] if b in ("eager", "cpu")]
FLOATS = [torch.float32, torch.bfloat16, torch.float16] + ([] if INTERPRETED else [torch.float64])


def run(logits, ids, *, grads=None, backend, **options):
    """(outputs, dlogits) with given upstream gradients, or ones."""
    leaf = logits.detach().clone().requires_grad_()
    view = leaf * 1  # a non-leaf, so that inplace_backward is allowed
    out = rf.token_logprobs(view, ids, backend=backend, **options)
    outs = out if isinstance(out, tuple) else (out,)
    grads = grads or [torch.ones_like(o) for o in outs]
    torch.autograd.backward(outs, [g.to(o) for g, o in zip(grads, outs, strict=True)])
    return [o.detach() for o in outs], leaf.grad


def check(logits, ids, *, backend, grads=None, **options):
    if grads is None:
        grads = [torch.randn(ids.shape)]
        if options.get("return_entropy"):
            grads.append(torch.randn(logits.shape[:-1]))
    got, got_grad = run(logits, ids, grads=grads, backend=backend, **options)
    oracle, oracle_grad = run(logits.double(), ids, grads=grads, backend="eager", **options)
    eager, eager_grad = run(logits, ids, grads=grads, backend="eager", **options)
    assert got[0].dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    for name, g, o, e in zip(("logp", "entropy"), got, oracle, eager, strict=False):
        assert_as_good_as_eager(g, o, e, name=name)
    assert got_grad.dtype == logits.dtype
    assert_as_good_as_eager(got_grad, oracle_grad, eager_grad, name="dlogits")
    return got, got_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocabulary", [1, 2, 127, 1000, 4097, 50257])
@pytest.mark.parametrize("entropy", [False, True])
def test_agrees_with_the_oracle(backend, dtype, vocabulary, entropy):
    logits = (3 * torch.randn(5, vocabulary)).to(dtype)
    check(logits, torch.randint(vocabulary, (5,)), backend=backend, return_entropy=entropy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": torch.tensor(1.3)},
        {"temperature": "rows"},
        {"softcap": 5.0},
        {"softcap": torch.tensor(30.0), "temperature": 0.5},
        {"mask": "random"},
        {"temperature": "rows", "softcap": 3.0, "mask": "random", "inplace_backward": True},
    ],
    ids=str,
)
def test_options(backend, dtype, options):
    logits = (4 * torch.randn(3, 4, 517)).to(dtype)
    ids = torch.randint(517, (3, 4))
    options = dict(options)
    if options.get("temperature") == "rows":
        options["temperature"] = torch.rand(3, 4) + 0.3
    if options.get("mask") == "random":
        options["mask"] = torch.rand(3, 4) > 0.4
    check(logits, ids, backend=backend, return_entropy=True, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0), (2, 3, 0), (0, 2, 3)])
@pytest.mark.parametrize("k", [None, 0, 1, 4])
def test_leading_shapes_and_k_ids(backend, lead, k):
    logits = torch.randn(*lead, 33)
    ids = torch.randint(33, lead if k is None else (*lead, k))
    got, _ = check(logits, ids, backend=backend, return_entropy=True)
    assert got[0].shape == ids.shape
    assert got[1].shape == lead


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_logits(backend):
    base = torch.randn(3, 6, 40, dtype=torch.bfloat16)
    for view in (base[:, :-1], base.transpose(0, 1), base[..., ::2], base[:, 1:2].expand(3, 5, 40), base[::2, 1::2]):
        check(view, torch.randint(view.shape[-1], view.shape[:-1]), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_minus_infinity_anywhere(backend, dtype):
    logits = torch.randn(6, 3000).to(dtype)
    logits[0, :2500] = -INF  # the first blocks of an online softmax hold nothing
    logits[1, 2000:] = -INF
    logits[2, ::2] = -INF
    logits[3, 1:] = -INF  # one possible token: logp 0, entropy 0
    logits[4, 7] = -INF  # the chosen token itself
    ids = torch.tensor([2700, 5, 1, 0, 7, 0])
    (logp, entropy), grad = check(logits, ids, backend=backend, return_entropy=True, temperature=0.9)
    assert logp[3] == 0
    assert entropy[3] == 0
    assert logp[4] == -INF
    assert (grad[logits == -INF] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_bad_rows_stay_alone(backend, softcap):
    logits = torch.randn(5, 1500)
    logits[0, 3] = math.nan
    logits[1, 1400] = INF
    logits[2] = -INF
    logits[3, 700:] = -INF
    logp, entropy = rf.token_logprobs(
        logits, torch.zeros(5, dtype=torch.long), softcap=softcap, return_entropy=True, backend=backend
    )
    assert logp.isnan().tolist() == [True, True, True, False, False]
    assert entropy.isnan().tolist() == [True, True, True, False, False]
    check(logits, torch.zeros(5, dtype=torch.long), backend=backend, softcap=softcap, return_entropy=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_masked_rows_are_exactly_zero_whatever_they_hold(backend, inplace):
    logits = torch.randn(4, 900)
    logits[0] = math.nan
    logits[1] = -INF
    logits[2, 5] = INF
    ids = torch.tensor([10**9, -1, -100, 3])  # ids of masked rows are not looked at
    mask = torch.tensor([False, False, True, True])
    (logp, entropy), grad = run(logits, ids, mask=mask, return_entropy=True, inplace_backward=inplace, backend=backend)
    for t in (logp[:3], entropy[:3], grad[:3]):
        assert (t == 0).all()
    assert (logp[3] < 0).item()
    assert torch.isfinite(grad[3]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignore_index_with_k_ids_zeroes_that_id_alone(backend):
    logits = torch.randn(2, 50)
    ids = torch.tensor([[3, -7, 4], [-7, -7, -7]])
    (logp, entropy), grad = check(logits, ids, backend=backend, ignore_index=-7, return_entropy=True)
    assert (logp[ids == -7] == 0).all()
    assert (entropy > 0).all()
    _, grad = run(logits, ids, backend=backend, ignore_index=-7)
    assert (grad[1] == 0).all()
    assert (grad[0] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_duplicate_ids_add_up(backend):
    logits = torch.randn(2, 9)
    check(logits, torch.tensor([[3, 3, 4], [8, 8, 8]]), backend=backend, inplace_backward=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_large_common_offset_costs_nothing(backend, offset):
    """u_y − lse would cancel: the parts are kept apart to the end."""
    logits = (torch.randn(4, 2048).double() * 2).float() + offset
    check(logits, torch.randint(2048, (4,)), backend=backend, return_entropy=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_extreme_temperatures(backend, temperature):
    check(torch.randn(4, 999), torch.randint(999, (4,)), backend=backend, temperature=temperature, return_entropy=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fill_value_masks_like_finfo_min(backend):
    logits = torch.randn(3, 300, dtype=torch.bfloat16)
    logits[:, 100:] = torch.finfo(torch.bfloat16).min
    check(logits, torch.tensor([0, 99, 5]), backend=backend, return_entropy=True)


def test_one_bf16_probability_is_not_rounded_away():
    """The gradient at the chosen token is p − 1: built in fp32, rounded once."""
    logits = torch.zeros(1, 300, dtype=torch.bfloat16)
    for backend in BACKENDS:
        _, grad = run(logits, torch.tensor([7]), backend=backend)
        assert grad[0, 7].item() == torch.tensor(1 - 1 / 300, dtype=torch.bfloat16).item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_values(backend):
    """logits ln 1, ln 2, ln 5: p = 1/8, 2/8, 5/8, by hand."""
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    ids = torch.tensor([2])
    (logp, entropy), grad = run(
        logits, ids, return_entropy=True, grads=[torch.ones(1), torch.zeros(1)], backend=backend
    )
    assert logp.item() == pytest.approx(math.log(5 / 8), abs=1e-6)
    # H = -(1/8 ln 1/8 + 2/8 ln 2/8 + 5/8 ln 5/8) = 0.9002560...
    assert entropy.item() == pytest.approx(0.9002560, abs=1e-6)
    assert grad[0].tolist() == pytest.approx([-1 / 8, -2 / 8, 3 / 8], abs=1e-6)
    _, grad = run(logits, ids, return_entropy=True, grads=[torch.zeros(1), torch.ones(1)], backend=backend)
    expected = [-p * (math.log(p) + 0.9002560) for p in (1 / 8, 2 / 8, 5 / 8)]
    assert grad[0].tolist() == pytest.approx(expected, abs=1e-6)
    # temperature 1/2 squares the weights: 1, 4, 25 of 30
    logp = rf.token_logprobs(logits, ids, temperature=0.5, backend=backend)
    assert logp.item() == pytest.approx(math.log(25 / 30), abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entropy", [False, True])
def test_gradcheck(backend, entropy):
    logits = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(11, (3, 2))
    assert torch.autograd.gradcheck(
        lambda x: rf.token_logprobs(
            x, ids, temperature=0.8, softcap=4.0, return_entropy=entropy, mask=torch.tensor([1, 0, 1]), backend=backend
        ),
        (logits,),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_whatever_stands_beside(backend):
    if backend == "eager":
        pytest.skip("the eager backend is exempt: PyTorch's reductions depend on the shape")
    logits = torch.randn(67, 70_001, dtype=torch.bfloat16)
    ids = torch.randint(70_001, (67,))
    whole, whole_grad = run(logits, ids, return_entropy=True, backend=backend)
    for rows in (slice(0, 1), slice(3, 5), slice(60, 67)):
        part, part_grad = run(logits[rows], ids[rows], return_entropy=True, backend=backend)
        assert torch.equal(whole[0][rows], part[0])
        assert torch.equal(whole[1][rows], part[1])
        assert torch.equal(whole_grad[rows], part_grad)


class TestBadInput:
    logits = torch.randn(2, 3, 7)
    ids = torch.zeros(2, 3, dtype=torch.long)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("bad", [7, -1, 10**12])
    def test_token_id_out_of_range(self, backend, bad):
        ids = self.ids.clone()
        ids[1, 2] = bad
        with pytest.raises(IndexError, match=f"token_ids.*{bad}"):
            rf.token_logprobs(self.logits, ids, backend=backend)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize(
        "temperature",
        [
            *(0, -1.0, torch.tensor(0.0), torch.tensor([[1.0, 1, 1], [1, -1, 1]]), math.nan, torch.tensor(math.nan)),
            *(INF, torch.tensor(INF), torch.tensor([[1.0, 1, 1], [1, INF, 1]])),
        ],
    )
    def test_temperature(self, backend, temperature):
        with pytest.raises(ValueError, match=r"temperature: wanted (a finite number|finite values) > 0"):
            rf.token_logprobs(self.logits, self.ids, temperature=temperature, backend=backend)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("bad", [INF, math.nan])
    def test_numbers_that_are_not_finite(self, backend, bad):
        hidden, weight = torch.randn(2, 3, 4), torch.randn(7, 4)
        for number, name in itertools.product((bad, torch.tensor(bad)), ("temperature", "softcap")):
            how = {name: number, "backend": backend}
            message = f"{name}: wanted a finite number > 0, got {bad}"
            with pytest.raises(ValueError, match=message):
                rf.token_logprobs(self.logits, self.ids, **how)
            with pytest.raises(ValueError, match=message):
                rf.linear_token_logprobs(hidden, weight, self.ids, **how)
            with pytest.raises(ValueError, match=message):
                rf.kl_divergence(self.logits, self.logits, **how)

    @pytest.mark.parametrize(
        ("error", "name", "arguments"),
        [
            (TypeError, "logits", {"logits": torch.zeros(2, 3, 7, dtype=torch.int32)}),
            (TypeError, "logits", {"logits": [1.0]}),
            (ValueError, "logits", {"logits": torch.zeros(2, 3, 0)}),
            (ValueError, "logits", {"logits": torch.tensor(1.0)}),
            (TypeError, "token_ids", {"token_ids": torch.zeros(2, 3)}),
            (ValueError, "token_ids", {"token_ids": torch.zeros(2, 4, dtype=torch.long)}),
            (ValueError, "token_ids", {"token_ids": torch.zeros(3, dtype=torch.long)}),
            (ValueError, "mask", {"mask": torch.ones(2, 4, dtype=torch.bool)}),
            (TypeError, "mask", {"mask": torch.ones(2, 3)}),
            (ValueError, "temperature", {"temperature": torch.ones(5)}),
            (TypeError, "temperature", {"temperature": "warm"}),
            (ValueError, "temperature", {"temperature": torch.tensor(1.0, requires_grad=True)}),
            (ValueError, "softcap", {"softcap": -1.0}),
            (ValueError, "softcap", {"softcap": torch.tensor(-1.0)}),
            (ValueError, "softcap", {"softcap": torch.tensor(0.0), "backend": "eager"}),
            (TypeError, "ignore_index", {"ignore_index": 1.5}),
            (TypeError, "ignore_index", {"ignore_index": "pad", "backend": "eager"}),
            (TypeError, "softcap", {"softcap": True}),
            (ValueError, "backend", {"backend": "tpu"}),
            (rf.BackendError, "backend 'cuda'", {"backend": "cuda"}),
            (rf.BackendError, "backend 'triton'", {"backend": "triton"}),
        ],
    )
    def test_the_message_names_the_argument(self, error, name, arguments):
        with pytest.raises(error, match=name):
            rf.token_logprobs(**{"logits": self.logits, "token_ids": self.ids, **arguments})


def test_masked_rows_may_hold_bad_temperatures_only_if_positive():
    with pytest.raises(ValueError, match="temperature"):
        rf.token_logprobs(torch.randn(2, 3), torch.tensor([0, -100]), temperature=torch.tensor([1.0, 0.0]))


def test_agrees_with_trl():
    utils = pytest.importorskip("trl.trainer.utils")
    logits, ids = torch.randn(4, 9, 1003), torch.randint(1003, (4, 9))
    for backend in BACKENDS:
        logp, entropy = rf.token_logprobs(logits, ids, return_entropy=True, backend=backend)
        torch.testing.assert_close(logp, utils.selective_log_softmax(logits, ids), atol=2e-6, rtol=1e-6)
        torch.testing.assert_close(entropy, utils.entropy_from_logits(logits), atol=2e-5, rtol=1e-5)
