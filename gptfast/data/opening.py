"""Opening whatever training reads: a text, a prepared folder, a token file, or a mixture of these."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gptfast._files import atomic_write
from gptfast._json import read_json
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
            file, whose last documents become the validation part; or a .toml file of sources (`gptfast.data.mixture`).
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
    if given and (current(data, MANIFEST).exists() or is_token_file(data)):
        raise ValueError(f"open_data: {data} holds tokens; leave {' and '.join(given)} out, or pass the text")
    if current(data, MANIFEST).exists():
        if tokenizer is not None or vocab_size is not None:
            raise ValueError(
                f"open_data: {data} holds tokens and their tokenizer; leave tokenizer and vocab_size out, or "
                "pass the text"
            )
        return load_prepared(data)
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
    return current(data, MANIFEST).exists() or is_token_file(data)


def _open_mixture(
    path: Path, cache_dir: Path, tokenizer: Any, learning: dict[str, Any], **options: Any
) -> PreparedData:
    """The sources of a file, all with one tokenizer: the one asked for, else that of those which are tokens already.

    learning: vocab_size and unk. options: val_fraction, seed, progress and overwrite.
    """
    sources = read_mixture(path)
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
    files = [part.train for part in parts if isinstance(part.train, TokenFile)]
    train = Mixture(tuple(s.name for s in sources), tuple(files), tuple(s.share for s in sources))
    val = _joined([part.val for part in parts], cache_dir, chosen)
    notes = [f"{s.name}: {note}" for s, part in zip(sources, parts, strict=True) for note in part.info.get("notes", [])]
    split = f"validation: the validation texts of the {len(sources)} sources, one after the other"
    return PreparedData(cache_dir, train, val, chosen, {"data": str(path), "split": split, "notes": notes})


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
    wanted = [[len(part), crc(part.tokens)] for part in parts]
    mark, file = folder / "val.json", folder / "val.bin"
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


def _documents(file: TokenFile) -> Iterator[np.ndarray]:
    """The ids of each document, without the token that ends it."""
    ends = [*file.document_starts[1:].tolist(), len(file)]
    for start, end in zip(file.document_starts.tolist(), ends, strict=True):
        ids = file.take(np.arange(start, end))
        yield ids[:-1] if file.eos_id is not None and ids[-1] == file.eos_id else ids
