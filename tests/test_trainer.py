"""The GRPO trainer on a tiny random Llama: it learns, resumes bit-exactly, and every shortcut keeps the mathematics."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from tiny_llama import END, PROMPTS, V, config, count_sevens, rewards, run, tiny_model, weights

import rl4llm_fast as rf
from rl4llm_fast.trainer import GRPOConfig, sample
from rl4llm_fast.trainer.compare import plain_token_logprobs
from rl4llm_fast.trainer.grpo import GRPOTrainer
from rl4llm_fast.trainer.optimizer import MasterAdamW, learning_rate
from rl4llm_fast.trainer.policy import Policy

transformers = pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
pytestmark = pytest.mark.usefixtures("one_thread")


# It learns


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_improves_a_toy_reward(tmp_path, precision):
    model = tiny_model(dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    result = run(config(tmp_path, steps=40, precision=precision), model)
    values = rewards(result)
    first, last = sum(values[:3]) / 3, sum(values[-5:]) / 5
    assert first < 0.3
    assert last > first + 0.5, values
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert all(math.isclose(line["reward_mean"], value) for line, value in zip(lines, values, strict=True))
    assert (tmp_path / "rewards.png").read_bytes().startswith(b"\x89PNG")


def test_learns_with_kl_entropy_epochs_and_minibatches(tmp_path):
    cfg = config(
        tmp_path, steps=25, epochs=2, minibatches=2, micro_batch_size=5, kl_coef=1e-3, entropy_coef=1e-3,
        loss="ppo_clip", aggregation="seq_mean_token_mean",
    )  # fmt: skip
    result = run(cfg)
    assert sum(rewards(result)[-5:]) / 5 > sum(rewards(result)[:3]) / 3 + 0.3
    assert {"kl_ref", "entropy", "clip_fraction", "ratio_mean"} <= set(result.history[-1])
    assert result.history[-1]["kl_ref"] > 0


def test_saves_a_model_that_loads_again(tmp_path):
    result = run(config(tmp_path, steps=1, save_model=True))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for a, b in zip(weights(result.model), weights(loaded), strict=True):
        assert torch.equal(a, b)


# The same curve, however it is computed


def test_same_curve_fused_and_eager(tmp_path):
    fused = run(config(tmp_path / "fused", steps=8))
    eager = run(config(tmp_path / "eager", steps=8, backend="eager"))
    for a, b in zip(fused.history, eager.history, strict=True):
        assert a["reward_mean"] == b["reward_mean"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"])
def test_accumulation_equals_the_whole_batch(tmp_path, aggregation):
    gradients = []
    for size, layout in ((0, "plain"), (3, "plain"), (5, "shared")):
        trainer = GRPOTrainer(
            config(tmp_path, micro_batch_size=size, layout=layout, aggregation=aggregation, kl_coef=0.05),
            model=tiny_model(), prompts=PROMPTS, reward=count_sevens,
        )  # fmt: skip
        batch = trainer.collect(1)
        trainer.optimizer.step = lambda lr, norm: 0.0
        metrics = trainer.update(batch, 1)
        gradients.append([p.grad.clone() for p in trainer.model.parameters()])
        assert len({len(a) for a in batch.rollout.answers}) > 1  # lengths differ, or the test shows nothing
        assert math.isfinite(metrics["loss"])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_answers_of_advantage_zero_are_skipped_exactly(tmp_path, monkeypatch):
    gradients, forwards = [], []
    for silent in (True, False):
        monkeypatch.setattr("rl4llm_fast.trainer.grpo.silent_at_zero", lambda c, silent=silent: silent)
        trainer = GRPOTrainer(
            config(tmp_path), model=tiny_model(), prompts=PROMPTS, reward=lambda e, a: float(e == [4, 5] and 7 in a)
        )
        batch = trainer.collect(1)
        live = batch.advantages.reshape(4, 8).ne(0).any(1)
        assert 0 < live.sum() < 4
        counted = []
        inner = trainer.policy.head_inputs
        trainer.policy.head_inputs = lambda layout, _i=inner, _c=counted: _c.append(len(layout.token_ids)) or _i(layout)
        trainer.optimizer.step = lambda lr, norm: 0.0
        trainer.update(batch, 1)
        gradients.append([p.grad.clone() for p in trainer.model.parameters()])
        forwards.append(sum(counted))
    assert forwards[0] < forwards[1]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_formula_that_the_demo_compares_with():
    logits, ids = torch.randn(5, V) * 3, torch.arange(5)
    for options in ({"temperature": 1.0}, {"temperature": 0.5, "softcap": 4.0, "return_entropy": True}):
        ours, plain = rf.token_logprobs(logits, ids, **options), plain_token_logprobs(logits, ids, **options)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


# Sampling


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_sampled_logprobs_equal_a_fresh_forward(backend):
    model = tiny_model()
    policy = Policy(model)
    generator = torch.Generator().manual_seed(1)
    arguments = {"group_size": 6, "max_new_tokens": 10, "end_ids": {END, 3}, "temperature": 0.8, "generator": generator}
    if backend == "auto":
        rollout = sample(policy, PROMPTS, **arguments)
    else:
        with rf.use_backend(backend):
            rollout = sample(policy, PROMPTS, **arguments)
    assert len(rollout.answers) == 24
    assert 0 < sum(rollout.ended) < 24
    for i, (answer, kept) in enumerate(zip(rollout.answers, rollout.logprobs, strict=True)):
        prompt = PROMPTS[i // 6]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        fresh = torch.log_softmax(logits / 0.8, -1)[range(len(answer)), answer]
        torch.testing.assert_close(torch.tensor(kept), fresh.detach(), rtol=1e-4, atol=1e-4)
        assert rollout.ended[i] == (answer[-1] in {END, 3})
        assert not {END, 3} & set(answer[:-1])


def test_batches_of_prompts_are_drawn_alike_and_seeds_differ():
    policy = Policy(tiny_model())

    def draw(seed: int):
        generator = torch.Generator().manual_seed(seed)
        return sample(policy, PROMPTS, group_size=4, max_new_tokens=6, end_ids={END}, generator=generator).answers

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    greedy = [
        sample(policy, PROMPTS, max_new_tokens=6, end_ids={END}, greedy=True, batch_size=b).answers for b in (0, 1)
    ]
    assert greedy[0] == greedy[1]


def test_a_position_brings_one_copy_from_the_device(monkeypatch):
    """Whether answers go on; their tokens and log-probabilities come at the end, all at once."""
    copies: dict[str, int] = {"cpu": 0, "tolist": 0}
    for name in copies:
        inner = getattr(torch.Tensor, name)

        def counted(tensor, name=name, inner=inner):
            copies[name] += 1
            return inner(tensor)

        monkeypatch.setattr(torch.Tensor, name, counted)
    policy, found = Policy(tiny_model()), []
    for count in (3, 9):
        copies.update(cpu=0, tolist=0)
        sample(policy, PROMPTS, group_size=2, max_new_tokens=count, end_ids=())
        found.append(dict(copies))
    assert [each["cpu"] for each in found] == [3 + 2, 9 + 2]
    assert found[0]["tolist"] == found[1]["tolist"]


def test_draws_follow_the_distribution():
    model = tiny_model()
    policy = Policy(model)
    generator = torch.Generator().manual_seed(0)
    count = 20_000
    first = [
        a[0]
        for a in sample(
            policy, [PROMPTS[0]], group_size=count, max_new_tokens=1, end_ids=(), generator=generator
        ).answers
    ]
    seen = torch.bincount(torch.tensor(first), minlength=V) / count
    probs = torch.softmax(model(torch.tensor([PROMPTS[0]])).logits[0, -1], -1).detach()
    assert (seen - probs).abs().max() < 5 * (0.25 / count) ** 0.5
    order = probs.argsort(descending=True)
    for options, allowed in (
        ({"top_k": 3}, set(order[:3].tolist())),
        ({"top_p": float(probs[order[0]]) / 2}, {int(order[0])}),
    ):
        rollout = sample(
            policy, [PROMPTS[0]], group_size=500, max_new_tokens=1, end_ids=(), generator=generator, **options
        )
        assert {a[0] for a in rollout.answers} == allowed


# Resuming


def test_resumes_bit_exactly(tmp_path):
    changes = {"checkpoint_every": 3, "epochs": 2, "minibatches": 2, "lr_schedule": "constant", "precision": "bf16"}

    def bf16():
        return tiny_model(dtype=torch.bfloat16)

    whole = run(config(tmp_path / "whole", steps=6, **changes), bf16())

    class CutOff(BaseException):  # a reward's Exception would score 0
        pass

    calls = 0

    def cut_off(example, answer):
        nonlocal calls
        calls += 1
        if calls > 4 * 32 + 5:  # in the middle of step 5, two steps after the checkpoint
            raise CutOff
        return count_sevens(example, answer)

    with pytest.raises(CutOff):
        run(config(tmp_path / "cut", steps=6, **changes), bf16(), reward=cut_off)
    torch.manual_seed(12345)  # what the state of the process was must not matter
    rest = run(config(tmp_path / "cut", steps=6, **changes), bf16())
    timeless = [
        [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in result.history]
        for result in (whole, rest)
    ]
    assert timeless[0] == timeless[1]
    for a, b in zip(weights(whole.model), weights(rest.model), strict=True):
        assert torch.equal(a, b)
    assert not (tmp_path / "cut" / "checkpoint.partial").exists()
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_checkpoint_of_other_settings_or_broken(tmp_path):
    run(config(tmp_path, steps=1, checkpoint_every=1))
    with pytest.raises(ValueError, match=r"learning_rate 0.01 -> 0.5"):
        run(config(tmp_path, steps=2, checkpoint_every=1, learning_rate=0.5))
    assert len(run(config(tmp_path, steps=2, checkpoint_every=1, learning_rate=0.5, resume=False)).history) == 2
    (tmp_path / "checkpoint.pt").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="delete it to start over"):
        run(config(tmp_path, steps=2, checkpoint_every=1))


# The optimizer


def test_master_weights_follow_fp32_adamw():
    torch.manual_seed(0)
    reference = torch.nn.Linear(8, 8)
    half = copy.deepcopy(reference).bfloat16()
    with torch.no_grad():
        for a, b in zip(reference.parameters(), half.parameters(), strict=True):
            a.copy_(b)
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    plain, master = MasterAdamW(reference, **options), MasterAdamW(half, **options)
    assert plain.masters[0] is reference.weight
    for _ in range(20):
        for parameters in (reference.parameters(), half.parameters()):
            torch.manual_seed(1)
            sum((p * torch.randn(p.shape).to(p.dtype)).sum() for p in parameters).backward()
        assert half.weight.grad is None  # moved to fp32 and freed
        norms = plain.step(1e-3, 1.0), master.step(1e-3, 1.0)
        assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    torch.testing.assert_close(master.masters[0], reference.weight, rtol=0, atol=2e-4)
    assert torch.equal(half.weight, master.masters[0].bfloat16())
    before = weights(half)
    (half.weight.sum() * float("nan")).backward()
    assert math.isnan(master.step(1e-3, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(half), strict=True))


def test_learning_rate_by_hand():
    cfg = GRPOConfig(steps=12, warmup_steps=2, learning_rate=1.0, lr_schedule="linear")
    # warm-up 1/2, 2/2; then from 1 down by 1/10 a step: step 3 has done 0 of 10, step 12 has done 9.
    assert [learning_rate(cfg, s) for s in (1, 2, 3, 8, 12)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.1])
    assert learning_rate(GRPOConfig(steps=10, learning_rate=1.0, lr_schedule="cosine"), 6) == pytest.approx(0.5)
