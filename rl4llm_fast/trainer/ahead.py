"""The answers of the next step, drawn while this step is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch

from .policy import Policy
from .sampling import Rollout

Draw = Callable[[Sequence[list[int]], torch.Generator, "Policy | None"], Rollout]


class Ahead:
    """Draws in a thread, under the weights as they are when it is started: one update older than those it teaches.

    An engine beside the policy holds weights of its own; else a copy of the policy does, which is the memory it costs.
    What was drawn is part of a checkpoint, so a run that goes on takes the same answers.
    """

    def __init__(
        self, draw: Draw, prompts_of: Callable[[int], Sequence[list[int]]], policy: Policy, *, engine: bool
    ) -> None:
        self.draw, self.prompts_of = draw, prompts_of
        self.policy, self.copy = policy, None if engine else policy.frozen_copy()
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="sampling")
        self.step = 0  # whose answers ``future`` gives
        self.future: Future[Rollout] = Future()

    @torch.no_grad()
    def start(self, step: int, generator: torch.Generator) -> None:
        """Begin with the answers of ``step``, with a generator of their own from ``generator``."""
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        if self.copy is not None:
            for old, now in zip(self.copy.model.parameters(), self.policy.model.parameters(), strict=True):
                old.copy_(now)
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)  # the thread has a stream of its own
        self.step = step
        self.future = self.pool.submit(self._on_its_stream, self.prompts_of(step), own)

    def _on_its_stream(self, prompts: Sequence[list[int]], generator: torch.Generator) -> Rollout:
        device = self.policy.device
        if device.type != "cuda":
            return self.draw(prompts, generator, self.copy)
        with torch.cuda.stream(torch.cuda.Stream(device)):
            return self.draw(prompts, generator, self.copy)

    def take(self) -> Rollout:
        """What was begun, as soon as it is there."""
        return self.future.result()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "rollout": asdict(self.future.result()) if self.step else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.future = state["step"], Future()
        if self.step:
            self.future.set_result(Rollout(**state["rollout"]))
