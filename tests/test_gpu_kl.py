"""kl_divergence on a GPU, against the fp64 oracle on the CPU. Skipped, with the reason, where there is no GPU."""

from __future__ import annotations

import math

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast import dispatch
from rl4llm_fast.testing import assert_as_good_as_eager
from tests.kl_cases import KINDS, hard_rows

pytestmark = pytest.mark.gpu

INF = math.inf
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
DIRECTIONS = ["reverse", "forward", "jsd"]
ONE = torch.ones((), dtype=torch.float64)
HALF = torch.full((), 0.5, dtype=torch.float64)


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    reason = dispatch.why_not("kl_divergence", request.param, "cuda")
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def run(logits, ref, grad, *, backend, **options):
    """[kl, dlogits] on the CPU."""
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    kl = rf.kl_divergence(leaf * 1, ref, backend=backend, **options)
    kl.backward(grad.to(kl))
    assert leaf.grad is not None
    return [kl.detach().cpu(), leaf.grad.cpu()]


def check(logits, ref, *, backend, **options):
    """The error rule for the value and the gradient; inputs are CPU tensors."""
    grad = torch.randn(logits.shape[:-1])
    on_gpu = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    got = run(logits.cuda(), ref.cuda(), grad, backend=backend, **on_gpu)
    oracle = run(logits.double(), ref.double(), grad, backend="eager", **options)
    eager = run(logits, ref, grad, backend="eager", **options)
    for name, g, o, e in zip(("kl", "dlogits"), got, oracle, eager, strict=True):
        assert_as_good_as_eager(g, o, e, name=name)
    return got


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocabulary", [1, 127, 1000, 4097, 32_768, 50_257, 151_936])
def test_agrees_with_the_oracle(backend, dtype, vocabulary, direction):
    check(*((3 * torch.randn(5, vocabulary)).to(dtype) for _ in range(2)), backend=backend, direction=direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("ref_dtype", FLOATS)
@pytest.mark.parametrize("softcap", [None, 5.0, torch.tensor(30.0)], ids=str)
def test_options_and_every_pair_of_dtypes(backend, direction, dtype, ref_dtype, softcap):
    logits, ref = (4 * torch.randn(3, 4, 40_017)).to(dtype), (4 * torch.randn(3, 4, 40_017)).to(ref_dtype)
    for temperature in (0.7, torch.tensor(1.3), torch.rand(3, 4) + 0.3):
        check(
            logits, ref, backend=backend, direction=direction, temperature=temperature, softcap=softcap,
            mask=torch.rand(3, 4) > 0.4, beta=0.3,
        )  # fmt: skip


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3), (0,), (2, 0)])
def test_leading_shapes(backend, lead):
    check(torch.randn(*lead, 9_000), torch.randn(*lead, 9_000), backend=backend)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_hard_rows(backend, direction, kind):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        for vocabulary in (127, 4_097, 70_000):
            logits, ref, temperature = hard_rows(kind, vocabulary, generator)
            check(logits, ref, backend=backend, direction=direction, temperature=temperature)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_alignment_of_both_sides(backend, direction):
    """Straight to the ops, on views: a copy would align them."""
    base, ref_base = torch.randn(2, 4_111).bfloat16(), torch.randn(2, 4_111)
    ops, grad = dispatch.ops(backend), torch.randn(2)
    on_gpu, ref_on_gpu = base.cuda()[None], ref_base.cuda()[None]
    for shift in range(8):
        own, other = slice(shift, 4_103 + shift), slice(8 - shift, 4_111 - shift)
        rows = (on_gpu[..., own], ref_on_gpu[..., other], None, ONE, None, direction, HALF)
        kl, *saved = ops.kl_divergence_fwd(*rows)
        got = kl.cpu(), ops.kl_divergence_bwd(*rows, *saved, grad.cuda())[0].cpu()
        oracle = run(base[:, own].double(), ref_base[:, other].double(), grad, backend="eager", direction=direction)
        eager = run(base[:, own], ref_base[:, other], grad, backend="eager", direction=direction)
        for name, g, o, e in zip(("kl", "dlogits"), got, oracle, eager, strict=True):
            assert_as_good_as_eager(g, o, e, name=name)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_minus_infinity_anywhere(backend, direction, dtype):
    logits, ref = torch.randn(6, 70_000).to(dtype), torch.randn(6, 70_000).to(dtype)
    logits[0, :40_000] = ref[0, :40_000] = -INF  # a whole part of both rows holds nothing
    logits[1, 7] = -INF  # the forward KL is inf
    ref[2, 69_999] = -INF  # the reverse KL is inf
    logits[3, 1:] = ref[3, 1:] = -INF  # one possible token
    logits[4, 100:] = ref[4, 100:] = torch.finfo(dtype).min  # what libraries write for a masked token
    grad = torch.ones(6)
    kl, dlogits = run(logits.cuda(), ref.cuda(), grad, backend=backend, direction=direction, temperature=0.5)
    options = {"backend": "eager", "direction": direction, "temperature": 0.5}
    oracle, oracle_grad = run(logits.double(), ref.double(), grad, **options)
    eager, eager_grad = run(logits, ref, grad, **options)
    assert_as_good_as_eager(kl, oracle, eager, name="kl")
    assert kl.isinf().nonzero().flatten().tolist() == {"reverse": [2], "forward": [1], "jsd": []}[direction]
    rows = torch.isfinite(oracle)
    assert_as_good_as_eager(dlogits[rows], oracle_grad[rows], eager_grad[rows], name="dlogits")
    assert (dlogits[logits == -INF] == 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_bad_rows_stay_alone(backend, direction, softcap):
    logits, ref = torch.randn(7, 40_000), torch.randn(7, 40_000)
    logits[0, 3] = ref[1, 39_999] = math.nan
    logits[2, 5] = ref[3, 6] = INF
    logits[4] = -INF
    ref[5] = -INF
    kl, grad = run(logits.cuda(), ref.cuda(), torch.ones(7), backend=backend, direction=direction, softcap=softcap)
    assert kl.isnan().tolist() == [True] * 6 + [False]
    assert grad.isnan().any(-1).tolist() == [True] * 4 + [False, True, False]
    assert (grad[4] == 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_masked_rows_are_exactly_zero_whatever_they_hold(backend, direction):
    logits, ref = torch.randn(1, 4, 40_000), torch.randn(1, 4, 40_000)
    logits[0, 0], ref[0, 1], logits[0, 2, 5] = math.nan, -INF, INF
    mask = torch.tensor([False, False, False, True]).cuda()
    poison = torch.full((8, 40_000), math.nan, device="cuda")  # fresh memory that is not zero by chance
    del poison
    ops = dispatch.ops(backend)
    rows = (logits.cuda(), ref.cuda(), mask, ONE, None, direction, HALF)
    results = ops.kl_divergence_fwd(*rows)
    grad = torch.ones(4, device="cuda")
    fresh = ops.kl_divergence_bwd(*rows, *results[1:], grad)
    ops.kl_divergence_bwd_(*rows, *results[1:], grad)  # over the logits
    assert torch.equal(rows[0], fresh)
    assert all((result[:3] == 0).all() for result in results)
    assert (fresh[0, :3] == 0).all()
    assert torch.isfinite(fresh[0, 3]).all()
    assert results[0][3] > 0


def test_hyperparameters_on_the_device_that_are_out_of_range(backend):
    ops, logits, ref = dispatch.ops(backend), torch.randn(1, 3, 99).cuda(), torch.randn(1, 3, 99).cuda()
    temperature = torch.tensor([1.0, 0.0, -1.0]).cuda()
    kl = ops.kl_divergence_fwd(logits, ref, None, temperature, None, "reverse", ONE)[0]
    assert kl.isnan().tolist() == [False, True, True]
    for beta in (0.0, 1.0, -0.5):
        kl, inner, *_ = ops.kl_divergence_fwd(logits, ref, None, ONE, None, "jsd", torch.tensor(beta).cuda())
        assert kl.isnan().all()
        assert inner[:, 0].isnan().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("vocabulary", [1_000, 50_257, 151_936])
def test_same_bits_run_to_run_and_whatever_stands_beside(backend, vocabulary, direction):
    logits, ref = torch.randn(130, vocabulary).bfloat16().cuda(), torch.randn(130, vocabulary).cuda()

    def results(rows):
        return run(logits[rows], ref[rows], torch.ones(130)[rows], backend=backend, direction=direction)

    whole = results(slice(None))
    assert all(torch.equal(a, b) for a, b in zip(whole, results(slice(None)), strict=True))
    # Rows of an odd V start on 16 bytes only now and then, and Triton's order of summation follows that.
    for rows in (slice(0, 1), slice(8, 16), slice(32, 97)):
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, results(rows), strict=True))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_row_has_the_same_bits_at_every_alignment(direction):
    """CUDA C++ only: Triton's layout, and so its order of summation, follows the alignment of the rows."""
    if (reason := dispatch.why_not("kl_divergence", "cuda", "cuda")) is not None:
        pytest.skip(f"cuda: {reason}")
    V, fwd = 50_000, torch.ops.rl4llm_fast.kl_divergence_fwd
    row, ref = torch.randn(1, 1, V).bfloat16().cuda(), torch.randn(1, 1, V).bfloat16().cuda()
    options = (None, ONE, None, direction, HALF)
    expected = fwd(row, ref, *options)
    for shift in range(1, 8):
        storage = torch.empty(1, 1, V + 8, dtype=torch.bfloat16, device="cuda")
        moved = storage[..., shift : shift + V]
        moved.copy_(row)
        assert all(torch.equal(a, b) for a, b in zip(fwd(moved, ref, *options), expected, strict=True))
        moved.copy_(ref)
        assert all(torch.equal(a, b) for a, b in zip(fwd(row, moved, *options), expected, strict=True))


def test_more_than_2_to_the_31_logits(backend):
    N, V = 16_500, 131_072
    if torch.cuda.mem_get_info()[0] < 4 * N * V * 2:
        pytest.skip("not enough free GPU memory")
    logits, ref = (torch.empty(1, N, V, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    few = [0, 1, N // 2, N - 2, N - 1]
    chosen, ref_chosen = logits[0, few].cpu(), ref[0, few].cpu()
    ops, options = dispatch.ops(backend), (None, ONE, None, "reverse", ONE)
    kl, *saved = ops.kl_divergence_fwd(logits, ref, *options)
    ops.kl_divergence_bwd_(logits, ref, *options, *saved, torch.ones_like(kl))
    ones = torch.ones(len(few))
    oracle = run(chosen.double(), ref_chosen.double(), ones, backend="eager")
    eager = run(chosen, ref_chosen, ones, backend="eager")
    for name, g, o, e in zip(("kl", "dlogits"), (kl[few].cpu(), logits[0, few].cpu()), oracle, eager, strict=True):
        assert_as_good_as_eager(g, o, e, name=name)


def test_more_rows_than_65535(backend):
    check(torch.randn(200_000, 8), torch.randn(200_000, 8), backend=backend)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_cuda_graph(backend, direction):
    """Captured without a synchronisation; a replay reads new logits, a new temperature and a new β."""
    ops = dispatch.ops(backend)
    logits, ref = torch.randn(1, 6, 70_000, device="cuda").bfloat16(), torch.randn(1, 6, 70_000, device="cuda")
    temperature, beta = torch.ones((), device="cuda"), torch.full((), 0.5, device="cuda")
    ones = torch.ones(6, device="cuda")

    def step():
        rows = (logits, ref, None, temperature, None, direction, beta)
        results = ops.kl_divergence_fwd(*rows)
        return *results, ops.kl_divergence_bwd(*rows, *results[1:], ones)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # Triton compiles here
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    logits.normal_()
    temperature.fill_(0.6)
    beta.fill_(0.2)
    graph.replay()
    replayed = [t.clone() for t in captured]
    for a, b in zip(replayed, step(), strict=True):
        assert torch.equal(a, b)


def test_no_synchronisation(backend):
    logits, ref = torch.randn(4, 50_000, device="cuda", requires_grad=True), torch.randn(4, 50_000, device="cuda")
    for direction in DIRECTIONS:
        rf.kl_divergence(logits, ref, direction=direction, backend=backend).sum().backward()  # whatever happens once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for direction in DIRECTIONS:
            rf.kl_divergence(logits, ref, direction=direction, temperature=0.7, backend=backend).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compile_fullgraph(backend):
    logits, ref = torch.randn(4, 3_000, device="cuda"), torch.randn(4, 3_000, device="cuda")

    def loss(x):
        return rf.kl_divergence(x, ref, backend=backend).sum()

    plain, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss(plain).backward()
    torch.compile(loss, fullgraph=True)(compiled).backward()
    assert torch.equal(plain.grad, compiled.grad)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_hidden_states(backend, dtype, direction):
    """In chunks, with another D on the reference's side; the products are the vendor's."""
    policy = [t.to(dtype) for t in (torch.randn(40, 64), torch.randn(1_031, 64) / 6, torch.randn(1_031))]
    ref = [t.to(dtype) for t in (torch.randn(40, 48), torch.randn(1_031, 48) / 6, torch.randn(1_031))]
    mask, grad = torch.rand(40) > 0.3, torch.randn(40)

    def both(device, to, backend, chunk_tokens):
        leaves = [t.to(device, to).requires_grad_() for t in policy]
        other = [t.to(device, to) for t in ref]
        kl = rf.linear_kl_divergence(
            leaves[0], leaves[1], other[0], other[1], leaves[2], other[2],
            mask=mask.to(device), direction=direction, chunk_tokens=chunk_tokens, backend=backend,
        )  # fmt: skip
        kl.backward(grad.to(kl))
        return [kl.detach().cpu()] + [leaf.grad.cpu() for leaf in leaves]

    got, oracle = both("cuda", dtype, backend, 16), both("cpu", torch.float64, "eager", None)
    eager = both("cuda", dtype, "eager", None)
    for name, g, o, e in zip(("kl", "dhidden", "dweight", "dbias"), got, oracle, eager, strict=True):
        assert_as_good_as_eager(g, o, e, dtype=dtype, name=name)
