"""The shapes of the published GPT-1, GPT-2, GPT-3, gpt-oss and BERT, as fields of `gptfast.GPTConfig`."""

from __future__ import annotations

from typing import Any


def _gpt3(n_layer: int, n_embd: int, n_head: int, **others: Any) -> dict[str, Any]:
    return {
        "n_layer": n_layer,
        "n_embd": n_embd,
        "n_head": n_head,
        "block_size": 2048,
        "attention_pattern": "alternating",
        "window": 256,
        "dropout": 0.0,
        **others,
    }


def _gpt_oss(n_layer: int, n_expert: int, **others: Any) -> dict[str, Any]:
    scaling = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
    return {
        **{"n_layer": n_layer, "n_embd": 2880, "n_head": 64, "n_kv_head": 8, "head_size": 64, "n_inner": 2880},
        **{"vocab_size": 201088, "block_size": 131072, "tie_weights": False, "dropout": 0.0},
        **{
            "norm": "rms_norm",
            "layer_norm_epsilon": 1e-5,
            "attention_pattern": "SL",
            "window": 128,
            "attention_sinks": True,
        },
        **{"position_embedding": "rotary", "rope_theta": 150000.0, "rope_scaling": scaling},
        **{"activation": "swiglu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        **{"n_expert": n_expert, "n_expert_per_tok": 4},
        **others,
    }


BERT: dict[str, Any] = {  # what every BERT has and no GPT
    **{"causal": False, "type_vocab_size": 2, "head_transform": True, "pooler": True, "next_sentence_head": True},
    **{"norm_position": "post", "final_norm": False, "embedding_norm": True, "activation": "gelu"},
    "layer_norm_epsilon": 1e-12,
}


def _bert(**sizes: Any) -> dict[str, Any]:
    return {"block_size": 512, "vocab_size": 30522, **BERT, **sizes}


PRESETS: dict[str, dict[str, Any]] = {
    "gpt1": {"block_size": 512, "vocab_size": 40478, "norm_position": "post", "final_norm": False},
    "gpt2": {},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "gpt3-175b": _gpt3(96, 12288, 96, tie_weights=False),
    "bert-base": _bert(),
    "bert-large": _bert(n_layer=24, n_head=16, n_embd=1024),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "gptoss-tiny": _gpt_oss(
        *(4, 8),
        **{
            "n_embd": 192,
            "n_head": 6,
            "n_kv_head": 2,
            "head_size": 32,
            "n_inner": 192,
            "vocab_size": 50257,
            "block_size": 256,
        },
        **{"window": 64, "n_expert_per_tok": 2, "rope_theta": 10000.0, "rope_scaling": None, "tie_weights": True},
    ),
}
"""Shapes from the papers: Radford et al. 2018 (GPT-1), Radford et al. 2019 (GPT-2), Brown et al., arXiv
2005.14165, Table 2.1 (GPT-3), Devlin et al., arXiv 1810.04805, section 3 (BERT, with both heads of its pre-training and
the uncased vocabulary). Where the GPT-3 paper leaves a choice:

* its XL row (2048 channels, 24 heads of 128) and its 13B row (5140 channels, 40 heads of 128) contradict
  themselves; n_head * head_dim = n_embd and the printed parameter counts hold with 16 heads and with 5120
  channels;
* it does not say whether the head is tied. The printed counts of the small models fit only a tied head (125M
  would be 164M untied), so 125M to 13B are tied as GPT-2 is; 175B is untied, as the usual table lists it:
  617M each for the embedding and the unembedding, 175.2B in all (tied it would be 174.6B);
* it gives no width for the banded layers; 256 is that of GPT-Neo's local layers. Dropout is 0: less than one
  epoch.

gpt-oss: OpenAI, arXiv 2508.10925, and the config.json of the published checkpoints; "gptoss-tiny" is our own, 4.0M parameters
beside its embedding, to train on a CPU.
"""
