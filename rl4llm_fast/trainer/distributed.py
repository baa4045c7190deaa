"""A run over several processes, one a device, as torchrun starts them: who does what, and what they tell each other.

Every process knows every row of a step and works on its share of them, normalised by the whole step: the shares of the
loss add up to the loss of one process, and so do the gradients. They are added once a step, in fp32, just before the
optimizer's step: simpler than overlapping them with the backward pass, and nothing on the way is averaged.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

MESSAGE_BYTES = 32 * 2**20  # of gradients: long enough for a link's full speed

Item = TypeVar("Item")
Result = TypeVar("Result")


class Ranks:
    """The processes of a run; one, where nobody else is there."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and draws progress bars."""
        return self.rank == 0

    def cut(self, count: int) -> slice:
        """This process's part of ``count`` things: a run of neighbours, as long as another's or one longer."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def share(self, items: Sequence[Item]) -> list[Item]:
        return list(items[self.cut(len(items))])

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """Everybody's items, in the order of the ranks: what ``share`` took apart."""
        if self.size == 1:
            return list(items)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """``function`` of each item; each process calls it on its share."""
        return self.gather([function(item) for item in self.share(items)])

    def sum(self, value: float | Tensor) -> float:
        """The sum of everybody's value, in the order of the ranks: the same bits everywhere."""
        return float(sum(self.gather([float(value)])))

    def of_first(self, value: Item) -> Item:
        """What the first process has there."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes the sum of everybody's; small ones travel together, for each message has a price.

        Two messages at a time: while one is on its way the next is put together.
        """
        if self.size == 1:
            return
        sent: list[tuple[Any, Tensor, list[Tensor]]] = []  # what is waited for, the message, the tensors in it
        for part in in_messages(tensors):
            message = part[0] if len(part) == 1 else torch.cat([tensor.reshape(-1) for tensor in part])
            sent.append((dist.all_reduce(message, async_op=True), message, part))
            if len(sent) > 1:
                _arrived(*sent.pop(0))
        for one in sent:
            _arrived(*one)

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes the first process's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)


def in_messages(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors of one device and dtype together, up to ``MESSAGE_BYTES``; a larger one is a message by itself."""
    found: list[list[Tensor]] = []
    filling: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        kind, size = (tensor.device, tensor.dtype), tensor.numel() * tensor.element_size()
        if size >= MESSAGE_BYTES:
            found.append([tensor])
            continue
        part, used = filling.get(kind, ([], 0))
        if not part or used + size > MESSAGE_BYTES:
            part, used = [], 0
            found.append(part)
        part.append(tensor)
        filling[kind] = part, used + size
    return found


def _arrived(work: Any, message: Tensor, part: list[Tensor]) -> None:
    work.wait()
    if len(part) > 1:
        pieces = message.split([tensor.numel() for tensor in part])
        torch._foreach_copy_(part, [piece.view(tensor.shape) for piece, tensor in zip(pieces, part, strict=True)])


def join() -> Ranks:
    """The processes that torchrun started, or those of a process group that is there already; else this one alone."""
    if not dist.is_available():
        return Ranks()
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
            return Ranks()
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_leave)
    place = os.environ.get("LOCAL_RANK")  # of a group that somebody else made: where they computed, they stay
    if torch.cuda.is_available() and place is not None and int(place) < torch.cuda.device_count():
        torch.cuda.set_device(int(place))
    return Ranks(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def only_one(command: str) -> None:
    """Raise ValueError if several processes were started for what one does by itself."""
    if (size := join().size) > 1:
        raise ValueError(f"{command}: runs in one process, but {size} were started")


def say(text: str) -> None:
    """Print it once, whatever the number of processes."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
        print(text)
