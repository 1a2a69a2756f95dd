"""Opening whatever training reads: a text, a prepared folder, a token file, or a mixture of these."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gptfast._files import atomic_write
from gptfast._json import NULL, field, items, read_json
from gptfast._snapshots import current
from gptfast.data.corpus import load_corpus
from gptfast.data.filters import Filters
from gptfast.data.learn import learn
from gptfast.data.mixture import Mixture, Source, is_mixture, read_mixture
from gptfast.data.prepared import MANIFEST, PreparedData, check_fit, given_tokenizer, load_prepared, prepare
from gptfast.data.survey import survey
from gptfast.data.token_file import TokenFile, is_token_file, write_tokens
from gptfast.data.token_format import crc, vocabulary_hash
from gptfast.tokenizer import TRAINED, Tokenizer

_MIXTURE = "mixture.json"  # in the folder of a mixture's tokens: its sources as they were opened
_MARK = "val.json"  # beside it: what the validation texts were made of
_VERSION = 1


def open_data(
    data: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    *,
    vocab_size: int | None = None,
    unk: bool = False,
    glob: str | Sequence[str] | None = None,
    text_field: str | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    progress: bool = True,
    overwrite: bool = True,
) -> PreparedData:
    """The tokens of a text, of a prepared folder, of a token file or of a mixture.

    Args:
        data: a text as `prepare` takes it, whose tokens are written to `cache_dir`; a folder of `prepare`; one token
            file, whose last documents become the validation part; a .toml file of sources (`gptfast.data.mixture`); or the
            `cache_dir` of such a file, for the mixture as it was opened.
        cache_dir: folder for the tokens of a text; later calls find them there.
        tokenizer: as in `prepare`. None: "gpt2" for text; for tokens the tokenizer in their folder.
        vocab_size, unk, glob, text_field, val_fraction, seed, progress, overwrite: as in `prepare`.
    Raises:
        OSError, ValueError: as `prepare` and `load_prepared`; a tokenizer that does not match the tokens.
    """
    if is_mixture(data):
        if glob or text_field:
            raise ValueError(f"open_data: {data} is a mixture; give glob and text_field in its [[source]] tables")
        learning = {"vocab_size": vocab_size, "unk": unk}
        return _open_mixture(
            Path(data),
            Path(cache_dir),
            tokenizer,
            learning,
            val_fraction=val_fraction,
            seed=seed,
            progress=progress,
            overwrite=overwrite,
        )
    given = [name for name, value in (("glob", glob), ("text_field", text_field), ("unk", unk)) if value]
    kept = current(data, MANIFEST).exists() or _is_kept_mixture(data)
    if given and (kept or is_token_file(data)):
        raise ValueError(f"open_data: {data} holds tokens; leave {' and '.join(given)} out, or pass the text")
    if kept:
        if tokenizer is not None or vocab_size is not None:
            raise ValueError(
                f"open_data: {data} holds tokens and their tokenizer; leave tokenizer and vocab_size out, or "
                "pass the text"
            )
        return load_tokens(data)
    if is_token_file(data):
        return _open_token_file(Path(data), tokenizer, val_fraction)
    return prepare(
        data,
        "gpt2" if tokenizer is None else tokenizer,
        cache_dir,
        vocab_size=vocab_size,
        unk=unk,
        glob=glob,
        text_field=text_field,
        val_fraction=val_fraction,
        seed=seed,
        progress=progress,
        overwrite=overwrite,
    )


def _open_token_file(path: Path, tokenizer: Any, val_fraction: float) -> PreparedData:
    file = TokenFile.open(path)
    if tokenizer in TRAINED:
        raise ValueError(
            f"open_data: tokenizer is {tokenizer!r}, which is trained on text, but {path} holds tokens; "
            "name 'gpt2' or the folder of the tokenizer that made them"
        )
    chosen = given_tokenizer(path.parent if tokenizer is None else tokenizer)
    check_fit([file], chosen)
    train, val = file.split(val_fraction)
    info: dict[str, Any] = {
        "data": str(path),
        "split": f"validation: the last {len(val) / len(file):.1%} of the tokens",
    }
    for name, part in (("train", train), ("val", val)):
        info[name] = {"documents": len(part.document_starts), "tokens": len(part)}
    return PreparedData(path.parent, train, val, chosen, info)


def is_tokens(data: str | os.PathLike[str]) -> bool:
    """Whether `data` names tokens with their tokenizer: a folder of `prepare`, a token file, or a mixture with one of these."""
    if is_mixture(data):
        return any(is_tokens(source.data) for source in read_mixture(Path(data)))
    return current(data, MANIFEST).exists() or _is_kept_mixture(data) or is_token_file(data)


def load_tokens(folder: str | os.PathLike[str]) -> PreparedData:
    """The tokens in a folder that `open_data` had as its `cache_dir`: of a text, or of a mixture as it was opened.

    Raises:
        OSError, ValueError: as `load_prepared`; a source of the mixture that is elsewhere is gone.
    """
    return _load_mixture(Path(folder)) if _is_kept_mixture(folder) else load_prepared(folder)


def _is_kept_mixture(data: str | os.PathLike[str]) -> bool:
    return Path(data, _MIXTURE).exists()


def _open_mixture(
    path: Path, cache_dir: Path, tokenizer: Any, learning: dict[str, Any], **options: Any
) -> PreparedData:
    """The sources of a file, all with one tokenizer: the one asked for, else that of those which are tokens already.

    learning: vocab_size and unk. options: val_fraction, seed, progress and overwrite.
    """
    sources = read_mixture(path)
    for source in sources:
        if is_mixture(source.data) or _is_kept_mixture(source.data):
            raise ValueError(
                f"{path}: source {source.name} is a mixture itself; list the sources of {source.data} here"
            )
    texts = [source for source in sources if not is_tokens(source.data)]
    opened: dict[str, PreparedData] = {}
    for source in (s for s in sources if s not in texts):
        with _named(path, source):
            opened[source.name] = open_data(source.data, cache_dir / source.name, val_fraction=options["val_fraction"])
    if tokenizer is None:
        tokenizer = next((data.tokenizer for data in opened.values()), "gpt2")
    elif tokenizer in TRAINED:
        tokenizer, learning = _learnt(path, texts, str(tokenizer), learning, options), {}
    chosen = given_tokenizer(tokenizer, **learning)
    for source in texts:
        with _named(path, source):
            found = {"glob": source.glob, "text_field": source.text_field}
            opened[source.name] = prepare(source.data, chosen, cache_dir / source.name, **found, **options)
    parts = [opened[source.name] for source in sources]
    for source, part in zip(sources, parts, strict=True):
        if part.tokenizer.files() != chosen.files():
            kinds = [f"{t.kind}, {t.vocab_size} tokens" for t in (part.tokenizer, chosen)]
            raise ValueError(
                f"{path}: source {source.name} has another tokenizer ({kinds[0]}) than the mixture ({kinds[1]}); prepare it with "
                "that of the others, or give its text"
            )
    kept: dict[str, Any] = {"version": _VERSION, "data": str(path), "val_fraction": options["val_fraction"]}
    kept["sources"] = [
        {"name": s.name, "share": s.share, "tokens": None if s in texts else os.path.abspath(s.data)} for s in sources
    ]
    if not options["overwrite"]:
        _refuse_others(cache_dir, kept, parts)
    data = _mixed(cache_dir, kept, parts)
    atomic_write(cache_dir / _MIXTURE, json.dumps(kept, indent=2).encode())
    notes = [f"{s.name}: {note}" for s, part in zip(sources, parts, strict=True) for note in part.info.get("notes", [])]
    return replace(data, info={**data.info, "notes": notes})


def _mixed(folder: Path, kept: dict[str, Any], parts: list[PreparedData]) -> PreparedData:
    """The mixture of sources that are open. kept: the content of its file in `folder`."""
    names, shares = (tuple(source[key] for source in kept["sources"]) for key in ("name", "share"))
    files = [part.train for part in parts if isinstance(part.train, TokenFile)]
    val = _joined([part.val for part in parts], folder, parts[0].tokenizer)
    split = f"validation: the validation texts of the {len(parts)} sources, one after the other"
    info = {"data": kept["data"], "split": split}
    return PreparedData(folder, Mixture(names, tuple(files), shares), val, parts[0].tokenizer, info)


def _load_mixture(folder: Path) -> PreparedData:
    """A mixture as it was opened, from its tokens: neither its file nor the texts of its sources are read."""
    kept = _read_kept(folder)
    parts = []
    for source in kept["sources"]:
        place = folder / source["name"]
        try:
            if source["tokens"] is None:
                parts.append(load_prepared(place))
            else:
                parts.append(open_data(source["tokens"], place, val_fraction=kept["val_fraction"]))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder / _MIXTURE}: source {source['name']}: {error}") from error
    _refuse_others(folder, kept, parts)
    return _mixed(folder, kept, parts)


def _read_kept(folder: Path) -> dict[str, Any]:
    path = folder / _MIXTURE
    kept = read_json(path)
    if field(kept, "version", int, path) != _VERSION:
        raise ValueError(f"{path}: version is {kept['version']}; expected {_VERSION} - update gptfast")
    field(kept, "data", str, path)
    field(kept, "val_fraction", float, path)
    for n, source in enumerate(items(field(kept, "sources", list, path), dict, "sources", path)):
        for key, kinds in (("name", str), ("share", float), ("tokens", (str, NULL))):
            field(source, key, kinds, path, inside=f"sources[{n}]")
    return kept


def _refuse_others(folder: Path, kept: dict[str, Any], parts: list[PreparedData]) -> None:
    """Raise FileExistsError where a folder has the tokens of another mixture."""
    there = _read_kept(folder) if _is_kept_mixture(folder) else {"sources": kept["sources"], "data": "a mixture"}
    mark = folder / _MARK
    val = read_json(mark) if mark.exists() else None
    if there["sources"] != kept["sources"] or val not in (None, _marks([part.val for part in parts])):
        raise FileExistsError(
            f"{folder} holds tokens of {there['data']} with other sources, weights or validation texts; replace that with "
            "`overwrite`, or choose another `out_dir`"
        )


@contextmanager
def _named(path: Path, source: Source) -> Iterator[None]:
    """Errors name the file and the source."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"{path}: source {source.name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: source {source.name}: {error}") from error


def _learnt(
    path: Path, texts: list[Source], tokenizer: str, learning: dict[str, Any], options: dict[str, Any]
) -> Tokenizer:
    """A tokenizer of the text of all sources together."""
    if not texts:
        raise ValueError(
            f"{path}: tokenizer {tokenizer} is learnt from text, but every source holds tokens; leave it out"
        )
    surveys = []
    for source in texts:
        with _named(path, source):
            corpus = load_corpus(source.data, source.glob, source.text_field)
            surveys.append(survey(corpus, options["val_fraction"], options["seed"], Filters()))
    return learn(tokenizer, surveys, **learning)[0]


def _joined(parts: list[TokenFile], folder: Path, tokenizer: Tokenizer) -> TokenFile:
    """One token file of all documents, which is kept and found again."""
    wanted = _marks(parts)
    mark, file = folder / _MARK, folder / "val.bin"
    try:
        if read_json(mark) == wanted:
            found = TokenFile.open(file)
            found.verify()
            return found
    except (FileNotFoundError, ValueError):
        pass  # written anew
    folder.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    documents = (document for part in parts for document in _documents(part))
    found = write_tokens(file, documents, tokenizer.vocab_size, tokenizer.eos_id, vocabulary_hash(tokenizer))
    atomic_write(mark, json.dumps(wanted).encode())
    return found


def _marks(parts: list[TokenFile]) -> list[list[int]]:
    """The length and the checksum of each file."""
    return [[len(part), crc(part.tokens)] for part in parts]


def _documents(file: TokenFile) -> Iterator[np.ndarray]:
    """The ids of each document, without the token that ends it."""
    ends = [*file.document_starts[1:].tolist(), len(file)]
    for start, end in zip(file.document_starts.tolist(), ends, strict=True):
        ids = file.take(np.arange(start, end))
        yield ids[:-1] if file.eos_id is not None and ids[-1] == file.eos_id else ids
