"""What to build: one extension module, ``rl4llm_fast._C``, by ninja. Everything else stands in pyproject.toml.

    csrc/module.cpp, csrc/build_time.cpp   the Python module: build_info()
    csrc/cpu/*.isa.cpp                     compiled once per instruction set (baseline, AVX2, AVX-512)
    csrc/cpu/*.cpp                         CPU ops, on torch's stable ABI
    csrc/cuda/*.cu                         CUDA kernels, by nvcc, without torch headers
    csrc/cuda/*.cpp                        CUDA ops, on torch's stable ABI

Environment:
    RL4LLM_FAST_NO_EXT=1        build nothing: a pure-Python install (Triton and eager)
    RL4LLM_FAST_CUDA            auto (default): CUDA kernels where a CUDA toolkit is found, GPU or not; 0: never;
                                1: always, and an error where it is impossible
    RL4LLM_FAST_CUDA_ARCHS      default "80;90a;100"; the newest also as PTX for later GPUs
    CUDA_HOME                   the toolkit's folder
    CXX, MAX_JOBS               the C++ compiler, the number of compilers at work at once

Objects stay in build/native-*: a second build compiles only what changed.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;90a;100"
# torch 2.10's stable ABI: the extension loads in every later torch.
TORCH_TARGET = "0x020a000000000000"

# One entry per instruction set, named as RL4LLM_FAST_CPU_ISA names it.
ISA_FLAGS: dict[str, str] = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = "-mavx2 -mfma -mf16c"
    ISA_FLAGS["avx512"] = (
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -mfma -mf16c -mprefer-vector-width=512 "
        "-Wno-uninitialized -Wno-maybe-uninitialized"  # gcc 12 warns about its own headers
    )
# How a kernel is compiled, by this build and later for a user's own formula (rl4llm_fast/user_losses.py).
# Never -ffast-math: it breaks -inf, and at link time it turns on flush-to-zero for the whole process.
# -ffp-contract=off: where a multiply-add is meant, the code says so; else the formulas round as eager does.
CPU_FLAGS = "-O3 -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=off"


class Impossible(Exception):
    """Why the CUDA part cannot be built here."""


def version() -> str:
    text = (ROOT / "rl4llm_fast" / "_version.py").read_text()
    match = re.search(r'__version__ = "([^"]+)"', text)
    assert match, "rl4llm_fast/_version.py holds no version"
    return match.group(1)


def torch_folder() -> Path:
    """torch's folder, found without importing it (which takes seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "\nrl4llm_fast: torch is not importable in this build. Build isolation hides an installed torch; install "
            "torch >= 2.10 first, then run\n\n    pip install --no-build-isolation .\n\n"
            "(RL4LLM_FAST_NO_EXT=1 installs without the compiled kernels.)\n"
        )
    return Path(spec.origin).parent


def pybind11_include(torch: Path) -> Path:
    """pybind11's headers: its own package, else the copy that torch carries."""
    spec = importlib.util.find_spec("pybind11")
    for folder in ([Path(spec.origin).parent / "include"] if spec and spec.origin else []) + [torch / "include"]:
        if (folder / "pybind11" / "pybind11.h").is_file():
            return folder
    raise SystemExit("rl4llm_fast: pybind11's headers are missing (pip install pybind11)")


def ninja_program() -> str:
    program = shutil.which("ninja")
    if program is None and importlib.util.find_spec("ninja") is not None:
        import ninja

        program = shutil.which("ninja", path=ninja.BIN_DIR)
    if program is None:
        raise SystemExit("rl4llm_fast: ninja is missing (pip install ninja)")
    return program


def capture(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class CudaToolkit:
    """A CUDA toolkit on this machine: nvcc, headers, the static runtime, and what it can compile for."""

    def __init__(self) -> None:
        self.home, reasons = None, []
        for home in self.candidates():
            missing = [f for f in ("bin/nvcc", "include/cuda_runtime.h") if not (home / f).is_file()]
            if not missing and self.static_runtime(home) is None:
                missing = ["libcudart_static.a"]
            if not missing:
                self.home = home
                break
            reasons.append(f"{home} has no {missing[0]}")
        if self.home is None:
            raise Impossible("; ".join(reasons) or "no CUDA toolkit found (CUDA_HOME, nvcc on PATH, /usr/local/cuda*)")
        self.nvcc = self.home / "bin" / "nvcc"
        self.cudart = self.static_runtime(self.home)
        release = re.search(r"release ([\d.]+)", capture(str(self.nvcc), "--version"))
        self.version = release.group(1) if release else "unknown"
        self.archs = self.choose_archs()

    @staticmethod
    def candidates() -> list[Path]:
        named = [Path(os.environ[k]) for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
        nvcc = shutil.which("nvcc")
        if nvcc:
            # nvcc on PATH may be a link or a script elsewhere: its own dry run tells where it really lives.
            dry_run = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
            top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr + dry_run.stdout, re.MULTILINE)
            named.append(Path(os.path.normpath(top.group(1))) if top else Path(nvcc).resolve().parent.parent)
        named += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
        return list(dict.fromkeys(named))

    @staticmethod
    def static_runtime(home: Path) -> Path | None:
        folders = [home / "lib64", home / "lib", *home.glob(f"targets/{platform.machine()}*/lib")]
        return next((f / "libcudart_static.a" for f in folders if (f / "libcudart_static.a").is_file()), None)

    def choose_archs(self) -> list[str]:
        asked = os.environ.get("RL4LLM_FAST_CUDA_ARCHS", "")
        archs = [a.strip() for a in (asked or DEFAULT_ARCHS).split(";") if a.strip()]
        known = {line.strip().removeprefix("compute_") for line in capture(str(self.nvcc), "--list-gpu-arch").split()}
        unknown = [a for a in archs if a.rstrip("af") not in known]
        if asked and unknown:
            raise Impossible(f"CUDA {self.version} cannot compile for {', '.join(unknown)}: it knows {sorted(known)}")
        for arch in unknown:
            print(f"rl4llm_fast: CUDA {self.version} does not know sm_{arch}; left out")
        archs = [a for a in archs if a not in unknown]
        if not archs:
            raise Impossible(f"CUDA {self.version} can compile for none of {DEFAULT_ARCHS}")
        return archs

    def gencode(self) -> str:
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        newest = max(self.archs, key=lambda a: int(a.rstrip("af")))
        return " ".join([*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"])


def find_cuda() -> tuple[CudaToolkit | None, str]:
    """The toolkit, or None and the reason for none, as RL4LLM_FAST_CUDA wants it."""
    wish = os.environ.get("RL4LLM_FAST_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"RL4LLM_FAST_CUDA: wanted auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return None, "RL4LLM_FAST_CUDA=0"
    try:
        return CudaToolkit(), ""
    except (Impossible, subprocess.CalledProcessError, OSError) as error:
        if wish == "1":
            raise SystemExit(f"RL4LLM_FAST_CUDA=1, but the CUDA kernels cannot be built: {error}") from None
        print(f"rl4llm_fast: building without CUDA kernels: {error}")
        return None, str(error)


class NinjaFile:
    """build.ninja: one line per object, then the link."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = ["ninja_required_version = 1.3"]
        self.objects: list[str] = []

    def rule(self, name: str, command: str, description: str, depfile: bool = True) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {description}"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, variant: str = "", flags: str = "", after: str = "") -> str:
        relative = source.relative_to(ROOT).as_posix()
        target = relative + (f".{variant}" if variant else "") + ".o"
        what = relative + (f" ({variant})" if variant else "")
        self.lines += [
            f"build {target}: {rule} {escape(os.path.relpath(source, self.folder))}" + (f" | {after}" if after else ""),
            f"  flags = {flags}",
            f"  what = {what}",
        ]
        self.objects.append(target)
        return target

    def write(self) -> None:
        text = "\n".join([*self.lines, ""])
        path = self.folder / "build.ninja"
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja_file(folder: Path, output: str) -> None:
    torch = torch_folder()
    pybind11 = pybind11_include(torch)
    cuda, no_cuda = find_cuda()
    cxx = os.environ.get("CXX", "g++")
    csrc = ROOT / "csrc"

    defines = {
        "RL4LLM_VERSION": version(),
        "RL4LLM_CPU_ISAS": ",".join(ISA_FLAGS),
        "RL4LLM_CPU_FLAGS": CPU_FLAGS,
        "RL4LLM_ISA_FLAGS": ";".join(ISA_FLAGS.values()) + ";",
        "RL4LLM_NO_CUDA": no_cuda,
    }
    if cuda:
        defines |= {"RL4LLM_CUDA_VERSION": cuda.version, "RL4LLM_CUDA_ARCHS": ";".join(cuda.archs)}
    header = "".join(f'#define {name} "{value}"\n' for name, value in defines.items())
    if not (folder / "build_config.h").is_file() or (folder / "build_config.h").read_text() != header:
        (folder / "build_config.h").write_text(header)

    # Paths inside the checkout are relative, so that a copy of it with its build folder need not compile again.
    include = f"-I{os.path.relpath(csrc, folder)}"
    common = f"-DTORCH_TARGET_VERSION={TORCH_TARGET} {include} -isystem {torch}/include"
    host = f"{CPU_FLAGS} {common} -Wall -Wextra -Wno-unused-parameter"
    ninja = NinjaFile(folder)
    ninja.rule("cxx", f"{cxx} -MMD -MF $out.d {host} $flags -c $in -o $out", "compile $what")
    for source in sorted((csrc / "cpu").glob("*.cpp")):
        if source.name.endswith(".isa.cpp"):
            for isa, flags in ISA_FLAGS.items():
                define = f"-DRL4LLM_ISA={isa} -DRL4LLM_ISA_{isa.upper()}=1"
                ninja.compile("cxx", source, variant=isa, flags=f"{define} {flags}")
        else:
            ninja.compile("cxx", source)
    if cuda:
        ninja.rule(
            "nvcc",
            f"{cuda.nvcc} -ccbin {cxx} -MD -MF $out.d -std=c++20 -O3 {include} {cuda.gencode()} --threads 2 "
            "-Xcompiler -fPIC,-fvisibility=hidden $flags -c $in -o $out",
            "compile $what",
        )
        for source in sorted((csrc / "cuda").glob("*.cu")):
            ninja.compile("nvcc", source)
        for source in sorted((csrc / "cuda").glob("*.cpp")):
            ninja.compile("cxx", source, flags=f"-isystem {cuda.home}/include")
    python = sysconfig.get_paths()["include"]
    # -I comes before -isystem: torch 2.11's own copy of pybind11 refuses to be included for a stable-ABI target.
    ninja.compile("cxx", csrc / "module.cpp", flags=f"-I. -isystem {python} -I{pybind11}")
    # Compiled again after any other object, so that the date it holds is the build's.
    ninja.compile("cxx", csrc / "build_time.cpp", after=" ".join(ninja.objects))

    # No rpath to this torch: the extension is loaded after `import torch`, whichever that is.
    libraries = f"-L{torch / 'lib'} -ltorch_cpu -lc10"
    if cuda:
        libraries += f" {cuda.cudart} -ldl -lrt -lpthread"
    ninja.rule("link", f"{cxx} -shared -o $out $in {libraries}", "link $out", depfile=False)
    ninja.lines += [f"build {output}: link {' '.join(ninja.objects)}", f"default {output}"]
    ninja.write()


class NinjaBuild(build_ext):
    """Builds the one extension by ninja in build/native-*, and copies it where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        folder = ROOT / "build" / f"native{suffix.removesuffix('.so').replace('.', '-', 1)}"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:  # two installs at once, from two ranks or two terminals
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_ninja_file(folder, f"_C{suffix}")
            jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
            sys.stdout.flush()
            if subprocess.run([ninja_program(), "-C", str(folder), *jobs]).returncode != 0:
                raise SystemExit("rl4llm_fast: the native build failed; the compiler's message stands above")
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # Renamed into place: a process that has the old file mapped keeps it.
            fresh = target.with_name(target.name + ".new")
            shutil.copy2(folder / f"_C{suffix}", fresh)
            os.replace(fresh, target)

    def get_source_files(self) -> list[str]:
        return [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()]


no_extension = os.environ.get("RL4LLM_FAST_NO_EXT") == "1"
if not no_extension and {"dist_info", "bdist_wheel", "build_ext", "editable_wheel", "install", "build"} & set(sys.argv):
    torch_folder()  # stops here, before pip resolves and downloads dependencies

setup(
    ext_modules=[] if no_extension else [Extension("rl4llm_fast._C", sources=["csrc/module.cpp"])],
    cmdclass={"build_ext": NinjaBuild},
)
