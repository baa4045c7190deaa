"""One case measured: everyone's results judged, then timed in rounds, then their peak memory, then the targets."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

import rl4llm_fast as rf
from rl4llm_fast import dispatch
from rl4llm_fast.machine import cpu_multiplies

from . import ops, peers, timing
from .base import Base
from .cases import BOTH, FORWARD, Case, Target
from .memory import Prober
from .timing import Step


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long a case may be sampled."""

    seconds: float
    min_rounds: int = 7
    max_rounds: int = 50


BUDGETS = {
    "smoke": Budget(2.0, min_rounds=5),
    "cpu": Budget(3.0, min_rounds=5),
    "gpu": Budget(3.0),
    "sweep": Budget(1.0, min_rounds=3),
}


_PRODUCTS = "bare products"


def run_case(
    case: Case,
    names: Sequence[str],
    device: str,
    budget: Budget,
    *,
    copy_ceiling: float,
    prober: Prober | None = None,
    base: Base | None = None,
) -> dict[str, Any]:
    """The case's record, as ``bench.report`` prints it and the JSON keeps it."""
    if (reason := passed_over(case, device)) is not None:
        absent = {"status": "absent", "reason": reason}
        record = _record(case, [{"implementation": n, "version": peers.version(n), **absent} for n in names])
        unjudged = {"got": None, "verdict": "not judged", "reason": reason}
        return {**record, "targets": [{"text": str(target), **unjudged} for target in case.targets]}
    torch._dynamo.reset()  # a compiled function of the last case must not count towards this one's recompile limit
    inputs = ops.make_inputs(case, device)
    found: dict[str, Any] = {}
    functions: dict[str, Callable[..., Any]] = {}
    outputs: dict[str, ops.Outputs] = {}
    for name in names:
        found[name] = {"implementation": name, "version": peers.version(name)}
        if case.repeats and name not in {peers.OURS, *(target.peer for target in case.targets)}:
            found[name].update(status="absent", reason=f"its call is measured in {case.repeats}")
            continue
        try:
            functions[name] = peers.build(name, case, device)
            outputs[name] = ops.first_run(ops.step(case, functions[name], inputs, ops.overwrites(case, name)))
            found[name]["status"] = "ok"
        except peers.Absent as reason:
            found[name].update(status="absent", reason=str(reason))
        except Exception as error:  # a peer that breaks is a result too
            functions.pop(name, None)
            found[name].update(status="failed", reason=one_line(error))
    for name, judged in ops.errors(case, inputs, outputs).items():
        found[name]["errors"] = {
            key: {"found": error.found, "allowed": error.allowed, "within": error.within}
            for key, error in sorted(judged.items())
        }
        found[name]["correct"] = all(error.within for error in judged.values())
    del outputs
    gc.collect()

    input_sets = [inputs] if device == "cpu" else beyond_cache(case, inputs)
    samplers = {}
    for name, function in functions.items():
        samplers[name], found[name]["timed"] = sampler(case, name, function, input_sets, device)
    if base is not None:
        found["base"] = {"implementation": "base", "version": base.ref}
        try:
            base.load(case, device)
            samplers["base"] = base.sample
            found["base"]["status"] = "ok"
        except RuntimeError as error:
            found["base"].update(status="failed", reason=one_line(error))
    floor = None if case.axis else ops.products(case, inputs)
    if floor is not None:
        sample = timing.cpu_sample if device == "cpu" else timing.cuda_sample
        samplers[_PRODUCTS] = lambda: sample(floor)
    measured = timing.interleave(
        samplers, budget_s=budget.seconds, min_rounds=budget.min_rounds, max_rounds=budget.max_rounds
    )
    products_ms = measured.pop(_PRODUCTS).median if floor is not None else None
    for name, samples in measured.items():
        found[name].update(median_ms=samples.median, p20_ms=samples.p20, p80_ms=samples.p80, rounds=len(samples.ms))
    for name, function in functions.items():
        long = measured[name].median >= timing.LONG_MS
        found[name]["extra_bytes"] = _extra_bytes(case, name, function, inputs, device, prober, long)

    record = _record(case, list(found.values()), products_ms, _backend(case, inputs))
    if case.op.startswith("linear_") and case.mode != FORWARD and found[peers.OURS].get("extra_bytes") is not None:
        record["memory"] = memory_parts(case, found[peers.OURS]["extra_bytes"])
    _add_ratios(record)
    record["targets"] = [judge(target, record, _device_name(device), copy_ceiling) for target in case.targets]
    return record


def passed_over(case: Case, device: str) -> str | None:
    """Why a case is measured for nobody here: without instructions for them, 16-bit products take minutes a call."""
    if device != "cpu" or not case.op.startswith("linear_") or cpu_multiplies(case.dtype):
        return None
    return f"this CPU has no instructions for products in {case.dtype_name}, and emulates them"


def _record(
    case: Case, results: list[dict[str, Any]], products_ms: float | None = None, backend: str = "none"
) -> dict[str, Any]:
    return {
        "name": case.name,
        "op": case.op,
        "call": case.call,
        "variant": case.variant,
        "mode": case.mode,
        "dtype": case.dtype_name,
        "shape": list(case.shape),
        "axis": case.axis,
        "bytes": case.bytes,
        "flops": case.flops,
        "products_ms": products_ms,
        "backend": backend,
        "results": results,
    }


def memory_parts(case: Case, extra: int) -> dict[str, int]:
    """What the peak beside the inputs consists of: both gradients, the fp32 sum of dW between chunks, and the rest."""
    rows, width, vocabulary = case.shape
    gradients = (rows + vocabulary) * width * case.dtype.itemsize
    accumulator = vocabulary * width * 4 if case.dtype.itemsize < 4 else 0
    return {"gradients": gradients, "accumulator": accumulator, "workspace": max(0, extra - gradients - accumulator)}


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def _backend(case: Case, inputs: ops.Inputs) -> str:
    return dispatch.choose(case.op, next(iter(inputs.values()))) if hasattr(rf, case.op) else "none"


def _device_name(device: str) -> str:
    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


def beyond_cache(case: Case, inputs: ops.Inputs) -> list[ops.Inputs]:
    """As many input sets as it takes that none is still in the GPU's L2 when its turn comes again."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = min(32, math.ceil(3 * cache / max(case.bytes, 1)) + 1) if case.bytes < 3 * cache else 1
    return [inputs, *(ops.make_inputs(case, "cuda", seed) for seed in range(1, copies))]


def sampler(
    case: Case, name: str, function: Callable[..., Any], input_sets: Sequence[ops.Inputs], device: str
) -> tuple[Callable[[], float], str]:
    """The clock for one implementation, and a word on how it measures."""
    restore = ops.overwrites(case, name)
    steps = [ops.step(case, function, inputs, restore) for inputs in input_sets]
    return clock(steps, case.mode in (FORWARD, BOTH) and not restore, device)


def clock(steps: Sequence[Step], repeatable: bool, device: str) -> tuple[Callable[[], float], str]:
    """The clock for one call of each step in turn, and a word on how it measures. repeatable: nothing to prepare."""
    if device == "cpu":
        (one,) = steps
        return lambda: timing.cpu_sample(one), "one call a sample, from a settled cache"
    turns = itertools.cycle(steps)
    # The first call may compile; one that takes long even so is no matter for a graph, and is not repeated to see that.
    first = [timing.cuda_sample(next(turns)) for _ in range(2)] if repeatable else []
    short = repeatable and first[1] < 100 * timing.GRAPH_BELOW_MS
    if short and timing.percentile([timing.cuda_sample(next(turns)) for _ in range(7)], 50) < timing.GRAPH_BELOW_MS:
        try:
            graph = timing.graphed(steps)
            return lambda: timing.cuda_sample(graph) / len(steps), f"a CUDA graph of {len(steps)} calls"
        except RuntimeError as error:  # a peer that synchronises cannot be captured, and is timed as it is
            torch.cuda.synchronize()
            return lambda: timing.cuda_sample(next(turns)), f"events; no CUDA graph: {one_line(error)}"
    return lambda: timing.cuda_sample(next(turns)), f"events, {len(steps)} input sets"


def _extra_bytes(
    case: Case,
    name: str,
    function: Callable[..., Any],
    inputs: ops.Inputs,
    device: str,
    prober: Prober | None,
    long: bool,
) -> int | None:
    if device == "cpu":
        return prober.ask(case, name, long) if prober else None
    made: Step = ops.step(case, function, inputs, ops.overwrites(case, name))
    return timing.cuda_extra_bytes(lambda: made.run(made.prepare()))


def result_of(record: dict[str, Any], name: str) -> dict[str, Any]:
    """The result of one implementation in a record; an absent one where it took no part."""
    missing = {"implementation": name, "status": "absent", "reason": "not asked for"}
    return next((r for r in record["results"] if r["implementation"] == name), missing)


def _add_ratios(record: dict[str, Any]) -> None:
    """``speedup`` of ours over each peer, only where ours is right; ``bytes_per_s`` of everyone."""
    ours = result_of(record, peers.OURS)
    for result in record["results"]:
        if "median_ms" not in result:
            continue
        result["bytes_per_s"] = record["bytes"] / (result["median_ms"] * 1e-3)
        if result is not ours and ours.get("correct") and "median_ms" in ours:
            result["speedup"] = result["median_ms"] / ours["median_ms"]


def judge(target: Target, record: dict[str, Any], device_name: str, copy_ceiling: float) -> dict[str, Any]:
    """Whether a record reaches a target: ``verdict`` is reached, missed or not judged (with the reason)."""
    ours = result_of(record, peers.OURS)
    verdict: dict[str, Any] = {"text": str(target), "got": None, "verdict": "not judged"}
    if target.device is not None and target.device not in device_name:
        return {**verdict, "reason": f"this is {device_name}"}
    if ours["status"] != "ok":
        return {**verdict, "verdict": "missed", "reason": ours.get("reason", "no result")}
    if not ours.get("correct"):
        return {**verdict, "verdict": "missed", "reason": "the result is wrong"}
    if target.kind == "speedup":
        peer = result_of(record, str(target.peer))
        got = peer.get("speedup")
        if got is None:
            return {**verdict, "reason": f"{target.peer}: {peer.get('reason', 'no figure')}"}
        shown, reached = f"{got:.1f}x", got >= target.value
    elif target.kind == "time_ms":
        got = ours["median_ms"]
        shown, reached = f"{got:.3g} ms", got <= target.value
    elif target.kind == "copy_fraction":
        got = ours["bytes_per_s"] / copy_ceiling
        shown, reached = f"{got:.0%}", got >= target.value
    elif target.kind == "workspace_bytes":
        if "memory" not in record:
            return {**verdict, "reason": "memory was not measured"}
        got = record["memory"]["workspace"]
        shown, reached = f"{got / 2**20:,.0f} MiB", got <= target.value
    elif target.kind == "memory":
        peer, extra = result_of(record, str(target.peer)), ours.get("extra_bytes")
        if not extra or not peer.get("extra_bytes"):
            return {**verdict, "reason": "memory was not measured"}
        got = peer["extra_bytes"] / extra
        shown, reached = f"1/{got:.1f}", got >= target.value
    elif target.kind == "products":
        got = ours["median_ms"] / record["products_ms"]
        shown, reached = f"{got:.2f}x", got <= target.value
    else:
        got = ours.get("extra_bytes")
        if got is None:
            return {**verdict, "reason": "memory was not measured"}
        shown, reached = f"{got / 2**20:.1f} MiB", got <= target.value
    return {**verdict, "got": got, "shown": shown, "verdict": "reached" if reached else "missed"}
