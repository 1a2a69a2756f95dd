"""The data of a run: its tokens are in OUT/data, where a run that is resumed finds them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gptfast.data import PreparedData, load_tokens, open_data
from gptfast.data.mixture import is_mixture, read_mixture
from gptfast.training.checkpoint import Checkpoint
from gptfast.training.fingerprint import fingerprint

_OF_TEXT = ("tokenizer", "vocab_size", "glob", "text_field", "unk")


def open_run_data(
    options: Mapping[str, Any], out: Path, tokenizer: str | None, progress: bool = True, overwrite: bool = True
) -> PreparedData:
    """The data that the options of a run name; the tokens of a text are in OUT/data.

    Raises:
        OSError, ValueError: as `open_data`.  FileExistsError: OUT/data has tokens of another text and `overwrite` is False.
    """
    return _opened({**options, "tokenizer": tokenizer}, out / "data", progress, overwrite)


def _opened(options: Mapping[str, Any], folder: Path, progress: bool, overwrite: bool) -> PreparedData:
    return open_data(
        options["data"],
        folder,
        options["tokenizer"],
        vocab_size=options.get("vocab_size"),
        glob=options.get("glob"),
        text_field=options.get("text_field"),
        unk=bool(options.get("unk")),
        progress=progress,
        overwrite=overwrite,
    )


def reopened(
    options: Mapping[str, Any], checkpoint: Checkpoint, out: Path, progress: bool = True
) -> tuple[PreparedData, str]:
    """The data of a run that is resumed, and a sentence about it or "".

    Where the text is gone, the tokens in OUT/data are read. They are never replaced by those of another text.

    Args:
        options: those that were given.
        checkpoint: where the run is resumed.
        out: OUT.
    Raises:
        ValueError: it is not what the run was trained on.  OSError: as `open_data`.
    """
    source, kept, note = checkpoint.source, out / "data", ""
    given = {**source["options"], "data": source["data"], **options}
    is_kept = _has(kept, source["marks"])
    if is_kept and "data" not in options and (gone := _missing(given["data"])):
        given["data"], note = str(kept), f"{gone} is no longer there; its tokens are in {kept}"
    if is_kept and Path(given["data"]).resolve() == kept.resolve():
        given |= dict.fromkeys(_OF_TEXT)  # it has its tokenizer
    data = same_data(
        given["data"], out, source["marks"], lambda folder, overwrite: _opened(given, folder, progress, overwrite)
    )
    if data is None:
        last = checkpoint.folder
        same = f"the same data, with `data` {kept}, which has its tokens," if is_kept else "the same data"
        raise ValueError(
            f"train: the data is not what {last} was trained on; resume with {same} or start a new run from these weights "
            f"with `init_from` {last}"
        )
    return data, note


def same_data(
    data: str, out: Path, marks: dict[str, Any], open_in: Callable[[Path, bool], PreparedData]
) -> PreparedData | None:
    """The data of something that is resumed; None where it is not what `marks` say. Tokens in OUT/data are never replaced by
    those of other data.

    Args:
        data: the text or the mixture.
        out: OUT.
        marks: its fingerprint.
        open_in: opens it with its tokens in a folder; the second argument is `overwrite`.
    Raises:
        OSError, ValueError: as `open_data`.
    """
    if is_mixture(data) and not _has_shares(data, marks):
        return None  # before its texts are read
    kept = out / "data"
    is_kept = _has(kept, marks)
    try:
        found = open_in(kept, not (is_kept or is_mixture(data)))  # older mixtures cannot tell
    except FileExistsError:  # other names of documents, or other text
        with TemporaryDirectory(prefix=".data-", dir=out) as place:
            same = fingerprint(open_in(Path(place), True)) == marks
        found = load_tokens(kept) if same and is_kept else None
    return found if found is not None and fingerprint(found) == marks else None


def _has_shares(mixture: str, marks: dict[str, Any]) -> bool:
    """Whether the sources of a mixture have these shares, in this order."""
    shares = [mark[0] if isinstance(mark, list) else None for mark in marks.get("train", [])]
    return [source.share for source in read_mixture(mixture)] == shares


def _missing(data: str) -> str:
    """What of `data` can be looked for and is not found, in words; "": nothing. A name that is no path is not looked for."""
    if is_mixture(data) and Path(data).exists():
        try:
            read_mixture(data)
        except FileNotFoundError:
            return f"a source of {data}"
        return ""
    return data if Path(data).is_absolute() and not Path(data).exists() else ""


def _has(folder: Path, marks: dict[str, Any]) -> bool:
    """Whether a folder of tokens has these."""
    try:
        return fingerprint(load_tokens(folder)) == marks
    except (OSError, ValueError):
        return False
