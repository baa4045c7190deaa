"""linear_token_logprobs by slices of the vocabulary (tiles.py): the oracle, the cut, the documented peak of memory."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

import rl4llm_fast as rf
from rl4llm_fast import tiles
from rl4llm_fast.testing import assert_as_good_as_eager

if "cpu" not in rf.backends()["linear_token_logprobs"]:
    pytest.skip("the compiled extension is not installed", allow_module_level=True)

N, D, V = 23, 16, 211
LIVE = torch.arange(N) % 3 > 0


@pytest.fixture
def small_tiles(monkeypatch):
    """Chunks of 9 tokens, slices of 32."""
    monkeypatch.setattr(tiles, "chunk_rule", lambda *_: 3)
    monkeypatch.setattr(tiles, "_SLICED_TOKENS", 9)
    monkeypatch.setattr(tiles, "_SLICED_WORKSPACE", 9 * 4 * 40)
    chunk, slices = tiles.tiling(N, V, torch.float32, None, "cpu", tiles.BY_RULE, sharded=False)
    assert chunk == 9
    assert [tile.size for tile in slices] == [32] * 6 + [19]


def run(dtype, backend, ids, bias, upstream, **options):
    generator = torch.Generator().manual_seed(3)
    factors = [torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator), bias]
    if options.get("mask") is not None:
        factors[0][~options["mask"]] = math.nan
    leaves = [t.to(dtype).requires_grad_() for t in factors]
    out = rf.linear_token_logprobs(leaves[0], leaves[1], ids, leaves[2], backend=backend, **options)
    outs = out if isinstance(out, tuple) else (out,)
    grads = [g.to(o) for g, o in zip(upstream, outs, strict=False)]
    twice = []
    for again in (False, True):  # from the logits that the forward left, and made anew
        twice.append(torch.autograd.grad(outs, leaves, grads, retain_graph=not again))
    for first, second in zip(*twice, strict=True):
        torch.testing.assert_close(first, second)
    return [o.detach() for o in outs] + list(twice[0])


@pytest.mark.parametrize("k", [None, 0, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_entropy": True, "temperature": 0.7, "softcap": 5.0},
        {"return_entropy": True, "mask": LIVE, "temperature": torch.linspace(0.3, 2.0, N)},
        {"ignore_index": 7, "return_entropy": True, "mask": LIVE},
    ],
    ids=["plain", "softcap", "masked", "ignore"],
)
def test_slices_agree_with_the_oracle(small_tiles, k, options):
    ids = torch.randint(V, (N,) if k is None else (N, k))
    ids.view(-1)[3:5] = 7
    bias = torch.randn(V)
    bias[32:64] = bias[200:] = -math.inf  # a slice where nothing can be drawn, and the tail of one
    ids[(ids // 32 == 1) | (ids >= 200)] = 100
    upstream = [torch.randn(ids.shape), torch.randn(N)]
    got, wide = (run(dtype, "cpu", ids, bias, upstream, **options) for dtype in (torch.float32, torch.float64))
    oracle, eager = (run(dtype, "eager", ids, bias, upstream, **options) for dtype in (torch.float64, torch.float32))
    for name, g, o, e, w in zip(("a", "b", "c", "d", "e"), got, oracle, eager, wide, strict=False):
        assert_as_good_as_eager(g, o, e, name=name)
        torch.testing.assert_close(w, o, rtol=1e-10, atol=1e-10)


def test_a_token_that_cannot_be_drawn_and_bad_rows(small_tiles):
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D), torch.zeros(V)
    bias[40] = -math.inf
    hidden[2] = math.nan
    ids = torch.full((N,), 40)
    ids[1] = 41
    logp, entropy = rf.linear_token_logprobs(hidden, weight, ids, bias, return_entropy=True)
    assert logp[0] == -math.inf
    assert math.isfinite(logp[1])
    assert logp[2].isnan()
    assert entropy.isnan().nonzero().flatten().tolist() == [2]
    with pytest.raises(IndexError, match=f"token_ids: {V} at position"):
        rf.linear_token_logprobs(hidden, weight, torch.full((N,), V))


def test_the_cut():
    for tokens in (1, 300, 2048, 5000):
        for vocabulary in (1, 127, 49_152, 50_257, 151_936, 262_144):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                for device, bound in (("cpu", 256 if dtype == torch.bfloat16 else 64), ("cuda", 512)):
                    chunk, slices = tiles.tiling(tokens, vocabulary, dtype, None, device, tiles.BY_RULE, sharded=False)
                    assert tiles.workspace_elements(tokens, chunk, slices) * dtype.itemsize <= bound * 2**20
                    assert [tile.start for tile in slices[1:]] == [tile.columns.stop for tile in slices[:-1]]
                    assert (slices[0].start, slices[-1].columns.stop) == (0, vocabulary)
                    assert len(slices) == 1 or (dtype != torch.bfloat16 and device == "cpu")
    assert tiles.tiling(5000, 49_152, torch.float32, None, "cpu", 64, sharded=False) == (64, [(0, 49_152, 49_152)])


def test_tiles_in_the_room_of_dw_are_used_up_before_they_are_written_over():
    """Played through: each turn reads its own tile, and writes its rows of dW where no tile still waits."""
    found = set()
    for tokens in (1, 31, 341, 2048):
        for width in (1, 16, 576, 4096):
            for vocabulary in (127, 49_152, 50_257, 151_936):
                _, slices = tiles.tiling(2048, vocabulary, torch.float32, None, "cpu", tiles.BY_RULE, sharded=False)
                kept = tiles.tiles_in_room(tokens, width, slices)
                size = tokens * max(tile.width for tile in slices)
                assert 0 <= kept < len(slices)
                assert kept * size <= vocabulary * width
                for k in range(kept + 1):  # the slices from the last; it lies in the workspace
                    waiting = min(kept, kept - k + 1) * size  # tiles from the start of the room, this turn's own too
                    assert waiting <= slices[-1 - k].start * width or kept == 0
                found.add(kept)
    assert len(found) > 3
    assert tiles.tiles_in_room(2048, 576, slices_of(2048)) == 2


def slices_of(tokens, vocabulary=49_152):
    return tiles.tiling(tokens, vocabulary, torch.float32, None, "cpu", tiles.BY_RULE, sharded=False)[1]


def test_what_lies_in_the_room_of_dw_is_not_made_again(small_tiles, monkeypatch):
    made = []
    original = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: made.append(a[0].shape) or original(*a, **k))
    hidden, weight, ids = torch.randn(9, D, requires_grad=True), torch.randn(V, D), torch.randint(V, (9,))
    counts, grads = {}, {}
    for learns in (False, True):
        made.clear()
        logp = rf.linear_token_logprobs(hidden, weight.clone().requires_grad_(learns), ids)
        assert len(made) == 7
        (grads[learns],) = torch.autograd.grad(logp.sum(), hidden)
        counts[learns] = sum(rows == (9, D) for rows in made) - 7
    assert counts == {False: 6, True: 1}  # slices whose logits are made again: all but the last; all but six
    torch.testing.assert_close(grads[False], grads[True])


@pytest.mark.parametrize(("dtype", "workspace"), [("float32", 64), ("bfloat16", 256)])
def test_peak_memory_keeps_the_documented_bound(dtype, workspace):
    """N 4,096, V 49,152, where all logits are 768 or 384 MiB: gradients (dW also in fp32) and the workspace."""
    script = f"""
import torch, rl4llm_fast as rf
from bench.timing import cpu_extra_bytes
hidden = torch.randn(4096, 32).to(torch.{dtype}).requires_grad_()
weight = torch.randn(49152, 32).to(torch.{dtype}).requires_grad_()
ids = torch.randint(49152, (4096,))
def step():
    return torch.autograd.grad(rf.linear_token_logprobs(hidden, weight, ids).sum(), (hidden, weight))
print(cpu_extra_bytes(step))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "RL4LLM_FAST_CPU_CACHE_MIB": "0"},  # kept blocks hide the peak
    )
    assert done.returncode == 0, done.stderr
    gradients = (4096 + 49_152) * 32 * 4 * 2
    assert int(done.stdout) <= (workspace + 8) * 2**20 + gradients


def test_opcheck_with_a_room(small_tiles):
    hidden, weight, ids = torch.randn(N, D), torch.randn(V, D), torch.randint(V, (N,))
    one = torch.ones((), dtype=torch.float64)
    common = (hidden, weight, None, ids, None, one, None, -100)
    ops = torch.ops.rl4llm_fast
    forward = (*common, True, torch.float32, None, tiles.BY_RULE, True, True, "")
    torch.library.opcheck(ops.linear_token_logprobs_fwd.default, forward, test_utils="test_faketensor")
    logp, entropy, row_max, log_sum, kept, room = ops.linear_token_logprobs_fwd(*forward)
    assert room.shape == weight.shape
    saved = (row_max, log_sum, entropy, torch.ones_like(logp), torch.ones_like(entropy), kept, room)
    arguments = (*common, *saved, torch.float32, None, None, tiles.BY_RULE, True, True, True, "")
    torch.library.opcheck(
        ops.linear_token_logprobs_bwd.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
