"""tp_group: the head's rows over 2 and 4 processes on gloo give the values and gradients of one process."""

from __future__ import annotations

import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import rl4llm_fast as rf

ROOT = pathlib.Path(__file__).resolve().parent.parent
B, T, D = 2, 5, 8
SIZES = {2: [30, 23], 4: [7, 0, 31, 15]}  # ragged, one rank without a row
V = 53


def one_process(backend, function, *factors):
    leaves = [f.clone().requires_grad_() for f in factors]
    results = function(*leaves, None, backend)
    sum((r * r).sum() for r in results).backward()
    return [r.detach() for r in results], [leaf.grad for leaf in leaves]


def close(got, wanted, name):
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if wanted.dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    torch.testing.assert_close(got, wanted, equal_nan=True, msg=lambda text: f"{name}: {text}", **tolerance)


def check(rank, world, backend, name, function, *factors):
    """Every rank holds its slice; results, d hidden, and its rows of dW and db are those of one process."""
    results, (dx, dw, db) = one_process(backend, function, *factors)
    cuts = [sum(SIZES[world][:r]) for r in range(world + 1)]
    own = slice(cuts[rank], cuts[rank + 1])
    hidden, weight, bias = factors
    leaves = [t.clone().requires_grad_() for t in (hidden, weight[own], bias[own])]
    got = function(*leaves, dist.group.WORLD, backend)
    sum((r * r).sum() for r in got).backward()
    for i, (a, b) in enumerate(zip(got, results, strict=True)):
        close(a.detach(), b, f"{name} result {i}")
    for leaf, wanted, what in zip(leaves, (dx, dw[own], db[own]), ("dx", "dW", "db"), strict=True):
        close(leaf.grad, wanted, f"{name} {what}")
    bits = [torch.empty_like(results[0]) for _ in range(world)]
    dist.all_gather(bits, got[0].detach().contiguous())
    for other in bits:  # joined in rank order: the same bits everywhere
        assert torch.equal(other.nan_to_num(7.0), got[0].detach().nan_to_num(7.0)), name


def scenario(dtype, backend, rank, world):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(B, T, D).to(dtype), torch.randn(V, D).to(dtype), torch.randn(V).to(dtype)
    ids, mask = torch.randint(V, (B, T)), torch.rand(B, T) > 0.3
    ids[0, 0] = -100
    several = torch.randint(V, (B, T, 3))
    several[0, 1, 1] = -100
    advantages, old = torch.randn(B).to(dtype), -3 - torch.rand(B, T).to(dtype)

    def logprobs(x, w, b, group, name):
        options = {"temperature": 0.7, "softcap": 4.0, "mask": mask, "chunk_tokens": 3}
        return rf.linear_token_logprobs(x, w, ids, b, return_entropy=True, tp_group=group, backend=name, **options)

    def many_ids(x, w, b, group, name):
        return (rf.linear_token_logprobs(x, w, several, b, tp_group=group, chunk_tokens=4, backend=name),)

    def policy(x, w, b, group, name):
        return (
            rf.linear_policy_loss(
                x, w, ids, old, advantages, b, mask=mask, entropy_coef=0.1, tp_group=group, backend=name,
                ref_hidden=x.detach() * 0.9, ref_weight=w.detach(), ref_bias=b.detach(), kl_coef=0.1,
            )[0],
        )  # fmt: skip

    def sft(x, w, b, group, name):
        return (rf.linear_sft_loss(x, w, ids, b, mask=mask, tp_group=group, backend=name),)

    def verl(x, w, b, group, name):
        with rf.use_backend(name):
            return rf.compat.verl.linear_cross_entropy(x, w, ids.clamp(min=0), 0.7, dist_process_group=group)

    def without_bias(x, w, b, group, name):
        return tuple(r + 0 * b.sum() for r in verl(x, w, b, group, name))

    functions = {"logprobs": logprobs, "many ids": many_ids, "policy": policy, "sft": sft, "verl": without_bias}
    for name, function in functions.items():
        if name == "verl" and dtype == torch.float64:  # its results are fp32
            continue
        check(rank, world, backend, name, function, hidden, weight, bias)

    # A slice without a token that can be drawn, a NaN in one rank's slice, an id that nobody has.
    masked = bias.clone()
    masked[: SIZES[world][0]] = -math.inf
    with torch.no_grad():
        chosen = ids.clamp(min=SIZES[world][0])
        wanted = rf.linear_token_logprobs(hidden, weight, chosen, masked, return_entropy=True, backend=backend)
        start = sum(SIZES[world][:rank])
        own = slice(start, start + SIZES[world][rank])
        local = (hidden, weight[own], chosen, masked[own])
        got = rf.linear_token_logprobs(*local, return_entropy=True, tp_group=dist.group.WORLD, backend=backend)
        for a, b in zip(got, wanted, strict=True):
            close(a, b, "slice of -inf")
        broken = weight.clone()
        broken[V - 1] = math.nan
        local = (hidden, broken[own], ids, bias[own])
        assert rf.linear_token_logprobs(*local, tp_group=dist.group.WORLD, backend=backend)[ids >= 0].isnan().all()
    with pytest.raises(IndexError, match=rf"outside the vocabulary \[0, {V}\)"):
        rf.linear_token_logprobs(hidden, weight[own], ids + V, bias[own], tp_group=dist.group.WORLD, backend=backend)


def serve(rank, world, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        for backend in rf.backends()["linear_token_logprobs"]:
            if backend in ("eager", "cpu"):
                for dtype in (torch.float64, torch.float32):
                    scenario(dtype, backend, rank, world)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_agree_with_one_process(world, tmp_path):
    command = [sys.executable, __file__, str(world), str(tmp_path / "store")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(world)
    ]
    try:
        texts = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, text in zip(ranks, texts, strict=True):
        assert process.returncode == 0, text[-3000:]


def test_dtensor_is_refused_with_what_to_pass():
    class DTensor(torch.Tensor):
        def to_local(self):
            raise AssertionError("not called")

    weight = torch.randn(7, 8).as_subclass(DTensor)
    ids = torch.zeros(2, dtype=torch.long)
    with pytest.raises(TypeError, match=r"weight: wanted a plain tensor, got a DTensor.*to_local.*full_tensor"):
        rf.linear_token_logprobs(torch.randn(2, 8), weight, ids)


def test_a_group_that_is_none():
    with pytest.raises(TypeError, match="tp_group: wanted a torch"):
        rf.linear_token_logprobs(torch.randn(2, 8), torch.randn(7, 8), torch.zeros(2, dtype=torch.long), tp_group=2)


if __name__ == "__main__":
    serve(int(sys.argv[3]), int(sys.argv[1]), sys.argv[2])
