"""Fingerprints of data, by which a resumed run recognises it."""

from __future__ import annotations

import zlib

import numpy as np

from gptfast.data import Mixture, PreparedData, TokenFile

_FINGERPRINT_TOKENS = 1 << 20


def fingerprint(data: PreparedData) -> dict[str, list]:
    """The number of tokens of each part, and a checksum of its first million; of a mixture those of each source, and its share."""
    return {"train": _of_part(data.train), "val": _of_part(data.val)}


def _of_part(part: TokenFile | Mixture) -> list:
    if isinstance(part, Mixture):
        return [[share, *_of_part(file)] for file, share in zip(part.files, part.shares, strict=True)]
    return [len(part), zlib.crc32(np.ascontiguousarray(part.tokens[:_FINGERPRINT_TOKENS]).data)]
