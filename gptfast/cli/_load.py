"""Loading the model and the tokenizer of a command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptfast.tokenizer import Tokenizer

MODEL_HELP = "Checkpoint folder, such as runs/bard/best, nanoGPT's ckpt.pt, or a Hugging Face hub id."
TOKENIZER_HELP = "How to cut text into tokens: gpt2, or the FOLDER of a tokenizer."
SPECIAL_TOKENS_HELP = "Read special tokens in prompts, such as <|endoftext|>, as such; without, as ordinary text."
QUANTIZE_HELP = "Pack the weights in int8, int6, q4, int4, nf4, bf16 or fp32 for the native CPU engine"
MOST_TEXTS = 1 << 16  # largest --batch-size; more would use much memory before the first token


def check_batch_size(command: str, batch_size: int) -> None:
    if not 1 <= batch_size <= MOST_TEXTS:
        raise ValueError(f"{command}: `batch_size` is {batch_size}; expected 1 to {MOST_TEXTS}")


def load(
    model: str, quantize: str | None, tokenizer: str | None = None, adapters: Mapping[str, str] | None = None
) -> tuple[Any, Tokenizer]:
    """A GPT, or a compiled one with `quantize`, and its tokenizer.

    Args:
        model: a checkpoint folder, nanoGPT's ckpt.pt, or a hub id.
        quantize: a format of `GPT.compile_for_inference`; None: the weights as they are.
        tokenizer: "gpt2" or a folder; None: the checkpoint's own.
        adapters: folders of adapters by name; the last one is active.
    """
    from gptfast._snapshots import read_whole
    from gptfast.models import GPT
    from gptfast.models.pretrained import build, resolve
    from gptfast.models.stored import StoredModel
    from gptfast.tokenizer import lenient, load_tokenizer

    path = resolve(model)
    if tokenizer is None:
        stored, found = read_whole(path, lambda: (StoredModel(path), _own_tokenizer(path)))
    else:
        stored, found = StoredModel(path), load_tokenizer(tokenizer)
    gpt = build(GPT, stored, None, {})
    for name, folder in (adapters or {}).items():
        gpt.load_adapter(folder, name)
    return gpt if quantize is None else gpt.compile_for_inference(quantize), lenient(found)


def _own_tokenizer(path: Path) -> Tokenizer:
    from gptfast.tokenizer import load_tokenizer

    try:
        if path.is_dir():
            return load_tokenizer(path)
        reason = f"{path} has no tokenizer"
    except FileNotFoundError as error:
        reason = str(error)
    raise FileNotFoundError(f"{reason}; or name the tokenizer of the model with --tokenizer: gpt2, or a FOLDER")
