"""Special tokens that are added to a tokenizer, such as the delimiters of a task or of a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptfast.tokenizer.added import FLAGS
from gptfast.tokenizer.base import Tokenizer
from gptfast.tokenizer.bpe import BPETokenizer
from gptfast.tokenizer.gpt1 import OpenAIGPTTokenizer
from gptfast.tokenizer.hf import HFTokenizer
from gptfast.tokenizer.hf_files import HFFiles
from gptfast.tokenizer.vocabulary import CharTokenizer, WordTokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int | None:
    """The id of a token by its text, as it is written in the vocabulary; None for one that is not there."""
    inner: Any = getattr(tokenizer, "inner", tokenizer)
    vocab = inner.vocab if hasattr(inner, "vocab") else {text: i for i, text in enumerate(inner.tokens)}
    return vocab.get(token)


def with_special_tokens(tokenizer: Tokenizer, tokens: Mapping[str, int]) -> Tokenizer:
    """A tokenizer of the same kind with more special tokens.

    Args:
        tokenizer: any of `gptfast.tokenizer`; it stays as it is.
        tokens: text -> id of tokens that it lacks, ids from its `vocab_size` on.
    Raises:
        ValueError: a list of characters or words whose ids would have a gap.  TypeError: another class.
    """
    if not tokens:
        return tokenizer
    inner: Any = getattr(tokenizer, "inner", tokenizer)
    if isinstance(inner, BPETokenizer):
        eos = next((token for token, i in inner.specials.items() if i == inner.eos_id), None)
        return BPETokenizer({**inner.vocab, **tokens}, inner.merges, eos, inner.settings)
    if isinstance(inner, OpenAIGPTTokenizer):
        return OpenAIGPTTokenizer({**inner.vocab, **tokens}, inner.merges, inner.unk_token)
    if isinstance(inner, HFTokenizer):
        return type(inner)(_extended(inner.hf_files, tokens))
    if isinstance(inner, (CharTokenizer, WordTokenizer)):
        wanted = list(range(inner.vocab_size, inner.vocab_size + len(tokens)))
        if sorted(tokens.values()) != wanted:
            raise ValueError(
                f"with_special_tokens: the ids {sorted(tokens.values())} leave a gap after the {inner.vocab_size} tokens of "
                f"a {type(inner).__name__}; expected {wanted}"
            )
        return type(inner)([*inner.tokens, *sorted(tokens, key=tokens.__getitem__)])
    raise TypeError(
        f"with_special_tokens: the tokenizer is a {type(inner).__name__}; expected one of gptfast.tokenizer"
    )


def _extended(files: HFFiles, tokens: Mapping[str, int]) -> HFFiles:
    flags = {**dict.fromkeys(FLAGS, False), "special": True}
    added = [{"id": i, "content": token, **flags} for token, i in tokens.items()]
    vocab = {**files.vocab, **tokens}
    spec = {**files.spec, "added_tokens": [*files.spec["added_tokens"], *added]}
    spec["model"] = {**spec["model"], "vocab": vocab}
    return HFFiles(vocab, files.merges, files.eos_token, spec, files.settings)
