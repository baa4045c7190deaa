"""A tokenizer of one token a character, tag and newline, for a tiny Llama that is to write text."""

from __future__ import annotations

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
LETTERS = sorted(set("0123456789+-=.?:,<>/'() \nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ你好да"))
WORDS = ["<end>", "<unk>", *TAGS, *LETTERS]
END = 0


def tiny_tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    pieces = Regex("</?(?:think|answer)>|.|\n")
    inner.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
