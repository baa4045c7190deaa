"""The CUDA C++ kernels without a GPU: compiled for every architecture that ships; no spills; 16-byte loads."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess

import pytest

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


def cuobjdump(home: pathlib.Path) -> str | None:
    """The toolkit's, or the one in Triton's package."""
    if (home / "bin" / "cuobjdump").is_file():
        return str(home / "bin" / "cuobjdump")
    triton = pytest.importorskip("triton", reason="no cuobjdump: neither in the CUDA toolkit nor in triton")
    inside = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(inside) if inside.is_file() else shutil.which("cuobjdump")


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """{(source name, arch): cubin}, all compiled side by side."""
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
    return cuobjdump(home), {key: out for key, (out, _) in jobs.items()}


@pytest.mark.slow
def test_no_spills_and_registers_within_budget(cubins):
    tool, files = cubins
    assert files
    for (name, arch), cubin in files.items():
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
        assert kernels, f"{name}.cu holds no kernel for sm_{arch}"
        for kernel, registers, stack in kernels:
            assert int(stack) == 0, f"{kernel} sm_{arch} spills {stack} bytes"
            budget = REGISTERS if any(streaming in kernel for streaming in STREAMING) else OTHER_REGISTERS
            if "scan_kernel" in kernel:
                (budget,) = {b for formula, b in SCAN_REGISTERS.items() if formula in kernel}
            assert int(registers) <= budget, f"{kernel} sm_{arch}: {registers} registers, budget {budget}"


@pytest.mark.slow
def test_streaming_kernels_move_16_bytes_at_a_time(cubins):
    tool, files = cubins
    for kernel, (name, count) in STREAMING.items():
        sass = subprocess.run([tool, "-sass", files[name, "90a"]], capture_output=True, text=True, check=True).stdout
        bodies = [body for body in re.split(r"Function : ", sass)[1:] if kernel in body.split("\n", 1)[0]]
        assert len(bodies) >= count
        for body in bodies:
            head = body.split("\n", 1)[0]
            assert re.search(r"LDG\.E\.\S*128", body), f"no 16-byte load in {head}"
            if "bwd" in kernel or "apply" in kernel:
                assert re.search(r"STG\.E\.\S*128", body), f"no 16-byte store in {head}"


@pytest.mark.slow
def test_scans_move_16_bytes_at_a_time(cubins):
    """Four tokens a thread: 16 bytes of fp32 in (8 of the halves), 16 bytes of every result out."""
    tool, files = cubins
    sass = subprocess.run([tool, "-sass", files["scan", "90a"]], capture_output=True, text=True, check=True).stdout
    bodies = [body.split("\n", 1) for body in re.split(r"Function : ", sass)[1:]]
    assert len(bodies) == (3 + 3 + 1) * 2 * 2  # gae and vtrace in every dtype, the backward; warp or block; both passes
    for head, body in bodies:
        width = 64 if "half" in head or "bfloat16" in head else 128
        assert re.search(rf"LDG\.E\.\S*{width}", body), f"no load of {width} bits in {head}"
        if "Lb1E" in head:
            assert re.search(r"STG\.E\.\S*128", body), f"no 16-byte store in {head}"
