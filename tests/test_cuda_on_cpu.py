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
SOURCES = ["token_logprobs", "kl_fwd", "kl_bwd", "scan", "n_step", "groups", "whiten", "token_loss",
           "token_loss_sequences"]  # fmt: skip
TESTS = [
    "tests/test_token_logprobs.py", "tests/test_token_logprobs_inplace.py",
    "tests/interpret/test_triton_token_logprobs.py",
    "tests/test_kl_divergence.py", "tests/interpret/test_triton_kl.py", "tests/test_properties.py",
    "tests/interpret/test_triton_returns.py", "tests/interpret/test_triton_n_step.py",
    "tests/test_group_advantages.py", "tests/test_process_advantages.py", "tests/cuda_on_cpu/test_long_returns.py",
]  # fmt: skip

# Of the token losses: the tests of their files and those that count launches.
LOSSES = [
    "tests/test_losses.py", "tests/test_kl_estimate.py", "tests/test_value_loss.py",
    "tests/test_policy_loss_launches.py", "tests/cuda_on_cpu/test_losses_of_many_tokens.py",
]  # fmt: skip

# As in test_triton_interpret.py; kl_estimate is among the losses, the launchers' own checks are Triton's.
LEFT_OUT = (
    "gradcheck", "out_of_range", "message_names", "50257", "same_bits", "trl", "compile", "golden", "kl_estimate",
    "launchers_refuse",
)  # fmt: skip


def toolkit_headers() -> pathlib.Path | None:
    named = [pathlib.Path(os.environ[n]) for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)]
    named += [*sorted(pathlib.Path("/usr/local").glob("cuda-*"), reverse=True), pathlib.Path("/usr/local/cuda")]
    return next((home / "include" for home in named if (home / "include" / "cuda_bf16.h").is_file()), None)


def translate(source: str) -> str:
    """kernel<<<grid, threads, shared, stream>>>(arguments); as a call of the emulator."""
    launch = re.compile(r"(\w+(?:<[^<>;]*>)?)[\s\\]*<<<([^;]*?),([^;]*?),[^;]*?>>>\(([^;]*)\);")
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
    sources = [HERE / "entry_points.cpp"]
    for name in SOURCES:
        sources.append(folder / f"{name}.cpp")
        sources[-1].write_text(translate((CUDA / f"{name}.cu").read_text()))
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-w", "-include", str(HERE / "emulator.h"), f"-I{folder}"]
    command += [f"-I{ROOT / 'csrc'}", "-isystem", str(headers)]
    jobs = [
        subprocess.Popen(
            [*command, "-c", str(source), "-o", str(folder / f"{source.stem}.o")], stderr=subprocess.PIPE, text=True
        )
        for source in sources
    ]
    for job in jobs:
        errors = job.communicate()[1]
        assert job.returncode == 0, errors[-4000:]
    library = folder / "emulated.so"
    subprocess.run([compiler, "-shared", *map(str, folder.glob("*.o")), "-o", str(library)], check=True)
    return library


def run(emulated, plugins: list[str], chosen: str, tests: list[str]) -> int:
    """How many tests passed with the emulated kernels in Triton's place, all that were chosen."""
    path = os.pathsep.join(filter(None, [str(HERE), str(ROOT), os.environ.get("PYTHONPATH")]))
    loaded = [argument for plugin in plugins for argument in ("-p", plugin)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *loaded, "-W", "ignore", "-k", chosen, *tests],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "RL4LLM_FAST_EMULATED": str(emulated), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-2000:]
    return int(passed.group(1))


@pytest.mark.slow
def test_the_cuda_source_meets_the_error_rule(emulated):
    chosen = "triton and not (" + " or ".join(LEFT_OUT) + ")"
    assert run(emulated, ["plugin"], chosen, TESTS) > 150


@pytest.mark.slow
def test_the_token_losses_meet_the_error_rule(emulated):
    chosen = "(triton or launches) and not trl and not compile"
    assert run(emulated, ["plugin", "plugin_losses"], chosen, LOSSES) > 250
