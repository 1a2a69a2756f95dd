"""Compiled models as files: the same bits again, mapped, and a clear error for every file that is not one."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast.backend import has_cpu_ops
from gptfast.engine import FORMATS, load
from tests.support.engine_models import model_of

pytestmark = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")


@pytest.mark.parametrize("dtype", FORMATS)
def test_round_trip(dtype: str, tmp_path: Path) -> None:
    for name in ("gpt1", "gpt3"):
        compiled = model_of(name).compile_for_inference(dtype)
        compiled.save(tmp_path / "model.gptfast")
        again = load(tmp_path / "model.gptfast", threads=1, verify=True)
        assert again.config == compiled.config and again.dtype == dtype and again.nbytes == compiled.nbytes
        assert torch.equal(again.logits([1, 2, 3]), compiled.logits([1, 2, 3]))
        assert again.generate([[1]], max_new_tokens=5) == compiled.generate([[1]], max_new_tokens=5)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.gptfast"
    model_of("odd").compile_for_inference("int8").save(path)
    return path


def test_every_cut_is_noticed(saved: Path) -> None:
    data = saved.read_bytes()
    for size in (0, 5, 19, 30, 4095, 4096, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut short|not a compiled|does not match its checksum"):
            load(saved)
    saved.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="instead of"):
        load(saved)


def test_other_files(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    saved.write_bytes(b"GGUF" + data[4:])
    with pytest.raises(ValueError, match="not a compiled gptfast model"):
        load(saved)
    saved.write_bytes(data[:8] + struct.pack("<I", 1) + data[12:])
    with pytest.raises(ValueError, match="has version 1 and this gptfast reads 2 and 3; compile the model again"):
        load(saved)
    with pytest.raises(FileNotFoundError, match="check the spelling"):
        load(tmp_path / "absent")
    with pytest.raises(OSError, match="cannot read"):
        load(tmp_path)


def change_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of a packed file, with a right checksum."""
    data = path.read_bytes()
    length = struct.unpack("<I", data[12:16])[0]
    weights = data[(20 + length + 4095) // 4096 * 4096 :]
    header = json.loads(data[20 : 20 + length])
    text = json.dumps(change(header) or header).encode()
    start = data[:12] + struct.pack("<II", len(text), zlib.crc32(text)) + text
    path.write_bytes(start + bytes(-len(start) % 4096) + weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["config"].update(n_later=h["config"].pop("n_layer")), "n_later"),
        (lambda h: h.pop("formats") and None, "'formats' in its header is missing"),
        (lambda h: h.pop("config") and None, "'config' in its header is missing"),
        (lambda h: h.pop("bytes") and None, "'bytes' in its header is missing"),
        (lambda h: h.pop("crc32") and None, "'crc32' in its header is missing"),
        (
            lambda h: h["formats"].pop("c_fc") and None,
            "'formats' in its header is {.*expected a format for each of c_attn",
        ),
        (lambda h: h["formats"].update(head="int3"), "'formats' in its header"),
        (lambda h: h["formats"].update(head=[1]), "'formats' in its header"),
        (lambda h: h.update(dtype=["int8"]), r"'dtype' in its header is \['int8'\], expected one of"),
        (lambda h: h.update(bytes="many"), "'bytes' in its header is 'many', expected a number"),
        (lambda h: h.update(crc32=-1), "'crc32' in its header is -1"),
        (lambda h: h.update(config=[1]), r"'config' in its header is \[1\]"),
        (lambda h: h["config"].update(n_layer="two"), "n_layer is 'two'"),
        (lambda h: [h], r"its header is \["),
    ],
)
def test_headers_that_say_more_or_less_than_this_gptfast_knows(saved: Path, change, message: str) -> None:
    change_header(saved, change)
    with pytest.raises(ValueError, match=rf"model\.gptfast describes a model that this gptfast cannot run.*{message}"):
        load(saved)


def test_a_header_that_is_no_json(saved: Path) -> None:
    data = saved.read_bytes()
    for text in (b"[" * 100_000, b"\xff\xfe", b""):
        start = data[:12] + struct.pack("<II", len(text), zlib.crc32(text)) + text
        saved.write_bytes(start)
        with pytest.raises(ValueError, match=r"model\.gptfast is damaged: its header is not JSON"):
            load(saved)


SIZES = ["n_layer", "n_head", "n_embd", "n_inner", "vocab_size", "block_size", "window"]


@pytest.mark.parametrize("key", SIZES)
def test_sizes_that_do_not_fit_the_bytes(saved: Path, key: str) -> None:
    """Products that wrap around 64 bits, and loops over layers that are not there: refused at once, and in a line."""
    original = saved.read_bytes()
    for value in (2**20, 2**31 - 1, 2**31, 2**40, *range(2**57, 2**63, 2**60), 2**62, 2**63, 10**30):
        saved.write_bytes(original)
        change_header(saved, lambda h, value=value: h["config"].update({key: value, **_beside(key, value)}))
        begin = time.monotonic()
        if key == "window" and value < 2**31:  # takes no bytes
            load(saved, threads=1).logits([1, 2])
            continue
        with pytest.raises(
            ValueError, match=r"model\.gptfast describes a model that (does not fit its bytes|this gptfast)"
        ):
            load(saved, threads=1)
        assert time.monotonic() - begin < 5


def _beside(key: str, value: int) -> dict[str, Any]:
    """What a config says beside a size, so that it is refused for its bytes."""
    return {
        "n_embd": {"n_head": max(1, value // 64)},
        "n_head": {"n_embd": value * 8},
        "window": {"attention_pattern": "alternating"},
    }.get(key, {})


def test_one_row_more_or_less_is_no_model_of_these_bytes(saved: Path) -> None:
    """Equal, not at least: what fits with room to spare is another model."""
    original = saved.read_bytes()
    for key, add in (("block_size", -1), ("n_layer", -1), ("vocab_size", 64), ("block_size", 1)):
        saved.write_bytes(original)
        change_header(saved, lambda h, key=key, add=add: h["config"].update({key: h["config"][key] + add}))
        with pytest.raises(ValueError, match="does not fit its bytes: it takes"):
            load(saved, threads=1)


USE = """
import os, sys
import gptfast.engine
path = sys.argv[1]
data = open(path, "rb").read()

def touched(compiled): os.utime(path)
def rewritten(compiled): open(path, "r+b").write(data)
def renamed(compiled):
    open(path + ".new", "wb").write(data[:5000])
    os.replace(path + ".new", path)
def cut(compiled): os.truncate(path, 4096)
def emptied(compiled): open(path, "wb")
def overwritten(compiled): open(path, "r+b").write(data[:-3000] + bytes(3000))
def extended(compiled): open(path, "ab").write(b"0")
def cut_inside(compiled):  # between the look before and the look behind
    mapped = compiled._source._mapped
    changed, looks = mapped.changed, iter([False])
    mapped.changed = lambda: next(looks, None) is None and changed()
    os.truncate(path, 4096)

for damage in (touched, rewritten, renamed, cut, emptied, overwritten, extended, cut_inside):
    open(path, "wb").write(data)
    compiled = gptfast.engine.load(path, threads=2)
    whole = compiled.generate([[1]], max_new_tokens=4, seed=0)
    damage(compiled)
    said = []
    for use in 2 * (lambda: compiled.generate([[1]], max_new_tokens=4, seed=0), lambda: compiled.save(path + ".copy")):
        try:
            said.append("same" if use() in (whole, None) else "other")
        except OSError as error:
            said.append("error" if "was changed, cut short" in str(error) and path in str(error) else str(error))
    if os.path.exists(path + ".copy"):
        gptfast.engine.load(path + ".copy", verify=True)
        os.remove(path + ".copy")
        said.append("copy")
    print(damage.__name__, *said)
"""


def test_a_file_that_is_changed_in_use(saved: Path) -> None:
    command = [sys.executable, "-c", USE, str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    told = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    harmless = ("touched", "rewritten", "renamed")
    assert {name: told.pop(name) for name in harmless} == dict.fromkeys(harmless, ["same"] * 4 + ["copy"])
    harmful = ("cut", "emptied", "overwritten", "extended", "cut_inside")
    assert told == dict.fromkeys(harmful, ["error"] * 4)


def test_damage_is_noticed(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[40] ^= 1  # in the header
    saved.write_bytes(data)
    with pytest.raises(ValueError, match="header does not match its checksum"):
        load(saved)
    data[40] ^= 1
    data[-2000] ^= 1  # in the weights
    saved.write_bytes(data)
    load(saved)
    with pytest.raises(ValueError, match="weights do not match their checksum"):
        load(saved, verify=True)


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="the previous file, if any, is intact"):
        model_of("gpt1").compile_for_inference("int8").save(saved)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


MEASURE = """
import ctypes, gc
import gptfast, gptfast.engine
from gptfast import GPT, GPTConfig

def resident():
    "Bytes but for libraries' code: how much of that a fault maps is up to the file system."
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    total, library = 0, False
    for line in open("/proc/self/smaps"):
        first = line.split()[0]
        if "-" in first:
            library = ".so" in line
        elif first == "Rss:" and not library:
            total += int(line.split()[1]) * 1024
    return total

def write(model):
    "A text; returns the bytes of its keys and values, which live as long as `kept`."
    global kept
    kept = model.runner(1)
    kept.extend(kept.allocate(), [list(range(60))])
    return kept.nbytes

write(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=32, block_size=64, vocab_size=70)).compile_for_inference("int8"))
before = resident()
"""


def measured(code: str) -> list[int]:
    """What a process prints that measures its memory."""
    out = subprocess.run([sys.executable, "-c", MEASURE + code], capture_output=True, text=True, check=True).stdout
    return [int(word) for word in out.split()]


def test_memory_is_the_packed_weights_and_the_cache(tmp_path: Path) -> None:
    """No second copy of the model, packed here or mapped from a file; mapping reads nothing before it is used."""
    path = tmp_path / "model.gptfast"
    grown, size, cache = measured(f"""
model = GPT(GPTConfig(n_layer=2, n_head=8, n_embd=512, block_size=64, vocab_size=20000, dropout=0.0))
model = model.compile_for_inference("float32")
cache = write(model)
print(resident() - before, model.nbytes, cache)
model.save({str(path)!r})
""")
    room = 10e6  # a fifth of the weights: activations, and what Python and torch keep
    assert size > 50e6 and size <= grown - cache + room and grown < size + cache + room
    mapped, grown, size, cache = measured(f"""
model = gptfast.engine.load({str(path)!r})
mapped = resident() - before
cache = write(model)
print(mapped, resident() - before, model.nbytes, cache)
""")
    assert mapped < size / 10 and grown < size + cache + room
