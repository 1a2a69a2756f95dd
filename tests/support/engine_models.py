"""Small models of every kind that the engine runs, with shapes that fit nothing, and the fp64 logits they should give."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import gptfast
from gptfast import GPT, GPTConfig

ROTARY = {"position_embedding": "rotary"}
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
    "llama": {  # three heads of queries a head of keys
        **{
            "n_layer": 2,
            "n_head": 6,
            "n_kv_head": 2,
            "n_embd": 144,
            "block_size": 150,
            "vocab_size": 97,
            "n_inner": 75,
        },
        **{"norm": "rms_norm", "activation": "swiglu", "bias": False, "tie_weights": False, **ROTARY},
        "rope_scaling": {
            **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 64,
        },
    },
    "qwen3": {  # heads that are not a share of the width
        **{
            "n_layer": 2,
            "n_head": 4,
            "n_kv_head": 1,
            "head_size": 20,
            "n_embd": 57,
            "block_size": 70,
            "vocab_size": 33,
        },
        **{"norm": "rms_norm", "activation": "swiglu", "bias": False, "qk_norm": True, **ROTARY},
    },
    "neox": {  # a part of the channels, both branches of one input
        **{"n_layer": 2, "n_head": 4, "n_embd": 96, "block_size": 100, "vocab_size": 97, "tie_weights": False},
        **{"activation": "gelu", "parallel_residual": True, "partial_rotary_factor": 0.25, **ROTARY},
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "nanochat": {  # norms without weights; layers of four kinds of window
        **{"n_layer": 5, "n_head": 2, "n_kv_head": 1, "n_embd": 64, "block_size": 150, "vocab_size": 97, "bias": False},
        **{"norm": "rms_norm", "norm_affine": False, "embedding_norm": True, "qk_norm": True, "logit_softcap": 15.0},
        **{"activation": "relu_squared", "tie_weights": False, "attention_pattern": "SSL", "window": 66},
        **{**ROTARY, "rotary_layout": "reversed"},
    },
    "gptoss": {
        **{
            "n_layer": 2,
            "n_head": 8,
            "n_kv_head": 1,
            "head_size": 24,
            "n_embd": 64,
            "block_size": 150,
            "vocab_size": 97,
        },
        **{
            "norm": "rms_norm",
            "activation": "swiglu",
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "attention_sinks": True,
        },
        **{"attention_pattern": "SL", "window": 70, "tie_weights": False, "attn_softcap": 20.0, **ROTARY},
        **{"rotary_layout": "interleaved", "n_expert": 5, "n_expert_per_tok": 2, "n_inner": 75},
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "mixed": {  # LayerNorms without weights, and biases in some places only
        **{"n_layer": 2, "n_head": 2, "n_embd": 48, "block_size": 70, "vocab_size": 33},
        **{"norm_affine": False, "attn_bias": False, "mlp_bias": True, "attn_out_bias": False},
    },
    "one": {"n_layer": 1, "n_head": 1, "n_embd": 1, "block_size": 1, "vocab_size": 1, "n_inner": 1},
}


@functools.cache
def model_of(name: str) -> GPT:
    """With biases and norms that are not 0 and 1, so that each matters."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**CONFIGS[name], dropout=0.0)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
            if key.endswith("router.weight"):
                parameter.mul_(16)  # or rounding sends tokens to other experts, whose answers differ by 30%
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
