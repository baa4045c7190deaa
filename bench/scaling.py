"""A model of a training step on 8, 64 and 1,024 GPUs, from figures of one GPU and the collectives of the head.

    python -m bench.scaling                 print the tables
    python -m bench.scaling --performance   write them to docs/performance.md

Figures of one GPU come from the newest result of the suite gpu (bench/results); what none has yet comes from what
others published for an H100, and the tables say which is which. Nothing here is a measurement of many GPUs.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .report import RESULTS, ROOT, newest, rewrite

PAGE = ROOT / "docs" / "performance.md"


@dataclass(frozen=True)
class Figure:
    value: float
    source: str


@dataclass(frozen=True)
class Work:
    """A decoder of about 7 billion parameters; the head's shape is that of the suite's linear cases."""

    tokens: int = 8_192  # of a micro-batch, in each tensor-parallel group
    micro_batches: int = 8
    width: int = 4_096
    vocabulary: int = 131_072
    layers: int = 32

    @property
    def body(self) -> int:
        """Parameters of the layers: 4·D² of attention and 8·D² of the feed-forward part in each."""
        return 12 * self.layers * self.width**2

    @property
    def parameters(self) -> int:
        return self.body + self.vocabulary * self.width


@dataclass(frozen=True)
class Link:
    """Between the GPUs of a group. A collective takes ``latency`` for each doubling of the ranks, and its bytes."""

    name: str
    bytes_per_s: float  # each way, of one GPU
    latency_s: float


# Data sheets: NVLink 4 gives an H100 900 GB/s, both directions together; NDR InfiniBand 400 Gbit/s a port, one a GPU.
NVLINK = Link("NVLink", 450e9, 5e-6)
INFINIBAND = Link("InfiniBand", 50e9, 10e-6)
_OF_THE_LINK = 0.8  # what a collective of many megabytes gets of it: an assumption
_NODE = 8  # GPUs that NVLink joins

# One GPU. (figure, the suite's case, or ceiling, that measures it, value, who published it)
_LOSS_CASE = "policy_loss grpo k3/forward+backward/fp32/256x4096"
_HEAD_CASE = "linear_token_logprobs/forward+backward/bf16/8192x4096x131072"
_PUBLISHED = {
    "head": (_HEAD_CASE, 50.4e-3, "published: Liger 0.8 on an H100, four products"),
    "loss": (_LOSS_CASE, 200e-6, "published: the best known elsewhere on an H100, for 1,048,576 tokens"),
    "products": ("bf16", 798e12, "published for an H100: bf16 products, FLOP/s"),
    "copy": ("copy", 3.0e12, "published for an H100: a device copy, read and write, bytes/s"),
}


def figures(result: dict[str, Any] | None) -> dict[str, Figure]:
    """What a result of the suite gpu has measured, and the published figures for the rest."""
    found = {name: Figure(value, source) for name, (_, value, source) in _PUBLISHED.items()}
    if result is None:
        return found
    meta = result["meta"]
    source = f"measured: {meta['device']}, {meta['date'][:10]}, commit {meta['git']}"
    for name in ("head", "loss"):
        for record in result["cases"]:
            ours = record["results"][0]
            if record["name"] == _PUBLISHED[name][0] and ours.get("correct") and "median_ms" in ours:
                found[name] = Figure(ours["median_ms"] * 1e-3, source)
    found["copy"] = Figure(result["ceilings_bytes_per_s"]["copy"], source)
    found["products"] = Figure(result["ceilings_flops_per_s"]["bf16"], source)
    return found


def link_of(ranks: int, stride: int = 1) -> Link:
    """What joins ``ranks`` GPUs that stand ``stride`` apart: NVLink inside a node of eight."""
    return NVLINK if ranks * stride <= _NODE else INFINIBAND


def all_gather(size: float, ranks: int, link: Link) -> float:
    """Seconds until each of the ranks has the ``size`` bytes of every other."""
    if ranks == 1:
        return 0.0
    return (ranks - 1) * size / (link.bytes_per_s * _OF_THE_LINK) + link.latency_s * math.ceil(math.log2(ranks))


def all_reduce(size: float, ranks: int, link: Link) -> float:
    """Seconds for the sum of ``size`` bytes: a reduce-scatter and an all-gather of a part each."""
    return 2 * all_gather(size / ranks, ranks, link)


def head_collectives(work: Work, ranks: int, entropy: bool = False) -> float:
    """Of one micro-batch, as rl4llm_fast/vocab_parallel.py makes them, one after the other.

    The slices' sizes (8 bytes a rank); maximum, log-sum, log-probability and perhaps entropy of every token in fp32;
    the sum of d hidden in bf16.
    """
    link = link_of(ranks)
    numbers = all_gather(work.tokens * 4 * (3 + entropy), ranks, link)
    return all_gather(8, ranks, link) + numbers + all_reduce(work.tokens * work.width * 2, ranks, link)


def gathered_logits(work: Work, ranks: int) -> float:
    """What the head would send instead if each rank gathered the whole rows of logits in bf16."""
    return all_gather(work.tokens * work.vocabulary / ranks * 2, ranks, link_of(ranks))


def step(work: Work, tensor: int, data: int, figure: dict[str, Figure]) -> dict[str, float]:
    """Seconds of the parts of one step on ``tensor`` × ``data`` GPUs, one after the other."""
    each, tokens = work.micro_batches, work.tokens * work.micro_batches
    activations = all_reduce(work.tokens * work.width * 2, tensor, link_of(tensor))
    own = work.parameters / tensor
    return {
        "layers": 6 * work.body * tokens / tensor / figure["products"].value,
        "their collectives": each * 4 * work.layers * activations,
        "head and loss": each * (figure["head"].value / tensor + figure["loss"].value * work.tokens / 2**20),
        "its collectives": each * head_collectives(work, tensor),
        "gradients and weights": all_reduce(2 * own, data, link_of(data, tensor)),
        "update": 28 * own / data / figure["copy"].value,  # gradient and weight in bf16, weight and moments in fp32
    }


LAYOUTS = ((1, 1), (8, 1), (8, 8), (8, 128))


def markdown(work: Work, figure: dict[str, Figure]) -> str:
    """The figures, a row a layout, and the head alone by the width of its group."""
    names = {
        "head": f"head and loss from hidden states, {work.tokens:,} × {work.width:,} × {work.vocabulary:,} in bf16",
        "loss": "policy loss from log-probabilities",
        "products": "matrix products",
        "copy": "memory",
    }
    shown = {"head": ("ms", 1e3), "loss": ("µs", 1e6), "products": ("TFLOP/s", 1e-12), "copy": ("TB/s", 1e-12)}
    lines = ["| of one GPU | | from |", "|---|---|---|"]
    for key, (unit, factor) in shown.items():
        lines.append(f"| {names[key]} | {figure[key].value * factor:.4g} {unit} | {figure[key].source} |")
    made = [(tensor, data, step(work, tensor, data, figure)) for tensor, data in LAYOUTS]
    parts = list(made[0][2])
    lines += ["", "Milliseconds of a step:", ""]
    lines.append("| GPUs | tensor × data parallel | " + " | ".join(parts) + " | step | tokens/s of a GPU |")
    lines.append("|---" * (len(parts) + 4) + "|")
    for tensor, data, seconds in made:
        total = sum(seconds.values())
        rate = work.tokens * work.micro_batches / tensor / total
        cells = " | ".join(f"{1e3 * seconds[part]:,.1f}" for part in parts)
        lines.append(f"| {tensor * data:,} | {tensor} × {data} | {cells} | {1e3 * total:,.0f} | {rate:,.0f} |")
    lines += ["", "Milliseconds of the head, one micro-batch, over the ranks of its group:", ""]
    lines += [
        "| ranks | link | head and loss | its collectives | if the logits were gathered instead |",
        "|---" * 5 + "|",
    ]
    for ranks in (2, 4, 8, 16, 64):
        own, sent, whole = figure["head"].value / ranks, head_collectives(work, ranks), gathered_logits(work, ranks)
        cells = " | ".join(f"{1e3 * seconds:,.2f}" for seconds in (own, sent, whole))
        lines.append(f"| {ranks} | {link_of(ranks).name} | {cells} |")
    lines += [
        "",
        f"`python -m bench.scaling`. Assumed: {work.layers} layers of width {work.width:,} and a head of "
        f"{work.vocabulary:,} rows ({work.parameters / 1e9:.1f} billion parameters); {work.micro_batches} "
        f"micro-batches of {work.tokens:,} tokens for each tensor-parallel group, so the batch grows with the "
        "data-parallel side. The layers' products run at the rate above (attention itself, norms, sampling and the "
        "sampler's weights are left out), four all-reduces of the activations a layer; the head's work divides by the "
        "ranks, with four products as under `tp_group=` below one chunk. Optimizer states are sharded over the "
        "data-parallel side, gradients reduced and weights gathered in bf16, once a step. "
        f"NVLink {NVLINK.bytes_per_s / 1e9:.0f} and InfiniBand {INFINIBAND.bytes_per_s / 1e9:.0f} GB/s each way of a "
        f"GPU, {_OF_THE_LINK:.0%} of it used, {NVLINK.latency_s * 1e6:.0f} and {INFINIBAND.latency_s * 1e6:.0f} µs for "
        f"each doubling of the ranks; nodes of {_NODE}. Nothing overlaps: a framework hides part of the gradients' "
        "exchange behind the backward. Whether one GPU holds the model is not asked.",
    ]
    return "\n".join(lines)


def _measured(folder: pathlib.Path = RESULTS) -> dict[str, Any] | None:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in newest(folder) if path.name.startswith("gpu-")]
    return found[-1] if found else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description="A model of a step on many GPUs.")
    parser.add_argument("--performance", nargs="?", const=PAGE, type=pathlib.Path, help="write it to that page")
    arguments = parser.parse_args(argv)
    text = markdown(Work(), figures(_measured()))
    if arguments.performance is None:
        print(text)
        return 0
    rewrite(arguments.performance, "scaling", [text])
    print(f"rewrote the model in {arguments.performance}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
