"""Models by their size: their configs, whole steps of small ones on the CPU, and the longest answers that fit."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

from bench import context, end_to_end, plots, report, run, sized, timing, trainer_steps
from bench.verify import Clock

pytest.importorskip("transformers")
ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = {
    **sized.CONFIGS["1b"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
}  # fmt: skip
SMALL = {"prompts": 2, "pairs": 3, "prompt": 8, "group": 4, "answer": 12}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sized.CONFIGS, "1b", TINY)
    monkeypatch.setattr(end_to_end, "SIZED", SMALL)


def test_the_sizes_are_those_of_the_models() -> None:
    # As their model cards have it: 1.24, 3.21 and 8.03 billion.
    found = {name: sized.parameters(config, config["num_hidden_layers"])[0] for name, config in sized.CONFIGS.items()}
    assert found == {"1b": 1_235_814_400, "3b": 3_212_749_824, "8b": 8_030_261_248}


@pytest.mark.parametrize("tied", [True, False])
def test_the_count_is_that_of_the_model(tied: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**TINY, "tie_word_embeddings": tied}
    monkeypatch.setitem(sized.CONFIGS, "1b", config)
    folder = sized.save(tmp_path, "1b", layers=2)
    model, tokenizer = sized.load(folder, "cpu")
    count = sum(p.numel() for p in model.parameters())
    assert sized.parameters(config, 2) == (count, count - (0 if tied else 64 * 32))
    assert tokenizer("w w")["input_ids"] == [0, 0]
    assert tokenizer.pad_token_id == 63
    again, _ = sized.load(folder, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_layers_by_memory() -> None:
    for name, config in sized.CONFIGS.items():
        for trainer in end_to_end.TRAINERS:
            layers = sized.layers_that_fit(name, trainer, end_to_end.SIZED)
            assert sized.step_bytes(config, layers, trainer, end_to_end.SIZED) <= sized.MEMORY
            more = sized.step_bytes(config, layers + 1, trainer, end_to_end.SIZED)
            assert layers == config["num_hidden_layers"] or more > sized.MEMORY
    # By hand: 18 bytes a parameter of a tied model, its 3 layers' inputs, one layer, 20 bytes a logit, the reserve.
    tokens, logits = 2 * 4 * (8 + 12), 2 * 4 * 12 * 64
    state = 18 * sized.parameters(TINY, 3)[0]
    rest = tokens * (3 * 4 * 32 + 2 * (6 * 32 + 4 * 64) + 16 * 32) + 20 * logits
    assert sized.step_bytes(TINY, 3, "grpo", SMALL) == state + rest + 8e9
    with pytest.raises(ValueError, match=r"one layer of 8b under ppo takes about .* GB, got 20"):
        sized.layers_that_fit("8b", "ppo", end_to_end.SIZED, 20e9)


@pytest.mark.parametrize("trainer", end_to_end.TRAINERS)
def test_everyone_takes_the_same_step(trainer: str, tiny: None, tmp_path: pathlib.Path) -> None:
    """Of random weights that nobody has stored, and with the layers computed again as without."""
    pytest.importorskip("trl")
    model = sized.save(tmp_path, "1b")
    batch = trainer_steps.make_batch(trainer, SMALL, 63)
    assert len(batch.get("rows", batch.get("prompts", ()))) == (2 if "prompts" in batch else 3)
    kept = trainer_steps.make_step(trainer, "fused", batch, model, "fp32", "cpu")()
    for variant in end_to_end.variants_of(trainer, end_to_end.VARIANTS):
        found = trainer_steps.make_step(trainer, variant, batch, model, "fp32", "cpu", recompute=True)()
        assert found["loss"] == pytest.approx(kept["loss"], rel=1e-5)
        assert trainer_steps.agrees(found["grad_norm"], kept["grad_norm"], "fp32")


@pytest.mark.slow
def test_the_command_by_size(tiny: None, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", "1b", "--trainers", "dpo,grpo", "--precision", "fp32", "--rounds", "2"]
    command += ["--variants", "fused,eager", "--layers", "2", "--out", str(tmp_path), "--resume"]
    assert end_to_end.main([*command, "--minutes", "1e-9"]) == end_to_end.UNFINISHED
    assert end_to_end.main([*command, "--plan"]) == 0
    assert "grpo, 2 layers: fused, eager, 2 steps each, about" in capsys.readouterr().out
    assert end_to_end.main(command) == 0
    (path,) = tmp_path.glob("end-to-end-1b-*.json")
    result = json.loads(path.read_text())
    assert [(row["trainer"], row["variant"], row["layers"], row["status"]) for row in result["rows"]] == [
        (trainer, variant, 2, "ok") for trainer in ("dpo", "grpo") for variant in ("fused", "eager")
    ]
    assert all(row["agrees"] for row in result["rows"] if row["variant"] == "eager")
    text = capsys.readouterr().out
    assert "| dpo, 2 layers | fused |" in text
    assert "3 prompts with 2 answers else of up to 12 tokens" in text
    assert len(list(tmp_path.glob("*-step-time*.png"))) == 2  # in light and in dark
    assert end_to_end.main([*command, "--plan"]) == 0
    assert capsys.readouterr().out.endswith("in all about 0 minutes (guessed)\n")


def test_a_step_that_finds_no_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, Any] = {"fused": {"trainer": "dpo", "variant": "fused"}}
    status = f"import sys; sys.exit({end_to_end._OUT_OF_MEMORY})"
    batch = {"rows": [{"prompt": [1], "chosen": [2], "rejected": [3]}]}
    end_to_end._take_turns({"fused": [sys.executable, "-c", status]}, rows, 1, "dpo", batch)
    assert (rows["fused"]["status"], rows["fused"]["reason"]) == ("failed", "out of memory")


def test_the_longest_answers_and_going_on() -> None:
    """A device that holds 5,000 tokens: doubled from 512 to 4,096, then between 4,096 and 8,192 to a sixteenth."""
    found: dict[str, Any] = {"probes": []}
    saved: list[int] = []

    def probe(answer: int) -> dict[str, Any]:
        return {"fits": answer <= 5_000, "seconds": 1.0, "peak_bytes": answer}

    def save() -> None:
        saved.append(len(found["probes"]))

    assert context.longest(found, probe, 100_000, save, Clock(None)) == 4_864
    tried = [known["answer"] for known in found["probes"]]
    assert tried == [512, 1_024, 2_048, 4_096, 8_192, 6_144, 5_120, 4_608, 4_864]
    assert saved == list(range(1, 10))
    # Cut off after five: the same search asks for the other four only, and none after the end of its minutes.
    found["probes"] = found["probes"][:5]
    with pytest.raises(context.OutOfTime):
        context.longest(found, probe, 100_000, save, Clock(0.0))
    asked: list[int] = []
    assert context.longest(found, lambda n: (asked.append(n), probe(n))[1], 100_000, save, Clock(None)) == 4_864  # type: ignore[func-returns-value]
    assert asked == tried[5:]
    assert context.longest({"probes": []}, probe, 2_000, save, Clock(None)) <= 2_000  # no more positions


def test_the_time_is_that_of_a_warm_step(tmp_path: pathlib.Path) -> None:
    asked: list[int] = []

    def probe(answer: int) -> dict[str, Any]:
        asked.append(answer)
        return {"fits": answer <= 512 or len(asked) < 2, "seconds": 10.0 / len(asked), "peak_bytes": 0}

    assert context.warm(probe, 512) == 5.0
    assert asked == [512, 512]
    assert context.warm(probe, 600) is None
    result = result_of(tmp_path)
    result["variants"]["fused"] = {  # refused the second time round: the length stands, and no time is known
        "status": "ok", "longest": 512, "seconds": None,
        "probes": [{"answer": 512, "fits": True, "seconds": 9.0, "peak_bytes": 2**30}],
    }  # fmt: skip
    assert "| fused | 512 | 5,120 | – | 1.0 GiB |  |" in context.markdown(result)


@pytest.mark.parametrize("variant", end_to_end.VARIANTS)
def test_a_refused_step_leaves_nothing_behind(
    variant: str, tiny: None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of several lengths on one trainer; one is refused in its backward pass, and the next is as without it."""
    pytest.importorskip("trl")
    model = sized.save(tmp_path, "1b")
    probe = context.prober(variant, model, "fp32", "cpu", 63)
    assert probe(6)["fits"]
    backward = torch.Tensor.backward

    def refuse(self: torch.Tensor, *args: Any, **more: Any) -> None:
        backward(self, *args, **more)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", refuse)
        assert not probe(12)["fits"]
    taken: list[float] = []
    for refused in (False, True):
        take, forget = trainer_steps.make_grpo(variant, context.batch_of(1, 63), model, "fp32", "cpu", True)
        if refused:
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "backward", refuse)
                with pytest.raises(torch.OutOfMemoryError):
                    take(context.batch_of(12, 63))
            forget()
        taken.append(take(context.batch_of(9, 63))["grad_norm"])
    assert taken[0] == taken[1]
    assert not timing.out_of_memory(RuntimeError("shapes do not match"))
    assert timing.out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))


def result_of(tmp_path: pathlib.Path) -> dict[str, Any]:
    meta = {
        **run.environment("cpu"), "suite": "context-1b", "command": "python -m bench.context --model 1b", "layers": 3,
        "precision": "fp32", "width": 32, "vocabulary": 64, "most": 1_000, "memory_bytes": 2**31,
    }  # fmt: skip
    return {"meta": meta, "variants": {}}


@pytest.mark.slow
def test_the_processes_the_table_and_the_plot(
    tiny: None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context.importlib.util, "find_spec", lambda name: None)
    result, path = result_of(tmp_path), tmp_path / "context-1b-x-2026-01-01.json"
    model = sized.save(tmp_path / "model", "1b")
    assert context.measure(result, path, model, ["fused", "trl"], Clock(None)) == 0
    fused = json.loads(path.read_text())["variants"]["fused"]
    assert fused["status"] == "ok"
    assert fused["longest"] == 992  # to a sixteenth of the 1,000 positions that there are
    assert fused["seconds"] > 0
    assert [known["answer"] for known in fused["probes"]][:1] == [512]
    result["variants"]["eager"] = {
        "status": "ok", "longest": 512, "seconds": 2.0,
        "probes": [{"answer": 512, "fits": True, "seconds": 9.0, "peak_bytes": 2**30}],
    }  # fmt: skip
    text = context.markdown(result)
    assert "| eager | 512 | 5,120 | 2 s | 1.0 GiB | 1.9x as many |" in text
    assert "| trl | absent: not installed: trl | – | – | – | – |" in text
    assert [plot.name for plot in plots.draw(result, tmp_path, path.stem)] == [
        f"{path.stem}-context{theme}.png" for theme in ("", "-dark")
    ]
    assert context.load([tmp_path], result["meta"]) == (path, json.loads(path.read_text()))
    assert context.load([tmp_path], {**result["meta"], "git": "other"})[0] is None
    assert "fused: done, " in context.plan(result, ["fused"])
    # A process that ends otherwise is a row, and the others go on.
    result["variants"] = {}
    assert context.measure(result, path, str(tmp_path / "none"), ["eager"], Clock(None)) == 0
    assert result["variants"]["eager"]["reason"] == "its process ended with status 1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert context.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().out == "this needs a GPU, and torch sees none here (--plan shows what would run)\n"
    assert context.main(["--plan", "--model", "8b", "--out", str(tmp_path)]) == 0
    assert "layers of width 4,096; in all about 8 minutes" in capsys.readouterr().out
    assert end_to_end.main(["--device", "cuda", "--model", "8b"]) == 2
    assert end_to_end.main(["--device", "cuda", "--model", "8b", "--plan", "--trainers", "grpo"]) == 0
    done = subprocess.run([sys.executable, "-m", "bench.context"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    with pytest.raises(SystemExit):
        context.main(["--variants", "fused,egaer"])


def test_the_page_of_the_gpu(tmp_path: pathlib.Path) -> None:
    result, page = result_of(tmp_path), tmp_path / "gpu.md"
    result["variants"]["fused"] = {
        "status": "ok", "longest": 512, "seconds": 2.0,
        "probes": [{"answer": 512, "fits": True, "seconds": 9.0, "peak_bytes": 2**30}],
    }  # fmt: skip
    row = {"status": "ok", "median_s": 1.0, "p20_s": 1.0, "p80_s": 1.0, "tokens_per_s": 9.0, "peak_bytes": 2**21}
    rows = [{"trainer": "grpo", "variant": "fused", "layers": 2, **row}]
    meta = result["meta"] | {"suite": "end-to-end-1b", "sizes": SMALL, "trl": "1", "model": "The model: tiny"}
    for stem, made in (
        ("context-1b-x-2026-01-01", result),
        ("end-to-end-1b-x-2026-01-01", {"meta": meta, "rows": rows}),
    ):
        report.write_json(tmp_path / f"{stem}.json", made)
        assert plots.draw(made, tmp_path, stem)
    files = report.newest(tmp_path)
    assert len(files) == 2
    page.write_text("\n".join(mark for name in ("order", "steps", "context") for mark in report.marks(name)))
    assert report.main([*map(str, files), "--gpu", str(page)]) == 0
    text = page.read_text()
    assert "| grpo, 2 layers | fused | 1 s (1 – 1) | 9 | 2 MiB |  |" in text
    assert "| fused | 512 | 5,120 | 2 s | 1.0 GiB |  |" in text
    assert text.count("<picture>") == 3
    # Pages of other suites keep what they show: these results are not theirs.
    assert report.main([*map(str, files), "--performance", str(page)]) == 1
    for name in ("steps", "context"):  # the page that the command writes by itself has its marks
        assert (ROOT / "docs" / "gpu.md").read_text().count(report.marks(name)[0]) == 1
