"""The tokens of the training and the validation part, written in shards, by steps that an interruption cannot undo."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptfast._files import atomic_write
from gptfast._json import read_json
from gptfast.data.documents import Document
from gptfast.data.encode import encode_batches
from gptfast.data.token_file import TokenFile
from gptfast.data.token_format import SIZE, vocabulary_hash
from gptfast.data.token_writer import TokenWriter
from gptfast.data.workers import Workers
from gptfast.tokenizer import Tokenizer

PARTS = ("train", "val")
STATE = "state.json"
_EVERY = 64  # batches of 256 KB of text between two states that a run can go on from
_VERSION = 2

Advance = Callable[[int, int, int], None]  # bytes, tokens and documents since the last call


def write_parts(
    folder: Path,
    job: str,
    documents: Iterable[tuple[str, Document]],
    tokenizer: Tokenizer,
    workers: Workers,
    shard_tokens: int,
    advance: Advance,
) -> dict[str, dict[str, Any]]:
    """Write the tokens of both parts into a folder; go on where an earlier call with the same `job` was interrupted.

    Args:
        folder: an existing folder, for nothing else.
        job: tells the text, the tokenizer and the options from others.
        documents: each after its part, in the same order each time.
        workers: to which `tokenizer` was given.
        shard_tokens: tokens of a file but the last.
    Returns:
        By part: documents, tokens, bytes, and under "files" where its files are, by the names that they are to have.
    Raises:
        OSError, ValueError: a document cannot be read or encoded, or a part has no tokens.
    """
    vocabulary = vocabulary_hash(tokenizer)
    state = _state(folder, job, shard_tokens)
    make = {part: (folder, part, tokenizer, vocabulary, shard_tokens) for part in PARTS}
    writers = {part: _Writer(*make[part], state["parts"][part] if state else None) for part in PARTS}
    if state and not all(writer.is_intact for writer in writers.values()):
        for writer in writers.values():
            writer.close()
        state, writers = None, {part: _Writer(*make[part], None) for part in PARTS}
    if state:
        for writer in writers.values():
            advance(writer.bytes, writer.tokens, writer.documents)
    done = state["batches"] if state else 0
    marked = (((n, part), document) for n, (part, document) in enumerate(documents))
    try:
        with closing(encode_batches(marked, tokenizer, workers, done)) as batches:
            for batch in batches:
                _add(writers, batch, advance)
                done += 1
                if done % _EVERY == 0:
                    kept = {part: writer.state() for part, writer in writers.items()}
                    content = {"version": _VERSION, "job": job, "batches": done, "parts": kept}
                    atomic_write(folder / STATE, json.dumps(content).encode())
        return {part: writer.finish() for part, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()


def _add(writers: dict[str, _Writer], batch: list[Any], advance: Advance) -> None:
    before = [(w.bytes, w.tokens, w.documents) for w in writers.values()]
    for (n, part), ids, size in batch:
        writers[part].add(n, ids, size)
    after = [(w.bytes, w.tokens, w.documents) for w in writers.values()]
    advance(*(np.sum(after, axis=0) - np.sum(before, axis=0)).tolist())


def _state(folder: Path, job: str, shard_tokens: int) -> dict[str, Any] | None:
    """What an earlier call left; None, and nothing in the folder, where that was another job or cannot be read."""
    try:
        state = read_json(folder / STATE)
        if state["version"] == _VERSION and state["job"] == job:
            return state
    except (OSError, ValueError, LookupError, TypeError):
        pass  # begun anew
    for file in folder.iterdir():
        file.unlink()
    return None


@dataclass
class _Writer:
    """Writes one part.

    tokens, documents, bytes: so far. is_intact: what was written before is as it was left.
    """

    folder: Path
    part: str
    tokenizer: Tokenizer
    vocabulary: bytes
    shard_tokens: int
    kept: dict[str, Any] | None

    def __post_init__(self) -> None:
        self.tokens = self.documents = self.bytes = 0
        self.done: list[int] = []  # tokens of each complete shard
        self.is_intact = True
        self._document: int | None = None  # the one that is being written
        self._begun = self._pending = False  # it has tokens; its first token is still to be written
        self._last: int | None = None  # token
        self._writer: TokenWriter | None = None
        self._file: BinaryIO | None = None
        self._starts = 0  # of the open shard, in its file of starts
        if self.kept is not None:
            self.is_intact = self._restore(self.kept)

    def add(self, document: int, ids: np.ndarray, size: int) -> None:
        """A piece of a document; `size`: its bytes of text."""
        if document != self._document:
            self._end()
            self._document, self._begun = document, False
        self.bytes += size
        self._begin(len(ids) > 0)
        self._put(ids)

    def finish(self) -> dict[str, Any]:
        """Close the last shard; what `write_parts` returns. Raises ValueError where there are no tokens."""
        self._end()
        self._document = None
        if not self.tokens:
            raise ValueError(f"prepare: the text of the {self.part} part has no tokens; give more text")
        self._close_shard()
        count = len(self.done)
        several = [f"{self.part}-{n:05d}-of-{count:05d}.bin" for n in range(1, count + 1)]
        names = [f"{self.part}.bin"] if count == 1 else several
        files = {name: self._path(n) for n, name in enumerate(names)}
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "files": files}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def state(self) -> dict[str, Any]:
        """What `kept` is to be for going on from here."""
        writer = self._writer
        state = {name: getattr(self, name) for name in ("tokens", "documents", "bytes", "done")}
        state |= {"document": self._document, "begun": self._begun, "last": self._last, "open": None}
        if writer is not None and self._file is not None:
            self._file.flush()
            with self._path(len(self.done), "starts").open("ab") as file:
                file.write(np.asarray(writer.starts[self._starts :], "<i8").tobytes())
            self._starts = len(writer.starts)
            sizes = {"count": writer.count, "starts": self._starts, "continues": writer.continues}
            state["open"] = {**sizes, "crcs": writer.crcs.tolist()}
        return state

    def _begin(self, has_tokens: bool) -> None:
        if has_tokens and not self._begun:
            self._begun = self._pending = True
            self.documents += 1

    def _end(self) -> None:
        eos = self.tokenizer.eos_id
        if self._begun and eos is not None and self._last != eos:  # a tokenizer may end its texts itself
            self._put(np.array([eos], np.uint32))

    def _put(self, ids: np.ndarray) -> None:
        at = 0
        while at < len(ids):
            if self._writer is not None and self._writer.count == self.shard_tokens:
                self._close_shard()
            writer = self._writer or self._open_shard()
            part = writer.checked(ids[at : at + self.shard_tokens - writer.count])
            if self._pending:
                writer.starts.append(writer.count)
                self._pending = False
            writer.add(part)
            at += len(part)
        self.tokens += len(ids)
        if len(ids):
            self._last = int(ids[-1])

    def _path(self, n: int, suffix: str = "part") -> Path:
        return self.folder / f"{self.part}-{n:05d}.{suffix}"

    def _open_shard(self) -> TokenWriter:
        self._file = self._path(len(self.done)).open("wb")
        self._starts = 0
        self._path(len(self.done), "starts").unlink(missing_ok=True)
        self._writer = self._writer_of(self._file, continues=not self._pending)
        return self._writer

    def _writer_of(self, file: BinaryIO, continues: bool) -> TokenWriter:
        tokenizer = self.tokenizer
        return TokenWriter(file, tokenizer.vocab_size, tokenizer.eos_id, self.vocabulary, continues)

    def _close_shard(self) -> None:
        if self._writer is None or self._file is None:
            return
        self._writer.finish()
        self._file.close()  # its file of starts stays: until the next state is kept, it may have to be opened again
        self.done.append(self._writer.count)
        self._writer = self._file = None

    def _restore(self, kept: dict[str, Any]) -> bool:
        """Take up what was left; False where the files are not what they were."""
        self.tokens, self.documents, self.bytes = kept["tokens"], kept["documents"], kept["bytes"]
        self.done, self._document, self._begun, self._last = (kept[k] for k in ("done", "document", "begun", "last"))
        try:
            for n, count in enumerate(self.done):
                file = TokenFile.open(self._path(n))
                file.verify()
                if len(file) != count:
                    return False
            return kept["open"] is None or self._reopen(**kept["open"])
        except (OSError, ValueError):
            return False

    def _reopen(self, count: int, starts: int, continues: bool, crcs: list[int]) -> bool:
        path = self._path(len(self.done))
        self._file = path.open("r+b")
        writer = self._writer_of(self._file, continues)
        for tokens in self._blocks(self._file, count, writer.dtype):
            writer.add(tokens)  # written once more over themselves
        self._file.truncate(SIZE + count * writer.dtype.itemsize)
        content = self._path(len(self.done), "starts").read_bytes()[: 8 * starts]
        writer.starts = array("q", np.frombuffer(content, "<i8").tolist())
        os.truncate(self._path(len(self.done), "starts"), 8 * starts)
        self._writer, self._starts = writer, starts
        return writer.count == count and writer.crcs.tolist() == crcs and len(writer.starts) == starts

    @staticmethod
    def _blocks(file: BinaryIO, count: int, dtype: np.dtype) -> Iterator[np.ndarray]:
        at, size = SIZE, SIZE + count * dtype.itemsize
        while at < size:
            file.seek(at)
            content = file.read(min(1 << 20, size - at))
            file.seek(at)
            if not content:
                return
            yield np.frombuffer(content, dtype)
            at += len(content)
