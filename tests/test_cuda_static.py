"""The CUDA C++ kernels without a GPU: compiled for every architecture that ships; no spills; 16-byte loads."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess

import pytest

from bench import static

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = ["80", "90a", "100"]
# {kernel: how many of it: for every dtype or pair of dtypes, with and without a softcap, by direction}
STREAMING = {
    "token_logprobs_fwd_kernel": 3 * 2,
    "token_logprobs_bwd_kernel": 3 * 2,
    "kl_divergence_fwd_kernel": 9 * 2,
    "kl_divergence_jsd_kernel": 9 * 2,
    "kl_divergence_bwd_kernel": 9 * 2 * 3,
    "whiten_parts_kernel": 3,
    "whiten_apply_kernel": 3,
}
REGISTERS = 64  # budget of the streaming kernels: four blocks of 256 threads an SM, since they wait for memory
SCAN_REGISTERS = {"Gae": 80, "Vtrace": 128}  # three and two blocks of 256 threads an SM, each with two rounds of loads
OTHER_REGISTERS = 128  # kernels that touch a few numbers a row


def toolkit() -> pathlib.Path | None:
    """The folder of a CUDA toolkit with nvcc in it."""
    named = [pathlib.Path(os.environ[n]) for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)]
    named += [*sorted(pathlib.Path("/usr/local").glob("cuda-*"), reverse=True), pathlib.Path("/usr/local/cuda")]
    return next((home for home in named if (home / "bin" / "nvcc").is_file()), None)


def of_the_extension(folder: pathlib.Path) -> tuple[str, dict[str, bytes]] | None:
    """CUDA's version and the cubins in the built extension; None where it is older than a source, or has none."""
    from rl4llm_fast import _C

    extension = pathlib.Path(_C.__file__)
    sources = [*(ROOT / "csrc" / "cuda").iterdir(), *(ROOT / "csrc").glob("*.h")]
    built = _C.build_info()
    if not built["cuda_archs"] or extension.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        return None
    subprocess.run([static.cuobjdump(), "-xelf", "all", extension], cwd=folder, capture_output=True, check=True)
    return built["cuda"], {path.name: path.read_bytes() for path in folder.glob("*.cubin")}


def of_the_sources(folder: pathlib.Path) -> tuple[str, dict[str, bytes]]:
    """The same, compiled here, all side by side."""
    home = toolkit()
    if home is None:
        pytest.skip("no CUDA toolkit here (no nvcc in CUDA_HOME or /usr/local/cuda*), and none in the extension")
    jobs = []
    for source in SOURCES:
        for arch in ARCHS:
            out = folder / f"{source.stem}.sm_{arch}.cubin"
            command = [str(home / "bin" / "nvcc"), "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-cubin"]
            command += ["-Werror=all-warnings", f"-arch=sm_{arch}", str(source), "-o", str(out)]
            jobs.append((out, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    for out, process in jobs:
        errors = process.communicate()[1]
        assert process.returncode == 0, f"{out.name}:\n{errors}"
    version = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", version)[1], {out.name: out.read_bytes() for out, _ in jobs}


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """CUDA's version, and {arch: {symbol: figures}} of every kernel."""
    if static.cuobjdump() is None:
        pytest.skip("no cuobjdump here: neither in a CUDA toolkit nor in triton")
    version, files = of_the_extension(tmp_path_factory.mktemp("built")) or of_the_sources(
        tmp_path_factory.mktemp("cubins")
    )
    found = {arch: {} for arch in ARCHS}
    for name, cubin in files.items():
        arch = re.search(r"\.sm_(\w+)\.cubin", name)[1]
        found[arch] |= static.read(cubin, int(arch.rstrip("a")))
    return version, found


def kernel_and_variant(symbol: str) -> tuple[str, str]:
    """The kernel's name, and its template arguments, of a mangled symbol."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"rl4llm::|\(anonymous namespace\)::|^void |__(?=half|nv_)", "", name)
    kernel, arguments = re.match(r"(\w+)(?:<(.*?)>)?\(", name).groups()
    return kernel, arguments or "plain"


def test_no_spills_and_registers_within_budget(cubins):
    version, found = cubins
    for arch, kernels in found.items():
        seen = set()
        for symbol, figures in kernels.items():
            kernel, variant = kernel_and_variant(symbol)
            assert (kernel, variant) not in seen
            seen.add((kernel, variant))
            assert figures.spills == 0, f"{kernel} {variant} sm_{arch} spills"
            budget = REGISTERS if kernel in STREAMING else OTHER_REGISTERS
            if kernel == "scan_kernel":
                (budget,) = {b for formula, b in SCAN_REGISTERS.items() if variant.startswith(formula)}
            assert figures.registers <= budget, f"{kernel} {variant} sm_{arch}: {figures.registers}, budget {budget}"
            static.check(kernel, variant, int(arch.rstrip("a")), ("nvcc", version), figures)
        names = {kernel for kernel, _ in seen}
        assert names == {name for path in SOURCES for name in re.findall(r"\b(\w+_kernel)\(", path.read_text())}


def test_streaming_kernels_move_16_bytes_at_a_time(cubins):
    _, found = cubins
    for kernel, count in STREAMING.items():
        for kernels in found.values():
            variants = [figures for symbol, figures in kernels.items() if kernel in symbol]
            assert len(variants) >= count
            assert {figures.load_bits for figures in variants} == {128}
            if "bwd" in kernel or "apply" in kernel:
                assert {figures.store_bits for figures in variants} == {128}


def test_scans_move_16_bytes_at_a_time(cubins):
    """Four tokens a thread: 16 bytes of fp32 in (8 of the halves), 16 bytes of every result out."""
    _, found = cubins
    for kernels in found.values():
        scans = {symbol: figures for symbol, figures in kernels.items() if "11scan_kernel" in symbol}
        assert len(scans) == (3 + 3 + 1) * 2 * 2  # gae and vtrace in every dtype, the backward; warp or block; passes
        for symbol, figures in scans.items():
            halves = "half" in symbol or "bfloat16" in symbol
            assert figures.load_bits >= (64 if halves else 128), symbol
            if "Lb1E" in symbol:
                assert figures.store_bits == 128, symbol
