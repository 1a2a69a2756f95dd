"""The model and the tokenizer that a command runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptfast.tokenizer import Tokenizer


def load(model: str, quantize: str | None) -> tuple[Any, Tokenizer]:
    """A GPT in evaluation mode, packed for the native engine where a format was given, and its tokenizer.

    Args:
        model: a checkpoint folder or a hub id.
        quantize: a format of `GPT.compile_for_inference`; None: PyTorch runs it.
    """
    from gptfast.models import GPT
    from gptfast.models.pretrained import resolve
    from gptfast.tokenizer import load_tokenizer

    folder = resolve(model)
    gpt = GPT.from_pretrained(folder).eval()
    return gpt if quantize is None else gpt.compile_for_inference(quantize), load_tokenizer(folder)
