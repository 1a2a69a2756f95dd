"""The format of token files: ids as uint16 or uint32 between a header and a list of documents.

    byte  0   8   magic "gptftok\\n"
          8   4   version of the format, 2
         12   4   bytes per token, 2 or 4: the dtype
         16   8   vocab_size
         24   8   eos_id, the token after each document, or -1
         32   8   number of tokens
         40   8   number of documents that begin here
         48   4   tokens of a block, each of which has a checksum
         52   4   flags; 1: the first token continues a document of the shard before
         56   4   CRC-32 of what follows the tokens
         60   4   zero
         64  32   hash of the vocabulary (SHA-256, `vocabulary_hash`), or zeros where it is not known
         96  28   zero
        124   4   CRC-32 of bytes 0 to 123
        128       the tokens, then for each document the position of its first token (8 bytes each), then the CRC-32 of each
                  block of tokens (4 bytes each; the last block may be shorter)

All numbers are little-endian. Version 1, which is still read, has a header of 64 bytes, with the number of documents at 40, one
CRC-32 of all tokens at 48 and that of the header at 60, and no checksums after the documents.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptfast.tokenizer import Tokenizer

MAGIC = b"gptftok\n"
VERSION = 2
BLOCK = 1 << 20  # tokens
UNKNOWN = bytes(32)  # the hash of a vocabulary that nobody named
CONTINUES = 1
_OLD = struct.Struct("<8sIIQqQQI8x")
_NEW = struct.Struct("<8sIIQqQQIII4x32s28x")
_CRC = struct.Struct("<I")
_SIZES = {1: _OLD.size + _CRC.size, VERSION: _NEW.size + _CRC.size}
SIZE = _SIZES[VERSION]  # of the header of a new file
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Header:
    """What the header of a token file says; size: its own bytes. block is 0 for one checksum of all tokens, `crc`."""

    itemsize: int
    vocab_size: int
    eos_id: int
    tokens: int
    documents: int
    crc: int
    block: int = BLOCK
    flags: int = 0
    vocabulary: bytes = UNKNOWN
    size: int = SIZE

    @property
    def blocks(self) -> int:
        return -(-self.tokens // self.block) if self.block else 0

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(f"<u{self.itemsize}")

    @property
    def tail(self) -> int:
        """Bytes after the tokens."""
        return 8 * self.documents + 4 * self.blocks

    def packed(self) -> bytes:
        numbers = (self.itemsize, self.vocab_size, self.eos_id, self.tokens, self.documents, self.block, self.flags)
        header = _NEW.pack(MAGIC, VERSION, *numbers, self.crc, self.vocabulary)
        return header + _CRC.pack(zlib.crc32(header))


def read_header(path: Path, content: bytes) -> Header:
    """The header at the beginning of a file.

    Raises:
        ValueError: no token file, of another version, cut short or damaged.
    """
    if content[: len(MAGIC)] != MAGIC:
        raise ValueError(
            f"{path} is not a gptfast token file (it begins with {content[:8]!r}, expected {MAGIC!r}); make "
            "one with `gptfast prepare`, or from raw uint16 ids (nanoGPT's train.bin) with "
            "gptfast.data.write_tokens(path, [numpy.fromfile(old, 'uint16')], vocab_size)"
        )
    version = int.from_bytes(content[8:12], "little")
    size = _SIZES.get(version, 12)
    if len(content) < size:
        raise ValueError(f"{path} is cut short: {len(content)} bytes, less than the header of {size}")
    if version not in _SIZES:
        raise ValueError(f"{path} has version {version}, expected at most {VERSION}; prepare the data again")
    if _CRC.unpack_from(content, size - 4)[0] != zlib.crc32(content[: size - 4]):
        raise ValueError(f"{path}: the header does not match its checksum; prepare the data again")
    if version == 1:
        header = Header(*_OLD.unpack_from(content)[2:], block=0, size=size)
    else:
        itemsize, vocab_size, eos_id, tokens, documents, block, flags, crc, vocabulary = _NEW.unpack_from(content)[2:]
        header = Header(itemsize, vocab_size, eos_id, tokens, documents, crc, block, flags, vocabulary)
    _check(path, header)
    return header


def _check(path: Path, header: Header) -> None:
    itemsize, vocab_size, eos_id, tokens = header.itemsize, header.vocab_size, header.eos_id, header.tokens
    known = itemsize in (2, 4) and 1 <= vocab_size <= 2 ** (8 * itemsize) and -1 <= eos_id < vocab_size
    least = 0 if header.flags & CONTINUES else 1
    if not known or tokens < 1 or not least <= header.documents <= tokens or (header.size == SIZE and not header.block):
        raise ValueError(
            f"{path}: the header contradicts itself ({itemsize} bytes per token, a vocabulary of {vocab_size}, end of text "
            f"{eos_id}, {tokens} tokens, {header.documents} documents); prepare the data again"
        )


def read_tail(path: Path, header: Header, tail: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The position of each document's first token (int64), and the checksum of each block (uint32).

    Raises:
        ValueError: they are damaged.
    """
    starts = np.frombuffer(tail, "<i8", header.documents)
    checksums = np.frombuffer(tail, "<u4", header.blocks, offset=8 * header.documents)
    whole = header.size != SIZE or zlib.crc32(tail) == header.crc
    first = bool(header.flags & CONTINUES) or (len(starts) > 0 and starts[0] == 0)
    inside = not len(starts) or (starts[0] >= 0 and starts[-1] < header.tokens)
    if not (whole and first and inside) or (np.diff(starts) <= 0).any():
        raise ValueError(f"{path}: the list of documents is damaged; prepare the data again")
    return starts, checksums if header.size == SIZE else np.array([header.crc], np.uint32)


def check_size(path: Path, size: int, header: Header) -> None:
    """Raise ValueError where a file has not the bytes that its header says."""
    expected = header.size + header.tokens * header.itemsize + header.tail
    if size != expected:
        state = "cut short" if size < expected else "longer than it should be"
        raise ValueError(
            f"{path} is {state}: {size} bytes, expected {expected}; copy it again, or prepare the data again"
        )


def find_damage(tokens: np.ndarray, checksums: np.ndarray, block: int) -> str:
    """The first block of tokens that its checksum does not fit, in words; "": none.

    Args:
        block: tokens of a block; 0: all of them are one.
    """
    size = block or max(1, len(tokens))
    for n, expected in enumerate(checksums.tolist()):
        part = tokens[n * size : (n + 1) * size]
        found = crc(part)
        if found != expected:
            where = f"tokens {n * size:,} to {n * size + len(part):,}" if block else "the tokens"
            return f"{where} have checksum 0x{found:08x}, expected 0x{expected:08x}"
    return ""


def crc(tokens: np.ndarray) -> int:
    """CRC-32 of an array, or of a joined one, a part at a time."""
    found = 0
    for start in range(0, len(tokens), _CHUNK):
        found = zlib.crc32(np.ascontiguousarray(tokens[start : start + _CHUNK]).data, found)
    return found


def vocabulary_hash(tokenizer: Tokenizer) -> bytes:
    """SHA-256 of the bytes that each id stands for and of the id that ends a text: equal where ids mean the same."""
    digest = hashlib.sha256(f"{tokenizer.vocab_size} {tokenizer.eos_id}\n".encode())
    has = getattr(tokenizer, "has_token", lambda token: True)
    for token in range(tokenizer.vocab_size):
        content = tokenizer.decode_bytes([token]) if has(token) else b""
        digest.update(len(content).to_bytes(4, "little") + content)
    return digest.digest()
