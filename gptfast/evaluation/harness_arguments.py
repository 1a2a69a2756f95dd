"""What the arguments of the model "gptfast" of lm-evaluation-harness mean."""

from __future__ import annotations

from typing import Any

import torch

from gptfast._checks import check_count
from gptfast.metadata import metadata_of
from gptfast.models.locate import resolve
from gptfast.tokenizer import load_tokenizer

OWNER = "gptfast"
GPU_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO_ROWS = 16  # texts that are written at a time under --batch_size auto


def device_of(asked: str | None, dtype: Any) -> torch.device:
    """The device that runs: the one that was asked for, or the CPU where a GPU is not there or has no such format."""
    device = torch.device("cpu" if asked is None else asked)
    runs = torch.cuda.is_available() and str(dtype).removeprefix("torch.") in (*GPU_DTYPES, "auto")
    return torch.device("cpu") if device.type == "cuda" and not runs else device


def on_device(gpt: Any, dtype: Any, device: torch.device) -> tuple[Any, str]:
    """The model that runs, and the name of its format."""
    stored = str(gpt.wte.weight.dtype).removeprefix("torch.")
    name = stored if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
    if device.type == "cpu":
        packed = gpt.compile_for_inference("float32" if dtype in (None, "auto") and name == "float16" else name)
        return packed, packed.dtype
    if name not in GPU_DTYPES:
        raise ValueError(f"{OWNER}: dtype is {dtype!r} on {device}; expected one of {', '.join(GPU_DTYPES)}, or auto")
    return in_torch(gpt, name, device)


def in_torch(gpt: Any, name: str, device: torch.device) -> tuple[Any, str]:
    """The network itself on a device, in a dtype by its name."""
    return gpt.to(device=device, dtype=GPU_DTYPES[name]).eval(), name


def tokenizer_of(pretrained: Any, tokenizer: Any) -> Any:
    """The tokenizer that was given, or that of the checkpoint."""
    if tokenizer is not None:
        return load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if not isinstance(pretrained, str):
        raise ValueError(f"{OWNER}: pretrained is a model without files; give its tokenizer=")
    folder = resolve(pretrained)
    return load_tokenizer(folder if folder.is_dir() else folder.parent)


def batch_size_of(value: Any, most: int | None) -> int:
    """Texts at a time, from lm-eval's --batch_size and --max_batch_size."""
    if isinstance(value, str) and value.partition(":")[0] == "auto":
        return AUTO_ROWS if most is None else min(AUTO_ROWS, int(most))
    try:
        size = int(1 if value is None else value)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"{OWNER}: batch_size is {value!r}; expected a number of at least 1, or auto")
    return size


def prefix_token_of(model: Any, tokenizer: Any, given: int | None) -> int | None:
    """The token before a text without context, chosen as `--model hf` does; then what the model itself names."""
    vocab_size = model.config.vocab_size
    if given is not None:
        check_count(OWNER, "prefix_token_id", given, 0, vocab_size - 1, " (the vocabulary)")
        return given
    inner, metadata = getattr(tokenizer, "inner", tokenizer), metadata_of(model)
    bos = getattr(getattr(inner, "hf_files", inner), "settings", {}).get("bos_token")
    text = bos.get("content") if isinstance(bos, dict) else bos
    named = [getattr(inner, "specials", {}).get(text), tokenizer.eos_id]
    named += [(metadata.generation or {}).get("bos_token_id"), metadata.config.get("bos_token_id")]
    return next((token for token in named if isinstance(token, int) and 0 <= token < vocab_size), None)
