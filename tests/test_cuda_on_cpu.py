"""The CUDA C++ kernels, executed on a CPU by tests/cuda_on_cpu/emulator.h, against the fp64 oracle.

The tests are those that Triton's interpreter runs (tests/test_triton_interpret.py), with the ops behind the backend
"triton" replaced by the emulated CUDA source: what nvcc compiles, with launches and one instruction translated.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "cuda_on_cpu"
CUDA = ROOT / "csrc" / "cuda"

# As in test_triton_interpret.py; the last is about the Triton launchers' own checks.
LEFT_OUT = ("gradcheck", "out_of_range", "message_names", "same_bits", "trl", "compile", "golden", "launchers_refuse")


def toolkit_headers() -> pathlib.Path | None:
    named = [pathlib.Path(os.environ[n]) for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)]
    named += [*sorted(pathlib.Path("/usr/local").glob("cuda-*"), reverse=True), pathlib.Path("/usr/local/cuda")]
    return next((home / "include" for home in named if (home / "include" / "cuda_bf16.h").is_file()), None)


def translate(source: str) -> str:
    """kernel<<<grid, threads, shared, stream>>>(arguments); as a call of the emulator."""
    launch = re.compile(r"(\w+<[^<>;]*>)\s*<<<([^;]*?),([^;]*?),[^;]*?>>>\(([^;]*)\);")
    translated = launch.sub(r"emulator::launch(\2, \3, [&] { \1(\4); });", source)
    assert "<<<" not in translated
    return translated


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> pathlib.Path:
    headers, compiler = toolkit_headers(), shutil.which("g++")
    if headers is None or compiler is None:
        pytest.skip("needs g++ and the headers of a CUDA toolkit (CUDA_HOME or /usr/local/cuda*)")
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "cuda").mkdir()
    device = (CUDA / "device.cuh").read_text()
    device, instructions = re.subn(r'asm\("ex2\.approx.*?\);', "y = std::exp2(x);", device)
    assert instructions == 1
    assert "asm(" not in device
    (folder / "cuda" / "device.cuh").write_text(device)  # found before csrc's
    entry_points = (HERE / "token_logprobs.h").read_text()
    source = folder / "token_logprobs.cpp"
    source.write_text(translate((CUDA / "token_logprobs.cu").read_text()) + entry_points)
    library = folder / "emulated.so"
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-pthread"]
    command += ["-include", str(HERE / "emulator.h"), f"-I{folder}", f"-I{ROOT / 'csrc'}", "-isystem", str(headers)]
    command += [str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return library


@pytest.mark.slow
def test_the_cuda_source_meets_the_error_rule(emulated):
    path = os.pathsep.join(filter(None, [str(HERE), str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "plugin", "-W", "ignore", "-k",
         "triton and not (" + " or ".join(LEFT_OUT) + ")", "tests/test_token_logprobs.py", "tests/interpret"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "RL4LLM_FAST_EMULATED": str(emulated), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) > 80, done.stdout[-2000:]
