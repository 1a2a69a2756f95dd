"""Files that are never half written, and text files that explain what is wrong with them."""

from __future__ import annotations

import errno
import gzip
import os
import resource
from contextlib import contextmanager

import pytest

from gptfast._files import atomic_path, atomic_write, read_text
from gptfast._json import read_json


@contextmanager
def full_disk(size: int):
    """No file of this process may grow beyond `size` bytes: the write itself fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_atomic_write_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    atomic_write(path, b"old")
    atomic_write(path, lambda file: (file.write(b"??w"), file.seek(0), file.write(b"ne")))
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


def test_atomic_write_follows_links_and_keeps_the_umask(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    before = os.umask(0o027)
    try:
        atomic_write(link, b"x")
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert real.read_bytes() == b"x"
    assert real.stat().st_mode & 0o777 == 0o640


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    """Root could: `--output /dev/null` once put a plain file in its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match=r"cannot write .*pipe: it is a device or a pipe; expected the name of a file"):
        atomic_write(pipe, b"x")
    assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(error):
        atomic_write(path, write)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_file_and_is_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with (
        full_disk(100_000),
        pytest.raises(OSError, match=r"cannot write .*file: .*intact.*ulimit -f") as caught,
    ):
        atomic_write(path, bytes(200_000))
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_failing_flush_is_not_success(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left on device; the previous file"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    atomic_write(tmp_path / "file", b"x")
    assert events == ["sync", "replace", "sync"]  # content, name, folder


def test_atomic_path_is_for_writers_with_a_path(tmp_path):
    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_bytes(b"x")
        assert not (tmp_path / "file").exists()
    assert (tmp_path / "file").read_bytes() == b"x"


def test_an_error_of_another_file_keeps_its_own_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^\[Errno 2\] cannot read .*missing.txt"):
        atomic_write(tmp_path / "file", lambda file: file.write(read_text(tmp_path / "missing.txt").encode()))


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(OSError, match="is a file, not a folder"):
        atomic_write(tmp_path / "a" / "b", b"x")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"plain\n", "plain\n"),
        (b"\xef\xbb\xbfmarked", "marked"),
        (b"dos\r\nmac\runix\n", "dos\nmac\nunix\n"),
        ("größe 日本 🎭".encode(), "größe 日本 🎭"),
    ],
)
def test_read_text(tmp_path, content, text):
    (tmp_path / "t.txt").write_bytes(content)
    assert read_text(tmp_path / "t.txt") == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0", "is binary, not text .zero byte at byte 8"),
        ("été".encode("latin-1"), "is not UTF-8 .byte 0xe9 at byte 0: .*iconv -f CP1252"),
        (b"a" * 5000 + b"\xff", "is not UTF-8 .byte 0xff at byte 5000: invalid start byte"),
        ("über".encode()[:-3] + b"\xc3", "is not UTF-8"),
        ("hi".encode("utf-16"), "is UTF-16 .*iconv -f UTF-16"),
        ("hi".encode("utf-32"), "is UTF-32 .*iconv -f UTF-32"),
        (gzip.compress(b"hi"), "is packed, and its name does not say so; rename it to .*\\.gz"),
        (b"PK\x03\x04 and so on", "is a ZIP archive; unpack it"),
    ],
)
def test_read_text_errors(tmp_path, content, message):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"t.txt {message}"):
        read_text(tmp_path / "t.txt")


def test_read_text_of_nothing_and_of_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot read .*check the spelling"):
        read_text(tmp_path / "missing")
    with pytest.raises(IsADirectoryError, match="this is a folder; name a file"):
        read_text(tmp_path)


def test_read_json_errors_name_the_place(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1,\n "b"')
    with pytest.raises(ValueError, match=r"x.json is not valid JSON .*line 2, column 5"):
        read_json(tmp_path / "x.json")
