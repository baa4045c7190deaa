"""Clocks and memory probes: the figures of every table come from here.

On the CPU a sample is one call with fresh outputs, from a settled cache and heap, whoever makes it: calls repeated
within a sample would leave the fast ones a warm cache, and their peers a cold one. On a GPU it is a pair of events
around one call, with inputs that are not in the cache, or around a CUDA graph for what takes under 100 µs.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from rl4llm_fast.machine import cpu_multiplies

GRAPH_BELOW_MS = 0.1  # below this a launch costs as much as the kernel: replay a CUDA graph instead
_LIBC = ctypes.CDLL(None)
_M_MMAP_THRESHOLD = -3
_SETTLING_BYTES = 2**28  # more than anybody's share of the last-level cache


@dataclass
class Samples:
    """Milliseconds a call, one entry a round."""

    ms: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return percentile(self.ms, 50)

    @property
    def p20(self) -> float:
        return percentile(self.ms, 20)

    @property
    def p80(self) -> float:
        return percentile(self.ms, 80)


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile with linear interpolation between neighbours. Raises ValueError without values."""
    if not values:
        raise ValueError("values: wanted at least one sample, got none")
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Step:
    """One call to be timed: ``prepare`` is not timed, ``run`` takes what it returned and is."""

    prepare: Callable[[], object]
    run: Callable[[object], object]


_FEW, _FEWEST = 3, 2  # samples that the slowest still give, and those of them whose one call uses up the budget
LONG_MS = 1e3  # of such a call, cold code and fresh pages are noise


def interleave(
    samplers: Mapping[str, Callable[[], float]], *, budget_s: float, min_rounds: int, max_rounds: int
) -> dict[str, Samples]:
    """Rounds over everyone until the budget is used, so that a slow moment of the machine falls on all alike.

    A sampler returns the milliseconds of one call. The order rotates from round to round: nobody always runs after
    the same neighbour. The first round is thrown away, but for calls of a second. Who has used the budget alone sits
    out further rounds: a peer of seconds a call has no small differences to show, and everyone would wait for it. For
    the same reason few rounds do where they take twice the budget.
    """
    names = list(samplers)
    result = {name: Samples() for name in names}
    start = time.perf_counter()
    for count in range(max_rounds + 1):
        spent = time.perf_counter() - start
        if (count > min_rounds and spent > budget_s) or (count > _FEW and spent > 2 * budget_s > 0):
            break
        turn = count % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            ms = result[name].ms
            few = _FEWEST if max(ms, default=0.0) > 1e3 * budget_s else _FEW
            if len(ms) >= few and sum(ms) > 1e3 * budget_s:
                continue
            sample = samplers[name]()
            if count or sample >= LONG_MS:
                ms.append(sample)
    return result


def _trim() -> None:
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


@functools.cache
def _other_memory() -> torch.Tensor:
    return torch.ones(_SETTLING_BYTES // 4)


def settle() -> None:
    """Start everyone alike: nobody's unwritten lines in the cache, and no warm pages that somebody left in the heap.

    Otherwise a call pays for the write-backs of its own preparation (a tenth of an in-place backward's time) or of the
    peer before it, and a large fresh output costs its page faults or, by the luck of the heap, does not (14 or 34 ms
    for an eager log-softmax of 512 x 49,152 in fp32).
    """
    _other_memory().sum()
    _trim()


def cpu_sample(step: Step) -> float:
    """Milliseconds a call. The last outputs are freed after the clock has stopped: everyone's are fresh pages."""
    state = step.prepare()
    settle()
    start = time.perf_counter()
    kept = step.run(state)
    elapsed = time.perf_counter() - start
    del kept, state
    return elapsed * 1e3


def cuda_sample(step: Step) -> float:
    """Milliseconds a call between two events. The sleep lets the host run ahead, so that no launch is waited for."""
    state = step.prepare()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000)  # about a millisecond
    start.record()
    kept = step.run(state)
    end.record()
    end.synchronize()
    del kept, state
    return start.elapsed_time(end)


def graphed(steps: Sequence[Step]) -> Step:
    """All steps (one call each, on inputs of its own) captured in one CUDA graph, replayed as one call.

    Together the inputs outgrow the cache, so that each call finds them in memory, as in training.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up off the capturing stream: lazy initialisation must not be captured
        for step in steps:
            step.run(step.prepare())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [step.run(step.prepare()) for step in steps]

    def replay(_: object) -> object:
        graph.replay()
        return kept

    return Step(prepare=lambda: None, run=replay)


def _status_kib(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(key + ":"):
                return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def give_memory_back() -> None:
    """Let freed memory leave the process at once, so that a probe starts from what is really held (glibc only)."""
    if hasattr(_LIBC, "mallopt"):
        _LIBC.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
        _trim()


def cpu_extra_bytes(run: Callable[[], object], warm: Callable[[], object] | None = None) -> int:
    """Peak resident memory of one call over what was resident before it. Linux only.

    ``warm`` is called before, ``run`` itself where it is None. Writing 5 to clear_refs resets the high-water mark;
    ru_maxrss would hide the call behind the set-up's peak. To be run in a process of its own: other threads' memory
    would be counted too.
    """
    give_memory_back()
    (warm or run)()  # code pages, thread stacks and the allocator's own tables are not the op's
    gc.collect()
    give_memory_back()
    with open("/proc/self/clear_refs", "w", encoding="ascii") as clear:
        clear.write("5")
    before = _status_kib("VmRSS")
    kept = run()
    peak = _status_kib("VmHWM")
    del kept
    return max(0, peak - before) * 1024


def cuda_extra_bytes(run: Callable[[], object]) -> int:
    """Peak of CUDA's caching allocator during one call over what was allocated before it."""
    run()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del kept
    return peak - before


def ceilings(device: str, budget_s: float = 1.5) -> dict[str, float]:
    """What this machine's memory gives, in bytes a second: a copy (read + write) and a read-only reduction."""
    size = 2**28 if device == "cpu" else 2**31
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    sample = cpu_sample if device == "cpu" else cuda_sample
    copy, read = Step(lambda: None, lambda _: target.copy_(source)), Step(lambda: None, lambda _: source.sum())
    samplers = {"copy": lambda: sample(copy), "read": lambda: sample(read)}
    measured = interleave(samplers, budget_s=budget_s, min_rounds=5, max_rounds=30)
    moved = {"copy": 2 * size, "read": size}
    return {name: moved[name] / (measured[name].median * 1e-3) for name in moved}


def _product_size(device: str, dtype: torch.dtype) -> int:
    if device != "cpu":
        return 8_192
    return 2_048 if cpu_multiplies(dtype) else 256  # emulated, a product of 2,048 takes more than a minute


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the allocator refused, or a library that asks the device by itself."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "ALLOC_FAILED" in said


def product_ceilings(device: str, budget_s: float = 0.7) -> dict[str, float]:
    """What this machine's matrix products give, in FLOP/s by dtype: one square product that fills the device."""
    sample = cpu_sample if device == "cpu" else cuda_sample
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        size = _product_size(device, dtype)
        # Not one number all over: a GPU is faster on data whose bits do not change.
        left, right = (torch.randn((size, size), device=device).to(dtype) / 64 for _ in range(2))
        out = torch.empty_like(left)
        step = Step(lambda: None, lambda _, a=left, b=right, o=out: torch.mm(a, b, out=o))  # type: ignore[misc]
        sampled = interleave({"mm": lambda step=step: sample(step)}, budget_s=budget_s, min_rounds=3, max_rounds=20)
        found[name] = 2 * size**3 / (sampled["mm"].median * 1e-3)
    return found
