"""Files that are never left half written, and text files that are read with helpful errors."""

from __future__ import annotations

import codecs
import errno
import io
import lzma
import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from gptfast._crc32 import crc32
from gptfast._warn import warn


def atomic_write(path: str | os.PathLike[str], content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader, a crash or a full disk sees the whole old file or the whole new one.

    Args:
        path: the file to write; folders that are missing are made.
        content: the bytes, or a function that writes them to the open (seekable) binary file it is given.
    Raises:
        OSError: the file cannot be written, or is none (a device, a pipe); the text says which, why and what to do. The
            old file is intact.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content)


def absolute(value: Any) -> Any:
    """A path that exists, from the root, so that a run can be resumed from another folder; other values as they are."""
    with suppress(OSError, ValueError):  # a text that cannot be a path
        if isinstance(value, (str, os.PathLike)) and Path(value).exists():
            return str(Path(value).resolve())
    return value


def as_drawn(text: str) -> str:
    """A text as matplotlib draws it as it is: what is between two dollar signs would be a formula."""
    return text.replace("$", r"\$")


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure of matplotlib as a PNG file; raises OSError as `atomic_write`. Of characters that its font lacks one warning
    says what to do."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", r"Glyph .* missing from")
        figure.savefig(buffer, format="png", dpi=120)
    atomic_write(path, buffer.getvalue())
    for warning in caught:
        if "missing from" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if any("missing from" in str(warning.message) for warning in caught):
        warn(
            f"{path} has boxes for characters that matplotlib's font lacks; name a font that has them under font.family in "
            "matplotlibrc and draw it again"
        )


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there replaces `path` when the block ends well.

    For writers that insist on a path of their own (`with atomic_path(p) as t: save_file(tensors, t)`). The
    new file is flushed to the disk before it takes the name, and removed if the block raises.

    Raises:
        OSError: as `atomic_write`.
    """
    target = Path(os.path.realpath(path))  # through links: the file they point to is the one to replace
    check_target(target)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        if os.name == "posix":  # the new name itself lives in the folder; Windows cannot open one
            _sync(target.parent)
    except OSError as error:
        if getattr(error, "explained", False):  # of another file that the block reads or writes
            raise
        raise explained(error, f"cannot write {path}", "the previous file, if any, is intact") from error
    finally:
        with suppress(OSError):  # gone already when all went well
            temporary.unlink()


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise OSError for a device or a pipe: root could put a file in the place of /dev/null."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise OSError(errno.EINVAL, f"cannot write {path}: it is a device or a pipe; expected the name of a file")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explained(error: OSError, failure: str, state: str = "") -> OSError:
    """The same class of error and errno, with a text that names the file, the reason and the remedy."""
    reason = error.strerror or str(error)
    remedy = remedy_of(error) or "check the disk (free space, quota) and try again"
    message = "; ".join(filter(None, [f"{failure}: {reason}", state, remedy]))
    told = OSError(error.errno, message) if error.errno is not None else OSError(message)
    told.explained = True  # type: ignore[attr-defined]
    return told


def remedy_of(error: OSError) -> str:
    """What to do about it; "": nothing is known."""
    return _BY_NUMBER.get(error.errno or 0) or _BY_TYPE.get(type(error), "")


_BY_TYPE: dict[type, str] = {
    PermissionError: "check who owns the file and its folder, or name another place",
    FileNotFoundError: "check the spelling of the path",
    NotADirectoryError: "a part of the path is a file, not a folder; name another place",
    FileExistsError: "a part of the path is a file, not a folder; name another place",
    IsADirectoryError: "this is a folder; name a file",
}
_BY_NUMBER = {
    errno.EFBIG: "raise the limit on the size of files (ulimit -f, or the file system's own)",
    errno.EROFS: "nothing can be written there; name another place",
}


def open_read(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a binary file for reading. Raises OSError with a text that says which, why and what to do."""
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise explained(error, f"cannot read {path}") from error


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file that must not be empty.

    Raises:
        OSError: missing, a folder, unreadable (FileNotFoundError, IsADirectoryError, PermissionError).
        ValueError: the file is empty.
    """
    with open_read(path) as file:
        content = file.read()
    if not content:
        raise ValueError(f"{path} is empty (0 bytes); expected a file with content")
    return content


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file; line ends become "\\n" and a byte order mark is dropped.

    Raises:
        OSError: as `read_bytes`.
        ValueError: the file is empty, or binary, or not UTF-8 (the text names the first offending byte).
    """
    return "".join(text_blocks(path))


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        OSError, ValueError: as `read_text`; or the file is not TOML.
    """
    import tomlkit
    from tomlkit.exceptions import ParseError

    try:
        return tomlkit.parse(read_text(path)).unwrap()
    except ParseError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def text_blocks(
    path: str | os.PathLike[str], start: int = 0, stop: int | None = None, size: int = 1 << 18
) -> Iterator[str]:
    """The text of a UTF-8 file as `read_text` has it, in blocks that join to it: a large file need not fit in memory.

    Args:
        path: of the file.
        start, stop: the bytes of the file to read, from and to the beginning of a character.
        size: bytes to read at once.
    Raises:
        OSError, ValueError: as `read_text`.
    """
    with open_read(path) as file:
        file.seek(start)
        yield from _blocks(file, path, start, stop, size)


def decoded_blocks(file: BinaryIO, path: str | os.PathLike[str], size: int = 1 << 18) -> Iterator[str]:
    """As `text_blocks`, from an open stream such as an unpacked file; `path` is for messages."""
    return _blocks(file, path, 0, None, size)


def _blocks(file: BinaryIO, path: str | os.PathLike[str], start: int, stop: int | None, size: int) -> Iterator[str]:
    utf8 = codecs.getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    at, mark, empty, final = start, start == 0, True, False
    while not final:
        content = file.read(size if stop is None else max(0, min(size, stop - at)))
        final = not content
        text = _decoded(path, content, at, lambda content, final=final: decoder.decode(content, final))
        at += len(content)
        if text and mark:
            text, mark = text.removeprefix("\ufeff"), False
        if text:
            empty = False
            yield text
    if empty:
        reason = "0 bytes" if at == start else "only a byte order mark"
        raise ValueError(f"{path} is empty ({reason}); expected a file with content")


def _decoded(path: str | os.PathLike[str], content: bytes, at: int, decode: Callable[[bytes], str]) -> str:
    """The text of a part of a file that begins at byte `at`."""
    if at == 0:
        check_beginning(path, content)
    null = content.find(b"\0")
    if null >= 0:
        raise ValueError(f"{path} is binary, not text (zero byte at byte {at + null}); give a UTF-8 text file")
    try:
        return decode(content)
    except UnicodeDecodeError as error:
        held = len(error.object) - len(content)  # of a character that began in the part before
        raise not_utf8(path, path, error, at - held) from error


def not_utf8(place: object, path: str | os.PathLike[str], error: UnicodeDecodeError, start: int = 0) -> ValueError:
    """The error for bytes that are not UTF-8.

    Args:
        place: begins the message: the file, or a line of it.
        path: the file.
        error: of the decoder.
        start: where the decoder's bytes begin in `place`.
    """
    return ValueError(
        f"{place} is not UTF-8 (byte 0x{error.object[error.start]:02x} at byte {start + error.start}: {error.reason}); "
        f"{_convert(path, 'CP1252')} if it is Latin-1 or Windows-1252"
    )


_ENCODINGS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_PACKED = {b"\x1f\x8b": ".gz", b"BZh91AY&SY": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}


def check_beginning(path: str | os.PathLike[str], content: bytes) -> None:
    """Refuse the beginning of a file that is to be UTF-8 and is packed or has another encoding's byte order mark.

    Raises:
        ValueError: the text says what it is, and what to do.
    """
    for mark, encoding in _ENCODINGS.items():
        if content.startswith(mark):
            raise ValueError(f"{path} is {encoding} (byte order mark at byte 0); {_convert(path, encoding)}")
    for mark, suffix in _PACKED.items():
        if content.startswith(mark):
            raise ValueError(f"{path} is packed, and its name does not say so; rename it to {Path(path).name}{suffix}")
    if content.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path} is a ZIP archive; unpack it, and give what is inside")


def _convert(path: str | os.PathLike[str], encoding: str) -> str:
    path = Path(path)
    return f"convert it: iconv -f {encoding} -t UTF-8 {path} > {path.stem}.utf8{path.suffix or '.txt'}"


def cache_folder() -> Path:
    """The folder of data that can be made again: GPTFAST_CACHE, or else ~/.cache/gptfast."""
    return Path(os.environ.get("GPTFAST_CACHE") or Path.home() / ".cache/gptfast")


def checksum(path: str | os.PathLike[str]) -> str:
    """CRC-32 of a file's bytes, as text that begins with the kind of checksum."""
    crc, buffer = 0, memoryview(bytearray(1 << 18))  # stays in the processor's cache
    with open_read(path) as file:
        while size := file.readinto(buffer):
            crc = crc32(buffer[:size], crc)
    return f"crc32:{crc:08x}"


def read_asset(name: str) -> bytes:
    """The content of gptfast/assets/`name`.xz, a data file that the package ships."""
    return lzma.decompress((resources.files("gptfast") / "assets" / f"{name}.xz").read_bytes())
