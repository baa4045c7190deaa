"""What runs here, what it was built with, and which GPU kernels were verified on which GPU.

The ledger, ``bench/results/verified.json``, is written by ``python -m bench.verify`` on a machine with a GPU. It keeps
the sha256 of every source that a kernel was compiled from, so that a kernel that has changed since says so.
"""

from __future__ import annotations

import ast
import hashlib
import json
import pathlib
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from . import dispatch
from ._version import __version__

_ROOT = pathlib.Path(__file__).resolve().parent.parent
LEDGER = _ROOT / "bench" / "results" / "verified.json"

_KERNEL = re.compile(r"^def \w+_kernel\(|__global__", re.MULTILINE)
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class KernelStatus:
    """What the ledger knows of one kernel file. state: "never", "failed", "changed" or "verified"."""

    path: str
    state: str
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.detail}"


def kernel_files(root: pathlib.Path = _ROOT) -> list[str]:
    """The files that hold GPU kernels, relative to a checkout's root; empty for an installation without sources."""
    found = [*root.glob("kernels/*.py"), *root.glob("csrc/cuda/*.cu")]
    return sorted(str(path.relative_to(root)) for path in found if _KERNEL.search(path.read_text(encoding="utf-8")))


def kernel_sources(path: str, root: pathlib.Path = _ROOT) -> dict[str, str]:
    """``{file: sha256}`` of a kernel file, first, and of every file of ours that it includes or imports."""
    digests: dict[str, str] = {}
    waiting = [(root / path).resolve()]
    while waiting:
        file = waiting.pop()
        name = str(file.relative_to(root.resolve()))
        if name in digests:
            continue
        content = file.read_bytes()
        digests[name] = hashlib.sha256(content).hexdigest()
        waiting += _needed(file, content.decode("utf-8"), root.resolve())
    return digests


def _needed(file: pathlib.Path, text: str, root: pathlib.Path) -> list[pathlib.Path]:
    if file.suffix == ".py":
        names: list[str] = []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names += [node.module] if node.module else [alias.name for alias in node.names]
        candidates = [file.parent / f"{name}.py" for name in names]
    else:
        candidates = [folder / name for name in _INCLUDE.findall(text) for folder in (file.parent, root / "csrc")]
    return [candidate.resolve() for candidate in candidates if candidate.is_file()]


def read_ledger(path: pathlib.Path = LEDGER) -> dict[str, Any]:
    """The ledger, or an empty one where there is none. Raises ValueError for a file that is no ledger."""
    if not path.is_file():
        return {"kernels": {}}
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a ledger: {error}") from error
    if not isinstance(ledger, dict) or not isinstance(ledger.get("kernels"), dict):
        raise ValueError(f"{path}: not a ledger: wanted an object with 'kernels'")
    return ledger


def ledger_status(root: pathlib.Path = _ROOT, ledger: pathlib.Path | None = None) -> list[KernelStatus]:
    """One status a kernel file: never run on a GPU, failed there, verified on X at a date, or changed since."""
    kernels = read_ledger(ledger or root / "bench" / "results" / "verified.json")["kernels"]
    return [_status(path, kernels.get(path), root) for path in kernel_files(root)]


def _status(path: str, entry: dict[str, Any] | None, root: pathlib.Path) -> KernelStatus:
    if not entry or not entry.get("tests"):
        return KernelStatus(path, "never", "never run on a GPU")
    tests, where = entry["tests"], f"on {entry['gpu']}, {entry['date'][:10]}"
    now = kernel_sources(path, root)
    changed = sorted(
        name for name in now.keys() | entry["sources"].keys() if now.get(name) != entry["sources"].get(name)
    )
    if changed:
        return KernelStatus(path, "changed", f"changed since it was last run {where} ({', '.join(changed)})")
    if tests["failed"]:
        return KernelStatus(
            path, "failed", f"{tests['failed']} of {tests['failed'] + tests['passed']} tests FAILED {where}"
        )
    for tool, found in entry.get("sanitizer", {}).items():
        if found["status"] not in ("clean", "absent"):
            return KernelStatus(path, "failed", f"{tool} FAILED {where}")
    if not tests["passed"]:
        return KernelStatus(path, "never", f"no test covered it {where}")
    return KernelStatus(path, "verified", f"verified {where} ({tests['passed']} tests)")


def ledger_lines(bullet: str = "  ", ledger: pathlib.Path | None = None) -> list[str]:
    """The ledger for people, one line a kernel file."""
    try:
        statuses = ledger_status(ledger=ledger)
    except ValueError as error:
        return [f"{bullet}{error}"]
    if not statuses:
        return [f"{bullet}not in this installation: the ledger and the kernels' sources are in the repository"]
    return [f"{bullet}`{s.path}`: {s.detail}" if bullet == "- " else f"{bullet}{s}" for s in statuses]


class Report(str):
    """Text that shows itself as it is, also at the prompt."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def info() -> Report:
    """What this installation is and can do here: print it, or let the prompt show it.

    Versions, what the extension was built with, the CPU instruction set in use, the usable backends of every op with
    the reason for each that is not, the GPUs, and for every GPU kernel file whether and where it was verified.

    Returns:
        A string. Nothing that is missing (extension, Triton, GPU, ledger) makes it raise: it says so instead.
    """
    sections = [
        ("versions", _versions()),
        ("built", _built()),
        ("backends usable here", _backends()),
        ("GPU", _gpus()),
        ("GPU kernels, last verified", ledger_lines()),
    ]
    return Report("\n".join(line for heading, lines in sections for line in (heading, *lines)))


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> list[str]:
    return [
        f"  rl4llm_fast {__version__}, torch {torch.__version__}, triton {_version_of('triton')}, "
        f"numpy {_version_of('numpy')}, python {platform.python_version()}",
        f"  {platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    ]


def _built() -> list[str]:
    if dispatch.extension is None:
        return [f"  {dispatch.why_not('token_logprobs', 'cpu', 'cpu')}"]
    build = dispatch.extension.build_info()
    if build["cuda"]:
        cuda = f"CUDA {build['cuda']} for {', '.join(build['cuda_archs'])}"
    else:
        cuda = f"no CUDA kernels: {build['no_cuda_reason']}"
    lines = [
        f"  rl4llm_fast._C {build['version']}, built {build['time']} by {build['compiler']}, "
        f"for torch's stable ABI from {build['torch_target_abi']}",
        f"  CPU kernels for {', '.join(build['cpu_instruction_sets'])}; in use: {build['cpu_instruction_set_in_use']}",
        f"  {cuda}",
    ]
    if build["version"] != __version__:
        lines.append(f"  the extension is of version {build['version']}: build it again")
    return lines


def _backends() -> list[str]:
    usable = dispatch.backends()
    width = max(map(len, usable), default=0)
    lines = [f"  {op:<{width}}  {' '.join(names)}" for op, names in sorted(usable.items())]
    reasons: dict[str, dict[str, list[str]]] = {}
    for op, names in sorted(usable.items()):
        for backend in dispatch.BACKENDS:
            if backend not in names and dispatch.OP_KERNELS[op]:
                device = "cpu" if backend == "cpu" else "cuda"
                reason = dispatch.why_not(op, backend, device) or "its kernels are built, but there is no GPU here"
                reasons.setdefault(backend, {}).setdefault(reason.removeprefix(f"{op} "), []).append(op)
    for backend, why in reasons.items():  # the reason of most ops needs no list of them
        for reason, ops in sorted(why.items(), key=lambda item: -len(item[1])):
            most = len(ops) > len(usable) // 2
            lines.append(f"  not {backend}: {reason}" if most else f"  not {backend}: {reason} ({', '.join(ops)})")
    plain = sorted(op for op, kernels in dispatch.OP_KERNELS.items() if not kernels)
    lines.append(f"  plain PyTorch on every device: {', '.join(plain)}")
    return lines


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return [f"  none: torch {torch.__version__} sees no CUDA device"]
    lines = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        lines.append(f"  {index}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return lines


def main() -> None:
    """Print :func:`info`; the command ``rl4llm-fast info``."""
    print(info())


if __name__ == "__main__":
    main()
