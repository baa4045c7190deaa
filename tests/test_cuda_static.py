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
# {kernel: (its file, how many of it: for every dtype or pair of dtypes, with and without a softcap, by direction)}
STREAMING = {
    "token_logprobs_fwd_kernel": ("token_logprobs", 3 * 2),
    "token_logprobs_bwd_kernel": ("token_logprobs", 3 * 2),
    "kl_divergence_fwd_kernel": ("kl_fwd", 9 * 2),
    "kl_divergence_jsd_kernel": ("kl_fwd", 9 * 2),
    "kl_divergence_bwd_kernel": ("kl_bwd", 9 * 2 * 3),
    "whiten_parts_kernel": ("whiten", 3),
    "whiten_apply_kernel": ("whiten", 3),
}
REGISTERS = 64  # budget of the streaming kernels: four blocks of 256 threads an SM, since they wait for memory
SCAN_REGISTERS = {"Gae": 80, "Vtrace": 128}  # three and two blocks of 256 threads an SM, each with two rounds of loads
OTHER_REGISTERS = 128  # kernels that touch a few numbers a row


def toolkit() -> pathlib.Path | None:
    """The folder of a CUDA toolkit with nvcc in it."""
    named = [pathlib.Path(os.environ[n]) for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)]
    named += [*sorted(pathlib.Path("/usr/local").glob("cuda-*"), reverse=True), pathlib.Path("/usr/local/cuda")]
    return next((home for home in named if (home / "bin" / "nvcc").is_file()), None)


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """nvcc's version, and {(source name, arch): {symbol: figures}}, all compiled side by side."""
    home = toolkit()
    if home is None:
        pytest.skip("no CUDA toolkit here (no nvcc in CUDA_HOME or /usr/local/cuda*)")
    folder = tmp_path_factory.mktemp("cubins")
    jobs = {}
    for source in SOURCES:
        for arch in ARCHS:
            out = folder / f"{source.stem}.sm_{arch}.cubin"
            command = [str(home / "bin" / "nvcc"), "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-cubin"]
            command += ["-Werror=all-warnings", f"-arch=sm_{arch}", str(source), "-o", str(out)]
            jobs[source.stem, arch] = (out, subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for (name, arch), (_, process) in jobs.items():
        errors = process.communicate()[1]
        assert process.returncode == 0, f"{name}.cu for sm_{arch}:\n{errors}"
    version = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = {key: static.read(out.read_bytes(), int(key[1].rstrip("a"))) for key, (out, _) in jobs.items()}
    return re.search(r"release ([\d.]+)", version)[1], found


def kernel_and_variant(symbol: str) -> tuple[str, str]:
    """The kernel's name, and its template arguments, of a mangled symbol."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"rl4llm::|\(anonymous namespace\)::|^void |__(?=half|nv_)", "", name)
    kernel, arguments = re.match(r"(\w+)(?:<(.*?)>)?\(", name).groups()
    return kernel, arguments or "plain"


@pytest.mark.slow
def test_no_spills_and_registers_within_budget(cubins):
    version, found = cubins
    for (name, arch), kernels in found.items():
        assert kernels, f"{name}.cu holds no kernel for sm_{arch}"
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


@pytest.mark.slow
def test_streaming_kernels_move_16_bytes_at_a_time(cubins):
    _, found = cubins
    for kernel, (name, count) in STREAMING.items():
        for arch in ARCHS:
            variants = [figures for symbol, figures in found[name, arch].items() if kernel in symbol]
            assert len(variants) >= count
            assert {figures.load_bits for figures in variants} == {128}
            if "bwd" in kernel or "apply" in kernel:
                assert {figures.store_bits for figures in variants} == {128}


@pytest.mark.slow
def test_scans_move_16_bytes_at_a_time(cubins):
    """Four tokens a thread: 16 bytes of fp32 in (8 of the halves), 16 bytes of every result out."""
    _, found = cubins
    for arch in ARCHS:
        kernels = found["scan", arch]
        assert len(kernels) == (3 + 3 + 1) * 2 * 2  # gae and vtrace in every dtype, the backward; warp or block; passes
        for symbol, figures in kernels.items():
            halves = "half" in symbol or "bfloat16" in symbol
            assert figures.load_bits >= (64 if halves else 128), symbol
            if "Lb1E" in symbol:
                assert figures.store_bits == 128, symbol
