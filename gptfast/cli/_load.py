"""The model and the tokenizer that a command runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptfast.tokenizer import Tokenizer


def load(model: str, quantize: str | None) -> tuple[Any, Tokenizer]:
    """A GPT, packed for the native engine where that can run it, and its tokenizer.

    Args:
        model: a checkpoint folder or a hub id.
        quantize: a format of `GPT.compile_for_inference`; None: the engine with the weights as they are, where it
            can run them, else PyTorch.
    """
    from gptfast.engine import engine_for
    from gptfast.models import GPT
    from gptfast.models.pretrained import resolve
    from gptfast.tokenizer import load_tokenizer

    folder = resolve(model)
    gpt = GPT.from_pretrained(folder).eval()
    compiled = engine_for(gpt) if quantize is None else gpt.compile_for_inference(quantize)
    return compiled or gpt, load_tokenizer(folder)
