"""The error of every op against the fp64 oracle, per dtype, over hard inputs: the tables of docs/numerics.md.

python -m bench.numerics            print them
python -m bench.numerics --write    rewrite docs/numerics.md between its markers

For each op, output and dtype: the largest error of the backend and of eager PyTorch in the same dtype, the share of
what the error rule allows (rl4llm_fast/testing.py), and the input that was worst.
"""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import rl4llm_fast as rf
from rl4llm_fast import dispatch
from rl4llm_fast.testing import error_bound

BEGIN, END = "<!-- numerics:begin -->", "<!-- numerics:end -->"
DOCUMENT = pathlib.Path(__file__).resolve().parent.parent / "docs" / "numerics.md"
ROWS, VOCABULARIES = 8, (127, 4_097, 50_257)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Outputs = dict[str, Tensor]
Op = Callable[[Tensor, Tensor, Tensor, str, float], Outputs]  # logits, other logits, ids, backend, temperature


def inputs(vocabulary: int) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """(name, logits, other logits, temperature); the worst that a model or a mask produces."""
    normal = 3 * torch.randn(2, ROWS, vocabulary, dtype=torch.float64)
    yield "normal, σ 3", *normal, 1.0
    yield "peaked, σ 30", *(10 * normal), 1.0
    yield "flat", *(1e-3 * normal), 1.0
    yield "offset 1e4", *(normal + 1e4), 1.0
    yield "temperature 1e-3", *(1e-3 * normal), 1e-3
    yield "temperature 1e3", *normal, 1e3
    masked = normal.masked_fill(torch.rand(1, ROWS, vocabulary) < 0.9, -math.inf)
    masked[..., 0] = 0.0
    yield "nine of ten −inf", *masked, 1.0


def token_logprobs(logits: Tensor, other: Tensor, ids: Tensor, backend: str, temperature: float) -> Outputs:
    leaf = logits.clone().requires_grad_()
    logp, entropy = rf.token_logprobs(leaf, ids, temperature=temperature, return_entropy=True, backend=backend)
    (of_logp,) = torch.autograd.grad(logp.sum(), leaf, retain_graph=True)
    (of_entropy,) = torch.autograd.grad(entropy.sum(), leaf)
    return {"logp": logp, "entropy": entropy, "dlogp/dz": of_logp, "dH/dz": of_entropy}


def kl(direction: str) -> Op:
    def op(logits: Tensor, other: Tensor, ids: Tensor, backend: str, temperature: float) -> Outputs:
        leaf = logits.clone().requires_grad_()
        value = rf.kl_divergence(leaf, other, direction=direction, temperature=temperature, backend=backend)  # type: ignore[arg-type]
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        return {direction: value, f"d {direction}/dz": grad}

    return op


OPS: dict[str, dict[str, Op]] = {
    "token_logprobs": {"": token_logprobs},
    "kl_divergence": {direction: kl(direction) for direction in ("reverse", "forward", "jsd")},
}


def measure(
    op: Op, backend: str, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[float, float, float, str]]:
    """output -> (largest error, eager's, share of the bound, worst input); the worst by share."""
    worst: dict[str, tuple[float, float, float, str]] = {}
    for vocabulary in VOCABULARIES:
        for name, wide, other_wide, temperature in inputs(vocabulary):
            logits, other = (t.to(dtype).to(device) for t in (wide, other_wide))
            ids = logits.argsort(-1, descending=True)[:, min(5, vocabulary // 20)]  # a likely token, not the likeliest
            arguments = (ids, "eager", temperature)
            oracle = op(logits.double(), other.double(), *arguments)
            eager = op(logits, other, *arguments)
            got = op(logits, other, ids, backend, temperature)
            for output, exact in ((name, tensor.detach()) for name, tensor in oracle.items()):
                finite = torch.isfinite(exact)
                if not bool(finite.any()):
                    continue
                errors = [float((r[output].detach().double() - exact)[finite].abs().max()) for r in (got, eager)]
                share = errors[0] / error_bound(exact, eager[output], got[output].dtype)
                if output not in worst or share > worst[output][2]:
                    worst[output] = (errors[0], errors[1], share, f"V {vocabulary:,}, {name}")
    return worst


def tables() -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = []
    for op_name, variants in OPS.items():
        for backend in rf.backends()[op_name]:
            if backend == "eager" or dispatch.why_not(op_name, backend, device.type) is not None:
                continue
            lines += [
                f"### {op_name}, backend {backend}",
                "",
                "| output | input dtype | error | eager's error | of the bound | worst input |",
                "|---|---|---|---|---|---|",
            ]
            for op in variants.values():
                for dtype in DTYPES:
                    for output, (error, eager, share, where) in measure(op, backend, device, dtype).items():
                        lines.append(
                            f"| {output} | {str(dtype).removeprefix('torch.')} | {error:.1e} | {eager:.1e} | "
                            f"{share:.0%} | {where} |"
                        )
            lines.append("")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return "\n".join([f"torch {torch.__version__}, {where}, `python -m bench.numerics --write`", "", *lines]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.numerics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="rewrite docs/numerics.md between its markers")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    text = tables()
    print(text)
    if arguments.write:
        head, rest = DOCUMENT.read_text().split(BEGIN)
        DOCUMENT.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
