"""verl's and OpenRLHF's functions and their drop-ins, side by side: ``python -m bench.dropin_functions verl``; with
``hf``, log-probabilities from SmolLM2-135M with and without ``logprob_head``.

Forward, and backward where there is one, in fp32: 64 answers of up to 512 tokens, and 256 tokens of a vocabulary of
49,152 for the functions of logits; 4 x 256 tokens for the model. Time: the best of interleaved rounds. Memory: peak
resident size above what was there before the call (Linux).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch

from .dropin_page import Table
from .dropin_trainers import kib, start_of_peak

B, T, ROWS, V = 64, 512, 256, 49152


def backward(result: Any) -> None:
    result = result[0] if isinstance(result, tuple) else result
    result.sum().backward()


class Config:
    """What verl's losses read of its ActorConfig."""

    clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, 0.2, 0.28

    def __init__(self) -> None:
        self.global_batch_info: dict[str, Any] = {}

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def data() -> dict[str, Any]:
    torch.manual_seed(0)
    lengths = torch.randint(T // 4, T, (B, 1))
    old = -torch.rand(B, T)
    return {
        "mask": (torch.arange(T) < lengths).long(),
        "old": old,
        "now": (old + 0.1 * torch.randn(B, T)).requires_grad_(),
        "values": torch.randn(B, T),
        "rewards": torch.randn(B, T),
        "index": [str(i // 8) for i in range(B)],
        "logits": torch.randn(ROWS, V).requires_grad_(),
        "labels": torch.randint(V, (ROWS,)),
    }


Cases = dict[str, tuple[str, Callable[[Any, dict[str, Any]], Any]]]  # name: (module, call)

_CORE, _TORCH = "verl.trainer.ppo.core_algos", "verl.utils.torch_functional"
VERL: Cases = {
    "compute_gae_advantage_return": (_CORE, lambda f, d: f(d["rewards"], d["values"], d["mask"], 0.99, 0.95)),
    "compute_grpo_outcome_advantage": (_CORE, lambda f, d: f(d["rewards"], d["mask"], d["index"])),
    "compute_policy_loss_vanilla": (
        _CORE,
        lambda f, d: backward(f(d["old"], d["now"], d["values"], d["mask"], "token-mean", Config())),
    ),
    "compute_value_loss": (_CORE, lambda f, d: backward(f(d["now"], d["rewards"], d["old"], d["mask"], 0.2))),
    "kl_penalty": (_CORE, lambda f, d: backward(f(d["now"], d["old"], "k3"))),
    "agg_loss": (_CORE, lambda f, d: backward(f(d["now"], d["mask"], "seq-mean-token-mean"))),
    "logprobs_from_logits": (_TORCH, lambda f, d: backward(f(d["logits"], d["labels"]))),
    "entropy_from_logits": (_TORCH, lambda f, d: backward(f(d["logits"]))),
}
_UTILS = "openrlhf.models.utils"
OPENRLHF: Cases = {
    "log_probs_from_logits": (_UTILS, lambda f, d: backward(f(d["logits"], d["labels"]))),
    "compute_approx_kl": (_UTILS, lambda f, d: backward(f(d["now"], d["old"], None, "k3"))),
}


def model(rounds: int) -> Table:
    """Forward and backward of the whole model, its log-probabilities from logits and from the head."""
    import transformers

    from rl4llm_fast.compat.hf import logprob_head
    from rl4llm_fast.trainer import smollm2

    network = transformers.AutoModelForCausalLM.from_pretrained(smollm2.model_folder(), dtype=torch.float32)
    logprob_head(network)  # without labels it is what it was
    ids = torch.randint(V, (4, 256), generator=torch.Generator().manual_seed(0))

    def from_logits() -> torch.Tensor:
        logps = network(input_ids=ids).logits[:, :-1].log_softmax(-1)
        return logps.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)

    ways = {"logits": from_logits, "head": lambda: network(input_ids=ids, labels=ids).log_probs}
    best, peak = dict.fromkeys(ways, float("inf")), dict.fromkeys(ways, 0)
    for _ in range(rounds):
        for name, way in ways.items():
            network.zero_grad()
            before = start_of_peak()
            start = time.perf_counter()
            backward(way())
            best[name] = min(best[name], time.perf_counter() - start)
            peak[name] = max(peak[name], (kib("VmHWM") - before) // 1024)
    table = Table("dropin-hf", ["SmolLM2-135M, 4 x 256 tokens", "from its logits", "`logprob_head`", "ratio"])
    table.add(["time", *(f"{best[name]:.2f} s" for name in ways), f"{best['logits'] / best['head']:.2f}x"])
    table.add(["memory", *(f"{peak[name]} MiB" for name in ways), f"{peak['logits'] / peak['head']:.1f}x"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.dropin_functions", description=__doc__)
    parser.add_argument("library", choices=["verl", "openrlhf", "hf"], help="verl and openrlhf must be installed")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help="put the table into docs/drop-in.md")
    arguments = parser.parse_args()
    library = arguments.library
    command = f"bench.dropin_functions {library} --rounds {arguments.rounds}"
    if library == "hf":
        model(arguments.rounds).close(command, arguments.write)
        return
    if importlib.util.find_spec(library) is None:
        parser.error(f"library: {library} is not installed")
    drop_ins, tensors = importlib.import_module(f"rl4llm_fast.compat.{library}"), data()
    table = Table(f"dropin-{library}", ["function", library, "drop-in", "ratio"])
    replacements = {target.name: target.replacement for target in drop_ins.TARGETS}
    for name, (module, call) in (VERL if library == "verl" else OPENRLHF).items():
        functions = {"theirs": getattr(importlib.import_module(module), name), "ours": replacements[name]}
        best = dict.fromkeys(functions, float("inf"))
        for round_number in range(arguments.rounds + 1):  # the first only warms up
            for which, function in functions.items():
                start = time.perf_counter()
                call(function, tensors)
                if round_number:
                    best[which] = min(best[which], time.perf_counter() - start)
                tensors["now"].grad = tensors["logits"].grad = None
        theirs, ours = best["theirs"] * 1e3, best["ours"] * 1e3
        table.add([f"`{name}`", f"{theirs:.2f} ms", f"{ours:.2f} ms", f"{theirs / ours:.1f}x"])
    table.close(command, arguments.write)


if __name__ == "__main__":
    main()
