"""One training step on given answers: this library's trainers, fused and in plain PyTorch, and two of TRL's.

A batch is plain data, token ids throughout, so that everyone trains on the same tokens; nothing is sampled.
grpo, ppo: {"prompts", "group_size", "answers", "advantages"}, the latter PPO's scores. sft, kto, dpo, rm: {"rows":
[{"prompt", "chosen", "rejected"}]}, whose answers sft and kto take one by one.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import sized

VARIANTS = ("fused", "eager", "trl")
SAMPLED = ("grpo", "ppo")  # trainers that learn from answers to prompts
Step = Callable[[], dict[str, float]]  # {"loss", "grad_norm"}
# A step on a batch of as many answers as it was made for, and what forgets a step that ended half-way.
Taker = tuple[Callable[[dict[str, Any]], dict[str, float]], Callable[[], object]]

_RATE = 1e-6  # the weights move, the batch stays about on-policy
_CLIP = 1.0
_BETA = 0.1  # of DPO


def make_batch(trainer: str, sizes: dict[str, int], vocabulary: int, seed: int = 0) -> dict[str, Any]:
    """Random tokens, with lengths as answers have them: from a quarter of the longest up."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    def answer() -> list[int]:
        return tokens(max(1, sizes["answer"] // 4), sizes["answer"])

    count = sizes["prompts"] if trainer in SAMPLED else sizes.get("pairs", sizes["prompts"])
    prompts = [tokens(sizes["prompt"] // 2, sizes["prompt"]) for _ in range(count)]
    if trainer not in SAMPLED:
        return {"rows": [{"prompt": prompt, "chosen": answer(), "rejected": answer()} for prompt in prompts]}
    answers = [answer() for _ in prompts for _ in range(sizes["group"])]
    advantages = torch.randn(len(answers), generator=generator).tolist()
    return {"prompts": prompts, "group_size": sizes["group"], "answers": answers, "advantages": advantages}


def tokens_of(trainer: str, batch: dict[str, Any]) -> int:
    """What a model reads where every answer is a row with its prompt, without padding."""
    if trainer not in SAMPLED:
        return sum(2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) for row in batch["rows"])
    prompts = sum(len(prompt) for prompt in batch["prompts"]) * batch["group_size"]
    return prompts + sum(map(len, batch["answers"]))


def make_step(
    trainer: str, variant: str, batch: dict[str, Any], model: str, precision: str, device: str, recompute: bool = False
) -> Step:
    """A function that takes one step and returns its loss and the gradient's norm before clipping.

    model: a folder; without weights in it they are random, the same for everyone. recompute: every layer is computed
    again in the backward pass.
    """
    if variant == "trl":
        return TRL[trainer](batch, model, precision, device, recompute)
    return MADE[trainer](batch, _settings(variant, model, precision, device, recompute))


def make_grpo(
    variant: str, batch: dict[str, Any], model: str, precision: str, device: str, recompute: bool = False
) -> Taker:
    """GRPO's step for any batch with as many prompts and answers as ``batch``."""
    if variant == "trl":
        return _trl_grpo_taker(batch, model, precision, device, recompute)
    return _grpo_taker(batch, _settings(variant, model, precision, device, recompute))


def _settings(variant: str, model: str, precision: str, device: str, recompute: bool) -> dict[str, Any]:
    return {
        "model": model,
        "precision": precision,
        "device": device,
        "learning_rate": _RATE,
        "max_grad_norm": _CLIP,
        "gradient_checkpointing": recompute,
        "backend": "eager" if variant == "eager" else "auto",
        "output_dir": tempfile.mkdtemp(),
        "checkpoint_every": 0,
        "progress": False,
    }


def _loaded(settings: dict[str, Any]) -> dict[str, Any]:
    """What a trainer is given beside its config: of a folder without weights the model, which it could not load."""
    if sized.has_weights(settings["model"]):
        return {}
    return dict(zip(("model", "tokenizer"), sized.load(settings["model"], settings["device"]), strict=True))


def _grpo(batch: dict[str, Any], settings: dict[str, Any]) -> Step:
    take, _ = _grpo_taker(batch, settings)
    return lambda: take(batch)


def _grpo_taker(batch: dict[str, Any], settings: dict[str, Any]) -> Taker:
    from rl4llm_fast.trainer.compare import plain_token_logprobs
    from rl4llm_fast.trainer.config import GRPOConfig
    from rl4llm_fast.trainer.grpo import Batch, GRPOTrainer
    from rl4llm_fast.trainer.tasks import Task

    plain = settings["backend"] == "eager"
    sizes = {"prompts_per_step": len(batch["prompts"]), "group_size": batch["group_size"]}
    config = GRPOConfig(**settings, **sizes, head="logits" if plain else "auto")
    task = Task(train=[[1]], reward=lambda example, answer: 0.0)
    made = GRPOTrainer(config, task=task, **_loaded(settings))
    if plain:
        made.policy.logprobs_op = plain_token_logprobs

    def take(given: dict[str, Any]) -> dict[str, float]:
        rollout = _rollout(given)
        unrewarded = Batch(rollout, [0.0] * len(rollout.answers), torch.tensor(given["advantages"]))
        return _two(made.update(unrewarded, step=1))

    return take, made.optimizer.discard


def _dpo(batch: dict[str, Any], settings: dict[str, Any]) -> Step:
    from rl4llm_fast.trainer.dpo import DPOConfig, DPOTrainer

    rows = batch["rows"]
    config = DPOConfig(**settings, batch_size=len(rows), beta=_BETA, reference="live", eval_every=0)
    made = DPOTrainer(config, rows=rows, heldout_rows=rows[:1], **_loaded(settings))
    return lambda: _two(made.step(1))


def take_plain_logprobs() -> None:
    """The obvious formula on logits in the place of the eager oracle, which is slower, for all of this process."""
    from rl4llm_fast import reference
    from rl4llm_fast.trainer.compare import plain_token_logprobs

    def obvious(
        logits: Tensor,
        token_ids: Tensor,
        mask: Tensor | None,
        temperature: Tensor,
        softcap: Tensor | None,
        ignore_index: int,
        return_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        live = reference.live_ids(token_ids, mask, ignore_index)
        ids = token_ids.masked_fill(~live, 0).reshape(-1)
        cap = None if softcap is None else float(softcap)
        found = plain_token_logprobs(
            logits.flatten(0, -2), ids, temperature=float(temperature), softcap=cap, return_entropy=return_entropy
        )
        logp, entropy = found if isinstance(found, tuple) else (found, None)
        shape = token_ids.shape
        logp = logp.reshape(shape).masked_fill(~live, 0.0)
        return logp, None if entropy is None else entropy.reshape(shape).masked_fill(~live, 0.0)

    reference.token_logprobs = obvious


def _ppo(batch: dict[str, Any], settings: dict[str, Any]) -> Step:
    """Policy, reference and value model; values, advantages and one update."""
    from rl4llm_fast.trainer.metrics import Phases
    from rl4llm_fast.trainer.ppo import PPOTrainer
    from rl4llm_fast.trainer.ppo_config import PPOConfig

    rollout, size = _rollout(batch), len(batch["answers"])
    rollout.prompts = [prompt for prompt in rollout.prompts for _ in range(rollout.group_size)]
    rollout.group_size = 1  # each answer has a prompt of its own
    rows = [{"prompt": prompt} for prompt in batch["prompts"]]
    longest = max(map(len, rollout.answers))
    once = {"epochs": 1, "minibatches": 1, "max_new_tokens": longest, "batch_size": size, "heldout": 0}
    config, given = PPOConfig(**settings, **once), _loaded(settings)
    made = PPOTrainer(config, prompts=rows, reward=lambda example, answer: 0.0, **given)

    def step() -> dict[str, float]:
        made.phases = Phases(made.device)
        with made.chosen_backend():
            experience, _ = made.judge(rollout, batch["advantages"])
            found = made.update(experience, 1)
        # On-policy and with whitened advantages the policy's loss is 0 up to rounding: the value model's with it.
        return _two(found | {"loss": found["loss"] + found["value_loss"]})

    return step


def _rollout(batch: dict[str, Any]) -> Any:
    from rl4llm_fast.trainer.sampling import Rollout

    answers = batch["answers"]
    unknown = [[0.0] * len(answer) for answer in answers]  # the sampler's log-probabilities are not asked for
    return Rollout(batch["prompts"], batch["group_size"], answers, unknown, [True] * len(answers))


def _sft(batch: dict[str, Any], settings: dict[str, Any]) -> Step:
    from rl4llm_fast.trainer.sft import SFTConfig, SFTTrainer

    rows = _one_by_one(batch)
    config = SFTConfig(**settings, batch_size=len(rows))
    made = SFTTrainer(config, rows=rows, heldout_rows=rows[:1], **_loaded(settings))
    return lambda: _two(made.step(1))


def _rm(batch: dict[str, Any], settings: dict[str, Any]) -> Step:
    from rl4llm_fast.trainer.rm import RMConfig, RMTrainer

    rows = batch["rows"]
    config = RMConfig(**settings, batch_size=len(rows))
    made = RMTrainer(config, rows=rows, heldout_rows=rows[:1], **_loaded(settings))
    return lambda: _two(made.step(1))


def _kto(batch: dict[str, Any], settings: dict[str, Any]) -> Step:
    from rl4llm_fast.trainer.kto import KTOConfig, KTOTrainer

    rows = _one_by_one(batch)
    config = KTOConfig(**settings, batch_size=len(rows), beta=_BETA, reference="live", eval_every=0)
    made = KTOTrainer(config, rows=rows, heldout_rows=rows[:2], **_loaded(settings))
    return lambda: _two(made.step(1))


def _one_by_one(batch: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "answer": row[side], "desirable": side == "chosen"}
        for row in batch["rows"]
        for side in ("chosen", "rejected")
    ]


def _two(metrics: dict[str, float]) -> dict[str, float]:
    return {"loss": float(metrics["loss"]), "grad_norm": float(metrics["grad_norm"])}


def _trl_arguments(precision: str, device: str) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": device == "cpu",
        "bf16": precision == "autocast",
        "learning_rate": _RATE,
        "max_grad_norm": _CLIP,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }


def _trl_model(model: str, device: str, recompute: bool) -> tuple[Any, Any]:
    network, tokenizer = sized.load(model, device)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if recompute:  # its trainers' own switch is thrown in their loop, which is not run here
        network.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return network, tokenizer


def _trl_grpo(batch: dict[str, Any], model: str, precision: str, device: str, recompute: bool) -> Step:
    take, _ = _trl_grpo_taker(batch, model, precision, device, recompute)
    return lambda: take(batch)


def _trl_grpo_taker(batch: dict[str, Any], model: str, precision: str, device: str, recompute: bool) -> Taker:
    import datasets
    import trl

    network, tokenizer = _trl_model(model, device, recompute)
    size = batch["group_size"]
    arguments = trl.GRPOConfig(
        **_trl_arguments(precision, device),
        num_generations=size,
        per_device_train_batch_size=len(batch["answers"]),
        beta=0.0,
        loss_type="bnpo",  # a mean over the tokens of the batch, as ours
        temperature=1.0,
    )
    data = datasets.Dataset.from_dict({"prompt": ["w"] * len(batch["prompts"])})
    made = trl.GRPOTrainer(
        network,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
    )
    step = _trl_step(made)

    def take(given: dict[str, Any]) -> dict[str, float]:
        prompts = [prompt for prompt in given["prompts"] for _ in range(size)]
        prompt_ids, prompt_mask = _padded(prompts, tokenizer.pad_token_id, left=True)
        answer_ids, answer_mask = _padded(given["answers"], tokenizer.pad_token_id, left=False)
        inputs = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": answer_ids,
            "completion_mask": answer_mask,
            "advantages": torch.tensor(given["advantages"]),
            "num_items_in_batch": answer_mask.sum(),
        }
        return step({name: t.to(device) for name, t in inputs.items()})

    return take, lambda: made.model.zero_grad()


def _trl_dpo(batch: dict[str, Any], model: str, precision: str, device: str, recompute: bool) -> Step:
    import datasets
    import trl

    network, tokenizer = _trl_model(model, device, recompute)
    rows = batch["rows"]
    arguments = trl.DPOConfig(
        **_trl_arguments(precision, device), per_device_train_batch_size=len(rows), beta=_BETA, max_length=None
    )
    data = datasets.Dataset.from_list([{"prompt": "w", "chosen": " w", "rejected": " w w"}])
    reference, _ = _trl_model(model, device, recompute=False)
    made = trl.DPOTrainer(network, ref_model=reference, args=arguments, train_dataset=data, processing_class=tokenizer)
    named = [{f"{name}_ids": ids for name, ids in row.items()} for row in rows]
    inputs = {name: t.to(device) for name, t in made.data_collator(named).items()}
    step = _trl_step(made)
    return lambda: step(inputs)


def _trl_step(made: Any) -> Callable[[dict[str, Any]], dict[str, float]]:
    """Forward, backward, clipping and optimizer, as the trainer's own loop takes them around its loss."""
    made.current_gradient_accumulation_steps = 1
    made.create_optimizer()
    network = made.model.train()

    def step(inputs: dict[str, Any]) -> dict[str, float]:
        # The trainers' loop would have the model prepared, which puts it under autocast; GRPO's loss does so by itself.
        with made.accelerator.autocast(), made.compute_loss_context_manager():
            loss = made.compute_loss(network, inputs)
        made.accelerator.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), _CLIP)
        made.optimizer.step()
        network.zero_grad()
        return {"loss": float(loss.detach()), "grad_norm": float(norm)}

    return step


def _padded(rows: list[list[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, longest)."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        part = slice(longest - len(row), None) if left else slice(len(row))
        ids[i, part], mask[i, part] = torch.tensor(row), 1
    return ids, mask


def agrees(one: float, other: float, precision: str) -> bool:
    """Whether two norms of the first step's gradient are the same up to the rounding of their passes."""
    return math.isclose(one, other, rel_tol=1e-3 if precision == "fp32" else 5e-2)


MADE: dict[str, Callable[..., Step]] = {"sft": _sft, "rm": _rm, "ppo": _ppo, "dpo": _dpo, "kto": _kto, "grpo": _grpo}
TRL: dict[str, Callable[..., Step]] = {"grpo": _trl_grpo, "dpo": _trl_dpo}
