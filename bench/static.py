"""What is known of the GPU kernels without a GPU: registers, shared memory, spills, occupancy, load widths, bytes.

    python -m bench.static --write [triton|nvcc]  compile every kernel (the tests that do so anyway), record, rewrite
                                                  the tables; nvcc: the CUDA C++ kernels, out of the built extension
    python -m bench.static --check                whether docs/performance.md shows what is recorded

The tests that compile kernels ahead of time hand each one to :func:`check`, which compares it with the record
(bench/results/static.json): more registers, a spill, a narrower global load or a lower occupancy is a failure. Figures
of another compiler version are not compared. Loads and spills are read from the machine code itself; the bytes that an
op's Triton kernels ask for are counted in the interpreter (:mod:`bench.traffic`).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rl4llm_fast.info import kernel_files

from . import traffic
from .base import ROOT
from .report import rewrite

RECORD = ROOT / "bench" / "results" / "static.json"
PAGE = ROOT / "docs" / "performance.md"
TESTS = {
    "triton": (
        *("test_triton_aot", "test_triton_advantages_aot", "test_triton_returns_aot", "test_token_loss_gpu"),
        "test_preference_triton",
    ),
    "nvcc": ("test_cuda_static",),
}
# A file to which :func:`check` appends what it is given, instead of comparing it.
_RECORDING = "RL4LLM_FAST_RECORD_STATIC"

# Shared memory of an SM; the rest is alike on all three: 65,536 registers, 64 warps, 32 blocks.
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
_REGISTERS, _WARPS, _BLOCKS = 65_536, 64, 32
_REGISTER_UNIT, _SHARED_UNIT, _SHARED_RESERVED = 256, 128, 1024
_QUARTERS = 4  # of an SM, each with its own registers

# The machine code of sm_80 to sm_100: 16 bytes an instruction, the opcode in the lowest 12 bits. Each has two forms,
# with the address in registers or beside a descriptor.
_LOAD, _STORE, _LOCAL = {0x381, 0x981}, {0x386, 0x986}, {0x383, 0x983, 0x387, 0x987}
_BITS = {0: 8, 1: 8, 2: 16, 3: 16, 4: 32, 5: 64, 6: 128}  # by the size field of a load or store
# In a kernel's attributes: the largest block (__launch_bounds__) or the only one (Triton's), as three numbers.
_THREADS = (b"\x04\x05\x0c\x00", b"\x04\x10\x0c\x00")


@dataclass(frozen=True)
class Figures:
    """One compiled kernel on one architecture. Bits are those of the widest access to global memory, 0 for none."""

    registers: int
    shared: int  # bytes a block
    spills: int  # instructions that touch local memory, or its bytes where there is a stack
    threads: int
    load_bits: int
    store_bits: int

    def occupancy(self, arch: int) -> float:
        """Warps that fit an SM, of the 64 that it has slots for."""
        return resident_blocks(arch, self.registers, self.shared, self.threads) * self.threads / 32 / _WARPS


def resident_blocks(arch: int, registers: int, shared: int, threads: int) -> int:
    """Blocks of a kernel that an SM holds at once: the least of what warps, registers and shared memory allow."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // _QUARTERS // per_warp * _QUARTERS // warps
    per_block = -(-(shared + _SHARED_RESERVED) // _SHARED_UNIT) * _SHARED_UNIT
    return min(_BLOCKS, _WARPS // warps, by_registers, SHARED_MEMORY[arch] // per_block)


def accesses(code: bytes) -> tuple[list[int], list[int], int]:
    """(bits of each global load, of each global store, how many touch local memory) of a kernel's machine code."""
    loads, stores, local = [], [], 0
    for low, high in struct.iter_unpack("<QQ", code[: len(code) // 16 * 16]):
        opcode = low & 0xFFF
        if opcode in _LOAD:
            loads.append(_BITS[high >> 9 & 7])
        elif opcode in _STORE:
            stores.append(_BITS[high >> 9 & 7])
        else:
            local += opcode in _LOCAL
    return loads, stores, local


def sections(cubin: bytes) -> dict[str, bytes]:
    """{name: content} of a 64-bit ELF file; a kernel's code is .text.NAME, its attributes .nv.info.NAME."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    names = headers[names_at]
    found = {}
    for name_at, _, _, _, offset, length in headers:
        begin = names[4] + name_at
        found[cubin[begin : cubin.index(b"\0", begin)].decode()] = cubin[offset : offset + length]
    return found


def _threads(attributes: bytes) -> int:
    """The largest block that a kernel was compiled for."""
    at = max(attributes.find(mark) for mark in _THREADS)
    assert at >= 0, "a kernel without __launch_bounds__"
    x, y, z = struct.unpack_from("<3I", attributes, at + 4)
    return x * y * z


@functools.cache
def cuobjdump() -> str | None:
    """The toolkit's, or the one in Triton's package."""
    homes = [pathlib.Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [home / "bin" for home in (*homes, pathlib.Path("/usr/local/cuda"))]
    try:
        import triton

        places.append(pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    except ImportError:
        pass
    return next((str(place / "cuobjdump") for place in places if (place / "cuobjdump").is_file()), None)


def read(cubin: bytes, arch: int, dynamic_shared: int = 0) -> dict[str, Figures]:
    """{kernel's symbol: its figures} of a cubin; ``dynamic_shared``: bytes that a launch adds."""
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("no cuobjdump: neither in CUDA_HOME, /usr/local/cuda nor in triton")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    content, found = sections(cubin), {}
    for name, registers, stack, shared in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        loads, stores, local = accesses(content[f".text.{name}"])
        found[name] = Figures(
            registers=int(registers),
            shared=max(0, int(shared) - (_SHARED_RESERVED if arch >= 90 else 0)) + dynamic_shared,  # counted from sm_90
            spills=max(local, int(stack)),
            threads=_threads(content[f".nv.info.{name}"]),
            load_bits=max(loads, default=0),
            store_bits=max(stores, default=0),
        )
    return found


def worse(now: Figures, before: Figures, arch: int) -> list[str]:
    """What got worse, in words."""
    found = []
    if now.registers > before.registers:
        found.append(f"{now.registers} registers, recorded {before.registers}")
    if now.spills > before.spills:
        found.append(f"{now.spills} spills, recorded {before.spills}")
    if now.load_bits < before.load_bits:
        found.append(f"global loads of {now.load_bits} bits, recorded {before.load_bits}")
    if now.occupancy(arch) < before.occupancy(arch):
        found.append(f"occupancy {now.occupancy(arch):.0%}, recorded {before.occupancy(arch):.0%}")
    return found


@functools.cache
def _record() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {"compilers": {}, "kernels": {}}


def check(kernel: str, variant: str, arch: int, compiler: tuple[str, str], figures: Figures) -> None:
    """Raise AssertionError where a kernel is worse than recorded, or not recorded. ``compiler``: name and version."""
    recording = os.environ.get(_RECORDING)
    if recording:
        with open(recording, "a", encoding="utf-8") as file:
            file.write(json.dumps([kernel, variant, arch, *compiler, asdict(figures)]) + "\n")
        return
    record = _record()
    if record["compilers"].get(compiler[0]) != compiler[1]:
        return
    label = f"{kernel} ({variant}) on sm_{arch}"
    again = "python -m bench.static --write records what is compiled now"
    before = record["kernels"].get(f"{compiler[0]} {kernel}", {}).get(variant, {}).get(str(arch))
    assert before is not None, f"{label} is not in {RECORD.name}: {again}"
    found = worse(figures, Figures(*before), arch)
    assert not found, f"{label}: {'; '.join(found)}. {again}"


def record_of(lines: Iterable[str]) -> dict[str, Any]:
    """The record made of what :func:`check` wrote down."""
    compilers: dict[str, str] = {}
    kernels: dict[str, dict[str, dict[str, list[int]]]] = {}
    for line in sorted(set(lines)):
        kernel, variant, arch, compiler, version, figures = json.loads(line)
        compilers[compiler] = version
        kernels.setdefault(f"{compiler} {kernel}", {}).setdefault(variant, {})[str(arch)] = list(
            Figures(**figures).__dict__.values()
        )
    return {"compilers": compilers, "fields": list(Figures.__dataclass_fields__), "kernels": kernels}


def write_record(record: dict[str, Any], path: pathlib.Path = RECORD) -> None:
    """A line a variant: a change shows as what it is."""
    kernels = []
    for kernel, variants in sorted(record["kernels"].items()):
        lines = [f"  {json.dumps(v)}: {json.dumps(by_arch, sort_keys=True)}" for v, by_arch in sorted(variants.items())]
        kernels.append(f" {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n }")
    parts = [f"{json.dumps(key)}: {json.dumps(record[key], sort_keys=True)}" for key in ("compilers", "fields")]
    traffic_lines = [f" {json.dumps(case)}: {json.dumps(both)}" for case, both in record["traffic"].items()]
    parts.append('"traffic": {\n' + ",\n".join(traffic_lines) + "\n}")
    head = ",\n".join(parts)
    path.write_text(f'{{\n{head},\n"kernels": {{\n' + ",\n".join(kernels) + "\n}\n}\n", encoding="utf-8")


def home_of(compiler: str, kernel: str, root: pathlib.Path = ROOT) -> str:
    """The file that a kernel stands in."""
    for path in kernel_files(root):
        if path.endswith(".cu" if compiler == "nvcc" else ".py") and re.search(
            rf"\b{kernel}\(", (root / path).read_text(encoding="utf-8")
        ):
            return path
    raise ValueError(f"kernel: wanted one of a file of kernels/ or csrc/cuda, got {kernel!r}")


def markdown(record: dict[str, Any]) -> str:
    """A row a kernel: the worst of its variants, by architecture where they differ."""
    archs = sorted(SHARED_MEMORY)
    head = ", ".join(f"sm_{arch}" for arch in archs)
    lines = [
        f"| kernel | variants | registers: {head} | occupancy | shared, bytes | spills | load, store: bits |",
        "|---|---|---|---|---|---|---|",
    ]
    at_home = {tuple(name.split()): variants for name, variants in record["kernels"].items()}
    for (compiler, kernel), variants in sorted(at_home.items(), key=lambda item: (home_of(*item[0]), item[0])):
        by_arch = {a: [Figures(*v[str(a)]) for v in variants.values() if str(a) in v] for a in archs}
        everyone = [figures for found in by_arch.values() for figures in found]
        registers = ", ".join(_range([f.registers for f in by_arch[a]]) for a in archs)
        occupancy = ", ".join(f"{min(f.occupancy(a) for f in by_arch[a]):.0%}" if by_arch[a] else "–" for a in archs)
        width = f"{_range([f.load_bits for f in everyone])}, {_range([f.store_bits for f in everyone])}"
        lines.append(
            f"| {home_of(compiler, kernel)}: {kernel} | {len(variants)} | {registers} | {occupancy} | "
            f"{_range([f.shared for f in everyone])} | {sum(f.spills for f in everyone)} | {width} |"
        )
    compilers = ", ".join(f"{name} {version}" for name, version in sorted(record["compilers"].items()))
    lines += [
        "",
        f"`python -m bench.static --write` with {compilers}. A variant is a dtype, a formula or an option that is "
        "compiled in. Registers and bytes: from the least to the most of the variants. Occupancy: the least of the "
        "variants, warps that fit an SM of the 64 it has slots for, by registers and shared memory. Widths: the widest "
        "access to global memory in the machine code.",
        "",
        "| bytes that the Triton kernels of an op ask for | counted | by the formula | |",
        "|---|---|---|---|",
    ]
    for case, (counted, formula) in record["traffic"].items():
        lines.append(f"| {case} | {counted:,} | {formula:,} | {counted / formula:.2f} |")
    lines += [
        "",
        "Counted in Triton's interpreter, a lane at a time; the formulas are those of `bench/work.py`, the least that "
        "any implementation must move. Below 1: tokens behind an answer's end are not read. Above: a number that is "
        "read again, by a neighbour (from the cache) or by the kernels of the metrics.",
    ]
    return "\n".join(lines)


def _range(values: Sequence[int]) -> str:
    if not values:
        return "–"
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _write(compilers: Sequence[str]) -> int:
    """Record the kernels of these compilers anew; those of the others stay as they are."""
    known = _record()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "recorded")
        tests = [f"tests/{name}.py" for compiler in compilers for name in TESTS[compiler]]
        chosen = "nvidia or compiles_without_spills or registers_within_budget"
        command = [sys.executable, "-m", "pytest", "-q", "-k", chosen, *tests]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, _RECORDING: str(path)}).returncode
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    record = record_of(lines)
    missing = sorted(set(compilers) - set(record["compilers"]))
    if code or missing:
        print(f"not all was compiled ({', '.join(missing) or 'a test failed'}): the record is as it was")
        return 1
    kept = {name: by for name, by in known["kernels"].items() if name.split()[0] not in compilers}
    record["compilers"] = {**known["compilers"], **record["compilers"]}
    record["kernels"] |= kept
    record["traffic"] = traffic.counted() if "triton" in compilers else known["traffic"]
    write_record(record)
    rewrite(PAGE, "static", [markdown(record)])
    print(f"wrote {RECORD} and the table in {PAGE}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description="GPU kernels, as compiled.")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--write", nargs="?", const="all", choices=("all", *TESTS), help="compile, record, rewrite the tables"
    )
    how.add_argument("--check", action="store_true", help="whether the page shows the record")
    arguments = parser.parse_args(argv)
    if arguments.write:
        return _write(tuple(TESTS) if arguments.write == "all" else (arguments.write,))
    shown = markdown(_record()) in PAGE.read_text(encoding="utf-8")
    print("the page shows the record" if shown else "the page does not show the record: python -m bench.static --write")
    return 0 if shown else 1


if __name__ == "__main__":
    sys.exit(main())
