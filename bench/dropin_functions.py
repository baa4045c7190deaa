"""verl's and OpenRLHF's functions and their drop-ins, side by side: ``python -m bench.dropin_functions verl``.

Forward, and backward where there is one, in fp32: 64 answers of up to 512 tokens, and 256 tokens of a vocabulary of
49,152 for the functions of logits. Time: the best of interleaved rounds.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from typing import Any

import torch

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=["verl", "openrlhf"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    library = arguments.library
    drop_ins, tensors = importlib.import_module(f"rl4llm_fast.compat.{library}"), data()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"| function | {library} | drop-in | ratio |\n|---|---|---|---|")
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
        print(f"| `{name}` | {theirs:.2f} ms | {ours:.2f} ms | {theirs / ours:.1f}x |", flush=True)


if __name__ == "__main__":
    main()
