"""Small models whose next token depends on all tokens before, in transformers and here with the same weights."""

from __future__ import annotations

import torch

import gptfast


def sharpen(model):
    """Random weights whose next token depends on every token before it, not on the last one only (the head is tied)."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.mul_(2 if "wpe" in name or "positions_embed" in name else 12)
            elif name.endswith("ln_f.weight"):
                p.normal_(std=1.5)


def make_pair(kind, folder, V, block_size, layers=2):
    """(transformers' model, ours) of `kind` "gpt2" or "openai-gpt" with sharp random weights, through `folder`."""
    import transformers

    torch.manual_seed(3)
    config_class, model_class = {
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "openai-gpt": (transformers.OpenAIGPTConfig, transformers.OpenAIGPTLMHeadModel),
    }[kind]
    config = config_class(n_layer=layers, n_head=4, n_embd=32, n_positions=block_size, vocab_size=V)
    theirs = model_class(config).eval()
    sharpen(theirs)
    theirs.save_pretrained(folder)
    theirs.generation_config = transformers.GenerationConfig()
    return theirs, gptfast.GPT.from_pretrained(folder).eval()
