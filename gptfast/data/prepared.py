"""Prepared data: text as token files with their tokenizer, as `gptfast prepare` writes and training opens them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptfast._checks import check_count
from gptfast._folders import staged_folder, sync
from gptfast._json import field, read_json
from gptfast._snapshots import TOKENIZER, TOKENS, current, current_files, read_whole
from gptfast.data.corpus import load_corpus
from gptfast.data.filters import Filters
from gptfast.data.learn import learn
from gptfast.data.mixture import Mixture
from gptfast.data.options import SHARD_TOKENS
from gptfast.data.parts import PARTS, write_parts
from gptfast.data.progress import progress_bar
from gptfast.data.survey import Survey, survey
from gptfast.data.token_file import TokenFile
from gptfast.data.token_format import UNKNOWN, vocabulary_hash
from gptfast.data.token_shards import TokenShards
from gptfast.data.workers import Workers
from gptfast.tokenizer import TRAINED, Tokenizer, get_tokenizer, load_tokenizer
from gptfast.tokenizer.base import save_files

MANIFEST = "data.json"
_VERSION = 1
_UNFINISHED = ".preparing"
_LARGE = 32_000_000  # bytes of files from which processes are worth their start
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
    min_chars: int | None = None,
    max_chars: int | None = None,
    drop_near_duplicates: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = True,
    overwrite: bool = True,
    workers: int | None = None,
) -> PreparedData:
    """Split text into training and validation documents and write their tokens.

    Writes train.bin, val.bin, the tokenizer's files and data.json; a part of more than `shard_tokens` tokens becomes
    train-00001-of-00003.bin and so on. If they exist already for the same text, tokenizer and options, nothing is written.
    All files are replaced together; after an error the previous ones are intact. After an interruption the next call with the
    same arguments goes on from where it was, to the same bytes.

    Args:
        data: "shakespeare", "shakespeare:comedy", a text file, a file of records, a folder of `datasets`, or another folder
            (see `load_documents`).
        tokenizer: "gpt2", "char", "word", "bpe" or "wordpiece" (the last four are trained on the text; the last two on at most
            64 MB of it, in evenly spaced parts), a folder with a saved tokenizer, or a tokenizer.
        out_dir: the folder to write, created if missing.
        vocab_size, unk: for "bpe", "wordpiece" and "word", and for "char", see `get_tokenizer`.
        glob, text_field: which files of a folder, and which field of a record (see `load_documents`).
        val_fraction: part of the text for validation, in (0, 1); see `split_documents`. It does not count for a dictionary of
            splits that has one for validation.
        seed: chooses the validation documents.
        min_chars, max_chars: leave out shorter and longer documents; None: no limit.
        drop_near_duplicates: leave out documents that are nearly the same as an earlier one, see
            `gptfast.data.near_duplicates`.
        shard_tokens: tokens of a file, at least 1.
        progress: show a progress bar for a long text, if standard error is a terminal.
        overwrite: replace tokens of another text, another tokenizer or another split in `out_dir`.
        workers: processes that encode a long text, threads for a short one; None: one a core that the process may use. The
            files do not depend on it.
    Returns:
        The prepared data; info["notes"] lists files, records and documents that were left out, and damage that was mended.
    Raises:
        FileExistsError: other tokens, or a tokenizer, are in `out_dir` and `overwrite` is False.
        OSError: a file cannot be read or written.
        ValueError: bad arguments, or text that cannot be read or encoded.
        RuntimeError: a process that encodes died.
    """
    out_dir = Path(out_dir)
    check_count("prepare", "shard_tokens", shard_tokens)
    if workers is not None:
        check_count("prepare", "workers", workers)
    filters = Filters(min_chars, max_chars, drop_near_duplicates)
    corpus = load_corpus(data, glob, text_field)
    chosen = None if tokenizer in TRAINED else given_tokenizer(tokenizer, vocab_size, unk)
    files = None if chosen is None else chosen.files()  # taken once: those of GPT-2 take some 20 ms
    with (
        progress_bar(corpus.size, corpus.is_cheap_to_keep, progress) as bar,
        Workers(workers, corpus.size >= _LARGE) as team,
    ):
        encoders = team.use(chosen) if chosen else ""  # before the survey: processes take half a second to start
        found = survey(corpus, val_fraction, seed, filters, team, bar.read)
        notes = [*corpus.notes, *found.notes]
        job = _fingerprint(found, shard_tokens, files or (tokenizer, vocab_size, *(["unk"] if unk else [])))
        there, damage = _up_to_date(out_dir, job)
        if there is not None:
            return replace(there, info={**there.info, "notes": notes})
        chosen, learnt = (chosen, None) if chosen else learn(str(tokenizer), [found], vocab_size, unk)
        info: dict[str, Any] = {"version": _VERSION, "fingerprint": job}
        info |= {"data": str(data), "glob": glob, "text_field": text_field, "split": found.split, "notes": notes}
        info |= {} if learnt is None else {"learnt": learnt}
        keeps_tokenizer = _is_folder(tokenizer, out_dir)
        if not overwrite:
            _refuse_others(out_dir, job, keeps_tokenizer)
        bar.begin(found.size, encoders or team.use(chosen))
        with (
            staged_folder(out_dir, replaces=TOKENS if keeps_tokenizer else f"{TOKENS}|{TOKENIZER}") as stage,
            _unfinished(out_dir) as place,
        ):
            parts = write_parts(place, job, found.parts(), chosen, team, shard_tokens, bar.encoded)
            files_of = {part: entry.pop("files") for part, entry in parts.items()}
            several = any(len(made) > 1 for made in files_of.values())
            info |= parts | ({"files": {part: list(made) for part, made in files_of.items()}} if several else {})
            for name, path in (pair for made in files_of.values() for pair in made.items()):
                _link(path, stage / name)
            if not keeps_tokenizer:
                save_files(stage, files or chosen.files())
            (stage / MANIFEST).write_text(json.dumps(info, indent=2), encoding="utf-8")
    made = read_whole(out_dir, lambda: _load_prepared(out_dir, chosen))
    return replace(made, info={**made.info, "notes": [*damage, *notes]})


def _link(path: Path, other: Path) -> None:
    """Give a file another name, on disk when this returns; where the file system has no links, instead of its own."""
    try:
        os.link(path, other)
    except OSError:
        os.replace(path, other)
    sync(other)


@contextmanager
def _unfinished(out_dir: Path) -> Iterator[Path]:
    """A folder for files that are being made. It stays after Ctrl-C or a kill, to go on from; an error leaves nothing."""
    place = out_dir / _UNFINISHED
    place.mkdir(exist_ok=True)
    try:
        yield place
    except Exception:
        shutil.rmtree(place, ignore_errors=True)
        raise
    shutil.rmtree(place)


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
    train, val = (_open_shards(folder, part, info) for part in PARTS)
    tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer
    check_fit([train, val], tokenizer)
    return PreparedData(folder, train, val, tokenizer, info)


def _open_shards(folder: Path, part: str, info: dict[str, Any]) -> TokenFile:
    names = info.get("files", {}).get(part, [f"{part}.bin"])
    return TokenShards.join([TokenFile.open(current(folder, name)) for name in names])


def _read_manifest(path: Path) -> dict[str, Any]:
    info = read_json(path)
    if not isinstance(info, dict) or info.get("version") != _VERSION:
        raise ValueError(f"{path}: expected version {_VERSION}; prepare the data again")
    for key in ("fingerprint", "data", "split"):
        field(info, key, str, path)
    for part in PARTS:
        for key in ("documents", "tokens"):
            field(field(info, part, dict, path), key, int, path, inside=part)
    for part, names in field(info, "files", dict, path, {}).items():
        if not isinstance(names, list) or not names or not all(re.fullmatch(TOKENS, str(name)) for name in names):
            raise ValueError(f"{path}: files.{part} is {names}; expected names of token files - prepare the data again")
    return info


def given_tokenizer(tokenizer: Any, vocab_size: int | None = None, unk: bool = False) -> Tokenizer:
    """A tokenizer that is given by name or folder, or as an object."""
    return get_tokenizer(tokenizer, vocab_size=vocab_size, unk=unk) if isinstance(tokenizer, _PATH) else tokenizer


def _is_folder(tokenizer: Any, folder: Path) -> bool:
    return isinstance(tokenizer, _PATH) and Path(tokenizer).resolve() == folder.resolve()


def _fingerprint(found: Survey, shard_tokens: int, tokenizer: dict[str, bytes] | tuple[Any, ...]) -> str:
    """A hash of everything that determines the files: the text, and the tokenizer's files or how it is trained."""
    digest = hashlib.sha256(f"2 {shard_tokens} {found.digest} ".encode())
    if isinstance(tokenizer, tuple):
        digest.update(repr(tokenizer).encode())
    else:
        for _, content in sorted(tokenizer.items()):
            digest.update(hashlib.sha256(content).digest())
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
    """Raise FileExistsError where a folder has tokens of another job."""
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


def check_fit(files: Sequence[TokenFile], tokenizer: Tokenizer) -> None:
    """Raise ValueError where token files were made with another vocabulary than a tokenizer's."""
    for file in files:
        if (file.vocab_size, file.eos_id) != (tokenizer.vocab_size, tokenizer.eos_id):
            raise ValueError(
                f"{file.path} was made with a vocabulary of {file.vocab_size} (end of text: {file.eos_id}), but "
                f"the tokenizer has {tokenizer.vocab_size} (end of text: {tokenizer.eos_id}); name the tokenizer "
                "that made it, or prepare the data again"
            )
    known = [file for file in files if file.vocabulary != UNKNOWN]
    vocabulary = vocabulary_hash(tokenizer) if known else UNKNOWN
    for file in known:
        if file.vocabulary != vocabulary:
            raise ValueError(
                f"{file.path} was made with another vocabulary of {file.vocab_size} tokens than the tokenizer's; name the "
                "tokenizer that made it, or prepare the data again"
            )
