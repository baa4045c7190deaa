"""A suite's result as a terminal table, CSV, JSON and plots; and the README's table from the JSON.

python -m bench.report [FILE.json ...]      print tables (default: the newest of every suite and device)
python -m bench.report --plots              draw their plots anew
python -m bench.report --readme             rewrite the README between <!-- bench:begin --> and <!-- bench:end -->:
                                            of each suite the newest result, whatever machine it is of
python -m bench.report --performance        the same for the tables of docs/performance.md
python -m bench.report --gpu                the same for the tables and plots of docs/gpu.md
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import pathlib
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from . import plots, sweeps
from .peers import OURS

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
MIB = 2**20


def table(result: dict[str, Any]) -> str:
    """The whole run for a terminal of 100 columns."""
    meta, ceilings = result["meta"], result["ceilings_bytes_per_s"]
    lines = [
        f"suite {meta['suite']} on {meta['device']}, {meta['date']}, {meta['seconds']:.0f} s",
        f"rl4llm_fast {meta['rl4llm_fast']} at {meta['git']}{' (modified)' if meta['dirty'] else ''}, "
        f"torch {meta['torch']}, triton {meta['triton']}, python {meta['python']}"
        + (f", driver {meta['driver']}, CUDA {meta['cuda']}" if "driver" in meta else ""),
        f"measured ceilings: copy (read + write) {ceilings['copy'] / 1e9:.1f} GB/s, "
        f"read {ceilings['read'] / 1e9:.1f} GB/s",
        "",
        f"{'':<14}{'median ms':>10}  {'p20 - p80':<17}{'ours is':>9}{'GB/s':>8}{'of copy':>9}{'extra MiB':>11}"
        f"{'error':>8}",
    ]
    for record in result["cases"]:
        lines += ["", f"{title(record)}   {record['bytes'] / 1e6:,.1f} MB   backend {record['backend']}"]
        lines += [_row(r, ceilings["copy"]) for r in record["results"] if r["status"] == "ok"]
        if record.get("products_ms"):
            lines.append(_floor(record))
        missing = [f"{r['implementation']}: {r['status']}, {r['reason']}" for r in record["results"] if "reason" in r]
        lines += [f"  - {text}" for text in missing]
        lines += _memory(record)
        lines += [f"  > {_verdict(target)}" for target in record["targets"]]
    verdicts = [target["verdict"] for record in result["cases"] for target in record["targets"]]
    versions = {r["implementation"]: r["version"] for record in result["cases"] for r in record["results"]}
    lines += [
        "",
        f"targets: {verdicts.count('reached')} reached, {verdicts.count('missed')} missed, "
        f"{verdicts.count('not judged')} not judged",
        "peers: " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "'ours is 5.0x': that peer takes five times as long. GB/s: the least bytes of the case over the median time.",
        "error: the largest distance to the fp64 oracle, as a part of what the error rule allows this library.",
    ]
    if meta["suite"] == "sweep":
        lines += ["", sweeps.markdown(result)]
    return "\n".join(lines)


def title(record: dict[str, Any], separator: str = " ") -> str:
    """A case in words; the separator stands between the op and how it was run."""
    name = record["op"] + (" + entropy" if record["call"].endswith("_entropy") else "")
    shape = " x ".join(f"{size:,}" for size in record["shape"])
    return separator.join(
        " ".join(part for part in half if part)
        for half in ((name, record["variant"]), (record["mode"], record["dtype"], shape))
    )


def _row(r: dict[str, Any], copy: float) -> str:
    if "median_ms" not in r:
        return f"  {r['implementation']:<12} no timing"
    speedup = f"{r['speedup']:.1f}x" if "speedup" in r else ""
    extra = f"{r['extra_bytes'] / MIB:,.1f}" if r.get("extra_bytes") is not None else "?"
    used = max((e["found"] / e["allowed"] for e in r.get("errors", {}).values()), default=None)
    error = "" if used is None else f"{used:.2g}"
    wrong = ", ".join(key for key, e in r.get("errors", {}).items() if not e["within"])
    note = ""
    if wrong:
        ours = r["implementation"] == OURS
        note = f"  WRONG: {wrong}; no speed-up is printed" if ours else f"  less exact: {wrong}"
    spread = f"{r['p20_ms']:.3f} - {r['p80_ms']:.3f}"
    return (
        f"  {r['implementation']:<12}{r['median_ms']:>10.3f}  {spread:<17}{speedup:>9}{r['bytes_per_s'] / 1e9:>8.1f}"
        f"{r['bytes_per_s'] / copy:>9.0%}{extra:>11}{error:>8}{note}"
    )


def _floor(record: dict[str, Any]) -> str:
    """The case's matrix products alone, and everyone's time over them."""
    floor = record["products_ms"]
    over = [f"{r['implementation']} {r['median_ms'] - floor:+,.0f} ms" for r in record["results"] if "median_ms" in r]
    return f"  {'(products)':<12}{floor:>10.3f}  its bare matrix products; over them: {', '.join(over)}"


def _memory(record: dict[str, Any]) -> list[str]:
    """From hidden states: what the peak memory consists of."""
    if "memory" not in record:
        return []
    parts = ", ".join(f"{name} {size / MIB:,.0f} MiB" for name, size in record["memory"].items())
    return [f"  . extra memory of {OURS}: {parts}"]


def _verdict(target: dict[str, Any]) -> str:
    got = f": {target['shown']}" if target["got"] is not None else f" ({target['reason']})"
    return f"{target['verdict'].upper() if target['verdict'] == 'missed' else target['verdict']} {target['text']}{got}"


_FIELDS = (
    *("implementation", "version", "status", "reason", "median_ms", "p20_ms", "p80_ms", "rounds", "timed"),
    *("speedup", "bytes_per_s", "extra_bytes", "correct"),
)


def write(result: dict[str, Any], folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """JSON, CSV and plots under ``folder``; returns their paths. Plots need matplotlib, and say so without it."""
    folder.mkdir(parents=True, exist_ok=True)
    json_path, csv_path = folder / f"{stem}.json", folder / f"{stem}.csv"
    write_json(json_path, result)
    with open(csv_path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "bytes", "flops", "date", "device", "git", *_FIELDS])
        meta = result["meta"]
        for record in result["cases"]:
            head = [record["name"], record["bytes"], record["flops"], meta["date"], meta["device"], meta["git"]]
            writer.writerows([*head, *(r.get(key, "") for key in _FIELDS)] for r in record["results"])
    return [json_path, csv_path, *plots.draw(result, folder, stem)]


def write_json(path: pathlib.Path, data: object) -> None:
    """Whole or not at all: an interrupted run never leaves half a file."""
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def newest(folder: pathlib.Path = RESULTS) -> list[pathlib.Path]:
    """The newest JSON of each suite and device; a full suite makes its device's smoke run redundant."""
    latest: dict[tuple[str, str], pathlib.Path] = {}
    for path in sorted(folder.glob("*.json")):
        match = re.fullmatch(r"(smoke|cpu|gpu|sweep|end-to-end|context)-(.+)-\d{4}-\d\d-\d\d", path.stem)
        if match:  # sorted by name, so by date within a suite and device
            latest[match[1], match[2]] = path
    return [path for (suite, device), path in latest.items() if suite != "smoke" or ("cpu", device) not in latest]


def recorded(folders: Iterable[pathlib.Path], suite: str) -> list[pathlib.Path]:
    """A suite's JSON files, folder by folder, the newest of each first."""
    return [path for folder in folders for path in sorted(folder.glob(f"{suite}-*.json"), reverse=True)]


def alike(
    paths: Iterable[pathlib.Path], meta: dict[str, Any], keys: Sequence[str]
) -> Iterator[tuple[pathlib.Path, dict[str, Any]]]:
    """The results among the files that can be gone on with: made where, and of what, ``meta`` says by its ``keys``."""
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        known = result.get("meta", {})
        if all(known.get(key) == meta[key] for key in keys):
            yield path, result


def newest_of_suites(results: dict[pathlib.Path, dict[str, Any]]) -> dict[pathlib.Path, dict[str, Any]]:
    """What a page shows: of each suite and kind of device the newest; others' results stay in their files."""
    latest: dict[tuple[str, str], pathlib.Path] = {}
    for path in sorted(results, key=lambda path: results[path]["meta"]["date"]):
        meta = results[path]["meta"]
        latest[meta["suite"], meta["device_kind"]] = path
    if ("cpu", "cpu") in latest:  # a full suite has the cases of the smoke run
        latest.pop(("smoke", "cpu"), None)
    return {path: result for path, result in results.items() if path in latest.values()}


def of_other_devices(results: dict[pathlib.Path, dict[str, Any]], suite: str) -> list[dict[str, Any]]:
    """The newest results of a whole suite from the devices that ``newest_of_suites`` passes over, newest first."""
    shown = {r["meta"]["device"] for r in newest_of_suites(results).values() if r["meta"]["suite"] == suite}
    latest: dict[str, dict[str, Any]] = {}
    for result in sorted(results.values(), key=lambda result: result["meta"]["date"]):
        meta = result["meta"]
        if meta["suite"] == suite and meta.get("op") is None and meta["device"] not in shown:
            latest[meta["device"]] = result
    return list(latest.values())[::-1]


def folded(result: dict[str, Any]) -> str:
    """A table that the reader opens."""
    meta = result["meta"]
    return f"<details><summary>{meta['device']}, {meta['date'][:10]}</summary>\n\n{markdown(result)}\n\n</details>"


def markdown(result: dict[str, Any]) -> str:
    """Times and how many times faster, memory beside the inputs: every case of a result."""
    return f"{_rows(result['cases'])}\n\n{_source(result['meta'])}"


def headlines(result: dict[str, Any]) -> str:
    """The largest case of each op in each dtype, and the others where the reader opens them."""
    best: dict[tuple[str, str], tuple[tuple[bool, int], dict[str, Any]]] = {}
    for record in result["cases"]:
        ours = next(r for r in record["results"] if r["implementation"] == OURS)
        if "median_ms" in ours:
            key = record["call"], record["dtype"]
            rank = record["mode"] == "forward+backward", math.prod(record["shape"])
            if key not in best or rank > best[key][0]:
                best[key] = rank, record
    chosen = [record for _, record in best.values()]
    others = [record for record in result["cases"] if record not in chosen]
    text = _rows(chosen)
    if others:
        summary = f"The other {len(others)} cases: smaller ones, other modes and masks"
        text += f"\n\n<details><summary>{summary}</summary>\n\n{_rows(others)}\n\n</details>"
    return f"{text}\n\n{_source(result['meta'])}"


def _rows(records: Sequence[dict[str, Any]]) -> str:
    peers = []
    for record in records:
        peers += [r["implementation"] for r in record["results"] if "speedup" in r and r["implementation"] not in peers]
    lines = [
        "| case | rl4llm_fast | " + " | ".join(peers) + " | extra memory: ours | eager's |",
        "|---|---" + "|---" * len(peers) + "|---|---|",
    ]
    for record in records:
        by_name = {r["implementation"]: r for r in record["results"]}
        ours = by_name[OURS]
        right = ours.get("correct") or ours["status"] == "absent"
        cells = [title(record), _milliseconds(ours) if right else "result wrong: not shown"]
        cells += [_against(by_name.get(peer, {})) for peer in peers]
        cells += [_mib(ours), _mib(by_name.get("eager", {}))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _source(meta: dict[str, Any]) -> str:
    commit = f"commit {meta['git']}{', with local changes' if meta['dirty'] else ''}"
    return (
        f"`{meta['command']}` on {meta['device']}, {meta['date']}, torch {meta['torch']}, {commit}. Medians of "
        "interleaved rounds; in brackets: how many times as long as rl4llm_fast it takes. –: absent or without a "
        "counterpart; `python -m bench.report` says which, with the percentiles and the targets."
    )


def _milliseconds(r: dict[str, Any]) -> str:
    if "median_ms" in r:
        return _time(r["median_ms"])
    return f"not run: {r['reason']}" if "reason" in r else r.get("status", "–")


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds:,.0f} ms"


def _against(r: dict[str, Any]) -> str:
    if "speedup" in r:
        return f"{_time(r['median_ms'])} ({r['speedup']:.1f}x)"
    return "–" if r.get("status", "absent") == "absent" else r["status"]


def _mib(r: dict[str, Any]) -> str:
    extra = r.get("extra_bytes")
    return "-" if extra is None else f"{extra / MIB:,.0f} MiB"


PLOTS = {
    "speed": "time of each case, beside the peers",
    "memory": "memory of each case, beside the peers",
    "roofline": "what each case gets of the memory's and the matrix units' measured speed",
    "time": "time against the size of each dimension",
    "peak": "peak memory against the number of tokens",
    "step-time": "seconds of a training step, beside plain PyTorch and TRL",
    "step-memory": "peak memory of a training step, beside plain PyTorch and TRL",
    "context": "peak memory of a GRPO step against the length of its answers, as far as they fit",
}


def pictures(stem: pathlib.Path, page: pathlib.Path) -> str:
    """The plots beside a result, for a page that may be light or dark; nothing where they were not drawn."""
    lines = []
    for key, text in PLOTS.items():
        light, dark = (stem.with_name(f"{stem.name}-{key}{theme}.png") for theme in ("", "-dark"))
        if light.is_file() and dark.is_file():
            source, image = (os.path.relpath(path, page.parent) for path in (dark, light))
            lines.append(
                f'<picture><source media="(prefers-color-scheme: dark)" srcset="{source}">'
                f'<img alt="{text}" src="{image}"></picture>'
            )
    return "\n".join(lines)


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def rewrite(path: pathlib.Path, name: str, blocks: Sequence[str]) -> None:
    """Put the blocks between a page's markers of that name. Raises ValueError where it has no such pair."""
    text = path.read_text(encoding="utf-8")
    begin, end = marks(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path}: wanted one {begin} before one {end}")
    head, rest = text.split(begin)
    body = "\n\n".join(blocks)
    path.write_text(f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def _text(result: dict[str, Any]) -> str:
    from . import context, end_to_end

    if "cases" in result:
        return table(result)
    return context.markdown(result) if "variants" in result else end_to_end.markdown(result)


def write_gpu(page: pathlib.Path, results: dict[pathlib.Path, dict[str, Any]]) -> list[str]:
    """The order of commands, and the models by their size, newest of each; the names of what was written."""
    from . import campaign

    rewrite(page, "order", [campaign.markdown()])
    written = ["order"]
    for mark, kind in (("steps", "end-to-end-"), ("context", "context-")):
        of_kind = {path: r for path, r in results.items() if r["meta"]["suite"].startswith(kind)}
        shown = sorted(of_kind.items(), key=lambda item: item[1]["meta"]["suite"])
        blocks = [part for path, r in shown for part in (_text(r), pictures(path.with_suffix(""), page)) if part]
        if blocks:
            rewrite(page, mark, blocks)
            written.append(mark)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    from . import end_to_end

    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Tables from recorded results.")
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="JSON files of bench.run; default: the newest")
    parser.add_argument("--plots", action="store_true", help="draw their plots anew, beside them")
    parser.add_argument("--readme", nargs="?", const=ROOT / "README.md", type=pathlib.Path, help="rewrite its table")
    page = ROOT / "docs" / "performance.md"
    parser.add_argument("--performance", nargs="?", const=page, type=pathlib.Path, help="rewrite its tables")
    gpu = ROOT / "docs" / "gpu.md"
    parser.add_argument("--gpu", nargs="?", const=gpu, type=pathlib.Path, help="rewrite its tables")
    arguments = parser.parse_args(argv)
    files = arguments.files or newest()
    if missing := [str(path) for path in arguments.files if not path.is_file()]:
        parser.error(f"files: there is no {', '.join(missing)}")
    if not files:
        print(f"no results in {RESULTS}: run python -m bench.run first")
        return 1
    results = {path: json.loads(path.read_text(encoding="utf-8")) for path in files}
    if not (arguments.plots or arguments.readme or arguments.performance or arguments.gpu):
        print("\n\n".join(_text(result) for result in results.values()))
    if arguments.plots:
        for path, result in results.items():
            if result["meta"]["suite"] == "end-to-end":  # a table of few rows
                continue
            print("\n".join(f"wrote {plot}" for plot in plots.draw(result, path.parent, path.stem)))
    if arguments.readme is not None:
        from rl4llm_fast.info import ledger_lines

        shown = newest_of_suites(results)
        suites = ("smoke", "cpu", "gpu")
        blocks = [headlines(result) for result in shown.values() if result["meta"]["suite"] in suites]
        blocks += [folded(result) for result in of_other_devices(results, "cpu")]
        blocks += [pictures(p.with_suffix(""), arguments.readme) for p, result in shown.items() if "cases" in result]
        blocks.append("\n".join(ledger_lines(bullet="- ")))
        rewrite(arguments.readme, "bench", [block for block in blocks if block])
        print(f"rewrote the table in {arguments.readme} from {', '.join(path.name for path in shown)}")
    if arguments.performance is not None:
        made = {"sweep": sweeps.markdown, "end-to-end": end_to_end.markdown}
        written = 0
        shown = newest_of_suites(results)
        for suite, make in made.items():
            blocks = [make(result) for result in shown.values() if result["meta"]["suite"] == suite]
            if blocks:
                rewrite(arguments.performance, suite, blocks)
                print(f"rewrote the table {suite} in {arguments.performance}")
                written += 1
        if not written:
            print("no result: run python -m bench.run --suite sweep or python -m bench.end_to_end first")
            return 1
    if arguments.gpu is not None:
        for mark in write_gpu(arguments.gpu, newest_of_suites(results)):
            print(f"rewrote the table {mark} in {arguments.gpu}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that has seen enough, as `| head`, is no error
    sys.exit(main())
