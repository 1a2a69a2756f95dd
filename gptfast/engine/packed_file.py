"""Files of compiled models: a header, then the packed weights as the engine reads them.

    8 bytes   magic
    4 bytes   version of the layout, little-endian
    4 bytes   length of the header
    4 bytes   CRC-32 of the header
    header    JSON: configuration of the model, formats, size of the weights in bytes and their CRC-32, metadata of the
              checkpoint (such as end tokens) if it has any, and the mark that adapters of the base have; in version 3 also
              the exponents of matrices that are stored divided by a power of two
    …         zeros up to a whole page (4096 bytes), then the weights

Loading maps the file: the weights are read from the disk when they are used, and shared by processes. To replace such a file,
rename another over it, as `save` does. A file that is overwritten in place is detected, see `PackedFile.check`.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from gptfast._files import atomic_write, open_read
from gptfast._mapping import MappedFile
from gptfast.engine.exponents import are_exponents
from gptfast.engine.formats import FORMATS, MATRICES
from gptfast.metadata import Metadata

if TYPE_CHECKING:
    from gptfast.config import GPTConfig

MAGIC = b"gptfastE"
VERSION = 2
WITH_EXPONENTS = 3  # version of files with exponents, which a reader of version 2 must refuse
_START = struct.Struct("<8sIII")
_PAGE = 4096
_CHUNK = 1 << 24


def save(
    path: str | os.PathLike[str], description: dict[str, Any], weights: memoryview, check: Callable[[], None]
) -> None:
    """Write a compiled model to a temporary file, then rename it: a crash leaves the old file or the new one.

    Args:
        path: the file.
        description: see `described`.
        weights: the packed weights.
        check: raises if the weights have changed meanwhile.
    """
    start = _start(description | {"bytes": weights.nbytes, "crc32": _crc(weights)})

    def write(file: BinaryIO) -> None:
        file.write(start + b"\0" * (-len(start) % _PAGE))
        file.write(weights)
        check()

    atomic_write(path, write)


def described(
    config: GPTConfig, formats: dict[str, str], exponents: dict[str, int], name: str, metadata: Metadata, base: str
) -> dict[str, Any]:
    """What the header says but for the weights.

    Args:
        config: configuration of the model.
        formats: format of each kind of matrix.
        exponents: see `gptfast.engine.exponents`.
        name: format of the model.
        metadata: of the checkpoint.
        base: tells adapters of this base from others.
    """
    said = {"config": metadata.config, "generation": metadata.to_write()}
    return {
        "config": config.stored(),
        "dtype": name,
        "formats": formats,
        **({"exponents": exponents} if exponents else {}),
        **({"metadata": said} if any(said.values()) else {}),
        **({"base": base} if base else {}),
    }


def _start(description: dict[str, Any], length: int = 0) -> bytes:
    """What a file begins with. The header is filled up with blanks to `length` bytes of the whole."""
    header = json.dumps(description, indent=1).encode()
    header += b" " * (length - _START.size - len(header))
    version = WITH_EXPONENTS if description.get("exponents") else VERSION
    return _START.pack(MAGIC, version, len(header), zlib.crc32(header)) + header


def _reserve(file: BinaryIO, size: int) -> None:
    """Take room on the disk for an empty file, of zeros. A full disk raises here; a mapped write would be SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for at in range(0, size, _CHUNK):  # macOS has no such call
        file.write(bytes(min(_CHUNK, size - at)))
    file.flush()


class Draft:
    """A file of a compiled model that is packed in place, so that its weights are not held in memory. Its header comes last.

    weights: memory for the packed weights, which is that of the file.

    Args:
        path: a temporary file, which is made.
        size: of the weights, in bytes.
        longest: a description (see `described`) that takes as much room as the final one will take at most.
    Raises:
        OSError: it cannot be written, or there is no room for it.
    """

    def __init__(self, path: Path, size: int, longest: dict[str, Any]) -> None:
        self._size = size
        self._length = len(_start(longest | {"bytes": size, "crc32": 2**32 - 1}))
        begin = self._length + -self._length % _PAGE
        self._file = path.open("w+b")
        _reserve(self._file, begin + size)
        self._mapped = mmap.mmap(self._file.fileno(), begin + size)
        self.weights = memoryview(self._mapped)[begin:]

    def drop(self) -> None:
        """Let go of the memory that is written; the system writes it to the disk when it likes."""
        self._mapped.madvise(mmap.MADV_DONTNEED)

    def finish(self, description: dict[str, Any]) -> None:
        """Write the header of the packed weights."""
        crc = 0
        for at in range(0, self._size, _CHUNK):
            crc = zlib.crc32(self.weights[at : at + _CHUNK], crc)
            self.drop()
        start = _start(description | {"bytes": self._size, "crc32": crc}, self._length)
        self._file.seek(0)
        self._file.write(start)
        self._file.close()


class PackedFile:
    """A file that `save` wrote: its checked header, and its mapped weights.

    Attributes:
        description: config, dtype, formats, exponents, metadata, bytes and crc32.
        weights: the packed weights.

    Args:
        path: the file.
    Raises:
        OSError: the file cannot be read.  ValueError: not such a file, another version, damaged or truncated.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with open_read(path) as file:
            size = os.fstat(file.fileno()).st_size
            self.description, begin = _read_header(file, path, size)
            expected = begin + self.description["bytes"]
            if size != expected:
                raise ValueError(
                    f"{path} has {size} bytes instead of {expected}; it was cut short or added to - copy or compile it again"
                )
            self._mapped = MappedFile(file, path, recover=True)
        self.weights = memoryview(self._mapped)[begin:]

    def intact(self) -> bool:
        """Whether the weights match their checksum. Reads all of them."""
        return _crc(self.weights) == self.description["crc32"]

    def check(self) -> None:
        """Raise if the weights are no longer those that were opened; called before and after they are used.

        A file with a new modification time and the same content passes, after one comparison with its checksum.

        Raises:
            OSError: the file was overwritten or truncated; the message names it.
        """
        if self._mapped.changed() and not self._mapped.accept(self.intact):
            self._mapped.check()


def _read_header(file: BinaryIO, path: str | os.PathLike[str], size: int) -> tuple[dict[str, Any], int]:
    """The header of a file of `size` bytes, and the offset of the weights."""
    start = file.read(_START.size)
    if len(start) < _START.size or not start.startswith(MAGIC):
        raise ValueError(
            f"{path} is not a compiled gptfast model; expected a file that CompiledGPT.save wrote - a checkpoint folder is "
            "loaded with GPT.from_pretrained"
        )
    _, version, length, crc = _START.unpack(start)
    if version not in (VERSION, WITH_EXPONENTS):
        raise ValueError(
            f"{path} has version {version} and this gptfast reads {VERSION} and {WITH_EXPONENTS}; compile the model again: "
            "GPT.from_pretrained(...).compile_for_inference(...).save(path)"
        )
    header = file.read(min(length, size))
    if len(header) < length or zlib.crc32(header) != crc:
        raise ValueError(f"{path} is damaged: its header does not match its checksum; copy or compile it again")
    begin = _START.size + length
    return _description(header, path), begin + -begin % _PAGE


def _description(header: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        description = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header is not JSON ({error}); compile it again") from None
    if isinstance(description, dict):
        description.setdefault("exponents", {})
        description.setdefault("metadata", {"config": {}, "generation": None})
        description.setdefault("base", "")
    for key, right, expected in (
        (None, lambda d: isinstance(d, dict), "an object"),
        ("config", lambda c: isinstance(c, dict), "an object"),
        ("dtype", lambda d: isinstance(d, str) and d in FORMATS, "one of " + ", ".join(FORMATS)),
        ("formats", _are_formats, "a format for each of " + ", ".join(MATRICES)),
        ("exponents", are_exponents, "powers of two of matrices"),
        ("metadata", _is_metadata, "settings of a checkpoint"),
        ("base", lambda value: isinstance(value, str), "the mark of a base"),
        ("bytes", _is_count, "a number of bytes"),
        ("crc32", _is_count, "a checksum"),
    ):
        value = description if key is None else description.get(key)
        if not right(value):
            what = "its header" if key is None else f"{key!r} in its header"
            raise ValueError(
                f"{path} describes a model that this gptfast cannot run: {what} is {_short(value)}, expected {expected}; "
                "compile it again"
            )
    return description


def _are_formats(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) and value[name] in FORMATS for name in MATRICES
    )


def _is_metadata(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"config", "generation"}:
        return False
    return isinstance(value["config"], dict) and isinstance(value["generation"], (dict, type(None)))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _short(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _crc(data: memoryview) -> int:
    crc = 0
    for start in range(0, data.nbytes, _CHUNK):
        crc = zlib.crc32(data[start : start + _CHUNK], crc)
    return crc
