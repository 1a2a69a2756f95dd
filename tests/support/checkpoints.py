"""Small models here and in transformers, and when two of them are the same."""

from __future__ import annotations

import pytest
import torch

from gptfast.models import GPT, GPTConfig

transformers = pytest.importorskip("transformers")

V = 97
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": V}


def make(**options) -> GPT:
    model = GPT(GPTConfig(**{**SIZES, "block_size": 12, "dropout": 0.0, **options})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.dim() == 1))
    return model


def hf(kind: str, tie: bool = True) -> torch.nn.Module:
    config = {"gpt2": transformers.GPT2Config, "openai-gpt": transformers.OpenAIGPTConfig}[kind]
    return transformers.AutoModelForCausalLM.from_config(
        config(**SIZES, n_positions=12, tie_word_embeddings=tie, bos_token_id=None, eos_token_id=None)
    ).eval()


def same(a: GPT, b: GPT) -> None:
    """Equal in every bit and in the config."""
    assert a.config == b.config
    one, two = a.state_dict(), b.state_dict()
    assert list(one) == list(two)
    for name in one:
        assert one[name].dtype == two[name].dtype
        assert torch.equal(one[name], two[name]), name


def close_logits(ours: GPT, theirs: torch.nn.Module) -> None:
    ids = torch.randint(V, (2, 12))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
