"""Prepared data: text as token files with their tokenizer, as `gptfast prepare` writes and training opens them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptfast._checks import check_count
from gptfast._folders import staged_folder
from gptfast._json import field, read_json
from gptfast._snapshots import TOKENIZER, TOKENS, current, current_files, read_whole
from gptfast.data.documents import Split, load_corpus, split_documents
from gptfast.data.encode import progress_bar, write_part
from gptfast.data.learn import learn
from gptfast.data.mixture import Mixture
from gptfast.data.token_file import TokenFile
from gptfast.tokenizer import Tokenizer, get_tokenizer, load_tokenizer
from gptfast.tokenizer.base import save_files

MANIFEST = "data.json"
_VERSION = 1
TRAINABLE = ("char", "word", "bpe")
_PATH = (str, os.PathLike)


@dataclass(frozen=True, eq=False)
class PreparedData:
    """Training tokens, validation tokens and their tokenizer.

    folder: where they are stored.
    info: {"data", "split", "train", "val"}, and "learnt" where merges come from a part of the text. train and val have
        "documents", "tokens" and, if the text is known, "bytes" (UTF-8), which turns nats per token into bits per byte.
    """

    folder: Path
    train: TokenFile | Mixture
    val: TokenFile
    tokenizer: Tokenizer
    info: dict[str, Any]

    @property
    def notes(self) -> list[str]:
        """Sentences for the user: the split, the part of the text that merges come from, and what was left out."""
        return [*(self.info[name] for name in ("split", "learnt") if name in self.info), *self.info.get("notes", [])]


def prepare(
    data: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | Tokenizer,
    out_dir: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    unk: bool = False,
    glob: str | Sequence[str] | None = None,
    text_field: str | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    progress: bool = True,
    overwrite: bool = True,
    workers: int | None = None,
) -> PreparedData:
    """Split text into training and validation documents and write their tokens.

    Writes train.bin, val.bin, the tokenizer's files and data.json. If they exist already for the same text, tokenizer
    and split, nothing is written. All files are replaced together; after an error the previous ones are intact.

    Args:
        data: "shakespeare", "shakespeare:comedy", a text file, a file of records, or a folder (see
            `load_documents`).
        tokenizer: "gpt2", "char", "word" or "bpe" (the last three are trained on the text; bpe on at most 64 MB of it, in
            evenly spaced parts), a folder with a saved tokenizer, or a tokenizer.
        out_dir: the folder to write, created if missing.
        vocab_size, unk: for "bpe" and "word", and for "char", see `get_tokenizer`.
        glob, text_field: which files of a folder, and which field of a record (see `load_documents`).
        val_fraction: part of the text for validation, in (0, 1); see `split_documents`.
        seed: chooses the validation documents.
        progress: show a progress bar for a long text, if standard error is a terminal.
        overwrite: replace tokens of another text, another tokenizer or another split in `out_dir`.
        workers: threads that encode; None: one a core that the process may use. The files do not depend on it.
    Returns:
        The prepared data; info["notes"] lists files and records that were left out, and damage that was mended.
    Raises:
        FileExistsError: other tokens, or a tokenizer, are in `out_dir` and `overwrite` is False.
        OSError: a file cannot be read or written.
        ValueError: bad arguments, or text that cannot be read or encoded.
    """
    out_dir = Path(out_dir)
    if workers is not None:
        check_count("prepare", "workers", workers)
    corpus = load_corpus(data, glob, text_field)
    documents = corpus.documents
    split = split_documents(documents, val_fraction, seed)
    chosen = None if tokenizer in TRAINABLE else given_tokenizer(tokenizer, vocab_size, unk)
    files = None if chosen is None else chosen.files()  # taken once: those of GPT-2 take some 20 ms
    fingerprint = _fingerprint(split, files or (tokenizer, vocab_size, *(["unk"] if unk else [])))
    found, damage = _up_to_date(out_dir, fingerprint)
    if found is not None:
        return replace(found, info={**found.info, "notes": corpus.notes})
    chosen, learnt = (chosen, None) if chosen else learn(str(tokenizer), split, vocab_size, unk)
    info: dict[str, Any] = {"version": _VERSION, "fingerprint": fingerprint}
    info |= {"data": str(data), "glob": glob, "text_field": text_field, "split": split.note, "notes": corpus.notes}
    info |= {} if learnt is None else {"learnt": learnt}
    keeps_tokenizer = _is_folder(tokenizer, out_dir)
    if not overwrite:
        _refuse_others(out_dir, fingerprint, keeps_tokenizer)
    with staged_folder(out_dir, replaces=TOKENS if keeps_tokenizer else f"{TOKENS}|{TOKENIZER}") as stage:
        with progress_bar(documents, progress) as advance:
            for part in ("train", "val"):
                info[part] = write_part(stage / f"{part}.bin", getattr(split, part), chosen, advance, workers)
        if not keeps_tokenizer:
            save_files(stage, files or chosen.files())
        (stage / MANIFEST).write_text(json.dumps(info, indent=2), encoding="utf-8")
    made = read_whole(out_dir, lambda: _load_prepared(out_dir, chosen))
    return replace(made, info={**made.info, "notes": [*damage, *corpus.notes]})


def load_prepared(folder: str | os.PathLike[str]) -> PreparedData:
    """Open the data that `prepare` wrote.

    Raises:
        OSError, ValueError: a missing or damaged file, or files that do not belong together.
    """
    return read_whole(folder, lambda: _load_prepared(Path(folder)))


def _load_prepared(folder: Path, tokenizer: Tokenizer | None = None) -> PreparedData:
    """The data in a folder.

    Args:
        tokenizer: the folder's tokenizer, if the caller has it already; None: loaded, which takes a third of a second.
    """
    manifest = current(folder, MANIFEST)
    if not manifest.exists():
        raise FileNotFoundError(
            f"load_prepared: {folder} has no {MANIFEST}; it was not made by `gptfast prepare`, or that was "
            "interrupted - run it (again)"
        )
    info = _read_manifest(manifest)
    train, val = (TokenFile.open(current(folder, name)) for name in ("train.bin", "val.bin"))
    tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer
    check_fit(train, tokenizer)
    check_fit(val, tokenizer)
    return PreparedData(folder, train, val, tokenizer, info)


def _read_manifest(path: Path) -> dict[str, Any]:
    info = read_json(path)
    if not isinstance(info, dict) or info.get("version") != _VERSION:
        raise ValueError(f"{path}: expected version {_VERSION}; prepare the data again")
    for key in ("fingerprint", "data", "split"):
        field(info, key, str, path)
    for part in ("train", "val"):
        for key in ("documents", "tokens"):
            field(field(info, part, dict, path), key, int, path, inside=part)
    return info


def given_tokenizer(tokenizer: Any, vocab_size: int | None = None, unk: bool = False) -> Tokenizer:
    return get_tokenizer(tokenizer, vocab_size=vocab_size, unk=unk) if isinstance(tokenizer, _PATH) else tokenizer


def _is_folder(tokenizer: Any, folder: Path) -> bool:
    return isinstance(tokenizer, _PATH) and Path(tokenizer).resolve() == folder.resolve()


def _fingerprint(split: Split, tokenizer: dict[str, bytes] | tuple[Any, ...]) -> str:
    """A hash of everything that determines the files: the text, and the tokenizer's files or how it is trained."""
    digest = hashlib.sha256(f"{_VERSION}".encode())
    if isinstance(tokenizer, tuple):
        digest.update(repr(tokenizer).encode())
    else:
        for _, content in sorted(tokenizer.items()):
            digest.update(hashlib.sha256(content).digest())
    for part in (split.train, split.val):
        digest.update(f"part {len(part)}".encode())
        for document in part:
            digest.update(hashlib.sha256(repr(document.name).encode()).digest())
            text = hashlib.sha256()
            for block in document.blocks():
                text.update(block.encode())
            digest.update(text.digest())
    return digest.hexdigest()


def _up_to_date(folder: Path, fingerprint: str) -> tuple[PreparedData | None, list[str]]:
    """The data in `folder` if it is complete and has this fingerprint, else None; and what was damaged there."""
    try:
        found = load_prepared(folder)
        found.train.verify()
        found.val.verify()
    except FileNotFoundError:
        return None, []
    except ValueError as error:
        return None, [f"damaged files were written again: {error}"]
    return (found if found.info.get("fingerprint") == fingerprint else None), []


def _refuse_others(folder: Path, fingerprint: str, keeps_tokenizer: bool) -> None:
    names = TOKENS if keeps_tokenizer else f"{TOKENS}|{TOKENIZER}"
    found = [file.name for file in current_files(folder) if re.fullmatch(names, file.name)]
    if not found:
        return
    try:
        info = _read_manifest(current(folder, MANIFEST))
    except (OSError, ValueError):
        info = {}
    if info.get("fingerprint") != fingerprint:
        of = f"tokens of {info['data']}, made from other text or with other options" if info else ", ".join(found)
        raise FileExistsError(f"{folder} holds {of}; replace that with `overwrite`, or choose another `out_dir`")


def check_fit(file: TokenFile, tokenizer: Tokenizer) -> None:
    if (file.vocab_size, file.eos_id) != (tokenizer.vocab_size, tokenizer.eos_id):
        raise ValueError(
            f"{file.path} was made with a vocabulary of {file.vocab_size} (end of text: {file.eos_id}), but "
            f"the tokenizer has {tokenizer.vocab_size} (end of text: {tokenizer.eos_id}); name the tokenizer "
            "that made it, or prepare the data again"
        )
