"""Large files: the bytes, the ways past the cache and through it, checksums."""

from __future__ import annotations

import errno
import os
import random
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptfast import _crc32, _large_files
from gptfast._files import checksum
from gptfast._large_files import sum_of, summed, write_pieces
from gptfast.models.export import write_tensors


@pytest.fixture(params=["past the cache", "a disk with larger blocks", "a file system that cannot", "short writes"])
def blocks_of_a_page(request, monkeypatch):
    """Blocks of 4096 bytes, every file a large one, on several kinds of disks."""
    monkeypatch.setattr(_large_files, "_BLOCK", 4096)
    monkeypatch.setattr(_large_files, "_LEAST", 0)
    write, opened, drawn = os.write, os.open, random.Random(0)
    direct = _large_files._DIRECT

    def flags(descriptor):
        import fcntl

        return fcntl.fcntl(descriptor, fcntl.F_GETFL)

    def refused(descriptor, content):
        if flags(descriptor) & direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, content)

    def short(descriptor, content):
        return write(descriptor, content[: drawn.randint(1, len(content))])

    def cannot(path, how, *mode):
        if how & direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, how, *mode)

    if request.param == "a disk with larger blocks":
        monkeypatch.setattr(os, "write", refused)
    elif request.param == "a file system that cannot":
        monkeypatch.setattr(os, "open", cannot)
    elif request.param == "short writes":
        monkeypatch.setattr(os, "write", short)


def test_the_bytes_and_their_checksum(blocks_of_a_page, tmp_path):
    for sizes in ([], [0], [1], [4096], [4095, 2], [4097], [10000, 0, 3, 4096, 8189], [12288]):
        pieces = [random.Random(n).randbytes(n) for n in sizes]
        file = tmp_path / "file"
        file.write_bytes(b"older and longer" * 4096)
        with summed() as sums:
            write_pieces(file, map(memoryview, pieces), sum(sizes))
        assert file.read_bytes() == b"".join(pieces)
        assert sum_of(file, sums) == checksum(file)
    assert sum_of(tmp_path, sums) is None
    file.write_bytes(b"another of its inode")
    assert sum_of(file, sums) is None


def test_a_safetensors_file(tmp_path):
    halves = {f"h.{n}.weight": torch.randn(n, 5) for n in (3, 0, 11, 1)}
    save_file(halves, tmp_path / "theirs", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours", halves)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    mixed = {
        "text \N{SNOWMAN}": torch.arange(3, dtype=torch.uint8),
        "flag": torch.tensor(True),
        "half": torch.randn(3, 3).bfloat16().t(),
        "twice": halves["h.3.weight"],
        "again": halves["h.3.weight"][1:],
        "step": torch.tensor(7),
    }
    write_tensors(tmp_path / "ours", mixed, {"more": 'a "text"'})
    found = load_file(tmp_path / "ours")
    assert found.keys() == mixed.keys()
    assert all(found[name].dtype == x.dtype and found[name].equal(x) for name, x in mixed.items())
    with pytest.raises(TypeError, match=r"phase has dtype torch.complex64; expected one of torch.float64"):
        write_tensors(tmp_path / "ours", {"phase": torch.zeros(2, dtype=torch.complex64)})


def test_a_file_is_written_again_from_its_own_mapping(tmp_path):
    file, x = tmp_path / "file", torch.randn(1 << 20)
    write_tensors(file, {"x": x})
    write_tensors(file, {**load_file(file), "y": x[:3]})
    assert load_file(file)["x"].equal(x) and load_file(file)["y"].equal(x[:3])


def test_a_large_file_takes_the_way_past_the_cache(tmp_path):
    x = torch.randn(5 << 20)
    write_tensors(tmp_path / "file", {"x": x})
    assert load_file(tmp_path / "file")["x"].equal(x)
    with pytest.raises(OSError, match="No space left") as full:
        write_pieces(Path("/dev/full"), [x.view(torch.uint8).numpy().data], x.nbytes)
    assert full.value.errno == errno.ENOSPC


@pytest.mark.parametrize("compiled", [True, False])
def test_the_sum_of_bytes_is_zlibs_and_copies_are_whole(monkeypatch, compiled):
    if compiled and _crc32._compiled() is None:
        pytest.skip("this CPU has no instructions for it, or nothing is compiled")
    if not compiled:
        monkeypatch.setattr(_crc32, "_compiled", lambda: None)
    monkeypatch.setattr(_crc32, "_LEAST", 1)
    content = memoryview(random.Random(0).randbytes(70_000))
    for size in (*range(1, 200), 4096, 65_537):
        for begin in (0, 1, 15):
            piece, target = content[begin : begin + size], memoryview(bytearray(size))
            for crc in (0, 0xDEADBEEF):
                expected = zlib.crc32(piece, crc)
                assert _crc32.crc32(piece, crc) == expected
                assert _crc32.copy_crc32(target, piece, crc) == expected
                assert target == piece
    with pytest.raises(ValueError):
        _crc32.copy_crc32(memoryview(bytearray(9)), content[:8])
