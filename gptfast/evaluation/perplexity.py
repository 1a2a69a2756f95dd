"""Perplexity of texts, by token, word, character and byte, and paired differences between models.

perplexity = exp(-sum log p(token | tokens before it in its window) / count), and bits per byte = the same sum in bits over
the bytes of UTF-8. The windows are those of transformers; the sum is exact, where the well-known code weighs the mean loss
of an overlapping window by its targets minus one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from gptfast.data import Document
from gptfast.data.encode import encode_documents
from gptfast.evaluation.counts import Counts, count_text, count_token
from gptfast.evaluation.detokenizers import DETOKENIZERS
from gptfast.evaluation.logprobs import ROWS, scorer
from gptfast.evaluation.windows import Window, check_windows, windows
from gptfast.metadata import metadata_of
from gptfast.tokenizer import Tokenizer

OWNER = "perplexity"


@dataclass(frozen=True)
class Settings:
    """How texts are scored; see `perplexity`. `resolved` has no None."""

    context: int | None = None
    stride: int | None = None
    bos: bool = False
    join: bool = False
    detokenize: str = "none"

    def resolved(self, model: Any) -> Settings:
        """With the defaults that depend on the model. Raises TypeError, ValueError: a value out of range."""
        context, stride = check_windows(OWNER, self.context, self.stride, model.config.block_size)
        if self.detokenize not in DETOKENIZERS:
            raise ValueError(f"{OWNER}: detokenize is {self.detokenize!r}; expected one of {', '.join(DETOKENIZERS)}")
        return replace(self, context=context, stride=stride)


@dataclass
class DocumentScore:
    """The scored tokens of a document.

    loss: their negative log-likelihood, in nats.
    tokens: their number.
    counts: bytes, characters and words of their text.
    """

    name: str
    loss: float = 0.0
    tokens: int = 0
    counts: Counts = field(default_factory=Counts)


def perplexity(
    model: Any,
    texts: str | Iterable[str],
    tokenizer: Tokenizer,
    *,
    context: int | None = None,
    stride: int | None = None,
    bos: bool = False,
    join: bool = False,
    detokenize: str = "none",
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """How well a model predicts texts.

    Args:
        model: a GPT, which runs in torch, or a compiled one (`compile_for_inference`), which runs in the native engine.
        texts: one text, or several: documents, of which none sees another.
        tokenizer: of the model.
        context: most tokens in a window, in [2, block_size]; None: block_size.
        stride: tokens from one window to the next, in [1, context]: a token is seen with at least context - stride tokens
            before it, where the text has them. None: half a context. context: windows do not overlap, the cheapest and the
            highest perplexity, and the first token of each is not scored.
        bos: put the model's first token (its bos_token_id, else the tokenizer's end token) before each document, so that the
            document's own first token is scored.
        join: make one stream of the documents, with the tokenizer's end token between two, which is scored as well.
        detokenize: "none", or "wikitext": undo the spaces of WikiText's files before tokens are made; bytes, characters and
            words are those of the text before that, as published.
        progress: receives the number of tokens that each step has read.
    Returns:
        perplexity (by token), word_perplexity, char_perplexity, byte_perplexity, bits_per_byte; tokens, words, characters,
        bytes: of what was scored; documents: their number; and context, stride, bos, join, detokenize as they were used. A ratio
        is None where the scored text has no word, character or byte.
    Raises:
        TypeError, ValueError: options out of range, a text that cannot be encoded, no token to score, no token for `bos`.
    """
    named = [texts] if isinstance(texts, str) else texts
    documents = [Document(f"document {n + 1}", text) for n, text in enumerate(named)]
    settings = Settings(context, stride, bos, join, detokenize).resolved(model)
    return summarise(score_documents(model, documents, tokenizer, settings, progress), settings)


def score_documents(
    model: Any,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    settings: Settings = Settings(),
    progress: Callable[[int], None] | None = None,
) -> list[DocumentScore]:
    """The scores of each document; arguments and errors as in `perplexity`. Memory does not grow with the text, but by four
    bytes a token."""
    settings = settings.resolved(model)
    first = _first_token(model, tokenizer) if settings.bos else None
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        encoded = _encoded(documents, tokenizer, DETOKENIZERS[settings.detokenize])
        scores = [DocumentScore(document.name, counts=count_text(document.blocks())) for document in documents]
        if settings.join and scores:
            encoded, scores = _joined(encoded, tokenizer), [_sum("all documents", scores)]
        return _score(model, encoded, scores, tokenizer, settings, first, progress)
    finally:
        if was_training:
            model.train()


def _score(
    model: Any,
    encoded: Iterable[tuple[int, np.ndarray]],
    scores: list[DocumentScore],
    tokenizer: Tokenizer,
    settings: Settings,
    first: int | None,
    progress: Callable[[int], None] | None,
) -> list[DocumentScore]:
    size = settings.context or 0, settings.stride or 0  # resolved: never None
    score = scorer(model, size[0])
    waiting: list[tuple[int, np.ndarray, Window]] = []

    def work() -> None:
        found = score([(ids[w.begin : w.end], w.first - w.begin) for _, ids, w in waiting])
        for (n, _, window), logprobs in zip(waiting, found, strict=True):
            scores[n].loss -= float(logprobs.sum())
            scores[n].tokens += len(logprobs)
            if progress is not None:
                progress(window.end - window.first)
        waiting.clear()

    for n, ids in encoded:
        ids = ids if first is None else np.concatenate([np.array([first], ids.dtype), ids])
        _check_ids(scores[n].name, ids, model.config.vocab_size)
        for window in windows(len(ids), *size):
            _leave_out(scores[n].counts, tokenizer, ids, window, first is not None)
            if window.end > window.first:
                waiting.append((n, ids, window))
            if len(waiting) == ROWS:
                work()
    if waiting:
        work()
    return scores


def _encoded(
    documents: Sequence[Document], tokenizer: Tokenizer, detokenizer: Callable[[str], str] | None
) -> Iterator[tuple[int, np.ndarray]]:
    if detokenizer is not None:  # by the whole text: its rules look over the ends of lines
        documents = [Document(document.name, detokenizer(document.text)) for document in documents]
    for n, parts in groupby(encode_documents(documents, tokenizer), key=itemgetter(0)):
        yield n, np.concatenate([ids for _, ids, _ in parts])


def _joined(encoded: Iterable[tuple[int, np.ndarray]], tokenizer: Tokenizer) -> Iterator[tuple[int, np.ndarray]]:
    if tokenizer.eos_id is None:
        raise ValueError(
            f"{OWNER}: join=True, but the tokenizer has no end token to put between documents; leave it out"
        )
    end = np.array([tokenizer.eos_id], np.uint32)
    parts = [part for _, ids in encoded for part in (end, ids)]
    yield 0, np.concatenate(parts[1:])


def _sum(name: str, scores: Iterable[DocumentScore]) -> DocumentScore:
    total = DocumentScore(name)
    for score in scores:
        total.loss += score.loss
        total.tokens += score.tokens
        total.counts += score.counts
    return total


def _leave_out(counts: Counts, tokenizer: Tokenizer, ids: np.ndarray, window: Window, bos: bool) -> None:
    """Take the text of a window's unscored first token from the counts."""
    begin, end = window.begin, tokenizer.eos_id
    if not window.skips or (begin == 0 and bos) or ids[begin] == end:  # text is never encoded to the end token
        return
    before = int(ids[begin - 1]) if begin > bos and ids[begin - 1] != end else None
    alone = count_token(tokenizer, int(ids[begin]), before)
    counts.bytes -= alone.bytes
    counts.characters -= alone.characters
    counts.words -= alone.words


def _first_token(model: Any, tokenizer: Tokenizer) -> int:
    metadata = metadata_of(model)
    named = [(metadata.generation or {}).get("bos_token_id"), metadata.config.get("bos_token_id"), tokenizer.eos_id]
    for token in named:
        if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < model.config.vocab_size:
            return token
    raise ValueError(
        f"{OWNER}: bos=True, but neither the model nor its tokenizer names a first or end token; leave it out"
    )


def _check_ids(name: str, ids: np.ndarray, vocab_size: int) -> None:
    if len(ids) and int(ids.max()) >= vocab_size:
        raise ValueError(
            f"{OWNER}: {name} has token {int(ids.max())}, but the model's vocabulary has {vocab_size}; use the model's tokenizer"
        )


def summarise(scores: Sequence[DocumentScore], settings: Settings) -> dict[str, Any]:
    """What `perplexity` returns, from the scores of its documents and its settings, which are `resolved`."""
    total = _sum("", scores)
    loss, tokens, counts = total.loss, total.tokens, total.counts
    if tokens == 0:
        raise ValueError(f"{OWNER}: no token to score; expected a text of at least two tokens, or one with bos=True")
    return {
        "perplexity": _exp(loss / tokens),
        "word_perplexity": _exp(loss / counts.words) if counts.words > 0 else None,
        "char_perplexity": _exp(loss / counts.characters) if counts.characters > 0 else None,
        "byte_perplexity": _exp(loss / counts.bytes) if counts.bytes > 0 else None,
        "bits_per_byte": loss / math.log(2) / counts.bytes if counts.bytes > 0 else None,
        "tokens": tokens,
        "words": counts.words,
        "characters": counts.characters,
        "bytes": counts.bytes,
        "documents": len(scores),
        **asdict(settings),
    }


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def compare(first: Sequence[DocumentScore], other: Sequence[DocumentScore]) -> dict[str, Any]:
    """The paired difference of two models on the same documents.

    Returns:
        difference: mean over documents of other - first, in nats a token; standard_error: of that mean, with n - 1; None for
        one document. documents: those with a scored token.
    """
    pairs = [(a.loss / a.tokens, b.loss / b.tokens) for a, b in zip(first, other, strict=True) if a.tokens and b.tokens]
    differences = np.array([b - a for a, b in pairs])
    n = len(differences)
    return {
        "difference": float(differences.mean()),
        "standard_error": float(differences.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
        "documents": n,
    }
