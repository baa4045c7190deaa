"""verl as the tests see it: its own two files where it is installed, and a restatement of them everywhere.

verl's functions are plain Python, its package is not (ray, tensordict and more): the files are loaded beside stand-ins
for what they import. The restatement follows their documentation, a token at a time.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4llm_fast.compat import verl as ours
from rl4llm_fast.compat.verl_losses import POLICY_LOSSES

CORE, TORCH, LINEAR = (target.module for target in (ours.TARGETS[4], ours.TARGETS[0], ours.TARGETS[3]))


class Config:
    """The part of verl's ActorConfig that losses read."""

    clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, None, 0.28
    clip_ratio_c, tau_pos, tau_neg = 3.0, 1.0, 1.05

    def __init__(self, **info: Any) -> None:
        self.global_batch_info = info

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def restated_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    advantages = torch.zeros_like(values)
    for i in range(values.shape[0]):
        value_after = advantage_after = 0.0
        for t in reversed(range(values.shape[1])):
            if mask[i, t]:
                delta = float(rewards[i, t]) + gamma * value_after - float(values[i, t])
                advantage_after, value_after = delta + gamma * lam * advantage_after, float(values[i, t])
            advantages[i, t] = advantage_after
    live = advantages[mask.bool()]
    return (advantages - live.mean()) / (live.var() + 1e-8).sqrt(), advantages + values


def restated_grpo(
    rewards: Tensor, mask: Tensor, index: Any, epsilon: float = 1e-6, norm: bool = True, config: Any = None
) -> tuple[Tensor, Tensor]:
    scores = rewards.sum(-1)
    result = torch.zeros_like(scores)
    for i, score in enumerate(scores):
        group = torch.stack([scores[j] for j in range(len(scores)) if index[j] == index[i]])
        mean, std = (group.mean(), group.std()) if len(group) > 1 else (0.0, 1.0)
        result[i] = (score - mean) / (std + epsilon) if norm else score - mean
    return result[:, None] * mask, result[:, None] * mask


def restated_agg(
    losses: Tensor,
    mask: Tensor,
    mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    rows = [row[live.bool()] for row, live in zip(losses, mask, strict=True)]
    if mode.startswith("token"):
        count = 1 if mode == "token-sum" else batch_num_tokens or sum(len(row) for row in rows)
        return torch.cat(rows).sum() / count * dp_size
    rows = [row for row in rows if len(row)]
    sums = [row.mean() if mode == "seq-mean-token-mean" else row.sum() for row in rows]
    divisor = (loss_scale_factor or losses.shape[1]) if mode.endswith("norm") else 1
    return sum(sums) / (global_batch_size or len(rows)) / divisor * dp_size


def restated_kl(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    d = logprob - ref_logprob
    name = kl_penalty.removesuffix("+")
    if name in ("kl", "k1"):
        value = d
    elif name == "abs":
        value = d.abs()
    elif name in ("mse", "k2"):
        value = d * d / 2
    else:
        e = -d.clamp(-20, 20)
        value = (e.exp() - e - 1).clamp(-10, 10)
    return value.detach() + d * d / 2 - (d * d / 2).detach() if kl_penalty.endswith("+") else value


def restated_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:
    clipped = values + (vpreds - values).clamp(-cliprange_value, cliprange_value)
    plain, limited = (vpreds - returns) ** 2, (clipped - returns) ** 2
    counts = (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    loss = restated_agg(torch.where(limited > plain, limited, plain) / 2, response_mask, loss_agg_mode, *counts)
    return loss, (limited > plain)[response_mask.bool()].float().mean()


def restated_losses(kind: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        live = response_mask.bool()
        low, high = config.clip_ratio_low or config.clip_ratio, config.clip_ratio_high or config.clip_ratio
        log_ratio = log_prob - old_log_prob
        clipped = dual = torch.zeros_like(live)
        if kind == "gspo":
            mean = torch.stack(
                [r[m].mean() if m.any() else r.new_zeros(()) for r, m in zip(log_ratio, live, strict=True)]
            )
            ratio = (log_prob - log_prob.detach() + mean.detach()[:, None]).exp()
        else:
            ratio = log_ratio.exp()
        limited = ratio.clamp(1 - low, 1 + high)
        if kind in ("vanilla", "gspo"):
            loss_mat = -torch.minimum(ratio * advantages, limited * advantages)
            clipped = limited * advantages < ratio * advantages
            if kind == "vanilla":
                dual = (advantages < 0) & (loss_mat > -config.clip_ratio_c * advantages)
                loss_mat = torch.where(dual, -config.clip_ratio_c * advantages, loss_mat)
        elif kind == "sapo":
            tau = torch.where(advantages > 0, config.tau_pos, config.tau_neg)
            loss_mat = -advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
            loss_agg_mode = "seq-mean-token-mean"
        elif kind == "cispo":
            loss_mat, clipped = -limited.detach() * advantages * log_prob, limited != ratio
        else:
            loss_mat = -log_prob * advantages
        loss_mat = loss_mat if rollout_is_weights is None else loss_mat * rollout_is_weights
        value = restated_agg(loss_mat, live, loss_agg_mode, **config.global_batch_info)
        if kind == "gpg":
            return value, {}
        return value, {
            "actor/pg_clipfrac": float(clipped[live].float().mean()),
            "actor/ppo_kl": float(-log_ratio[live].mean().detach()),
            "actor/pg_clipfrac_lower": float(dual[live].float().mean()),
        }

    return loss


def module(name: str, **contents: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__spec__ = importlib.util.spec_from_loader(name, None)
    made.__path__ = []  # a package, so that submodules may be imported
    vars(made).update(contents)
    return made


def restatement() -> dict[str, types.ModuleType]:
    core = module(CORE, POLICY_LOSS_REGISTRY={}, ADV_ESTIMATOR_REGISTRY={"gae": restated_gae, "grpo": restated_grpo})
    core.compute_gae_advantage_return = _renamed(restated_gae, ours.compute_gae_advantage_return)
    core.compute_grpo_outcome_advantage = _renamed(restated_grpo, ours.compute_grpo_outcome_advantage)
    core.compute_value_loss = restated_value_loss
    core.agg_loss, core.kl_penalty = _renamed(restated_agg, ours.agg_loss), restated_kl
    core.ADV_ESTIMATOR_REGISTRY["gae"] = core.compute_gae_advantage_return
    for kind in POLICY_LOSSES:
        core.POLICY_LOSS_REGISTRY[kind] = restated_losses(kind)
        setattr(core, f"compute_policy_loss_{kind}", core.POLICY_LOSS_REGISTRY[kind])

    def register_policy_loss(name: str) -> Callable[[Any], Any]:
        return lambda function: core.POLICY_LOSS_REGISTRY.update({name: function}) or function

    core.register_policy_loss = register_policy_loss
    torch_functional = module(
        TORCH,
        logprobs_from_logits=lambda logits, labels, inplace_backward=True: (
            logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        ),
        entropy_from_logits=lambda logits: torch.distributions.Categorical(logits=logits).entropy(),
        entropy_from_logits_with_chunking=lambda logits, chunk_size=2048: torch.distributions.Categorical(
            logits=logits.float()
        ).entropy(),
    )
    return {"verl": module("verl", __version__="0.9.1"), CORE: core, TORCH: torch_functional}


def _renamed(restated: Any, like: Any) -> Any:
    """The restatement under the argument names of the drop-in, which are verl's."""
    restated.__signature__ = importlib.import_module("inspect").signature(like)
    return restated


def verl_itself(folder: Path) -> dict[str, types.ModuleType]:
    """verl's two files, imported beside stand-ins."""
    decorator = lambda *_: lambda function: function  # noqa: E731
    modules = {
        "verl": module("verl", __version__="0.9.1"),
        "verl.utils": module("verl.utils", as_torch_index=None, group_mean_std=None),
        "verl.utils.device": module("verl.utils.device", get_device_name=None, get_torch_device=None),
        "verl.utils.import_utils": module("verl.utils.import_utils", deprecated=decorator),
        "verl.trainer.config": module("verl.trainer.config", AlgoConfig=type("AlgoConfig", (), {})),
        "verl.workers.config": module("verl.workers.config", ActorConfig=Config),
        "tensordict": module("tensordict", TensorDict=None),
        "omegaconf": module("omegaconf", DictConfig=dict),
    }
    sys.modules.update(modules)
    for name in (TORCH, CORE):
        spec = importlib.util.spec_from_file_location(name, folder.joinpath(*name.split(".")[1:]).with_suffix(".py"))
        assert spec is not None
        assert spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        sys.modules[name] = modules[name]
        parent, _, child = name.rpartition(".")
        setattr(sys.modules.get(parent, types.SimpleNamespace()), child, modules[name])
        spec.loader.exec_module(modules[name])
    return modules


@pytest.fixture(scope="module", params=["restated", "verl"])
def core(request: pytest.FixtureRequest) -> Iterator[types.ModuleType]:
    before = dict(sys.modules)
    spec = importlib.util.find_spec("verl")
    if request.param == "verl":
        if spec is None or spec.origin is None:
            pytest.skip("verl is not installed")
        modules = verl_itself(Path(spec.origin).parent)
    else:
        modules = restatement()
    for name in (CORE, TORCH):  # the packages between
        for parent in itertools.accumulate(name.split(".")[:-1], "{}.{}".format):
            modules.setdefault(parent, module(parent))
    sys.modules.update(modules)
    yield modules[CORE]
    ours.unpatch()
    for name in modules:
        sys.modules.pop(name, None)
        if name in before:
            sys.modules[name] = before[name]


@pytest.fixture
def functional(core: types.ModuleType) -> types.ModuleType:
    return sys.modules[TORCH]


@pytest.fixture
def config() -> type[Config]:
    return Config
