"""Soft prompts of a model: their first values, and their place in it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from gptfast.checkpoints.prompt_config import PromptTuningConfig
from gptfast.nn.adapted import PROMPTS
from gptfast.nn.soft_prompt import SoftPrompt
from gptfast.nn.transformer import Transformer
from gptfast.tokenizer import load_tokenizer


def place(model: Transformer, name: str, weight: Tensor) -> None:
    """Give a model a soft prompt."""
    if PROMPTS not in model._modules:
        model.add_module(PROMPTS, nn.ModuleDict())
    cast(nn.ModuleDict, model._modules[PROMPTS])[name] = SoftPrompt(weight).train(model.training)


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
