"""A text with what tokenizers differ in, and small tokenizers of the `tokenizers` library."""

from __future__ import annotations

import json

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, trainers

from gptfast.tokenizer import (
    OpenAIGPTTokenizer,
)

POEM = """Shall I compare thee to a summer's day?
  Thou art more lovely -- and more temperate:
Rough winds do shake the darling buds of May,\tO'er all.

And summer's lease hath all too short a date; 1609 café 日本 🎭
"""


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> RustTokenizer:
    """GPT-2's kind of tokenizer in the `tokenizers` library, which shares no code with tiktoken."""
    rust = RustTokenizer(models.BPE(vocab=vocab, merges=merges))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return rust


def train_gpt1(text: str) -> OpenAIGPTTokenizer:
    """A small vocabulary of GPT-1's kind, learnt by the `tokenizers` library."""
    rust = RustTokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=300, end_of_word_suffix="</w>", special_tokens=["<unk>"], show_progress=False
    )
    rust.train_from_iterator([text.lower()] * 3, trainer)
    model = json.loads(rust.to_str())["model"]
    return OpenAIGPTTokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]])
