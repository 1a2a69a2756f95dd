"""The shapes of the published GPT-1, GPT-2 and GPT-3, as fields of `gptfast.GPTConfig`."""

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
}
"""Shapes from the papers: Radford et al. 2018 (GPT-1), Radford et al. 2019 (GPT-2), Brown et al., arXiv
2005.14165, Table 2.1 (GPT-3). Where the GPT-3 paper leaves a choice:

* its XL row (2048 channels, 24 heads of 128) and its 13B row (5140 channels, 40 heads of 128) contradict
  themselves; n_head * head_dim = n_embd and the printed parameter counts hold with 16 heads and with 5120
  channels;
* it does not say whether the head is tied. The printed counts of the small models fit only a tied head (125M
  would be 164M untied), so 125M to 13B are tied as GPT-2 is; 175B is untied, as the usual table lists it:
  617M each for the embedding and the unembedding, 175.2B in all (tied it would be 174.6B);
* it gives no width for the banded layers; 256 is that of GPT-Neo's local layers. Dropout is 0: less than one
  epoch.
"""
