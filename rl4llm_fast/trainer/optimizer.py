"""AdamW over an fp32 master copy of bf16 weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import Ranks
from .settings import RunConfig
from .sharding import cut_like, for_file, local, whole


class MasterAdamW:
    """Fused AdamW; parameters in 16 bits get an fp32 master and an fp32 gradient, others are updated as they are.

    lr = 1e-5 times a normalised update is below a bf16 weight's last place: without a master most updates would round
    away. A hook adds each bf16 gradient to the fp32 one as soon as it is complete and frees it, so accumulation over
    micro-batches is in fp32 and only one set of gradients is alive. Of several processes each has its share of a step's
    gradients; they are added up before the step, after which all hold the same weights.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("model: none of its parameters requires a gradient")
        self.params = [p for _, p in named]
        self.masters: list[Tensor] = []
        self._hooks: list[Any] = []
        self._stale = [True] * len(named)  # the fp32 gradient holds the last step's values: overwrite, don't add
        for index, parameter in enumerate(self.params):
            if parameter.dtype in (torch.bfloat16, torch.float16):
                master = parameter.detach().float().requires_grad_()
                master.grad = torch.zeros_like(master)  # kept for good: fresh pages cost more than the addition
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._collector(index, master)))
            else:
                master = parameter
            self.masters.append(master)
        # Norms, biases and other vectors are not decayed.
        matrices = [m for m in self.masters if m.dim() > 1]
        vectors = [m for m in self.masters if m.dim() <= 1]
        groups: list[dict[str, Any]] = [
            {"params": part, "weight_decay": decay}
            for part, decay in ((matrices, weight_decay), (vectors, 0.0))
            if part
        ]
        self.adam = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.names = [name for name, _ in named]
        self.nonfinite: list[str] = []  # the parameters whose gradient stopped the last step that was not taken

    def _collector(self, index: int, master: Tensor) -> Any:
        def collect(parameter: Tensor) -> None:
            assert master.grad is not None
            assert parameter.grad is not None
            if self._stale[index]:
                master.grad.copy_(parameter.grad)
                self._stale[index] = False
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

        return collect

    @torch.no_grad()
    def step(self, lr: float, max_grad_norm: float) -> float:
        """One update; returns the gradient's norm before clipping. A norm that is not finite updates nothing."""
        for index, (parameter, master) in enumerate(zip(self.params, self.masters, strict=True)):
            if master is not parameter and self._stale[index]:
                assert master.grad is not None
                master.grad.zero_()  # this step gave it no gradient
            elif master is parameter and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [m.grad for m in self.masters if m.grad is not None]
        self.ranks.add_up(grad for grad in grads if local(grad) is grad)  # pieces of FSDP's are sums already
        norm = float(whole(nn.utils.get_total_norm(grads)))
        if math.isfinite(norm):
            if 0 < max_grad_norm < norm:
                torch._foreach_mul_(grads, max_grad_norm / (norm + 1e-6))
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
            self._write_back()
        else:
            pairs = [(name, m.grad) for name, m in zip(self.names, self.masters, strict=True) if m.grad is not None]
            found = [name for name, grad in pairs if not bool(local(grad).isfinite().all())]
            self.nonfinite = list(dict.fromkeys(self.ranks.gather(found)))
        self.discard()
        return norm

    def discard(self) -> None:
        """Forget the gradients: the step is not taken."""
        self._stale = [True] * len(self.params)
        for parameter, master in zip(self.params, self.masters, strict=True):
            if master is parameter:
                parameter.grad = None

    def close(self) -> None:
        """Take the hooks off the model, so that it can be trained again by something else."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _write_back(self) -> None:
        pairs = [(p, m) for p, m in zip(self.params, self.masters, strict=True) if m is not p]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])

    def state_dict(self) -> dict[str, Any]:
        """Weights and moments, each in one piece in the first process: any number of them can go on from it."""
        pairs = zip(self.names, self.masters, strict=True)
        weights = {name: for_file(master, self.ranks) for name, master in pairs}
        adam = self.adam.state_dict()
        moments = {i: {key: for_file(v, self.ranks) for key, v in of.items()} for i, of in adam["state"].items()}
        return {"weights": weights, "adam": {**adam, "state": moments}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if sorted(state["weights"]) != sorted(self.names):
            raise ValueError("checkpoint: holds the parameters of another model")
        for name, master in zip(self.names, self.masters, strict=True):
            master.copy_(cut_like(state["weights"][name], master))
        self._write_back()
        params = [p for group in self.adam.param_groups for p in group["params"]]
        moments = {
            i: {key: cut_like(value, params[i]) if value.dim() else value for key, value in of.items()}
            for i, of in state["adam"]["state"].items()
        }
        self.adam.load_state_dict({**state["adam"], "state": moments})


def learning_rate(config: RunConfig, step: int) -> float:
    """The rate of a step, counted from 1: a linear warm-up, then constant, or down to 0 linearly or as a cosine."""
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    done = min(1.0, max(0.0, (step - 1 - config.warmup_steps) / max(1, config.steps - config.warmup_steps)))
    decay = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * warmup * decay[config.lr_schedule]
