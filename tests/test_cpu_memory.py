"""Large results of the CPU backend live in blocks that are kept for the next one (csrc/cpu/memory.cpp)."""

import os
import subprocess
import sys

import pytest
import torch

import rl4llm_fast as rf

if "cpu" not in rf.backends()["token_logprobs"]:
    pytest.skip("the compiled extension is not installed", allow_module_level=True)

ROWS, V = 64, 16384  # 4 MiB of fp32


def gradient(seed: int) -> torch.Tensor:
    logits = torch.randn(ROWS, V, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    rf.token_logprobs(logits, torch.zeros(ROWS, dtype=torch.int64), backend="cpu").sum().backward()
    return logits.grad


def expected(seed: int) -> torch.Tensor:
    logits = torch.randn(ROWS, V, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    torch.log_softmax(logits, -1)[:, 0].sum().backward()
    return logits.grad


def test_a_living_result_is_never_handed_out_again():
    first, second = gradient(1), gradient(2)
    third = gradient(3)
    assert len({first.data_ptr(), second.data_ptr(), third.data_ptr()}) == 3
    for seed, got in ((1, first), (2, second), (3, third)):
        torch.testing.assert_close(got, expected(seed))


def test_a_view_keeps_the_block():
    view = gradient(1)[3:5]
    array = gradient(2)[:2].numpy()
    others = [gradient(seed) for seed in (3, 4)]
    torch.testing.assert_close(view, expected(1)[3:5])
    torch.testing.assert_close(torch.from_numpy(array), expected(2)[:2])
    assert len(others) == 2


def test_a_dead_result_leaves_its_memory_to_the_next():
    script = """
import sys, torch
import rl4llm_fast as rf
seen = []
for rows in (64, 64, 60):
    logits = torch.randn(rows, 16384, requires_grad=True)
    logp = rf.token_logprobs(logits, torch.zeros(rows, dtype=torch.int64), backend="cpu")
    (grad,) = torch.autograd.grad(logp.sum(), logits)
    seen.append(grad.data_ptr())
    del grad, logp
print(len(set(seen)) == 1 and seen[0] % 2**21 == 0)
"""
    torch_blobs = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 11)
    for cache, kept in (("64", torch_blobs), ("0", False)):
        environment = {**os.environ, "RL4LLM_FAST_CPU_CACHE_MIB": cache}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(kept)


def test_threads_share_the_blocks_safely():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        for seed, got in zip(range(16), pool.map(gradient, range(16)), strict=True):
            torch.testing.assert_close(got, expected(seed))
