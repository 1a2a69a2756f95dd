"""Fingerprints of data, by which a resumed run recognises it."""

from __future__ import annotations

import zlib

import numpy as np

from gptfast.data import PreparedData, TokenFile

_FINGERPRINT_TOKENS = 1 << 20


def fingerprint(data: PreparedData) -> dict[str, list[int]]:
    """The number of tokens of each part, and a checksum of its first million."""
    return {"train": _of_part(data.train), "val": _of_part(data.val)}


def _of_part(part: TokenFile) -> list[int]:
    return [len(part), zlib.crc32(np.ascontiguousarray(part.tokens[:_FINGERPRINT_TOKENS]).data)]
