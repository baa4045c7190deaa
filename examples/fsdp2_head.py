"""A loss from hidden states on a head that FSDP2 has sharded: gathered once, for the layer and the loss together.

    torchrun --nproc-per-node 2 examples/fsdp2_head.py

The loss is called inside the forward of the module that owns the head's unit. FSDP2 gathers that unit when the forward
begins, so ``head.weight`` is whole there, and adds up its gradient when the backward ends: nothing else is gathered.
Four heads: tied to the embedding, which is in the same unit; one of its own; frozen, whose gradient is not made (two
products, not three); and frozen with LoRA. Their gradients are compared with those of one process.
"""

from __future__ import annotations

import copy
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import rl4llm_fast as rf

HEADS = ("tied", "separate", "frozen", "lora")


class Model(nn.Module):
    def __init__(self, head: str, vocabulary: int = 97, width: int = 32, layers: int = 2, rank: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        if head == "tied":
            self.head.weight = self.embedding.weight
        self.head.requires_grad_(head in ("tied", "separate"))
        self.down = self.up = None
        if head == "lora":
            self.down = nn.Parameter(torch.randn(rank, width) / width**0.5)
            self.up = nn.Parameter(0.1 * torch.randn(vocabulary, rank))  # trainers begin with zeros

    def forward(self, ids: Tensor, targets: Tensor, num_tokens: int) -> Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        weight = self.head.weight
        if self.down is not None and self.up is not None:
            # x (W + up·down)ᵀ = [x, x downᵀ] [W, up]ᵀ: a head that is wider by the rank, and no merged weight. The op
            # sees one weight that needs a gradient, so it costs the third product; that of W is dropped.
            hidden = torch.cat([hidden, hidden @ self.down.t()], -1)
            weight = torch.cat([weight, self.up], 1)
        return rf.linear_sft_loss(hidden, weight, targets, num_tokens=num_tokens)


def check(rank: int, size: int, device: str, head: str) -> None:
    torch.manual_seed(0)
    model = Model(head).to(device)
    alone = copy.deepcopy(model)
    ids, targets = (torch.randint(97, (2 * size, 16), device=device) for _ in range(2))
    alone(ids, targets, targets.numel()).backward()

    mesh = init_device_mesh(device, (size,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)  # embedding and head: kept until their backward
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums: num_tokens is that of all ranks, so the shares add up
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    own = slice(2 * rank, 2 * rank + 2)
    model(ids[own], targets[own], targets.numel()).backward()
    for (name, wanted), parameter in zip(alone.named_parameters(), model.parameters(), strict=True):
        if wanted.grad is None:
            assert name == "head.weight"
            assert head in ("frozen", "lora")
            assert parameter.grad is None
            continue
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted.grad, rtol=1e-4, atol=1e-6, msg=name)
    if rank == 0:
        print(f"{head} head: gradients of {size} processes are those of one")


def main() -> None:
    if "WORLD_SIZE" not in os.environ:
        raise SystemExit("fsdp2_head.py: start it with torchrun --nproc-per-node 2")
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])
    device = "cuda" if torch.cuda.device_count() >= here else "cpu"  # NCCL wants a GPU for each process
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        if device == "cuda":
            torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
        for head in HEADS:
            check(dist.get_rank(), dist.get_world_size(), device, head)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
