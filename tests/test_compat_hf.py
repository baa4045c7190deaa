"""A Hugging Face model with a log-probability head gives what its own logits give, and their gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rl4llm_fast.compat.hf import logprob_head

transformers = pytest.importorskip("transformers", reason="the head is for transformers' models")

V = 67
SMALL = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.5, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=False)),
    "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "softcap": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8)
    ),
    "multiplied": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SMALL, logit_scale=0.25)),
    "divided": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**SMALL, logits_scaling=4.0)),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def plain(model: Any, ids: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    logps = (model(input_ids=ids).logits[:, :-1].float() / temperature).log_softmax(-1)
    chosen = logps.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    live = labels[:, 1:] != -100
    return chosen * live, -(logps.exp() * logps).sum(-1) * live


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, V, (3, 9))
    labels = ids.clone()
    labels[:, :3], labels[1, 7:] = -100, -100
    return ids, labels


class Lora(nn.Module):
    """A head as PEFT makes it: the base layer, and a product of low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, 3, bias=False), nn.Linear(3, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # as PEFT does: the base weight, without the adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2.0 * self.b(self.a(x))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_the_models_own_logits(name: str, temperature: float, tokens: tuple[Tensor, Tensor]) -> None:
    ids, labels = tokens
    reference = build(name)
    model = logprob_head(copy.deepcopy(reference), temperature=temperature, return_entropy=True)
    output = model(input_ids=ids, labels=labels)
    wanted, wanted_entropy = plain(reference, ids, labels, temperature)
    assert output.log_probs.shape == (3, 8)
    torch.testing.assert_close(output.log_probs, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.entropy, wanted_entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, -wanted.sum() / (labels[:, 1:] != -100).sum())
    assert output.logits is output.log_probs
    upstream = torch.randn(3, 8)
    (output.log_probs * upstream + 0.1 * output.entropy).sum().backward()
    (wanted * upstream + 0.1 * wanted_entropy).sum().backward()
    for (parameter, got), (_, expected) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=parameter)


def test_loss_is_the_models_own(tokens: tuple[Tensor, Tensor]) -> None:
    ids, labels = tokens
    model = build("llama")
    own = model(input_ids=ids, labels=labels).loss
    head = logprob_head(model)
    torch.testing.assert_close(head(input_ids=ids, labels=labels).loss, own)
    torch.testing.assert_close(head(input_ids=ids, labels=labels, return_dict=False)[0], own)
    total = own * (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(head(input_ids=ids, labels=labels, num_items_in_batch=7.0).loss, total / 7)


def test_shift_labels_are_not_shifted(tokens: tuple[Tensor, Tensor]) -> None:
    ids, labels = tokens
    model = logprob_head(build("llama"))
    ahead = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    shifted = model(input_ids=ids, shift_labels=ahead).log_probs
    assert shifted.shape == (3, 9)
    torch.testing.assert_close(shifted[:, :-1], model(input_ids=ids, labels=labels).log_probs)
    assert not shifted[:, -1].any()


@pytest.mark.parametrize("chunk_tokens", [None, 5])
@pytest.mark.parametrize("entropy", [False, True])
def test_lora_on_the_head(chunk_tokens: int | None, entropy: bool, tokens: tuple[Tensor, Tensor]) -> None:
    ids, labels = tokens
    reference = build("softcap")
    reference.lm_head = Lora(reference.lm_head)
    model = logprob_head(copy.deepcopy(reference), return_entropy=entropy, chunk_tokens=chunk_tokens)
    output = model(input_ids=ids, labels=labels)
    wanted, _ = plain(reference, ids, labels)
    torch.testing.assert_close(output.log_probs, wanted, rtol=1e-5, atol=1e-5)
    output.log_probs.sum().backward()
    wanted.sum().backward()
    for name in ("a", "b"):
        got, expected = getattr(model.lm_head, name).weight.grad, getattr(reference.lm_head, name).weight.grad
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert model.lm_head.base_layer.weight.grad is None


def test_generation_is_untouched_and_del_restores(tokens: tuple[Tensor, Tensor]) -> None:
    ids, labels = tokens
    model = build("tied")
    logits = model(input_ids=ids).logits
    before = model.generate(ids, max_new_tokens=4, do_sample=False)
    logprob_head(logprob_head(model))  # twice is once
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), before)
    del model.forward
    assert model(input_ids=ids, labels=labels).logits.shape == (3, 9, V)


def test_bf16_and_training_mode(tokens: tuple[Tensor, Tensor]) -> None:
    ids, labels = tokens
    model = build("softcap").to(torch.bfloat16).train()
    logprob_head(model)
    assert model.training
    assert model(input_ids=ids, labels=labels).log_probs.dtype == torch.float32


def test_peft_is_unwrapped(tokens: tuple[Tensor, Tensor]) -> None:
    ids, labels = tokens

    class Peft(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def get_base_model(self) -> Any:
            return self.inner

        def forward(self, **kwargs: Any) -> Any:
            return self.inner(**kwargs)

    wrapped = Peft(build("llama"))
    assert logprob_head(wrapped) is wrapped
    assert wrapped(input_ids=ids, labels=labels).log_probs.shape == (3, 8)


@pytest.mark.parametrize("name", ["llama", "tied", "softcap"])
@pytest.mark.parametrize(
    "targets", [{"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj", "lm_head"]},
                {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["layers", "head", "saved-head"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of adapters on tied weights
def test_peft_itself(name: str, targets: dict[str, Any], tokens: tuple[Tensor, Tensor]) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    ids, labels = tokens

    def adapted() -> Any:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=3, lora_dropout=0.0, init_lora_weights=False, **targets)
        return peft.get_peft_model(build(name), config).eval()

    reference, model = adapted(), adapted()
    assert logprob_head(model, return_entropy=True) is model
    output = model(input_ids=ids, labels=labels)
    wanted, wanted_entropy = plain(reference, ids, labels)
    torch.testing.assert_close(output.log_probs, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.entropy, wanted_entropy, rtol=1e-5, atol=1e-5)
    (output.log_probs.sum() + 0.1 * output.entropy.sum()).backward()
    (wanted.sum() + 0.1 * wanted_entropy.sum()).backward()
    trained = 0
    for (parameter, got), (_, expected) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert (got.grad is None) == (expected.grad is None), parameter
        if expected.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-4, msg=parameter)
            trained += 1
    assert trained
    with model.disable_adapter(), torch.no_grad():  # the base model's, as a reference for the KL
        base = model(input_ids=ids, labels=labels).log_probs
        wanted_base, _ = plain(build(name), ids, labels)
    torch.testing.assert_close(base, wanted_base, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(base, wanted, atol=1e-3)


def test_refusals(tokens: tuple[Tensor, Tensor]) -> None:
    ids, labels = tokens

    class Louder(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    with pytest.raises(ValueError, match=r"Louder .* differ"):
        logprob_head(Louder(transformers.LlamaConfig(**SMALL)))
    with pytest.raises(TypeError, match="Linear without get_output_embeddings"):
        logprob_head(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="no backbone and head"):
        logprob_head(transformers.LlamaModel(transformers.LlamaConfig(**SMALL)))
    with pytest.raises(ValueError, match="logits_to_keep"):
        logprob_head(build("llama"))(input_ids=ids, labels=labels, logits_to_keep=3)
    with pytest.raises(ValueError, match="positive scale"):
        logprob_head(transformers.CohereForCausalLM(transformers.CohereConfig(**SMALL, logit_scale=-1.0)))
