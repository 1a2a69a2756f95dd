"""Compiled models as files: a header that says what they are, then the packed weights as the engine reads them.

    8 bytes   magic
    4 bytes   version of the layout, little-endian
    4 bytes   length of the header
    4 bytes   CRC-32 of the header
    header    JSON: the model's configuration, the formats, the number of bytes and their CRC-32
    …         zeros up to a whole page (4096 bytes), then the weights

Loading maps the file: the weights are read from the disk as they are used, and shared by processes.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

from gptfast._files import atomic_write, open_read

if TYPE_CHECKING:
    from gptfast.models import GPTConfig

MAGIC = b"gptfastE"
VERSION = 2
_START = struct.Struct("<8sIII")
_PAGE = 4096
_CHUNK = 1 << 24


def save(
    path: str | os.PathLike[str], config: GPTConfig, formats: dict[str, str], name: str, weights: memoryview
) -> None:
    """Write a compiled model, aside first: a crash leaves the old file or the new one."""
    description = {
        "config": asdict(config),
        "dtype": name,
        "formats": formats,
        "bytes": weights.nbytes,
        "crc32": _crc(weights),
    }
    header = json.dumps(description, indent=1).encode()
    start = _START.pack(MAGIC, VERSION, len(header), zlib.crc32(header)) + header

    def write(file: BinaryIO) -> None:
        file.write(start + b"\0" * (-len(start) % _PAGE))
        file.write(weights)

    atomic_write(path, write)


def load(path: str | os.PathLike[str], verify: bool = False) -> tuple[dict[str, Any], memoryview]:
    """What the header says, and the weights, mapped.

    Args:
        path: a file that `save` wrote.
        verify: also compare the weights with their checksum, which reads all of them.
    Raises:
        OSError: the file cannot be read.  ValueError: it is no such file, of another version, damaged or cut short.
    """
    with open_read(path) as file:
        start = file.read(_START.size)
        if len(start) < _START.size or not start.startswith(MAGIC):
            raise ValueError(
                f"{path} is not a compiled gptfast model; expected a file that CompiledGPT.save wrote - a checkpoint folder is "
                "loaded with GPT.from_pretrained"
            )
        _, version, length, crc = _START.unpack(start)
        if version != VERSION:
            raise ValueError(
                f"{path} has version {version} and this gptfast reads {VERSION}; compile the model again: "
                "GPT.from_pretrained(...).compile_for_inference(...).save(path)"
            )
        header = file.read(length)
        if len(header) < length or zlib.crc32(header) != crc:
            raise ValueError(f"{path} is damaged: its header does not match its checksum; copy or compile it again")
        description = json.loads(header)
        begin = _START.size + length
        begin += -begin % _PAGE
        expected, actual = begin + description["bytes"], os.fstat(file.fileno()).st_size
        if actual != expected:
            raise ValueError(
                f"{path} has {actual} bytes instead of {expected}; it was cut short or added to - copy or compile it again"
            )
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    weights = memoryview(mapped)[begin:]
    if verify and _crc(weights) != description["crc32"]:
        raise ValueError(f"{path} is damaged: its weights do not match their checksum; copy or compile it again")
    return description, weights


def _crc(data: memoryview) -> int:
    crc = 0
    for start in range(0, data.nbytes, _CHUNK):
        crc = zlib.crc32(data[start : start + _CHUNK], crc)
    return crc
