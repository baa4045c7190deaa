"""``python -m bench.tune``: which value of each constant of the launch tables is faster on this GPU, and which backend.

    python -m bench.tune [--plan] [--show] [--only NAME,...] [--minutes M] [--again] [--out DIR]

For each knob of :mod:`bench.knobs` and each of its cases the candidates take turns, with inputs that are not in the
cache and CUDA graphs below 100 µs. A candidate whose result breaks the error rule against the eager backend has no
time; whether it gives the bits of the present value is said of each. One step is a knob on one case; the JSON
(bench/results/tune-{device}-{date}.json) is written after every step, and the same command goes on where it stopped,
as long as kernels, GPU and versions are the same. --only takes parts of knobs' names, or the groups backends, chunk,
launches, constants, registers. --show prints what is known, without a GPU.

Nothing is changed: a person writes the line into its file, with the reason on the row.
Exit status: 0 done; 1 the present value gave a wrong result; 2 there is no GPU; 3 steps are left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rl4llm_fast.info import kernel_files, kernel_sources

from . import knobs, measure, ops, peers, report, run, timing
from .base import ROOT
from .cases import BOTH, FORWARD, Case
from .knobs import Candidate, Knob
from .timing import Step
from .verify import FAILED, HELD, NO_GPU, UNFINISHED, Clock

WORTH = 1.02  # a smaller gain is within what the same candidate differs by from run to run
_BUDGET = measure.Budget(1.5)
_CHECKED_ROWS = 128  # of logits, from both ends: rows are independent of each other
_ATTEMPTS = 2  # a step that has ended the process this often is left out
# For --plan: guesses at seconds of a step and of a candidate in it, of which the first step of a knob compiles.
_STEP_S, _COMPILE_S, _CANDIDATE_S, _LINEAR_S = 3.0, 1.5, 0.4, 6.0

Clocks = Callable[[Sequence[Step], bool, str], tuple[Callable[[], float], str]]


def steps(only: Sequence[str] = ()) -> list[tuple[Knob, Case]]:
    """Every knob on its first case, then on its others: what a run that is cut off has seen is of all of them."""
    chosen = [
        knob
        for knob in knobs.knobs()
        if not only or any(name == knob.group or (name not in knobs.GROUPS and name in knob.name) for name in only)
    ]
    first = [(knob, knob.cases[0]) for knob in chosen]
    return first + [(knob, case) for knob in chosen for case in knob.cases[1:]]


def key_of(knob: Knob, case: Case) -> str:
    return f"{knob.name} | {case.name}"


def seconds_of(knob: Knob, case: Case, first: bool) -> float:
    """A guess at a step's time."""
    each = _LINEAR_S if case.op.startswith("linear_") else _CANDIDATE_S
    return _STEP_S + len(knob.candidates) * (each + (_COMPILE_S if first else 0.0))


def within(knob: Knob, candidate: Candidate, step: Step) -> Step:
    """The step with the candidate in force."""

    def prepare() -> object:
        with knob.applied(candidate):
            return step.prepare()

    def take(state: object) -> object:
        with knob.applied(candidate):
            return step.run(state)

    return Step(prepare, take)


def checked(case: Case, inputs: ops.Inputs) -> tuple[Case, ops.Inputs, Callable[[ops.Outputs], ops.Outputs]]:
    """What the oracle is asked of: of rows of logits the first and the last, of other ops everything."""
    rows = case.shape[0]
    if "logits" not in inputs or rows <= 2 * _CHECKED_ROWS:
        return case, inputs, lambda outputs: {name: t.detach().clone() for name, t in outputs.items()}
    ends = torch.arange(rows, device=inputs["logits"].device)
    ends = torch.cat([ends[:_CHECKED_ROWS], ends[-_CHECKED_ROWS:]])
    part = Case(case.op, case.call, case.mode, case.dtype, (len(ends), *case.shape[1:]), (), (), case.variant)
    return part, {n: t[ends] for n, t in inputs.items()}, lambda outputs: {n: t[ends] for n, t in outputs.items()}


def measure_step(
    knob: Knob, case: Case, device: str = "cuda", clock: Clocks = measure.clock, budget: measure.Budget = _BUDGET
) -> dict[str, Any]:
    """One step's record: the present value first, each candidate with its time or with the reason for none."""
    began = time.monotonic()
    function, inputs = peers.build(peers.OURS, case, device), ops.make_inputs(case, device)
    part, part_inputs, sample = checked(case, inputs)
    rows: dict[str, dict[str, Any]] = {}
    outputs: dict[str, ops.Outputs] = {}
    by_label = {knob.label(candidate): candidate for candidate in knob.all()}
    for label, candidate in by_label.items():
        rows[label] = {"candidate": label}
        try:
            made = within(knob, candidate, ops.step(case, function, inputs))
            outputs[label] = sample(made.run(made.prepare()))  # type: ignore[arg-type]
        except Exception as error:  # out of registers or shared memory, say
            rows[label].update(status="failed", reason=measure.one_line(error))
            if device == "cuda":
                torch.cuda.synchronize()  # raises where the context is gone: no later figure would be worth anything
    now = next(iter(by_label))
    for label, judged in ops.errors(part, part_inputs, outputs).items():
        wrong = sorted(name for name, error in judged.items() if not error.within)
        rows[label].update({"status": "wrong", "reason": f"wrong: {', '.join(wrong)}"} if wrong else {"status": "ok"})
        if now in outputs:
            rows[label]["same_bits"] = all(
                torch.equal(value, outputs[now][name]) for name, value in outputs[label].items()
            )
    outputs.clear()
    right = [label for label, row in rows.items() if row["status"] == "ok"]
    input_sets = [inputs] if device == "cpu" else measure.beyond_cache(case, inputs)
    samplers = {}
    for label in right:
        made_steps = [within(knob, by_label[label], ops.step(case, function, given)) for given in input_sets]
        samplers[label], rows[label]["timed"] = clock(made_steps, case.mode in (FORWARD, BOTH), device)
    timed = timing.interleave(
        samplers, budget_s=budget.seconds, min_rounds=budget.min_rounds, max_rounds=budget.max_rounds
    )
    for label, samples in timed.items():
        rows[label].update(median_ms=samples.median, p20_ms=samples.p20, p80_ms=samples.p80)
        if knob.memory and device == "cuda":
            made = within(knob, by_label[label], ops.step(case, function, inputs))
            rows[label]["extra_bytes"] = timing.cuda_extra_bytes(lambda made=made: made.run(made.prepare()))  # type: ignore[misc]
    return {
        "knob": knob.name,
        "case": case.name,
        "now": now,
        "cut": knob.cut,
        "seconds": round(time.monotonic() - began, 1),
        "results": list(rows.values()),
    }


def verdict(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The candidate that is fastest over the cases, by the geometric mean; None where the present one has no time.

    Only candidates that are right and timed in every case take part, the present value among them.
    """
    times = [
        {r["candidate"]: r["median_ms"] for r in record["results"] if "median_ms" in r and r["status"] == "ok"}
        for record in records
    ]
    now = records[0]["now"] if records else None
    if not times or any(now not in of for of in times):
        return None
    common = set.intersection(*map(set, times))
    gains = {name: [of[now] / of[name] for of in times] for name in common}
    mean = {name: math.exp(sum(map(math.log, ratios)) / len(ratios)) for name, ratios in gains.items()}
    best = max(mean, key=lambda name: (mean[name], name == now))
    rows = [r for record in records for r in record["results"] if r["candidate"] == best]
    same = all(r.get("same_bits", False) for r in rows)
    return {"now": now, "best": best, "gain": mean[best], "least": min(gains[best]), "same_bits": same}


def text(result: dict[str, Any]) -> str:
    """Every knob that has a figure: its row now, the best, the gain, and the line to write."""
    meta = result["meta"]
    lines = [f"tuned on {meta['device']}, {meta['date']}, torch {meta['torch']}, triton {meta['triton']}"]
    by_name = {knob.name: knob for knob in knobs.knobs()}
    for name in dict.fromkeys(record["knob"] for record in result["steps"].values()):
        records = [record for record in result["steps"].values() if record["knob"] == name]
        lines += ["", f"{name}   (now {records[0]['now']})"]
        lines += [_case_line(record) for record in records]
        found, knob = verdict([record for record in records if record["results"]]), by_name.get(name)
        if found is None or knob is None:
            lines.append("  no verdict: the present value has no time")
            continue
        bits = "the same bits" if found["same_bits"] else "OTHER BITS: the cut or the order of sums is another one"
        over = f"{len(records)} of {len(knob.cases)} cases, least {found['least']:.2f}x, {bits}"
        if found["gain"] < WORTH or found["best"] == found["now"]:
            lines.append(f"  keep it: the best is {found['best']}, {found['gain']:.2f}x over {over}")
            continue
        lines.append(f"  best: {found['best']}, {found['gain']:.2f}x over {over}")
        why = f"{meta['device']}, {meta['date'][:10]}: {found['gain']:.2f}x of {found['now']} over {len(records)} cases"
        candidate = next((c for c in knob.all() if knob.label(c) == found["best"]), None)
        if candidate is not None:
            lines += [f"  {line}" for line in knob.line(candidate, why).split("\n")]
    return "\n".join(lines)


def _case_line(record: dict[str, Any]) -> str:
    timed = {r["candidate"]: r for r in record["results"] if "median_ms" in r}
    parts = [
        f"{name} {r['median_ms']:.4g} ms" + (f" and {r['extra_bytes'] / 2**20:,.0f} MiB" if "extra_bytes" in r else "")
        for name, r in sorted(timed.items(), key=lambda item: item[1]["median_ms"])
    ]
    parts += [f"{r['candidate']}: {r['reason']}" for r in record["results"] if "reason" in r]
    return f"  {record['case']}: " + ("; ".join(parts) or record.get("reason", "nothing was timed"))


def code() -> str:
    """A digest of every file that a kernel, its launch or the choice between backends comes from."""
    library = (ROOT / "rl4llm_fast" / name for name in ("tiles.py", "dispatch.py"))
    found = [hashlib.sha256(path.read_bytes()).hexdigest() for path in library]
    found += [digest for path in kernel_files(ROOT) for digest in kernel_sources(path, ROOT).values()]
    return hashlib.sha256("".join(sorted(set(found))).encode()).hexdigest()[:12]


def load(folders: Sequence[pathlib.Path], meta: dict[str, Any]) -> tuple[pathlib.Path | None, dict[str, Any]]:
    """The newest result of the same kernels, GPU and versions, with its path, or an empty one."""
    found = report.alike(report.recorded(folders, "tune"), meta, ("device", "code", "torch", "triton"))
    return next(found, (None, {"meta": meta, "steps": {}, "attempts": {}}))


def free(path: pathlib.Path) -> pathlib.Path:
    """That path, or the first of path-2, path-3, ... that is not taken by figures of other kernels."""
    number = 2
    while path.exists():
        path = path.with_name(f"{path.stem.removesuffix(f'-{number - 1}')}-{number}.json")
        number += 1
    return path


def tune(
    result: dict[str, Any],
    path: pathlib.Path,
    only: Sequence[str],
    minutes: float | None,
    take: Callable[[Knob, Case], dict[str, Any]] = measure_step,
) -> int:
    """Take the steps that the result lacks, writing it after each. Returns the command's exit status."""
    clock, status, wanted = Clock(minutes), HELD, steps(only)
    for number, (knob, case) in enumerate(wanted, 1):
        key = key_of(knob, case)
        if key not in result["steps"]:
            if clock.over:
                return UNFINISHED
            tried = result["attempts"].get(key, 0)
            if tried >= _ATTEMPTS:
                nothing = {"knob": knob.name, "case": case.name, "now": "", "results": []}
                result["steps"][key] = {**nothing, "reason": f"left out: its process ended {tried} times"}
            else:
                result["attempts"][key] = tried + 1
                report.write_json(path, result)  # if this step ends the process, the next run knows
                print(f"[{number}/{len(wanted)}] {key}", file=sys.stderr, flush=True)
                result["steps"][key] = attempt(knob, case, take)
            report.write_json(path, result)
        present = [r for r in result["steps"][key]["results"] if r["candidate"] == result["steps"][key]["now"]]
        if any(r["status"] == "wrong" for r in present):
            status = FAILED
    return status


def attempt(knob: Knob, case: Case, take: Callable[[Knob, Case], dict[str, Any]]) -> dict[str, Any]:
    """The step's record; of one that fails as a whole (the oracle's memory, say) the reason, so that others go on."""
    try:
        return take(knob, case)
    except Exception as error:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises where the context is gone: the next process goes on
            torch.cuda.empty_cache()
        nothing = {"knob": knob.name, "case": case.name, "now": "", "results": []}
        return {**nothing, "reason": measure.one_line(error)}


def plan(result: dict[str, Any], only: Sequence[str]) -> str:
    """What would run, knob by knob, and for how long: guesses, since no step is known before it was taken."""
    wanted, lines, total = steps(only), [], 0.0
    for knob in dict.fromkeys(knob for knob, _ in wanted):
        left = [case for case in knob.cases if key_of(knob, case) not in result["steps"]]
        seconds = sum(seconds_of(knob, case, case is knob.cases[0]) for case in left)
        total += seconds
        marked = ", another cut: may hang on V, T and dtype, never on N" if knob.cut else ""
        state = f"about {seconds:.0f} s" if left else "done"
        lines.append(
            f"{knob.group}: {knob.name}, {len(knob.candidates)} candidates on {len(knob.cases)} cases, {state}{marked}"
        )
    lines.append(f"{len(wanted)} steps, in all about {total / 60:.0f} minutes (guessed); each on its first case first")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description="Compare launches and backends here.")
    parser.add_argument("--plan", action="store_true", help="print what would run and for how long, and stop")
    parser.add_argument("--show", action="store_true", help="print the newest result, and stop")
    parser.add_argument("--only", default="", help="comma-separated: groups, or parts of knobs' names")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no step after M minutes; run again to go on")
    parser.add_argument("--again", action="store_true", help="forget the steps asked for, and take them anew")
    parser.add_argument("--out", type=pathlib.Path, default=report.RESULTS, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    only = [name for name in arguments.only.split(",") if name]
    if not steps(only):
        parser.error(f"--only: wanted parts of knobs' names, or {', '.join(knobs.GROUPS)}, got {arguments.only!r}")
    if arguments.show:
        paths = sorted(arguments.out.glob("tune-*.json"), key=lambda path: path.stat().st_mtime)
        print(text(json.loads(paths[-1].read_text(encoding="utf-8"))) if paths else f"no result in {arguments.out}")
        return HELD
    gpu = torch.cuda.is_available()
    meta = {**run.environment("cuda" if gpu else "cpu"), "suite": "tune", "code": code()}
    path, result = load((arguments.out, report.RESULTS), meta)
    if arguments.plan:
        print(plan(result, only))
        return HELD
    if not gpu:
        print("tuning needs a GPU, and torch sees none here (--plan shows what would run)")
        return NO_GPU
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = free(arguments.out / f"{run.stem(meta)}.json") if path is None else arguments.out / path.name
    if arguments.again:
        for knob, case in steps(only):
            result["steps"].pop(key_of(knob, case), None)
            result["attempts"].pop(key_of(knob, case), None)
    status = tune(result, path, only, arguments.minutes)
    print(text(result))
    print(f"wrote {path}")
    if status == UNFINISHED:
        print("steps are left: the same command (without --again) goes on")
    return status


if __name__ == "__main__":
    sys.exit(main())
