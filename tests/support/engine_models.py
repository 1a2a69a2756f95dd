"""Small models of every kind that the engine runs, with shapes that fit nothing, and the fp64 logits they should give."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import gptfast
from gptfast import GPT, GPTConfig

CONFIGS = {
    "gpt2": {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 150, "vocab_size": 301},
    "gpt1": {  # heads of 80
        **{"n_layer": 2, "n_head": 2, "n_embd": 160, "block_size": 100, "vocab_size": 97, "activation": "gelu"},
        **{"norm_position": "post", "final_norm": False},
    },
    "gpt3": {  # a window across pages of the cache
        **{
            "n_layer": 4,
            "n_head": 2,
            "n_embd": 96,
            "block_size": 150,
            "vocab_size": 97,
            "tie_weights": False,
            "bias": False,
        },
        **{"attention_pattern": "alternating", "window": 70, "position_embedding": "sinusoidal"},
    },
    "odd": {"n_layer": 2, "n_head": 3, "n_embd": 57, "block_size": 70, "vocab_size": 33, "n_inner": 101},
    "wide_head": {"n_layer": 1, "n_head": 1, "n_embd": 256, "block_size": 66, "vocab_size": 64},
    "one": {"n_layer": 1, "n_head": 1, "n_embd": 1, "block_size": 1, "vocab_size": 1, "n_inner": 1},
}


@functools.cache
def model_of(name: str) -> GPT:
    """With biases and norms that are not 0 and 1, so that each matters."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**CONFIGS[name], dropout=0.0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@functools.cache
def ids_of(name: str) -> Tensor:
    """Ids of shape (2, block_size)."""
    config = model_of(name).config
    return torch.randint(config.vocab_size, (2, config.block_size), generator=torch.Generator().manual_seed(1))


@functools.cache
def expected(name: str) -> Tensor:
    """fp64 logits of `ids_of`, in eager PyTorch."""
    model = GPT(model_of(name).config).double().eval()
    model.load_state_dict(model_of(name).state_dict())
    with torch.no_grad(), gptfast.backend("eager"):
        return model(ids_of(name))


def relative_error(x: Tensor, reference: Tensor) -> float:
    """Relative L2."""
    return ((x.double() - reference).norm() / reference.norm()).item()
