"""The methods of fine-tuning: what of a model is trained, and what a checkpoint then holds."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptfast.checkpoints.adapter_config import LoraConfig
from gptfast.checkpoints.prompt_config import PromptTuningConfig
from gptfast.finetuning.options import MethodOptions
from gptfast.finetuning.task_model import TaskModel
from gptfast.models import GPT
from gptfast.models.adapters.targets import ALL_LINEAR
from gptfast.models.locate import hub_name
from gptfast.nn.difference import is_tied
from gptfast.nn.quantized import QuantizedLinear

NAME = "default"  # of the adapter
_EXPRESSION = re.compile(r"[\\^$*+?()\[\]{}|]")


def is_adapter(method: str) -> bool:
    """Does a method train parts beside a frozen base, and do its checkpoints hold these alone?"""
    return method != "full"


def attach(gpt: GPT, method: MethodOptions, base: str, new_tokens: bool) -> None:
    """Give a model what the method trains; its other weights are frozen.

    Args:
        gpt: changed in place.
        method: of the run.
        base: where the model is, for the adapter's file.
        new_tokens: the model must learn rows of the embedding that are new.
    Raises:
        ValueError: module names that do not exist; the nearest is suggested.
    """
    place, revision = hub_name(base)
    if method.method in ("lora", "qlora"):
        gpt.add_adapter(
            LoraConfig(
                r=method.lora_r,
                lora_alpha=method.lora_alpha,
                lora_dropout=method.lora_dropout,
                target_modules=modules(method.target_modules),
                modules_to_save=["wte", *([] if is_tied(gpt) else ["lm_head"])] if new_tokens else None,
                ensure_weight_tying=new_tokens,
                base_model_name_or_path=place,
                revision=revision,
                task_type="CAUSAL_LM",
            ),
            NAME,
        )
    elif method.method == "prompt":
        if new_tokens:
            raise ValueError(
                "finetune: the tokenizer gets new tokens for its chat template, whose embeddings method prompt does not train; "
                "take method lora, or a model with a chat template of its own"
            )
        config = PromptTuningConfig(method.num_virtual_tokens, base_model_name_or_path=place, revision=revision)
        gpt.add_adapter(config, NAME)


def modules(text: str) -> list[str] | str:
    """target_modules as LoraConfig has them, from an option: "all-linear", names with commas, or a regular expression."""
    if text == ALL_LINEAR or _EXPRESSION.search(text):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def write(network: Any, folder: Path) -> None:
    """Write what a method trained: a whole model, or an adapter without its base."""
    gpt = network.gpt if isinstance(network, TaskModel) else network
    if gpt.adapters is None:
        network.save_pretrained(folder)
        return
    network.save_adapter(folder, NAME)


def base_fingerprint(gpt: nn.Module) -> str:
    """A checksum of all weights of a model, codes too, by which a resumed run recognises its base."""
    codes = (x for m in gpt.modules() if isinstance(m, QuantizedLinear) for x in m.buffers(recurse=False))
    crc = 0
    for x in (*gpt.parameters(), *codes):
        crc = zlib.crc32(x.detach().cpu().reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"crc32:{crc:08x}"


def count_parameters(network: Any) -> tuple[int, int]:
    """How many there are, quantised ones as the numbers they stand for; and how many are trained."""
    gpt = network.gpt if isinstance(network, TaskModel) else network
    own = sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in gpt.parameters())
    return gpt.num_parameters() + own, sum(p.numel() for p in network.parameters() if p.requires_grad)
