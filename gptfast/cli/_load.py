"""The model and the tokenizer that a command runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptfast.tokenizer import Tokenizer

MOST_TEXTS = 1 << 16  # at a time: more would take memory before the first has come


def check_batch_size(command: str, batch_size: int) -> None:
    if not 1 <= batch_size <= MOST_TEXTS:
        raise ValueError(f"{command}: --batch-size is {batch_size}; expected 1 to {MOST_TEXTS}")


def load(model: str, quantize: str | None) -> tuple[Any, Tokenizer]:
    """A GPT, packed for the native engine where that can run it, and its tokenizer.

    Args:
        model: a checkpoint folder or a hub id.
        quantize: a format of `GPT.compile_for_inference`; None: the engine with the weights as they are, where it
            can run them, else PyTorch.
    """
    from gptfast._snapshots import read_whole
    from gptfast.engine import engine_for
    from gptfast.models import GPT
    from gptfast.models.pretrained import build, resolve
    from gptfast.models.stored import StoredModel
    from gptfast.tokenizer import lenient, load_tokenizer

    folder = resolve(model)
    stored, tokenizer = read_whole(folder, lambda: (StoredModel(folder), load_tokenizer(folder)))
    gpt = build(GPT, stored, None, {})
    compiled = engine_for(gpt) if quantize is None else gpt.compile_for_inference(quantize)
    return compiled or gpt, lenient(tokenizer)
