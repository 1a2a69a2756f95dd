"""Soft prompts of a model: their first values, and their place in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gptfast.config import GPTConfig
from gptfast.models.adapters.prompt_config import PromptTuningConfig
from gptfast.nn.soft_prompt import PLACE, SoftPrompt
from gptfast.nn.transformer import Transformer
from gptfast.tokenizer import load_tokenizer

KEY = "prompt_embeddings"  # of peft's files


def check_fits(model: GPTConfig, config: PromptTuningConfig) -> None:
    """Raise ValueError for a soft prompt that is for another model, or leaves no room for tokens."""
    n, C, limit = config.n, model.n_embd, model.block_size
    if n >= limit:
        raise ValueError(
            f"add_adapter: num_virtual_tokens is {n} and the model's block_size {limit}, which leaves no room for tokens; "
            f"take at most {limit - 1}"
        )
    if config.token_dim not in (None, C):
        raise ValueError(
            f"add_adapter: token_dim is {config.token_dim} and this model's width {C}; a soft prompt is for the base that "
            "it was trained on"
        )


def place(model: Transformer, name: str, weight: Tensor) -> None:
    """Give a model a soft prompt."""
    if PLACE not in model._modules:
        model.add_module(PLACE, nn.ModuleDict())
    cast(nn.ModuleDict, model._modules[PLACE])[name] = SoftPrompt(weight).train(model.training)


def first_values(model: Transformer, config: PromptTuningConfig, blank: bool) -> Tensor:
    """The vectors of a new soft prompt, (n, C), in fp32 beside half precision: small steps would be rounded away.

    Args:
        blank: zeros, to be filled from a file.
    Raises:
        OSError, ValueError: the tokenizer of "TEXT" cannot be read, has other tokens than the model, or the text none.
    """
    table, n = model.wte.weight.detach(), config.n
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    if blank:
        return torch.zeros(n, table.shape[1], dtype=dtype, device=table.device)
    if config.prompt_tuning_init == "RANDOM":
        return torch.randn(n, table.shape[1], dtype=dtype).to(table.device)
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        ids = torch.randint(table.shape[0], (n,), device="cpu")
    else:
        ids = torch.tensor(_tokens(config, table.shape[0]), device="cpu")
    return table[ids.to(table.device)].to(dtype)


def _tokens(config: PromptTuningConfig, V: int) -> list[int]:
    """The tokens of the text, repeated or cut to the length of the prompt."""
    text, name = config.prompt_tuning_init_text, config.tokenizer_name_or_path
    assert text is not None and name is not None  # PromptTuningConfig checks
    ids = load_tokenizer(name).encode(text)
    if not ids or max(ids) >= V:
        said = f"token id {max(ids)}, and the model has {V}" if ids else "no token"
        raise ValueError(
            f"add_adapter: prompt_tuning_init_text {text[:40]!r} has {said}; name the tokenizer of the model and a text with "
            "tokens"
        )
    return (ids * -(-config.n // len(ids)))[: config.n]


def filled_in(model: Transformer, config: PromptTuningConfig) -> dict[str, Any]:
    """The fields that say which model a soft prompt is for, as peft fills them in; without the task it would not use it."""
    sizes = {"token_dim": model.config.n_embd, "num_layers": model.config.n_layer}
    heads = {"num_attention_heads": model.config.n_head, "num_transformer_submodules": 1}
    return {**sizes, **heads, "task_type": config.task_type or "CAUSAL_LM"}


def check_file(model: GPTConfig, config: PromptTuningConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise ValueError for a file that does not hold the soft prompt of its configuration, or one of another width."""
    if KEY not in tensors:
        raise ValueError(f"{folder}: {KEY} is missing; the adapter is half written - copy or save it again")
    values = tensors[KEY]
    if values.dim() != 2 or len(values) != config.n:
        raise ValueError(
            f"{folder}: {KEY} is {tuple(values.shape)} and the configuration says {config.n} virtual tokens; copy or save the "
            "adapter again"
        )
    if values.shape[1] != model.n_embd:
        raise ValueError(
            f"{folder}: the adapter does not fit this model: {KEY} is {tuple(values.shape)} and this model's width "
            f"{model.n_embd}; load the base that it was trained on"
        )
