"""Training tokenizers on the text to be prepared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from gptfast.data.survey import Survey
from gptfast.tokenizer import Tokenizer, get_tokenizer
from gptfast.tokenizer.pieces import WORDS, pieces

LEARNT = 64_000_000  # bytes; merges are learnt from at most this much text


def learn(name: str, surveys: Sequence[Survey], vocab_size: int | None, unk: bool) -> tuple[Tokenizer, str | None]:
    """The tokenizer "char", "word", "bpe" or "wordpiece" of texts, and a note where its merges come from a part of them, else None.

    Characters come from all the text, so that each can be encoded; words and merges come from the training parts.
    """
    everything = name == "char"
    parts = (
        piece
        for found in surveys
        for part, document in found.parts()
        if everything or part == "train"
        for piece in pieces(document.blocks(), WORDS)
    )
    total = sum(found.size - (0 if everything else found.val_size) for found in surveys)
    if name not in ("bpe", "wordpiece") or total <= LEARNT:
        return get_tokenizer(name, parts, vocab_size, unk), None
    note = f"{name}: learnt from {LEARNT / 1e6:.0f} of {total / 1e6:.0f} MB, taken evenly from all the text"
    return get_tokenizer(name, _sample(parts, LEARNT / total), vocab_size, unk), note


def _sample(parts: Iterable[str], share: float) -> Iterator[str]:
    """An evenly spaced, repeatable share of the parts."""
    for n, part in enumerate(parts):
        if int((n + 1) * share) > int(n * share):
            yield part
