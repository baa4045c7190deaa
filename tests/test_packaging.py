"""What a user installs: the wheel's contents, the source archive, an editable install, and the build's switches.

No network: every build runs with --no-build-isolation --no-deps, in a copy of the checkout with the objects that
setup.py has compiled there, so that only what changed is compiled.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from pathlib import Path

import instruction_sets
import pytest
import torch

import rl4llm_fast

ROOT = Path(__file__).resolve().parent.parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source checkout")


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Standard output and error of a command that must succeed."""
    done = attempt(*command, cwd=cwd, **environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


def attempt(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RL4LLM_FAST_") and k != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=cwd, env=clean | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_away_from_installs(script: str, cwd: Path, *folders: Path, **environment: str) -> str:
    """Run a script that sees torch and ``folders``, but no editable install of this library (-S: no .pth files)."""
    path = os.pathsep.join(map(str, [*folders, Path(torch.__file__).parent.parent]))
    return run(sys.executable, "-S", "-c", textwrap.dedent(script), cwd=cwd, PYTHONPATH=path, **environment)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would give a user who clones now."""
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if files.returncode != 0:
        pytest.skip("not a git checkout")
    copy = tmp_path_factory.mktemp("checkout")
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    for objects in (ROOT / "build").glob("native-*"):
        shutil.copytree(objects, copy / "build" / objects.name)  # with their times, which ninja goes by
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # CPU kernels only: the CUDA sources are compiled by test_cuda_static.py.
    pip_wheel(checkout, folder, RL4LLM_FAST_CUDA="0")
    return next(folder.glob("*.whl"))


def pip_wheel(source: Path, folder: Path, **environment: str) -> str:
    flags = ("--no-build-isolation", "--no-deps", "--no-index", "-q", "-w", str(folder))
    return run(sys.executable, "-m", "pip", "wheel", *flags, str(source), cwd=folder, **environment)


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


class TestWheel:
    def test_holds_the_package_and_the_extension(self, wheel: Path) -> None:
        names = names_in(wheel)
        for name in ("__init__.py", "py.typed", "_C.pyi", f"_C{SUFFIX}", "kernels/__init__.py", "schemas.py"):
            assert f"rl4llm_fast/{name}" in names
        modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "rl4llm_fast").rglob("*.py")}
        assert modules <= names
        kernels = {f"rl4llm_fast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
        assert kernels <= names

    def test_claims_no_other_top_level_name(self, wheel: Path) -> None:
        tops = {name.split("/")[0] for name in names_in(wheel)}
        assert tops == {"rl4llm_fast", f"rl4llm_fast-{rl4llm_fast.__version__}.dist-info"}

    def test_holds_what_a_users_loss_is_compiled_against_and_no_other_source(self, wheel: Path) -> None:
        sources = {n for n in names_in(wheel) if n.endswith((".cpp", ".cu", ".h", ".cuh", ".o")) or "csrc" in n}
        headers = rl4llm_fast.user_losses._header_files(Path("rl4llm_fast/csrc"))
        assert sources == {h.as_posix() for h in headers}

    def test_version_is_written_once(self, wheel: Path) -> None:
        assert wheel.name.startswith(f"rl4llm_fast-{rl4llm_fast.__version__}-cp")
        with zipfile.ZipFile(wheel) as archive:
            metadata = archive.read(f"rl4llm_fast-{rl4llm_fast.__version__}.dist-info/METADATA").decode()
        assert f"\nVersion: {rl4llm_fast.__version__}\n" in metadata

    def test_runs_away_from_the_checkout(self, wheel: Path, tmp_path: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path)
        script = """
            import torch, rl4llm_fast as rf
            from rl4llm_fast import _C
            import rl4llm_fast.kernels
            info = _C.build_info()
            assert info["version"] == rf.__version__ and info["no_cuda_reason"] == "RL4LLM_FAST_CUDA=0", info
            logits = torch.randn(3, 100)
            ids = torch.tensor([5, 6, 7])
            ours = rf.token_logprobs(logits, ids, backend="cpu")
            torch.testing.assert_close(ours, logits.log_softmax(-1)[range(3), ids])
            rf.token_loss("mine", knobs={"c": 1.0})(lambda m, logp, adv, c: -c * logp * adv)
            loss, _ = rf.policy_loss(torch.ones(2, 3), None, torch.ones(2, 3), kind="mine", c=2.0, backend="cpu")
            assert loss == -2
            print(rf.__file__, rl4llm_fast.kernels.__file__)
        """
        printed = run_away_from_installs(script, tmp_path, tmp_path, RL4LLM_FAST_CACHE_DIR=str(tmp_path / "cache"))
        assert printed.split() == [
            str(tmp_path / "rl4llm_fast" / "__init__.py"),
            str(tmp_path / "rl4llm_fast" / "kernels" / "__init__.py"),
        ]


class TestOtherInstalls:
    def test_second_build_compiles_nothing(self, checkout: Path, wheel: Path, tmp_path: Path) -> None:
        output = run(sys.executable, "setup.py", "build_ext", "-b", str(tmp_path), cwd=checkout, RL4LLM_FAST_CUDA="0")
        assert "no work to do" in output
        assert (tmp_path / "rl4llm_fast" / f"_C{SUFFIX}").is_file()

    def test_editable(self, checkout: Path, wheel: Path, tmp_path: Path) -> None:
        flags = ("--no-build-isolation", "--no-deps", "--no-index", "-q", "--target", str(tmp_path))
        run(sys.executable, "-m", "pip", "install", *flags, "-e", str(checkout), cwd=tmp_path, RL4LLM_FAST_CUDA="0")
        # site.addsitedir runs the .pth file, as for a folder of installed packages.
        script = f"""
            import importlib.util, site
            site.addsitedir({str(tmp_path)!r})
            import rl4llm_fast, rl4llm_fast.kernels, rl4llm_fast._C
            print(rl4llm_fast.__file__, rl4llm_fast.kernels.__file__, rl4llm_fast._C.__file__)
            print(importlib.util.find_spec("kernels"))
        """
        printed = run_away_from_installs(script, tmp_path).split()
        assert printed == [
            str(checkout / "rl4llm_fast" / "__init__.py"),
            str(checkout / "kernels" / "__init__.py"),
            str(checkout / "rl4llm_fast" / f"_C{SUFFIX}"),
            "None",
        ]

    def test_source_archive_builds(self, checkout: Path, tmp_path: Path) -> None:
        run(sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=checkout)
        (archive,) = tmp_path.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path, filter="data")
        source = tmp_path / archive.name.removesuffix(".tar.gz")
        for folder in ("csrc", "kernels", "rl4llm_fast"):
            wanted = {
                p.relative_to(checkout)
                for p in (checkout / folder).rglob("*")
                if p.suffix in (".py", ".pyi", ".cpp", ".cu", ".h", ".cuh", ".typed")
            }
            assert wanted <= {p.relative_to(source) for p in (source / folder).rglob("*")}
        # The archive's own metadata is enough to make a wheel of it; compiling it again would prove no more.
        pip_wheel(source, tmp_path, RL4LLM_FAST_NO_EXT="1")
        assert f"rl4llm_fast-{rl4llm_fast.__version__}-py3-none-any.whl" in {p.name for p in tmp_path.glob("*.whl")}

    def test_pure_python(self, checkout: Path, tmp_path: Path) -> None:
        pip_wheel(checkout, tmp_path, RL4LLM_FAST_NO_EXT="1")
        (pure,) = tmp_path.glob("*-py3-none-any.whl")
        with zipfile.ZipFile(pure) as archive:
            archive.extractall(tmp_path / "site")
        assert not list((tmp_path / "site").rglob("*.so"))
        script = """
            import torch, rl4llm_fast as rf
            assert rf.backends()["token_logprobs"] == ["eager"], rf.backends()
            logits = torch.randn(3, 100, requires_grad=True)
            rf.token_logprobs(logits, torch.tensor([5, 6, 7])).sum().backward()
            try:
                rf.token_logprobs(logits, torch.tensor([5, 6, 7]), backend="cpu")
            except rf.BackendError as error:
                print(error)
        """
        site = tmp_path / "site"
        assert "_C is not installed" in run_away_from_installs(script, site, site, CUDA_VISIBLE_DEVICES="")


class TestSwitches:
    """The build's refusals; none of them gets as far as a compiler."""

    def test_without_torch_it_names_the_way_out(self, checkout: Path) -> None:
        script = f"""
            import importlib.machinery, sys
            find = importlib.machinery.PathFinder.find_spec
            hidden = classmethod(lambda cls, name, *a: None if name == "torch" else find(name, *a))
            importlib.machinery.PathFinder.find_spec = hidden
            sys.argv = ["setup.py", "build_ext"]
            exec(compile(open("setup.py").read(), {str(checkout / "setup.py")!r}, "exec"), {{"__file__": "setup.py"}})
        """
        done = attempt(sys.executable, "-c", textwrap.dedent(script), cwd=checkout)
        assert done.returncode != 0
        assert "pip install --no-build-isolation ." in done.stdout

    def test_cuda_that_cannot_be_had(self, checkout: Path, tmp_path: Path) -> None:
        wanted = attempt(
            sys.executable, "setup.py", "build_ext", "-b", str(tmp_path), cwd=checkout,
            RL4LLM_FAST_CUDA="1", RL4LLM_FAST_CUDA_ARCHS="20", PATH="/usr/bin:/bin",
        )  # fmt: skip
        assert wanted.returncode != 0
        assert "RL4LLM_FAST_CUDA=1, but the CUDA kernels cannot be built: " in wanted.stdout

    def test_unknown_switch(self, checkout: Path, tmp_path: Path) -> None:
        done = attempt(
            sys.executable, "setup.py", "build_ext", "-b", str(tmp_path), cwd=checkout, RL4LLM_FAST_CUDA="yes"
        )
        assert done.returncode != 0
        assert "wanted auto, 0 or 1, got 'yes'" in done.stdout


class TestExtension:
    """The binary itself, and what it is made of."""

    def test_macros_are_those_of_the_oldest_torch(self) -> None:
        """Functions newer than torch's target ABI do not compile; macros are not guarded so."""
        sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp"))
        used = set(re.findall(r"\b(?:[A-Z]+_)?TORCH_[A-Z_]+\b", sources))
        known = {"TORCH_ABI_VERSION", "TORCH_BOX", "TORCH_ERROR_CODE_CHECK", "TORCH_TARGET_VERSION"}
        assert used == {"STABLE_TORCH_LIBRARY_IMPL", *known}

    @pytest.fixture(scope="class")
    def binary(self, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("binary")
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"rl4llm_fast/_C{SUFFIX}", folder))

    @pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is missing")
    def test_links_only_the_stable_part_of_torch(self, binary: Path) -> None:
        dynamic = run("readelf", "-d", str(binary), cwd=binary.parent)
        needed = set(re.findall(r"\(NEEDED\).*\[lib([\w+]+)", dynamic))
        assert needed <= {"torch_cpu", "c10", "stdc++", "m", "gcc_s", "c", "dl", "rt", "pthread"}
        assert "RUNPATH" not in dynamic
        assert "RPATH" not in dynamic

    @pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is missing")
    def test_objects_for_one_instruction_set_share_nothing(self, checkout: Path, wheel: Path) -> None:
        """A weak symbol would be merged over instruction sets: an older CPU might get the AVX-512 copy."""
        objects = list((checkout / "build").rglob("*.isa.cpp.*.o"))
        assert objects
        for path in objects:
            symbols = run("nm", "-C", str(path), cwd=checkout)
            assert not re.findall(r"^\w+ [WVu] .*$", symbols, re.MULTILINE), path.name


class TestInstructionSets:
    def test_environment_forces_one(self, tmp_path: Path) -> None:
        code = "import torch, rl4llm_fast._C as c; print(c.build_info()['cpu_instruction_set_in_use'])"
        for isa in usable_instruction_sets():
            printed = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=import_path(), RL4LLM_FAST_CPU_ISA=isa)
            assert printed.strip() == isa

    def test_unknown_name(self) -> None:
        extension = pytest.importorskip("rl4llm_fast._C")
        with pytest.raises(ValueError, match="wanted avx512, avx2 or baseline, got 'mmx'"):
            extension.force_cpu_isa("mmx")


def usable_instruction_sets() -> list[str]:
    pytest.importorskip("rl4llm_fast._C")
    found = instruction_sets.usable()
    assert "baseline" in found
    return found


def import_path() -> str:
    return str(Path(rl4llm_fast.__file__).resolve().parent.parent)


def test_the_architecture_names_every_file_of_the_library_and_the_suite():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    patterns = [re.escape(name).replace(r"\*", r"\w*") for name in re.findall(r"[\w*]+\.py", text)]
    for folder in ("rl4llm_fast", "rl4llm_fast/trainer", "bench"):
        for path in (ROOT / folder).glob("*.py"):
            named = path.name.startswith("_") or any(re.fullmatch(pattern, path.name) for pattern in patterns)
            assert named, f"docs/architecture.md names no {folder}/{path.name}"
