"""Answers from an inference engine beside the policy: a stand-in of vLLM's interface, and of the engine itself."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
from tiny_data import settings, timeless
from tiny_llama import END, PROMPTS, config, count_sevens, save_with_tokenizer, tiny_model, weights

from rl4llm_fast.trainer import PPOConfig, VLLMSampler, sample, train_grpo, train_ppo
from rl4llm_fast.trainer.grpo import GRPOTrainer
from rl4llm_fast.trainer.policy import Policy

transformers = pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
pytestmark = pytest.mark.usefixtures("one_thread")


class Engine:
    """An inference engine as far as a trainer sees it: weights of its own, answers by seed."""

    def __init__(self, model=None) -> None:
        self.model = model or tiny_model(seed=99)
        self.policy = Policy(self.model)
        self.pushes, self.calls = 0, []

    def load_weights(self, weights) -> None:
        own = dict(self.model.named_parameters())
        for name, weight in weights:
            assert not weight.requires_grad
            own.pop(name).data.copy_(weight)
        assert not own  # all of them
        self.pushes += 1

    def generate(self, prompts, *, max_new_tokens, end_ids, temperature, top_p, top_k, seed):
        self.calls.append(seed)
        answers = []
        for i, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(seed + i)
            rollout = sample(
                self.policy, [prompt], max_new_tokens=max_new_tokens, end_ids=end_ids, temperature=temperature,
                top_p=top_p, top_k=top_k, generator=generator,
            )  # fmt: skip
            answers.append((rollout.answers[0], rollout.logprobs[0]))
        return answers


def train(tmp_path, engine, **changes):
    cfg = config(tmp_path, **changes)
    return train_grpo(cfg, model=tiny_model(), prompts=PROMPTS, reward=count_sevens, sampler=engine)


def test_learns_from_an_engine_that_has_the_weights_of_each_update(tmp_path):
    engine = Engine()
    result = train(tmp_path, engine, steps=12, temperature=0.9)
    moved = [row for row in result.history[:-1] if "sampler_gap" in row]  # the others had nothing to learn from
    assert engine.pushes == 1 + len(moved) > 8
    assert len(set(engine.calls)) == 12
    assert result.history[-1]["reward_mean"] > result.history[0]["reward_mean"] + 0.1
    gaps = [row["sampler_gap"] for row in result.history if "sampler_gap" in row]  # none where no answer has advantage
    assert len(gaps) > 5
    assert max(gaps) < 1e-4  # its log-probabilities are those of the policy's weights, step after step
    assert all(row["rollout_logp"] == -row["entropy_sampled"] < 0 for row in result.history)


def test_the_log_probabilities_of_an_engine_enter_the_loss(tmp_path):
    class Colder(Engine):
        """An engine that rounds: what it reports is not what the policy says."""

        def generate(self, prompts, **options):
            answers = super().generate(prompts, **options)
            return [(ids, [value - 0.2 for value in logp]) for ids, logp in answers]

    plain, weighed = (
        train(tmp_path / name, Colder(), steps=1, rollout_correction=name, rollout_cap=1.1)
        for name in ("none", "truncate")
    )
    assert plain.history[0]["sampler_gap"] == pytest.approx(0.2, abs=1e-4)
    assert weighed.history[0]["loss"] == pytest.approx(1.1 * plain.history[0]["loss"], rel=1e-3)


def test_goes_on_bit_by_bit(tmp_path):
    changes = {"checkpoint_every": 2, "epochs": 2, "minibatches": 2}
    whole = train(tmp_path / "whole", Engine(), steps=4, **changes)
    train(tmp_path / "cut", Engine(), steps=2, **changes)
    rest = train(tmp_path / "cut", Engine(), steps=4, **changes)
    assert timeless(whole) == timeless(rest)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole.model), weights(rest.model), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answers: answers[1:], "wanted 32 answers, got 31"),
        (lambda answers: [(ids, logp[1:]) for ids, logp in answers], "answer 0 has . tokens and . log-probabilities"),
        (lambda answers: [([], []), *answers[1:]], "answer 0: wanted 1 to 4 tokens, got 0"),
        (lambda answers: [([1] * 5, [-1.0] * 5), *answers[1:]], "answer 0: wanted 1 to 4 tokens, got 5"),
        (lambda answers: [([32], [-1.0]), *answers[1:]], r"answer 0 has tokens outside the vocabulary \[0, 32\)"),
        (lambda answers: [([1], [float("nan")]), *answers[1:]], "answer 0: wanted log-probabilities, got nan"),
        (lambda answers: [([1], [0.5]), *answers[1:]], r"answer 0: wanted log-probabilities, got 0\.5"),
    ],
)
def test_nonsense_of_an_engine_is_refused(tmp_path, change, message):
    class Broken(Engine):
        def generate(self, prompts, **options):
            return change(super().generate(prompts, **options))

    with pytest.raises(ValueError, match="sampler: " + message):
        train(tmp_path, Broken(), steps=1)


def test_ppo_takes_its_answers_there_too(tmp_path):
    engine = Engine()
    cfg = PPOConfig(**settings(tmp_path, steps=3, heldout=0, max_new_tokens=4, kl_coef=0.01, stop_tokens=[3]))
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    result = train_ppo(cfg, model=tiny_model(), prompts=rows, reward=count_sevens, sampler=engine)
    assert (engine.pushes, len(engine.calls)) == (3, 3)
    assert all(row["rollout_logp"] == -row["entropy_sampled"] for row in result.history)


# vLLM, whose interface a module of the same name stands in for


class FakeLLM:
    def __init__(self, model, seed, logprobs_mode, **options) -> None:
        assert logprobs_mode == "processed_logprobs"
        self.options = options
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
        self.engine = Engine(loaded)
        self.resets = 0
        runner = types.SimpleNamespace(model=self.engine)
        driver = types.SimpleNamespace(driver_worker=types.SimpleNamespace(model_runner=runner))
        self.llm_engine = types.SimpleNamespace(model_executor=driver)

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def generate(self, prompts, params, use_tqdm):
        outputs = []
        for prompt, p in zip(prompts, params, strict=True):
            assert p.ignore_eos
            assert p.logprobs == 0
            ((ids, logp),) = self.engine.generate(
                [prompt["prompt_token_ids"]], max_new_tokens=p.max_tokens, end_ids=p.stop_token_ids,
                temperature=p.temperature, top_p=p.top_p, top_k=p.top_k, seed=p.seed,
            )  # fmt: skip
            steps = [{token: types.SimpleNamespace(logprob=value)} for token, value in zip(ids, logp, strict=True)]
            outputs.append(types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(ids), logprobs=steps)]))
        return outputs


@pytest.fixture
def vllm(monkeypatch):
    import importlib.machinery

    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = FakeLLM, lambda **values: types.SimpleNamespace(**values)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    return module


def test_vllm_by_its_name(tmp_path, vllm):
    save_with_tokenizer(tmp_path / "m")
    cfg = config(
        tmp_path / "out", model=str(tmp_path / "m"), steps=3, sampler="vllm",
        sampler_options={"gpu_memory_utilization": 0.3}, stop_tokens=["w3", 5],
    )  # fmt: skip
    trainer = GRPOTrainer(cfg, prompts=PROMPTS, reward=lambda example, text: text.count("w7") / 4)
    assert isinstance(trainer.sampler, VLLMSampler)
    assert trainer.sampler.llm.options == {"gpu_memory_utilization": 0.3}
    assert trainer.end_ids == {3, 5, END}
    result = trainer.run()
    assert trainer.sampler.llm.resets == trainer.sampler.llm.engine.pushes == 3
    assert all(row.get("sampler_gap", 0.0) < 1e-5 for row in result.history)
    own = dataclasses.replace(cfg, output_dir=str(tmp_path / "direct"), sampler="own", sampler_options={})
    reward = trainer.task.reward
    assert timeless(train_grpo(own, prompts=PROMPTS, reward=reward, sampler=Engine())) == timeless(result)


def test_without_vllm(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "vllm")
    with pytest.raises(ImportError, match=r"pip install 'rl4llm_fast\[vllm\]'"):
        GRPOTrainer(config(tmp_path, sampler="vllm"), model=tiny_model(), prompts=PROMPTS, reward=count_sevens)
    with pytest.raises(ValueError, match="sampler: wanted own: the log-probabilities of vLLM"):
        config(tmp_path, sampler="vllm", top_p=0.9, old_logprobs="sampler")


# Stop tokens


def test_stop_tokens_end_an_answer(tmp_path):
    trainer = GRPOTrainer(
        config(tmp_path, stop_tokens=[3, 7]), model=tiny_model(), prompts=PROMPTS, reward=count_sevens
    )
    assert trainer.end_ids == {3, 7, END}
    rollout = trainer.collect(1).rollout
    assert any(answer[-1] in (3, 7) and len(answer) < 4 for answer in rollout.answers)
    assert not any({3, 7} & set(answer[:-1]) for answer in rollout.answers)
    for token in ("seven", True, 2.5):
        with pytest.raises(ValueError, match="stop_tokens: wanted token ids, or texts that are one token"):
            GRPOTrainer(config(tmp_path, stop_tokens=[token]), model=tiny_model(), prompts=PROMPTS, reward=count_sevens)
