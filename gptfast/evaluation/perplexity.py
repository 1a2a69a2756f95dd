"""Perplexity of texts, by token, word, character and byte, and paired differences between models.

perplexity = exp(-sum log p(token | tokens before it in its window) / count), and bits per byte = the same sum in bits over
the bytes of UTF-8. The windows are those of transformers; the sum is exact, where the well-known code weighs the mean loss
of an overlapping window by its targets minus one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

import numpy as np

from gptfast.data import Document
from gptfast.data.encode import encode_documents
from gptfast.data.spool import Spool
from gptfast.evaluation.counts import Counts, count_text, count_token
from gptfast.evaluation.detokenizers import DETOKENIZERS, by_lines
from gptfast.evaluation.document_scores import DocumentScore, sum_of
from gptfast.evaluation.logprobs import ROWS, scorer
from gptfast.evaluation.windows import Window, check_windows, windows
from gptfast.generation.runner import virtual_tokens
from gptfast.metadata import metadata_of
from gptfast.tokenizer import Tokenizer

OWNER = "perplexity"
BLOCK = 1 << 15  # characters that are encoded at a time


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
        room = model.config.block_size - virtual_tokens(model)
        context, stride = check_windows(OWNER, self.context, self.stride, room)
        if self.detokenize not in DETOKENIZERS:
            raise ValueError(f"{OWNER}: detokenize is {self.detokenize!r}; expected one of {', '.join(DETOKENIZERS)}")
        return replace(self, context=context, stride=stride)


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
        context: most tokens in a window, in [2, block_size], less the virtual tokens of an active soft prompt; None: all of these.
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
    documents = (Document(f"document {n + 1}", text) for n, text in enumerate(named))
    settings = Settings(context, stride, bos, join, detokenize).resolved(model)
    return summarise(score_documents(model, documents, tokenizer, settings, progress), settings)


def score_documents(
    model: Any,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    settings: Settings = Settings(),
    progress: Callable[[int], None] | None = None,
    observe: Callable[[int, np.ndarray], None] | None = None,
) -> list[DocumentScore]:
    """The scores of each document; arguments and errors as in `perplexity`. observe: receives the log-probabilities of the
    scored tokens of each window, and the place in it of the first.

    A document is read, encoded and scored in pieces, so that memory does not grow with its text; one that the tokenizer can only
    encode as a whole is held as a whole.
    """
    settings = settings.resolved(model)
    first = _first_token(model, tokenizer) if settings.bos else None
    if settings.join and tokenizer.eos_id is None:
        raise ValueError(
            f"{OWNER}: join=True, but the tokenizer has no end token to put between documents; leave it out"
        )
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    scores: list[DocumentScore] = []
    try:
        with closing(encode_documents(_read(documents, scores, settings), tokenizer, 1, BLOCK)) as encoded:
            _score(
                model,
                _streams(encoded, tokenizer, settings.join),
                scores,
                tokenizer,
                settings,
                first,
                progress,
                observe,
            )
    finally:
        if was_training:
            model.train()
    return scores


def _read(documents: Iterable[Document], scores: list[DocumentScore], settings: Settings) -> Iterator[Document]:
    """The documents as they are to be encoded. Each has its entry in `scores`, with the counts of its text, before it comes."""
    detokenize = DETOKENIZERS[settings.detokenize]
    for document in documents:
        counts = count_text(document.blocks(BLOCK))
        if settings.join and scores:
            scores[0].counts += counts
        else:
            scores.append(DocumentScore("all documents" if settings.join else document.name, counts=counts))
        if detokenize is None:
            yield document
        else:
            yield Document(document.name, Spool().add(by_lines(detokenize, document.blocks(BLOCK))))


def _streams(
    encoded: Iterable[tuple[int, np.ndarray, int]], tokenizer: Tokenizer, join: bool
) -> Iterator[tuple[int, Iterable[np.ndarray]]]:
    """The index in the scores and the ids of each text, in chunks."""
    documents = ((n, (ids for _, ids, _ in parts)) for n, parts in groupby(encoded, key=itemgetter(0)))
    if not join:
        yield from documents
        return

    def joined() -> Iterator[np.ndarray]:
        end, last = np.array([tokenizer.eos_id], np.uint32), tokenizer.eos_id
        for _, chunks in documents:
            if last != tokenizer.eos_id:  # some tokenizers put it there themselves
                yield end
            for ids in chunks:
                last = ids[-1] if len(ids) else last
                yield ids

    yield 0, joined()


def _score(
    model: Any,
    streams: Iterable[tuple[int, Iterable[np.ndarray]]],
    scores: list[DocumentScore],
    tokenizer: Tokenizer,
    settings: Settings,
    first: int | None,
    progress: Callable[[int], None] | None,
    observe: Callable[[int, np.ndarray], None] | None,
) -> None:
    """Add loss and tokens to the scores, and take what is not scored from their counts."""
    size = settings.context or 0, settings.stride or 0  # resolved: never None
    score = scorer(model, size[0])
    waiting: list[tuple[int, Window]] = []

    def work() -> None:
        found = score([(window.ids, window.first) for _, window in waiting])
        for (n, window), logprobs in zip(waiting, found, strict=True):
            scores[n].loss -= float(logprobs.sum())
            scores[n].tokens += len(logprobs)
            if observe is not None:
                observe(window.first, logprobs)
            if progress is not None:
                progress(len(window.ids) - window.first)
        waiting.clear()

    before = [] if first is None else [np.array([first], np.uint32)]
    for n, chunks in streams:
        checked = (_check_ids(scores[n].name, ids, model.config.vocab_size) for ids in chain(before, chunks))
        for window in windows(checked, *size):
            _leave_out(scores[n].counts, tokenizer, window, first is not None)
            if len(window.ids) > window.first:
                waiting.append((n, window))
            if len(waiting) == ROWS:
                work()
    if waiting:
        work()


def _leave_out(counts: Counts, tokenizer: Tokenizer, window: Window, bos: bool) -> None:
    """Take the text of a window's unscored first token from the counts."""
    token, end = int(window.ids[0]), tokenizer.eos_id  # text is never encoded to the end token
    if not window.skips or (bos and window.before is None) or token == end:
        return
    before, after = window.before, int(window.ids[1]) if len(window.ids) > 1 else None
    alone = count_token(tokenizer, token, *(None if other == end else other for other in (before, after)))
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


def _check_ids(name: str, ids: np.ndarray, vocab_size: int) -> np.ndarray:
    if len(ids) and int(ids.max()) >= vocab_size:
        raise ValueError(
            f"{OWNER}: {name} has token {int(ids.max())}, but the model's vocabulary has {vocab_size}; use the model's tokenizer"
        )
    return ids


def summarise(scores: Sequence[DocumentScore], settings: Settings) -> dict[str, Any]:
    """What `perplexity` returns, from the scores of its documents and its settings, which are `resolved`."""
    total = sum_of(scores)
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
