"""The prompts of `gptfast generate` and their tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptfast.tokenizer import Tokenizer


def read_prompts(prompt: list[str] | None, prompt_file: Path | None) -> list[str]:
    """The prompts given, else that of the file, else that on standard input."""
    from gptfast._files import read_text

    if prompt and prompt_file:
        raise ValueError("generate: --prompt and --prompt-file were both given; expected one of them")
    if prompt:
        return prompt
    if prompt_file:
        return [read_text(prompt_file).removesuffix("\n")]
    if sys.stdin.isatty():
        raise ValueError('generate: no prompt; give one with --prompt "…", --prompt-file, or on standard input')
    try:
        return [sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"generate: standard input is not UTF-8 ({error}); expected UTF-8 text") from None


def encode(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    """The ids of a prompt of at least one character."""
    from gptfast.tokenizer import encode_prompt

    if not text:
        start = "a newline" if tokenizer.eos_id is None else "<|endoftext|> to begin a new document"
        raise ValueError(f"generate: the prompt is empty; give at least one character, such as {start}")
    return encode_prompt(tokenizer, text, special)
