"""What is known of the GPU kernels without a GPU: how it is read, recorded and compared; the model of many GPUs."""

from __future__ import annotations

import json
import pathlib
import re
import struct
import subprocess

import pytest
import torch

from bench import capacity, scaling, static, traffic
from bench.static import Figures
from rl4llm_fast.info import kernel_files

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOOD = Figures(registers=64, shared=0, spills=0, threads=256, load_bits=128, store_bits=128)
COMPILER = ("triton", "9.9")


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """A record of one kernel."""
    line = json.dumps(["token_logprobs_fwd_kernel", "bf16", 90, *COMPILER, vars(GOOD)])
    path = tmp_path / "static.json"
    static.write_record(static.record_of([line]) | {"traffic": {"case": [10, 10]}}, path)
    monkeypatch.setattr(static, "RECORD", path)
    static._record.cache_clear()
    yield path  # type: ignore[misc]
    static._record.cache_clear()


# --- reading machine code


def instruction(opcode: int, size: int = 0) -> bytes:
    return struct.pack("<QQ", 0x4047000 | opcode, size << 9)


def test_accesses_by_opcode_and_size() -> None:
    code = b"".join(
        (
            *(instruction(0x981, 6), instruction(0x381, 5), instruction(0x981, 0), instruction(0x981, 2)),
            *(instruction(0x986, 4), instruction(0x386, 6), instruction(0x983, 4), instruction(0x387, 4)),
            *(instruction(0x984, 6), instruction(0x7C02)),  # of shared memory, and no access at all
        )
    )
    assert static.accesses(code) == ([128, 64, 8, 16], [32, 128], 2)


PTX = """.version 8.0
.target sm_80
.address_size 64
.visible .entry known(.param .u64 a, .param .u32 b) .maxntid 192, 1, 1 {
  .reg .b64 %p; .reg .f32 %x<5>; .reg .b32 %i, %j; .reg .b64 %q; .local .align 4 .b8 stack[256];
  ld.param.u64 %p, [a]; cvta.to.global.u64 %p, %p; ld.param.u32 %i, [b];
  ld.global.v4.f32 {%x0, %x1, %x2, %x3}, [%p];
  ld.global.v2.f32 {%x0, %x4}, [%p+64];
  add.f32 %x1, %x1, %x0; add.f32 %x1, %x1, %x4;
  mov.u64 %q, stack; cvt.u64.u32 %q, %i; st.local.f32 [%q], %x1; ld.local.u32 %j, [%q+4];
  st.global.v2.f32 [%p+128], {%x1, %x2}; st.global.u8 [%p+160], %j; st.global.f32 [%p+256], %x3;
  ret; }
"""


def test_a_kernel_with_known_accesses_is_read_right(tmp_path: pathlib.Path) -> None:
    """What an assembler makes of known loads and stores, read back from its machine code."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    folder = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    source, cubin = tmp_path / "k.ptx", tmp_path / "k.cubin"
    source.write_text(PTX)
    for arch, assembler in ((80, "ptxas"), (90, "ptxas"), (100, "ptxas-blackwell")):
        if not (folder / assembler).is_file():
            assembler = "ptxas"
        subprocess.run([folder / assembler, f"-arch=sm_{arch}", source, "-o", cubin], check=True)
        code = static.sections(cubin.read_bytes())[".text.known"]
        loads, stores, local = static.accesses(code)
        assert sorted(loads) == [64, 128]
        assert sorted(stores) == [8, 32, 64]
        assert local >= 2
        (figures,) = static.read(cubin.read_bytes(), arch, dynamic_shared=512).values()
        assert (figures.threads, figures.load_bits, figures.store_bits, figures.shared) == (192, 128, 64, 512)
        assert figures.spills > 0


def test_occupancy_by_hand() -> None:
    # 64 registers: 2,048 a warp, 8 warps in each quarter's 16,384, 32 of 64 in all
    assert GOOD.occupancy(90) == 0.5
    # 65 registers are given out as 72: 2,304 a warp, 7 warps a quarter, 28, of which three blocks of 8 fit
    assert Figures(65, 0, 0, 256, 0, 0).occupancy(80) == 24 / 64
    # few registers: 64 warps; 48 KiB and the reserved KiB of shared memory: 3 blocks in 164 KiB, 4 in 228
    assert Figures(16, 0, 0, 256, 0, 0).occupancy(80) == 1.0
    assert static.resident_blocks(80, 16, 48 * 1024, 256) == 3
    assert static.resident_blocks(90, 16, 48 * 1024, 256) == 4
    assert static.resident_blocks(90, 16, 0, 32) == 32  # no more blocks than that


# --- the record


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"registers": 65}, "65 registers, recorded 64; occupancy 38%, recorded 50%"),
        ({"spills": 2}, "2 spills, recorded 0"),
        ({"load_bits": 64}, "global loads of 64 bits, recorded 128"),
        ({"shared": 100_000}, "occupancy 25%, recorded 50%"),
    ],
)
def test_what_is_worse_fails(change: dict[str, int], words: str, record: pathlib.Path) -> None:
    now = Figures(**{**vars(GOOD), **change})
    with pytest.raises(AssertionError, match=re.escape(words)):
        static.check("token_logprobs_fwd_kernel", "bf16", 90, COMPILER, now)
    static.check("token_logprobs_fwd_kernel", "bf16", 90, ("triton", "9.8"), now)  # another compiler's figures


def test_what_is_as_good_or_better_holds_and_what_is_new_must_be_recorded(record: pathlib.Path) -> None:
    static.check("token_logprobs_fwd_kernel", "bf16", 90, COMPILER, GOOD)
    static.check("token_logprobs_fwd_kernel", "bf16", 90, COMPILER, Figures(40, 0, 0, 256, 128, 32))
    for unknown in (("token_logprobs_fwd_kernel", "fp16", 90), ("other_kernel", "bf16", 90)):
        with pytest.raises(AssertionError, match=r"is not in static.json: python -m bench.static --write"):
            static.check(*unknown, COMPILER, GOOD)


def test_recording_writes_lines(record: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RL4LLM_FAST_RECORD_STATIC", str(tmp_path / "lines"))
    worse = Figures(200, 0, 5, 256, 32, 32)
    static.check("token_logprobs_fwd_kernel", "bf16", 90, COMPILER, worse)
    made = static.record_of((tmp_path / "lines").read_text().splitlines())
    assert made["compilers"] == {"triton": "9.9"}
    assert made["kernels"] == {"triton token_logprobs_fwd_kernel": {"bf16": {"90": [200, 0, 5, 256, 32, 32]}}}


def test_the_table(record: pathlib.Path) -> None:
    text = static.markdown(json.loads(record.read_text()))
    row = "| kernels/token_logprobs.py: token_logprobs_fwd_kernel | 1 | –, 64, – | –, 50%, – | 0 | 0 | 128, 128 |"
    assert row in text
    assert "| case | 10 | 10 | 1.00 |" in text
    assert static.home_of("nvcc", "token_logprobs_fwd_kernel") == "csrc/cuda/token_logprobs.cu"
    with pytest.raises(ValueError, match="got 'nobody'"):
        static.home_of("triton", "nobody")


def test_every_kernel_of_the_tree_is_recorded_and_the_page_shows_it() -> None:
    static._record.cache_clear()
    recorded = static._record()
    assert set(recorded["compilers"]) == {"nvcc", "triton"}
    for path in kernel_files(ROOT):
        source, compiler = (ROOT / path).read_text(), "nvcc" if path.endswith(".cu") else "triton"
        for kernel in set(re.findall(r"\b(?:def )?(\w+_kernel)\(", source)):
            variants = recorded["kernels"].get(f"{compiler} {kernel}")
            assert variants, f"{path}: {kernel} is not recorded: python -m bench.static --write"
            for variant, by_arch in variants.items():
                assert by_arch.keys() == {"80", "90", "100"}, (kernel, variant)
                assert all(Figures(*figures).spills == 0 for figures in by_arch.values())
    assert static.main(["--check"]) == 0


def test_the_kernels_ask_for_no_more_bytes_than_recorded() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    recorded = static._record()["traffic"]
    found = traffic.counted()
    assert found.keys() == recorded.keys()
    for case, (counted, formula) in found.items():
        assert counted <= recorded[case][0], f"{case}: {counted} bytes, recorded {recorded[case][0]}"
        if case.startswith(("token_logprobs", "kl_divergence", "kl_estimate", "gae", "vtrace")):
            assert counted <= 1.01 * formula, f"{case}: {counted} bytes, {formula} by the formula"


# --- many GPUs


def test_collectives_by_hand() -> None:
    link = scaling.Link("a", bytes_per_s=100.0, latency_s=1.0)
    assert scaling.all_gather(40, 1, link) == 0
    assert scaling.all_gather(40, 4, link) == pytest.approx(3 * 40 / 80 + 2)  # 80% of the link, two doublings
    assert scaling.all_reduce(40, 4, link) == pytest.approx(2 * (3 * 10 / 80 + 2))
    assert scaling.link_of(8) is scaling.NVLINK
    assert scaling.link_of(8, 8) is scaling.link_of(16) is scaling.INFINIBAND


def test_the_head_s_collectives_are_those_of_the_code() -> None:
    """Three numbers a token and d hidden: their bytes, and three collectives' latencies."""
    work = scaling.Work(tokens=1_000, width=64)
    link, ranks = scaling.NVLINK, 4
    sent = 3 * (8 + 1_000 * 4 * 3) + 2 * 3 * (1_000 * 64 * 2 / ranks)
    wanted = sent / (0.8 * link.bytes_per_s) + (1 + 1 + 2) * 2 * link.latency_s
    assert scaling.head_collectives(work, ranks) == pytest.approx(wanted)
    assert scaling.head_collectives(work, ranks, entropy=True) > wanted
    source = (ROOT / "rl4llm_fast" / "vocab_parallel.py").read_text()
    assert source.count("_all_gather(") == 5  # the function, the sizes, the numbers; eager's two
    assert source.count("all_reduce(") == 2


def test_the_model_takes_measured_figures_and_says_what_is_published() -> None:
    published = scaling.figures(None)
    assert all(figure.source.startswith("published") for figure in published.values())
    ours = {"implementation": "rl4llm_fast", "correct": True, "median_ms": 48.0}
    result = {
        "meta": {"device": "H100", "date": "2027-01-01 10:00 UTC", "git": "abc"},
        "ceilings_bytes_per_s": {"copy": 2e12},
        "ceilings_flops_per_s": {"bf16": 7e14},
        "cases": [{"name": scaling._HEAD_CASE, "results": [ours]}],
    }
    mixed = scaling.figures(result)
    assert mixed["head"] == scaling.Figure(0.048, "measured: H100, 2027-01-01, commit abc")
    assert (mixed["copy"].value, mixed["products"].value) == (2e12, 7e14)
    assert mixed["loss"] == published["loss"]
    ours["correct"] = False
    assert scaling.figures(result)["head"] == published["head"]
    one, eight = (scaling.step(scaling.Work(), tensor, 1, published) for tensor in (1, 8))
    assert one["their collectives"] == one["its collectives"] == one["gradients and weights"] == 0
    assert eight["layers"] == pytest.approx(one["layers"] / 8)
    text = scaling.markdown(scaling.Work(), published)
    assert "| 1,024 | 8 × 128 |" in text
    assert text in (ROOT / "docs" / "performance.md").read_text() or scaling._measured() is not None


# --- the largest micro-batch


def test_the_largest_that_fits_is_found() -> None:
    for limit in (1_024, 1_500, 40_000, 1_000_000):
        asked: list[int] = []

        def fits(tokens: int, limit: int = limit, asked: list[int] = asked) -> bool:
            asked.append(tokens)
            return tokens <= limit

        found = capacity.largest(fits)
        assert found <= limit < found * (1 + 1 / 8)
        assert len(asked) < 20
    assert capacity.largest(lambda tokens: False) == 0
    result = {"meta": {"width": 1, "vocabulary": 2, "device": "X"}, "tokens": {"a": 3}, "ratio": 9.0, "target": 10.0}
    assert "9.0x, MISSED >= 10x" in capacity.text({**result, "reached": False})
    if not torch.cuda.is_available():
        assert capacity.main([]) == 2
