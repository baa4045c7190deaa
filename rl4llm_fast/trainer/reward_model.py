"""A decoder with a scalar head: the reward of a sequence is read at its last token."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .devices import to_device


class RewardModel(nn.Module):
    """r = w·h + b in fp32, h the decoder's last hidden state of a sequence's last token (survey §4.1.3).

    ``bias`` is no parameter: losses on differences of scores cannot learn it. ``train_rm`` sets it at the end.
    """

    bias: Tensor

    def __init__(self, decoder: Any, weight: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.decoder = decoder
        self.weight = nn.Parameter(weight.float())
        self.register_buffer("bias", torch.tensor(bias, device=weight.device))
        self.autocast = False

    @classmethod
    def of(cls, model: Any, *, seed: int = 0) -> RewardModel:
        """Of a causal language model, whose decoder it takes; the head is drawn from N(0, 1/(D+1)) (Stiennon 2020).

        Raises:
            ValueError: the model has no decoder apart from its head.
        """
        decoder = getattr(model, "base_model", None)
        if decoder is None or decoder is model:
            raise ValueError("model: wanted a causal language model with a decoder apart from its head")
        width = model.config.get_text_config().hidden_size
        weight = torch.randn(width, generator=torch.Generator().manual_seed(seed)) / (width + 1) ** 0.5
        return cls(decoder, weight.to(next(model.parameters()).device))

    def forward(self, sequences: Sequence[list[int]]) -> Tensor:
        """Scores (B,) of token ids, prompt and answer together; padded on the right, where attention never looks."""
        device = self.weight.device
        ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        last = to_device(torch.tensor([len(sequence) - 1 for sequence in sequences]), device)
        precision: Any = torch.autocast(device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()
        with precision:
            hidden = self.decoder(input_ids=to_device(ids, device), use_cache=False).last_hidden_state
        scores: Tensor = hidden[torch.arange(len(sequences), device=device), last].float() @ self.weight + self.bias
        return scores

    def save_pretrained(self, folder: str | Path) -> None:
        """A folder with the decoder as transformers saves it, and the head in ``reward_head.json``."""
        self.decoder.save_pretrained(folder)
        head = {"weight": self.weight.detach().tolist(), "bias": float(self.bias)}
        (Path(folder) / "reward_head.json").write_text(json.dumps(head), encoding="utf-8")


def head_of(folder: str | Path, name: str) -> Path:
    """The file of a reward model's folder that holds its head.

    Raises:
        ValueError: there is no reward model in ``folder``, which the user knows as ``name``.
    """
    path = Path(folder) / "reward_head.json"
    if not path.is_file():
        raise ValueError(
            f"{name}: no reward_head.json in {str(folder)!r}; wanted what RewardModel.save_pretrained wrote"
        )
    return path


def load_reward_model(folder: str | Path, *, device: str | torch.device = "cpu") -> RewardModel:
    """The reward model that ``RewardModel.save_pretrained`` wrote.

    Raises:
        ValueError: there is no reward model in ``folder``.
    """
    from transformers import AutoModel

    head = json.loads(head_of(folder, "folder").read_text(encoding="utf-8"))
    decoder = AutoModel.from_pretrained(folder, dtype="auto").to(device)
    return RewardModel(decoder, torch.tensor(head["weight"], device=device), head["bias"]).eval()
