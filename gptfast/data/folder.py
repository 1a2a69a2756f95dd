"""The choice of files in a folder, and notes about those that are left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from gptfast.data.records import RECORDS, kind_of

_BOM = b"\xef\xbb\xbf"
_MOST = 8  # kinds of files that a note lists


def choose_files(folder: Path, glob: Sequence[str], records: bool) -> tuple[dict[str, Path], list[str]]:
    """The files to read, by name, and notes about the others.

    Args:
        folder: searched recursively.
        glob: patterns of names, such as "*.md", regardless of case; "*" matches any characters, also "/". Empty: .txt
            files, or files of records.
        records: choose files of records where `glob` is empty.
    Returns:
        Paths by their names in the folder, sorted; hidden and empty files are left out.
    Raises:
        OSError: a folder cannot be read.
        ValueError: no file is left.
    """
    files, others = _walk(folder)
    wanted = {name: path for name, path in files.items() if _is_wanted(name, glob, records)}
    empty = [name for name, path in wanted.items() if _is_empty(path)]
    others.update(_kind(name) for name in files.keys() - wanted.keys())
    found = {name: wanted[name] for name in sorted(wanted.keys() - set(empty))}
    if not found:
        raise ValueError(_nothing(folder, glob, records, empty, others))
    notes = []
    if others:
        total = sum(others.values())
        notes.append(f"{total} other file{'s' if total > 1 else ''} skipped: {_listed(others)}")
    if empty:
        names = ", ".join(sorted(empty)[:3]) + (", …" if len(empty) > 3 else "")
        notes.append(f"{len(empty)} empty file{'s' if len(empty) > 1 else ''} skipped: {names}")
    return found, notes


def _walk(folder: Path) -> tuple[dict[str, Path], Counter[str]]:
    """The files that are not hidden, by name, and a count of all other entries by kind."""

    def refuse(error: OSError) -> None:
        raise OSError(error.errno, f"cannot read the folder {error.filename}: {error.strerror}; check its permissions")

    files: dict[str, Path] = {}
    others: Counter[str] = Counter()
    for place, folders, names in os.walk(folder, onerror=refuse):
        hidden = [name for name in folders if name.startswith(".")]
        others["hidden"] += sum(len(inner) for name in hidden for _, _, inner in os.walk(Path(place, name)))
        links = [name for name in folders if Path(place, name).is_symlink() and name not in hidden]
        others["link to a folder"] += len(links)
        folders[:] = sorted(set(folders) - set(hidden))
        for name in names:
            path = Path(place, name)
            if name.startswith("."):
                others["hidden"] += 1
            elif not path.is_file():
                others["no file (a broken link, a pipe)"] += 1
            else:
                files[path.relative_to(folder).as_posix()] = path
    return files, +others


def _is_wanted(name: str, glob: Sequence[str], records: bool) -> bool:
    if glob:
        patterns = [pattern.lower() for pattern in glob]
        patterns += [pattern.replace("**/", "") for pattern in patterns]  # "**/" also matches no folder
        return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)
    return kind_of(name)[0] in (RECORDS if records else (".txt",))


def _is_empty(path: Path) -> bool:
    if path.stat().st_size > len(_BOM):
        return False
    try:
        return path.read_bytes() in (b"", _BOM)
    except OSError:
        return False  # reading its text raises the error


def _kind(name: str) -> str:
    return "".join(kind_of(name)) or "no suffix"


def _listed(kinds: Counter[str]) -> str:
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    more = sum(count for _, count in ordered[_MOST:])
    return ", ".join(f"{kind} {count}" for kind, count in ordered[:_MOST]) + (f", others {more}" if more else "")


def _nothing(folder: Path, glob: Sequence[str], records: bool, empty: Iterable[str], others: Counter[str]) -> str:
    what = " or ".join(glob) if glob else f"{', '.join(RECORDS)}" if records else ".txt"
    if empty:
        others = others + Counter({f"{what}, empty": len(list(empty))})
    has = f"it has {_listed(others)}" if others else "it is empty"
    advice = "choose others with glob='*.md' or the like"
    if not records:
        advice += "; name the text of .jsonl, .csv or .parquet with text_field='text' or the like"
    return f"load_documents: folder {folder} has no {what} file to read; {has} - {advice}"
