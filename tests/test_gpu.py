"""The GPU kernels on a GPU, against the fp64 oracle on the CPU. Skipped, with the reason, where there is no GPU."""

from __future__ import annotations

import math

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast import dispatch
from rl4llm_fast.testing import assert_as_good_as_eager

pytestmark = pytest.mark.gpu

INF = math.inf
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ONE = torch.ones((), dtype=torch.float64)


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    reason = dispatch.why_not("token_logprobs", request.param, "cuda")
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def run(logits, ids, grads, *, backend, **options):
    """[logp, entropy, dlogits] on the CPU."""
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    outs = rf.token_logprobs(leaf * 1, ids, return_entropy=True, backend=backend, **options)
    torch.autograd.backward(outs, [g.to(o) for g, o in zip(grads, outs, strict=True)])
    assert leaf.grad is not None
    return [*(o.detach().cpu() for o in outs), leaf.grad.cpu()]


def check(logits, ids, *, backend, **options):
    """The error rule for both outputs and the gradient; inputs are CPU tensors."""
    grads = [torch.randn(ids.shape), torch.randn(logits.shape[:-1])]

    def on_gpu(value):
        return value.cuda() if isinstance(value, torch.Tensor) else value

    gpu_options = {name: on_gpu(value) for name, value in options.items()}
    got = run(logits.cuda(), ids.cuda(), grads, backend=backend, **gpu_options)
    oracle = run(logits.double(), ids, grads, backend="eager", **options)
    eager = run(logits, ids, grads, backend="eager", **options)
    for name, g, o, e in zip(("logp", "entropy", "dlogits"), got, oracle, eager, strict=True):
        assert_as_good_as_eager(g, o, e, name=name)
    return got


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocabulary", [1, 2, 127, 1000, 4097, 32_768, 50_257, 151_936, 262_144])
def test_agrees_with_the_oracle(backend, dtype, vocabulary):
    check((3 * torch.randn(5, vocabulary)).to(dtype), torch.randint(vocabulary, (5,)), backend=backend)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("softcap", [None, 5.0, torch.tensor(30.0)], ids=str)
@pytest.mark.parametrize("temperature", [0.7, torch.tensor(1.3), "rows"], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_options(backend, dtype, softcap, temperature, inplace):
    if isinstance(temperature, str):
        temperature = torch.rand(3, 4) + 0.3
    check(
        (4 * torch.randn(3, 4, 40_017)).to(dtype),
        torch.randint(40_017, (3, 4)),
        backend=backend,
        temperature=temperature,
        softcap=softcap,
        mask=torch.rand(3, 4) > 0.4,
        inplace_backward=inplace,
    )


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("k", [None, 0, 1, 40])
def test_leading_shapes_and_k_ids(backend, lead, k):
    ids = torch.randint(9_000, lead if k is None else (*lead, k))
    check(torch.randn(*lead, 9_000), ids, backend=backend)


def test_strided_logits(backend):
    """Every alignment of a row to 16 bytes, and rows that are no neighbours."""
    base = torch.randn(3, 6, 4_111, dtype=torch.bfloat16)
    views = [base[:, :-1], base.transpose(0, 1), base[..., ::2], *(base[..., shift:] for shift in range(1, 9))]
    for view in views:
        ids = torch.randint(view.shape[-1], view.shape[:-1])
        grads = [torch.randn(ids.shape), torch.randn(ids.shape)]
        # clone() would make it contiguous: cut the view on the GPU, from a leaf of the base's layout.
        leaf = base.cuda().requires_grad_()
        cut = leaf.as_strided(view.shape, view.stride(), view.storage_offset())
        outs = rf.token_logprobs(cut, ids.cuda(), return_entropy=True, backend=backend)
        (grad,) = torch.autograd.grad(outs, cut, [g.cuda() for g in grads])
        got = [*(o.detach().cpu() for o in outs), grad.cpu()]
        oracle = run(view.double(), ids, grads, backend="eager")
        eager = run(view, ids, grads, backend="eager")
        for name, g, o, e in zip(("logp", "entropy", "dlogits"), got, oracle, eager, strict=True):
            assert_as_good_as_eager(g, o, e, name=name)


@pytest.mark.parametrize("dtype", FLOATS)
def test_minus_infinity_anywhere(backend, dtype):
    logits = torch.randn(6, 70_000).to(dtype)
    logits[0, :40_000] = -INF  # a whole part of the row holds nothing
    logits[1, 30_000:] = -INF
    logits[2, ::2] = -INF
    logits[3, 1:] = -INF  # one possible token: logp 0, entropy 0
    logits[4, 7] = -INF  # the chosen token itself
    logits[5, 100:] = torch.finfo(dtype).min  # what libraries write for a masked token
    ids = torch.tensor([69_999, 5, 1, 0, 7, 0])
    logp, entropy, grad = check(logits, ids, backend=backend, temperature=0.3)
    assert logp[3] == entropy[3] == 0
    assert logp[4] == -INF
    assert (grad[logits == -INF] == 0).all()


@pytest.mark.parametrize("softcap", [None, 10.0])
def test_bad_rows_stay_alone(backend, softcap):
    logits = torch.randn(5, 40_000)
    logits[0, 3] = math.nan
    logits[1, 39_999] = INF
    logits[2] = -INF
    logits[3, 700:] = -INF
    ids = torch.zeros(5, dtype=torch.long)
    logp, entropy, grad = run(
        logits.cuda(), ids.cuda(), [torch.ones(5), torch.ones(5)], backend=backend, softcap=softcap
    )
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [True, True, True, False, False]
    assert grad.isnan().any(-1).tolist() == [True, True, False, False, False]
    assert (grad[logits == -INF] == 0).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_masked_rows_are_exactly_zero_whatever_they_hold(backend, inplace):
    logits = torch.randn(4, 40_000)
    logits[0], logits[1], logits[2, 5] = math.nan, -INF, INF
    ids = torch.tensor([10**9, -1, -100, 3]).cuda()  # ids of masked rows are not looked at
    mask = torch.tensor([False, False, True, True]).cuda()
    poison = torch.full((8, 40_000), math.nan, device="cuda")  # fresh memory that is not zero by chance
    del poison
    got = run(
        logits.cuda(), ids, [torch.ones(4)] * 2, backend=backend, mask=mask, inplace_backward=inplace, temperature=0.5
    )
    for result in got:
        assert (result[:3] == 0).all()
    assert torch.isfinite(got[2][3]).all()


@pytest.mark.parametrize("bad", [40_000, -1, 10**12, -(2**40)])
def test_a_bad_id_is_nan_for_its_row_alone(backend, bad):
    ids = torch.tensor([3, bad, 5])
    logp, entropy, grad = run(torch.randn(3, 40_000).cuda(), ids.cuda(), [torch.ones(3)] * 2, backend=backend)
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    assert grad.isnan().any(-1).tolist() == [False, True, False]


def test_temperature_on_the_device_that_is_not_positive(backend):
    temperature = torch.tensor([1.0, 0.0, -1.0]).cuda()
    ids = torch.zeros(3, dtype=torch.long).cuda()
    logp = rf.token_logprobs(torch.randn(3, 99).cuda(), ids, temperature=temperature, backend=backend)
    assert logp.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("vocabulary", [1_000, 50_257, 151_936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_bits_run_to_run_and_whatever_stands_beside(backend, vocabulary, dtype):
    logits, ids = torch.randn(300, vocabulary).to(dtype).cuda(), torch.randint(vocabulary, (300,)).cuda()

    def results(rows):
        return run(logits[rows], ids[rows], [torch.ones(ids[rows].shape)] * 2, backend=backend)

    whole = results(slice(None))
    assert all(torch.equal(a, b) for a, b in zip(whole, results(slice(None)), strict=True))
    for rows in (slice(0, 1), slice(3, 5), slice(100, 227)):
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, results(rows), strict=True))


def test_a_row_has_the_same_bits_at_every_alignment():
    """CUDA C++ only: Triton's layout, and so its order of summation, follows the alignment of the rows."""
    if (reason := dispatch.why_not("token_logprobs", "cuda", "cuda")) is not None:
        pytest.skip(f"cuda: {reason}")
    row, ids = torch.randn(50_000).bfloat16().cuda(), torch.tensor([77]).cuda()
    expected = run(row[None], ids, [torch.ones(1)] * 2, backend="cuda")
    for shift in range(1, 8):
        storage = torch.empty(1, 50_008, dtype=torch.bfloat16, device="cuda")
        moved = storage[:, shift : shift + 50_000]
        moved.copy_(row)
        out = torch.ops.rl4llm_fast.token_logprobs_fwd(moved[None], ids, None, ONE, None, -100, True)
        assert torch.equal(out[0].cpu(), expected[0])
        assert torch.equal(out[1].cpu(), expected[1])


@pytest.mark.parametrize("in_place", [False, True])
def test_more_than_2_to_the_31_logits(backend, in_place):
    N, V = 16_500, 131_072
    if torch.cuda.mem_get_info()[0] < (3 - in_place) * N * V * 2:
        pytest.skip("not enough free GPU memory")
    logits = torch.empty(1, N, V, dtype=torch.bfloat16, device="cuda").normal_()
    ids = torch.randint(V, (N,), device="cuda")
    few = [0, 1, N // 2, N - 2, N - 1]
    chosen, chosen_ids = logits[0, few].cpu(), ids[few].cpu()
    ops = dispatch.ops(backend)
    logp, entropy, row_max, log_sum = ops.token_logprobs_fwd(logits, ids, None, ONE, None, -100, True)
    arguments = (
        logits,
        ids,
        None,
        ONE,
        None,
        -100,
        row_max,
        log_sum,
        entropy,
        torch.ones_like(logp),
        torch.ones_like(logp),
    )
    if in_place:
        ops.token_logprobs_bwd_(*arguments)
    grad = (logits if in_place else ops.token_logprobs_bwd(*arguments))[0, few].cpu()
    ones = [torch.ones(len(few))] * 2
    oracle = run(chosen.double(), chosen_ids, ones, backend="eager")
    eager = run(chosen, chosen_ids, ones, backend="eager")
    got = (logp[few].cpu(), entropy[few].cpu(), grad)
    for name, g, o, e in zip(("logp", "entropy", "dlogits"), got, oracle, eager, strict=True):
        assert_as_good_as_eager(g, o, e, name=name)


def test_more_rows_than_65535(backend):
    logits, ids = torch.randn(200_000, 8), torch.randint(8, (200_000,))
    check(logits, ids, backend=backend)


def test_cuda_graph(backend):
    """Captured without a synchronisation; a replay reads new logits and a new temperature tensor."""
    ops = dispatch.ops(backend)
    logits = torch.randn(1, 6, 70_000, device="cuda").bfloat16()
    ids = torch.randint(70_000, (6,), device="cuda")
    temperature = torch.ones((), device="cuda")
    ones = torch.ones(6, device="cuda")

    def step():
        logp, entropy, row_max, log_sum = ops.token_logprobs_fwd(logits, ids, None, temperature, None, -100, True)
        grad = ops.token_logprobs_bwd(logits, ids, None, temperature, None, -100, row_max, log_sum, entropy, ones, ones)
        return logp, entropy, grad

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
    graph.replay()
    replayed = [t.clone() for t in captured]
    for a, b in zip(replayed, step(), strict=True):
        assert torch.equal(a, b)


def test_runs_on_the_current_stream(backend):
    """A launch on any other stream would race with the copy and read what stood there before."""
    logits, ids = torch.zeros(512, 50_000, device="cuda"), torch.zeros(512, dtype=torch.long, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        logits[:, 0] = 100.0
        logp = rf.token_logprobs(logits, ids, backend=backend)
    stream.synchronize()
    assert (logp == 0).all()


def test_no_synchronisation(backend):
    logits, ids = torch.randn(4, 50_000, device="cuda", requires_grad=True), torch.zeros(4, device="cuda").long()
    rf.token_logprobs(logits, ids, backend=backend).sum().backward()  # whatever is compiled or allocated once
    torch.cuda.set_sync_debug_mode("error")
    try:
        rf.token_logprobs(logits, ids, backend=backend, temperature=0.7, return_entropy=True)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compile_fullgraph(backend):
    logits, ids = torch.randn(4, 3_000, device="cuda"), torch.randint(3_000, (4,), device="cuda")

    def loss(x):
        logp, entropy = rf.token_logprobs(x, ids, return_entropy=True, backend=backend)
        return (logp + 0.1 * entropy).sum()

    plain, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss(plain).backward()
    torch.compile(loss, fullgraph=True)(compiled).backward()
    assert torch.equal(plain.grad, compiled.grad)
