"""FSDP2: weights, gradients and the optimizer's state cut into as many parts as there are processes."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import Ranks


def shard(model: Any, ranks: Ranks, precision: str) -> None:
    """Cut a causal language model's weights over the processes, in place: each layer is a unit, and so is the rest.

    The rest, embedding, last norm and head, is one unit, gathered when the forward begins and kept until the backward
    ends: the losses take the head's weight from there, whole, with no gathering of their own. The weights become fp32
    (that is the master copy); under ``precision = "bf16"`` they are gathered, and multiplied, in bf16. Gradients are
    added up in fp32, not averaged: each process's are its share of the step's.

    Raises:
        ValueError: the model has no layers that transformers marks as such.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError("parallel: this model has no layers that transformers marks as such, which fsdp needs")
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.size,))
    compute = torch.bfloat16 if precision == "bf16" else None
    options: dict[str, Any] = {
        "mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    }  # fmt: skip
    model.float()
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # a factor of 1 is else a kind of sum that gloo has not
    model.computes_in = compute or torch.float32  # unlike its parameters
    model.decode = types.MethodType(_decode, model)
    register_fsdp_forward_method(model, "decode")


def _decode(model: Any, **inputs: Any) -> Any:
    """The decoder without its head, called through the module that gathers the weights of both."""
    return model.base_model(**inputs)


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece; every process must ask for it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def for_file(tensor: Tensor, ranks: Ranks) -> Tensor:
    """A tensor that is cut over the processes in one piece, on the CPU of the first and empty elsewhere.

    Every process must ask for it. One tensor at a time is whole on the devices: a model with its moments would not fit.
    """
    piece = whole(tensor).detach()
    if local(tensor) is tensor:
        return piece
    return piece.cpu() if ranks.first else piece.new_empty(0)


def local(tensor: Tensor) -> Tensor:
    """This process's piece."""
    piece = getattr(tensor, "to_local", None)
    return tensor if piece is None else piece()


def cut_like(tensor: Tensor, other: Any) -> Tensor:
    """``tensor``, cut as ``other`` is."""
    if not hasattr(other, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def whole_state(model: nn.Module, precision: str, ranks: Ranks) -> dict[str, Tensor]:
    """What the first process saves of a sharded model: tensors in one piece, in the precision it is computed in."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return {name: for_file(value, ranks).to("cpu", dtype) for name, value in model.state_dict().items()}
