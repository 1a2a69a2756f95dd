"""Damage: of JSON values at any depth, of bytes, and of files in a folder."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

ODD = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**30),
    *(0.0, -0.0, 0.5, 1.5, 1e-300, 1e308, -1e308, float("nan"), float("inf"), 1e5),
    *("", " ", "0", "1", "gpt2", "a\0b", "\ud800", "🤗", "é", "../x", "/etc/passwd", "x" * 5000, "</w>", "Ġ"),
    *([], {}, [[]], [None], [1, 2, 3], ["a", "b"], {"a": 1}, {"": None}, [[[[[]]]]], {"content": 5}),
]


def odd_value(rng: random.Random, like: Any = None) -> Any:
    """A value of any type; often a number near `like`, where that is one."""
    if isinstance(like, int) and not isinstance(like, bool) and rng.random() < 0.4:
        return rng.choice(
            [like + 1, like - 1, -like, like * 2, like // 2, like * 10**6, str(like), float(like), [like]]
        )
    if rng.random() < 0.03:
        return json.loads("[" * 900 + "]" * 900)
    return copy.deepcopy(rng.choice(ODD))


def mutate_value(rng: random.Random, value: Any, times: int = 1) -> Any:
    """A copy of a JSON value with so many changes."""
    value = copy.deepcopy(value)
    for _ in range(times):
        holder, key = _somewhere(rng, value)
        if holder is None or rng.random() < 0.02:
            value = odd_value(rng, value)
        elif isinstance(holder, dict) and rng.random() < 0.2:
            held = holder.pop(key)
            if rng.random() < 0.4:
                holder[rng.choice(["", "x", key.upper(), key + "s"])] = held
        elif isinstance(holder, list) and rng.random() < 0.3:
            how = rng.randrange(3)
            if how == 0:
                holder.pop(key)
            else:
                holder.insert(key, odd_value(rng) if how == 1 else holder[key])
        else:
            holder[key] = odd_value(rng, holder[key])
    return value


def _somewhere(rng: random.Random, value: Any) -> tuple[Any, Any]:
    """A container inside `value` and a key of it; rather far up, so that long lists do not get it all."""
    holder, key = None, None
    while isinstance(value, (dict, list)) and value:
        if holder is not None and rng.random() < 0.35:
            break
        holder, key = value, rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = holder[key]
    return holder, key


def as_json(rng: random.Random, value: Any) -> bytes:
    """JSON as other programs may write it, and sometimes hardly JSON."""
    text = json.dumps(value, indent=rng.choice([None, 1]))
    if rng.random() < 0.05:
        text = rng.choice(
            ["\ufeff" + text, text + text, text[:-1], "[" * 50_000, "9" * 6000, text.replace(":", ":\r\n")]
        )
    return text.encode()


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bits flipped, parts cut, repeated or overwritten."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(changed) + 1) if rng.random() < 0.5 else rng.randrange(min(len(changed), 64) + 1)
        length = rng.choice([1, 1, 2, 4, 8, 100])
        how = rng.randrange(7)
        if how == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del changed[at:]
        elif how == 2:
            changed[at : at + length] = bytes(length)
        elif how == 3:
            changed[at : at + length] = b"\xff" * length
        elif how == 4:
            changed[at:at] = changed[at : at + length]
        elif how == 5:
            changed[at : at + length] = rng.randbytes(length)
        else:
            del changed[at : at + length]
    return bytes(changed)


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Another header before the same tensors."""
    (length,) = struct.unpack_from("<Q", data)
    header = as_json(rng, mutate_value(rng, json.loads(data[8 : 8 + length]), rng.choice([1, 1, 3])))
    length = rng.choice([0, 2**63, len(header) + 1]) if rng.random() < 0.05 else len(header)
    return struct.pack("<Q", length) + header + data[8 + struct.unpack_from("<Q", data)[0] :]


def mutate_packed(rng: random.Random, data: bytes) -> bytes:
    """Another header, with the right checksum, before the same weights (see gptfast/engine/packed_file.py)."""
    start = struct.Struct("<8sIII")
    magic, version, length, _ = start.unpack_from(data)
    weights = start.size + length
    weights += -weights % 4096
    header = as_json(rng, mutate_value(rng, json.loads(data[start.size : start.size + length]), rng.choice([1, 1, 2])))
    head = start.pack(magic, version, len(header), zlib.crc32(header)) + header
    return head + bytes(-len(head) % 4096) + data[weights:]


def mutate_tokens(rng: random.Random, data: bytes) -> bytes:
    """Another header, with the right checksum, before the same tokens (see gptfast/data/token_format.py)."""
    header = struct.Struct("<8sIIQqQQIII4x32s28x")
    fields = list(header.unpack_from(data))
    at = rng.randrange(1, len(fields) - 1)
    largest = [None, 2**32, 2**32, 2**64, 2**63, 2**64, 2**64, 2**32, 2**32, 2**32][at]
    fields[at] = rng.choice([0, 1, 2, 3, fields[at] + 1, max(0, fields[at] - 1), largest // 2, largest - 1])
    head = header.pack(*fields)
    return head + struct.pack("<I", zlib.crc32(head)) + data[header.size + 4 :]


def mutate_file(rng: random.Random, path: Path) -> str:
    """Damage a file in one of the ways that its kind has; returns which."""
    data, suffix = path.read_bytes(), path.suffix
    how = rng.random()
    if how < 0.04:
        return _replace(rng, path)
    structured = {".safetensors": mutate_safetensors, ".gptfast": mutate_packed, ".bin": mutate_tokens}
    if how < 0.35 or not (suffix in structured or suffix in (".json", ".jsonl")):
        path.write_bytes(mutate_bytes(rng, data))
        return "bytes"
    if suffix in structured:
        path.write_bytes(structured[suffix](rng, data))
        return "header"
    if suffix == ".jsonl":
        lines = data.split(b"\n")
        at = rng.randrange(len(lines) - 1)
        lines[at] = as_json(rng, mutate_value(rng, json.loads(lines[at]), rng.choice([1, 1, 3])))
        path.write_bytes(b"\n".join(lines))
        return "line"
    path.write_bytes(as_json(rng, mutate_value(rng, json.loads(data), rng.choice([1, 1, 1, 3]))))
    return "values"


def _replace(rng: random.Random, path: Path) -> str:
    others = [file for file in path.parent.iterdir() if file != path and file.is_file()]
    how = rng.choice(["missing", "a folder", "a loop", "another", "empty", "unreadable"])
    if how == "unreadable" and os.geteuid() == 0:
        how = "empty"  # root reads everything
    if how == "empty":
        path.write_bytes(b"")
    elif how == "unreadable":
        path.chmod(0)
    elif how == "another" and others:
        shutil.copy(rng.choice(others), path)
    else:
        path.unlink()
        if how == "a folder":
            path.mkdir()
        elif how == "a loop":
            path.symlink_to(path.name)
    return how
