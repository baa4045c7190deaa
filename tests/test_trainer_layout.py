"""Prompts and answers as rows of a forward pass: each token sees what it would in a row of its own."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_llama import END, PROMPTS, config, run, tiny_model

from rl4llm_fast import dispatch
from rl4llm_fast.trainer.devices import host_backend, to_device
from rl4llm_fast.trainer.layout import packed_layout, plain_layout, shared_layout
from rl4llm_fast.trainer.policy import Policy

pytest.importorskip("transformers", reason="the trainer needs the extra 'trainer'")
pytestmark = pytest.mark.usefixtures("one_thread")


def answers_with_shared_prefixes() -> tuple[list[list[int]], list[list[int]], list[int]]:
    answers = [[5, 6, END], [5, 6, 7, 8], [5, 6, END], [9], [5], [9, 9, 9, 9], [1, 2, END], [1, 3]]
    groups = [0, 0, 0, 0, 2, 2, 2, 2]
    return [PROMPTS[g] for g in groups], answers, groups


def test_shared_layout_equals_plain_layout():
    model = tiny_model()
    policy = Policy(model)
    assert policy.layout == "auto"
    assert policy.decoder is not None
    prompts, answers, groups = answers_with_shared_prefixes()
    results = []
    for layout in (plain_layout(prompts, answers), shared_layout(prompts, answers, groups)):
        model.zero_grad()
        logp, entropy = policy.token_logprobs(layout, temperature=0.7, return_entropy=True)
        upstream = torch.linspace(-1, 1, len(logp))
        ((logp + 0.3 * entropy) * upstream).sum().backward()
        results.append((logp.detach(), entropy.detach(), [p.grad.clone() for p in model.parameters()]))
        size = layout.input_ids.numel()
    assert size < plain_layout(prompts, answers).input_ids.numel()
    for a, b in zip(*((r[0], r[1], *r[2]) for r in results), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # and both are what the model itself says of each answer in a row of its own
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected.append(torch.log_softmax(logits / 0.7, -1)[range(len(answer)), answer])
    torch.testing.assert_close(results[0][0], torch.cat(expected).detach(), rtol=1e-4, atol=1e-5)


def test_layout_tree_by_hand():
    # Prompt 1 2 3; answers 5 6 and 5 7: one row 1 2 3 5, whose 3 predicts 5 and whose 5 predicts 6 and 7.
    layout = shared_layout([[1, 2, 3]] * 2, [[5, 6], [5, 7]], [0, 0])
    assert layout.input_ids.tolist() == [[1, 2, 3, 5]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3]]
    assert layout.source.tolist() == [2, 3, 3]
    assert layout.token_ids.tolist() == [5, 6, 7]
    assert layout.prediction.tolist() == [0, 1, 0, 2]
    # Answers 5 6 8 and 7 9 8: siblings do not see each other.
    layout = shared_layout([[1]] * 2, [[5, 6, 8], [7, 9, 8]], [0, 0])
    assert layout.input_ids.tolist() == [[1, 5, 6, 7, 9]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 1, 2]]
    assert (~layout.unseen())[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1],
    ]  # fmt: skip


def test_a_layout_shows_each_token_what_a_row_of_its_own_would():
    """Random trees, with answers that are equal, or the beginning of others: found back from mask and positions."""
    draw = random.Random(0)
    for _ in range(100):
        vocabulary, prompts, answers, groups = draw.choice([2, 3, 9]), [], [], []
        for group in range(draw.randint(1, 4)):
            prompt = [draw.randrange(vocabulary) for _ in range(draw.randint(1, 5))]
            for _ in range(draw.randint(1, 6)):
                prompts.append(prompt)
                answers.append([draw.randrange(vocabulary) for _ in range(draw.randint(1, 6))])
                groups.append(group)
        for layout in (shared_layout(prompts, answers, groups), packed_layout(prompts, answers, 12)):
            sees, (rows, width) = ~layout.unseen()[:, 0], layout.shape
            assert sees.any(-1).all()  # padding too: no row of a softmax is empty
            source, expected = layout.of_answers(layout.source).tolist(), iter(layout.of_answers(layout.token_ids))
            for prompt, answer in zip(prompts, answers, strict=True):
                for t, token in enumerate(answer):
                    row, column = divmod(source.pop(0), width)
                    seen = sees[row, column].nonzero().flatten()
                    assert layout.input_ids[row, seen].tolist() == prompt + answer[:t]
                    assert layout.position_ids[row, seen].tolist() == list(range(len(prompt) + t))
                    assert next(expected) == token
            mask = layout.additive_mask(torch.bfloat16)
            assert mask.shape == (rows, 1, width, width)
            assert all(stride % 16 == 0 for stride in mask.stride()[:-1])
            assert torch.equal(mask == 0, ~layout.unseen())


def test_long_answers_take_rows_of_their_own_without_a_mask(monkeypatch):
    """One row for four answers of 20,000 tokens would need a mask of 6.4e9 entries: it is not made for nothing."""
    policy = Policy(tiny_model())
    prompts, short = [[1, 2, 3]] * 4, [[5, 6, 7], [5, 6, 8], [5, 9, 7], [4, 6, 7]]
    assert policy.choose_layout(prompts, short, [0] * 4).until is not None
    monkeypatch.setattr("rl4llm_fast.trainer.layout.Layout.unseen", None)
    layout = policy.choose_layout(prompts, [[4 + i] * 20_000 for i in range(4)], [0] * 4)
    assert layout.until is None
    assert layout.shape == (4, 20_002)


def test_on_a_gpu_the_choice_minds_the_mask(monkeypatch):
    policy = Policy(tiny_model())
    gpu = policy.frozen_copy()
    gpu.device = torch.device("cuda")
    shared, plain = (4, 6_000), (64, 3_200)
    for size, pays in ((4 * 6_000**2 * 5, True), (4 * 6_000**2 * 5 - 1, False)):  # fp32 and its boolean twin
        monkeypatch.setattr("rl4llm_fast.trainer.policy.MASK_BYTES", size)
        assert gpu._pays(shared, plain) == pays
        assert policy._pays(shared, plain)
    assert policy._pays((4, 6_000), (32, 3_200))  # there is no flash attention with a mask: fewer products do not do
    assert not gpu._pays((4, 6_000), (32, 3_200))


def test_a_mask_is_in_what_attention_computes_in():
    policy = Policy(tiny_model())
    assert policy.dtype == torch.float32
    policy.autocast = True
    assert policy.dtype == torch.bfloat16
    half = Policy(tiny_model(dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    half.model.float().computes_in = torch.bfloat16  # as under fsdp, whose parameters are the fp32 master
    layout = shared_layout([[1, 2]] * 2, [[3, 4, 5], [3, 6, 7]], [0, 0])
    assert layout.additive_mask(half.dtype).dtype == torch.bfloat16


def test_a_copy_to_a_gpu_does_not_wait(monkeypatch):
    calls = []

    def pin(tensor):
        calls.append("pinned")
        return tensor

    def to(tensor, *args, **options):
        calls.append((args, options))
        return tensor

    tensor, gpu = torch.arange(6).reshape(2, 3).T, torch.device("cuda")
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    assert to_device(tensor, gpu).is_contiguous()
    assert calls == ["pinned", ((gpu,), {"non_blocking": True})]
    calls.clear()
    to_device(tensor, torch.device("cpu"))
    assert calls == [((torch.device("cpu"),), {})]


def test_models_that_cannot_share_fall_back(tmp_path):
    model = tiny_model()
    inner = model.model.forward

    def no_4d(*args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError("wanted a 2-D attention mask")
        return inner(*args, attention_mask=attention_mask, **kwargs)

    model.model.forward = no_4d
    assert Policy(model).layout == "plain"
    with pytest.raises(ValueError, match=r"'shared'.*4-D mask"):
        Policy(model, layout="shared")
    assert len(run(config(tmp_path, steps=1), model).history) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ignored", "scale"), [("attention_mask", 1), ("attention_mask", 0.03), ("position_ids", 1)])
def test_models_that_ignore_what_a_shared_row_needs_fall_back(dtype, ignored, scale):
    """Also where it hardly shows, by 2e-4 or less, which a fixed tolerance would let pass: weights change."""
    model = tiny_model(dtype=dtype)
    for parameter in model.model.layers.parameters():
        parameter.data *= scale
    assert Policy(model).layout == "auto"
    inner = model.model.forward
    model.model.forward = lambda *args, **inputs: inner(*args, **{**inputs, ignored: None})
    assert Policy(model).layout == "plain"
    with pytest.raises(ValueError, match=r"'shared'.* differ by .* without the mask"):
        Policy(model, layout="shared")


@pytest.mark.parametrize(("noise", "layout"), [(0.08, "auto"), (1.0, "plain")])
def test_rounding_is_no_reason_to_fall_back(noise, layout):
    """Deep models in bf16 differ by more than 0.1 from kernel to kernel; as much as without the mask is too much."""
    found = []

    class Rounding(Policy):
        def token_logprobs(self, *args, **options):
            logp, entropy = super().token_logprobs(*args, **options)
            found.append(logp + noise * torch.randn(len(logp)))
            return found[-1], entropy

    assert Rounding(tiny_model(dtype=torch.bfloat16)).layout == layout
    assert (found[0] - found[1]).abs().max() > 0.1


def test_models_whose_head_is_not_all_are_called_whole():
    model = tiny_model()
    inner = model.lm_head.forward
    policy = Policy(model)
    expected, _ = policy.token_logprobs(plain_layout(PROMPTS, [[1, 2]] * 4), temperature=1.0)
    whole = model.forward

    def scaled(*args, **kwargs):  # a model with a logit scale behind the head
        output = whole(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    model.forward = scaled
    other = Policy(model)
    assert other.decoder is None
    assert inner is not None
    got, _ = other.token_logprobs(plain_layout(PROMPTS, [[1, 2]] * 4), temperature=0.5)  # ×0.5, ÷0.5
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_numbers_of_the_host_do_not_take_the_devices_backend(monkeypatch):
    """RL4LLM_FAST_BACKEND=triton is meant for the GPU: GRPO's advantages are made on the host."""
    here = "cpu" if dispatch.why_not("group_advantages", "cpu", "cpu") is None else "eager"
    monkeypatch.setenv("RL4LLM_FAST_BACKEND", "triton")
    assert host_backend("group_advantages", "auto") == here
    assert host_backend("group_advantages", "eager") == "eager"
    monkeypatch.setenv("RL4LLM_FAST_BACKEND", "eager")
    assert host_backend("group_advantages", "auto") == "eager"
