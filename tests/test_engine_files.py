"""Compiled models as files: the same bits again, mapped, and a clear error for every file that is not one."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from engine_models import model_of

from gptfast.backend import has_cpu_ops
from gptfast.engine import FORMATS, load

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
    with pytest.raises(ValueError, match="has version 1 and this gptfast reads 2; compile the model again"):
        load(saved)
    with pytest.raises(FileNotFoundError, match="check the spelling"):
        load(tmp_path / "absent")
    with pytest.raises(OSError, match="cannot read"):
        load(tmp_path)


def test_a_model_of_another_gptfast(saved: Path) -> None:
    """Whose header is whole, but says more or less than this one knows."""
    data = saved.read_bytes()
    length = struct.unpack("<I", data[12:16])[0]
    for old, new in ((b'"n_layer"', b'"n_later"'), (b'"formats"', b'"formals"')):
        header = data[20 : 20 + length].replace(old, new)
        saved.write_bytes(data[:16] + struct.pack("<I", zlib.crc32(header)) + header + data[20 + length :])
        with pytest.raises(ValueError, match=r"describes a model that this gptfast cannot run .*; compile it again"):
            load(saved)


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
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def write(model):
    "A text; returns the bytes of its keys and values, which live as long as `kept`."
    global kept
    kept = model.sequences(1)
    kept.extend(kept.add(), [list(range(60))])
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
