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

    def preference(x, w, b, group, name):
        options = {"mask": mask, "tp_group": group, "backend": name, "chunk_tokens": 3, "temperature": 0.7}
        return (rf.linear_preference_loss(x, w, ids, b, kind="orpo", **options)[0],)

    def gspo(x, w, b, group, name):
        options = {"mask": mask, "tp_group": group, "backend": name, "chunk_tokens": 3}
        return (rf.linear_policy_loss(x, w, ids, old, advantages, b, kind="gspo", eps_high=5.0, **options)[0],)

    def sft(x, w, b, group, name):
        return (rf.linear_sft_loss(x, w, ids, b, mask=mask, tp_group=group, backend=name),)

    def verl(x, w, b, group, name):
        with rf.use_backend(name):
            return rf.compat.verl.linear_cross_entropy(x, w, ids.clamp(min=0), 0.7, dist_process_group=group)

    def without_bias(x, w, b, group, name):
        return tuple(r + 0 * b.sum() for r in verl(x, w, b, group, name))

    functions = {"logprobs": logprobs, "many ids": many_ids, "policy": policy, "gspo": gspo, "sft": sft}
    functions |= {"preference": preference, "verl": without_bias}
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


def large(rank, world):
    """V = 50,257 in ragged slices, in fp32: the loss, and gradients in the norm of what one process makes."""
    torch.manual_seed(1)
    vocabulary = 50_257
    factors = [torch.randn(2, 3, D), torch.randn(vocabulary, D), torch.randn(vocabulary)]
    ids, advantages = torch.randint(vocabulary, (2, 3)), torch.randn(2)
    cuts = [0, *(17_001 * (r + 1) // (world - 1) for r in range(world - 1)), vocabulary]
    own = slice(cuts[rank], cuts[rank + 1])

    def loss(x, w, b, group):
        options = {"kind": "grpo", "entropy_coef": 0.1, "tp_group": group, "chunk_tokens": 4}
        return rf.linear_policy_loss(x, w, ids, None, advantages, b, **options)[0]

    leaves = [f.clone().requires_grad_() for f in factors]
    wanted = loss(*leaves, None)
    wanted.backward()
    shards = [f.clone().requires_grad_() for f in (factors[0], factors[1][own], factors[2][own])]
    got = loss(*shards, dist.group.WORLD)
    got.backward()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    for shard, leaf, part in zip(shards, leaves, (slice(None), own, own), strict=True):
        torch.testing.assert_close(shard.grad, leaf.grad[part], rtol=1e-4, atol=1e-6)


def dtensors(rank, world):
    """What the refusal of a DTensor says to pass: the head's local rows with the group, hidden states gathered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(2)
    mesh = init_device_mesh("cpu", (world,))
    hidden, weight, ids = torch.randn(2, 4, D).double(), torch.randn(V, D).double(), torch.randint(V, (2, 4))
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    rf.linear_sft_loss(*leaves, ids).backward()
    x = distribute_tensor(hidden, mesh, [Shard(1)]).requires_grad_()  # sequence-parallel: each rank has some positions
    w = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    with pytest.raises(TypeError, match=r"hidden: wanted a plain tensor, got a DTensor; pass hidden.full_tensor\(\)"):
        rf.linear_sft_loss(x, w, ids)
    with pytest.raises(TypeError, match=r"weight: wanted a plain tensor.*weight.to_local\(\), with tp_group"):
        rf.linear_sft_loss(hidden, w, ids)
    rf.linear_sft_loss(x.full_tensor(), w.to_local(), ids, tp_group=dist.group.WORLD).backward()
    for leaf, sharded in zip(leaves, (x, w), strict=True):
        close(sharded.grad.full_tensor(), leaf.grad, "DTensor")
    w.grad = None
    rf.linear_sft_loss(hidden, w.full_tensor(), ids).backward()
    close(w.grad.full_tensor(), leaves[1].grad, "gathered")


def compiled(rank, world):
    torch.manual_seed(3)
    hidden, weight, ids = torch.randn(2, 4, D), torch.randn(V, D), torch.randint(V, (2, 4))
    cuts = [sum(SIZES[world][:r]) for r in range(world + 1)]
    own = weight[cuts[rank] : cuts[rank + 1]]

    def loss(x, w):
        return rf.linear_sft_loss(x, w, ids, tp_group=dist.group.WORLD, chunk_tokens=3)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (hidden, own)]
        found = function(*leaves)
        found.backward()
        results.append((found.detach(), *(leaf.grad for leaf in leaves)))
    for wanted, got in zip(*results, strict=True):
        close(got, wanted, "compiled")


def disagreeing(rank, world):
    """Ranks that were given other tokens, or slices of heads of another width, all say so."""
    weight, ids = torch.randn(V, D), torch.zeros(2, 4 + rank, dtype=torch.long)
    with pytest.raises(ValueError, match=r"tp_group: wanted the same tokens and hidden size on all ranks"):
        rf.linear_sft_loss(torch.randn(2, 4 + rank, D), weight, ids, tp_group=dist.group.WORLD, backend="cpu")
    with pytest.raises(ValueError, match=r"tp_group: wanted the same .*\(9, 8\) on rank 1"):
        rf.linear_sft_loss(
            torch.randn(2, 4, D + rank), torch.randn(V, D + rank), ids[:, :4], tp_group=dist.group.WORLD, backend="cpu"
        )
    with pytest.raises(ValueError, match="bias: wanted the shape"):
        rf.linear_sft_loss(torch.randn(2, 4, D), weight, ids[:, :4], torch.randn(V - 1), tp_group=dist.group.WORLD)


def serve(rank, world, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        for backend in rf.backends()["linear_token_logprobs"]:
            if backend in ("eager", "cpu"):
                for dtype in (torch.float64, torch.float32):
                    scenario(dtype, backend, rank, world)
        dtensors(rank, world)
        if "cpu" in rf.backends()["linear_token_logprobs"]:
            disagreeing(rank, world)
            if world == 2:
                large(rank, world)
                compiled(rank, world)
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
