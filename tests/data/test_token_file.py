"""Token files: round trips, and every way in which they can be damaged."""

from __future__ import annotations

import os
import pickle
import struct
import time
import zlib

import numpy as np
import pytest

from gptfast.data import (
    TokenFile,
    WindowSampler,
    is_token_file,
    sequential_batches,
    token_format,
    token_writer,
    write_tokens,
)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_token_file_round_trip(tmp_path, vocab_size, dtype):
    rng = np.random.default_rng(vocab_size)
    documents = [rng.integers(0, vocab_size, n) for n in (1, 1000, 0, 77)]
    documents[1][5] = vocab_size - 1
    file = write_tokens(tmp_path / "t.bin", documents, vocab_size)
    assert file.tokens.dtype == dtype
    assert not (file.tokens.flags.owndata or file.tokens.flags.writeable)  # mapped
    np.testing.assert_array_equal(file.tokens, np.concatenate(documents))
    assert file.document_starts.tolist() == [0, 1, 1001]  # the empty document is left out
    assert (len(file), file.vocab_size, file.eos_id) == (1078, vocab_size, None)
    file.verify()
    assert is_token_file(tmp_path / "t.bin")


def test_end_of_text_and_pieces(tmp_path):
    document = iter([[1, 2], np.array([3]), []])
    file = write_tokens(tmp_path / "t.bin", [document, [4], iter([])], vocab_size=10, eos_id=9)
    assert file.tokens.tolist() == [1, 2, 3, 9, 4, 9]
    assert file.document_starts.tolist() == [0, 4]
    assert file.eos_id == 9


def test_a_document_that_has_its_end_gets_no_second_one(tmp_path):
    file = write_tokens(tmp_path / "t.bin", [iter([[1], [9], []]), [9, 4], [9]], vocab_size=10, eos_id=9)
    assert file.tokens.tolist() == [1, 9, 9, 4, 9, 9] and file.document_starts.tolist() == [0, 2, 5]


@pytest.mark.parametrize(
    ("documents", "options", "error", "message"),
    [
        ([[1], [2, 10]], {}, ValueError, "document 1 has id 10; expected ids in .0, 10"),
        ([[-1]], {}, ValueError, "document 0 has id -1"),
        ([[0.5]], {}, TypeError, "document 0 is of float64 with shape .1,."),
        ([np.zeros((2, 2), int)], {}, TypeError, "shape .2, 2."),
        ([[]], {}, ValueError, "documents have no token"),
        ([[1]], {"eos_id": 10}, ValueError, "eos_id is 10; expected None or 0 <= eos_id < 10"),
        ([[1]], {"vocab_size": 0}, ValueError, "vocab_size is 0"),
    ],
)
def test_what_write_tokens_refuses(tmp_path, documents, options, error, message):
    path = tmp_path / "t.bin"
    write_tokens(path, [[7]], vocab_size=10)
    with pytest.raises(error, match=message):
        write_tokens(path, documents, **{"vocab_size": 10, **options})
    assert TokenFile.open(path).tokens.tolist() == [7]
    assert os.listdir(tmp_path) == ["t.bin"]


def change(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def reheaded(content: bytes, at: int, new: bytes) -> bytes:
    """With a valid checksum of the header, as another version of gptfast would write it."""
    header = change(content, at, new)[:124]
    return header + struct.pack("<I", zlib.crc32(header)) + content[128:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:-1], "is cut short: 355 bytes, expected 356"),
        (lambda c: c[:200], "is cut short: 200 bytes, expected 356"),
        (lambda c: c[:30], "is cut short: 30 bytes, less than the header"),
        (lambda c: c + b"x", "is longer than it should be: 357 bytes"),
        (lambda c: c[64:], "is not a gptfast token file .it begins with"),
        (lambda c: b"", "is not a gptfast token file"),
        (lambda c: change(c, 16, b"\xff"), "the header does not match its checksum"),
        (lambda c: reheaded(c, 8, b"\x03"), "has version 3, expected at most 2"),
        (lambda c: change(c, 344, b"\x32"), "the list of documents is damaged"),
        (lambda c: change(c, 328, b"\xff\xff\xff"), "the list of documents is damaged"),
    ],
)
def test_damaged_token_files(tmp_path, damage, message):
    path = tmp_path / "t.bin"
    write_tokens(path, [range(50), range(25), range(25)], vocab_size=100)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        TokenFile.open(path)


def test_a_damaged_token_is_found(tmp_path):
    path = tmp_path / "t.bin"
    write_tokens(path, [range(100)], vocab_size=100)
    path.write_bytes(change(path.read_bytes(), 128 + 2 * 50 + 1, b"\x80"))
    with pytest.raises(ValueError, match=r"t.bin: tokens 0 to 100 have checksum 0x.*, expected 0x"):
        TokenFile.open(path).verify()
    sampler = WindowSampler(TokenFile.open(path), 99, 1)
    with pytest.raises(ValueError, match="id 32818 lies outside its vocabulary of 100"):
        sampler.batch(0)


def test_the_block_that_is_damaged_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(token_writer, "BLOCK", 16)
    monkeypatch.setattr(
        token_format.Header.__init__, "__defaults__", (16, *token_format.Header.__init__.__defaults__[1:])
    )
    path = tmp_path / "t.bin"
    write_tokens(path, [iter([range(10), range(50)]), range(40)], vocab_size=100).verify()
    path.write_bytes(change(path.read_bytes(), 128 + 2 * 50, b"\x01"))
    with pytest.raises(ValueError, match=r"t.bin: tokens 48 to 64 have checksum"):
        TokenFile.open(path).verify()


def test_files_of_version_1_are_read(tmp_path):
    tokens = np.arange(100, dtype="<u2")
    header = struct.pack("<8sIIQqQQI8x", b"gptftok\n", 1, 2, 100, 99, 100, 2, zlib.crc32(tokens.data))
    content = header + struct.pack("<I", zlib.crc32(header)) + tokens.tobytes() + np.array([0, 60], "<i8").tobytes()
    path = tmp_path / "t.bin"
    path.write_bytes(content)
    file = TokenFile.open(path)
    file.verify()
    assert (file.tokens.tolist(), file.document_starts.tolist(), file.eos_id) == (list(range(100)), [0, 60], 99)
    path.write_bytes(change(content, 70, b"\x09"))
    with pytest.raises(ValueError, match=r"t.bin: the tokens have checksum 0x.*, expected 0x"):
        TokenFile.open(path).verify()


def test_the_error_of_a_headerless_file_has_the_conversion(tmp_path):
    old = tmp_path / "train.bin"
    np.arange(500, dtype="uint16").tofile(old)
    with pytest.raises(ValueError, match=r"from raw uint16 ids .nanoGPT's train.bin. with gptfast.data.write_tokens"):
        TokenFile.open(old)
    assert len(write_tokens(tmp_path / "new.bin", [np.fromfile(old, "uint16")], 500)) == 500
    with pytest.raises(FileNotFoundError, match=r"cannot read .*nothing.bin"):
        TokenFile.open(tmp_path / "nothing.bin")


@pytest.mark.parametrize(
    ("lengths", "train"),
    [([50, 38, 12], 88), ([100], 90), ([30, 70], 90), ([5] * 20, 90)],
    ids=["boundary", "one document", "no boundary near", "even"],
)
def test_split_of_a_token_file(tmp_path, lengths, train):
    ids = np.arange(100)
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    first, last = write_tokens(tmp_path / "t.bin", documents, vocab_size=100).split(0.1)
    assert (len(first), len(last)) == (train, 100 - train)
    np.testing.assert_array_equal(np.concatenate([first.tokens, last.tokens]), ids)
    starts = [*first.document_starts, *(last.document_starts + train)]
    assert starts == sorted({0, train, *np.cumsum(lengths)[:-1].tolist()})


@pytest.mark.parametrize(
    ("at", "new"),
    [
        (12, "<I 0"),
        (12, "<I 3"),
        (12, "<I 8"),
        (16, "<Q 0"),
        (16, "<Q 65537"),
        (24, "<q 100"),
        (24, "<q -2"),
        (32, "<Q 0"),
    ]
    + [(32, f"<Q {n}") for n in (2**31, 2**61, 2**63, 2**64 - 1)]
    + [(40, f"<Q {n}") for n in (0, 101, 2**60, 2**64 - 1)],
)
def test_numbers_of_a_header_that_cannot_be(tmp_path, at, new):
    path = tmp_path / "t.bin"
    write_tokens(path, [range(50), range(25), range(25)], vocab_size=100)
    code, number = new.split()
    path.write_bytes(reheaded(path.read_bytes(), at, struct.pack(code, int(number))))
    with pytest.raises(ValueError, match=r"t.bin(: the header contradicts itself| is cut short)"):
        TokenFile.open(path)


def cut(path):
    os.truncate(path, 100)


def overwrite(path):
    with path.open("r+b") as file:
        file.seek(128 + 2 * 5000)
        file.write(bytes(2000))


def copied_over(path):
    other = path.with_name("other.bin")
    write_tokens(other, [np.arange(9_999) % 96], 97)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("change", [cut, overwrite, copied_over])
def test_a_file_that_is_changed_while_it_is_used_is_named(tmp_path, change, part):
    """It was SIGBUS, or other tokens without a word."""
    path = tmp_path / "train.bin"
    file = write_tokens(path, [np.arange(10_000) % 97], 97)
    used = file.split(0.5)[1] if part else file
    sampler = WindowSampler(used, 8, 4)
    before = [sampler.batch(n) for n in range(3)]
    time.sleep(0.02)  # clocks of file systems are coarse
    change(path)
    for _ in range(2):
        with pytest.raises(OSError, match=r"changed, cut short or could not be read while it is in use.*train.bin"):
            sampler.batch(100)
        with pytest.raises(OSError, match=r"train.bin"):
            list(sequential_batches(used, 8, 4))
    assert len(before) == 3


def test_a_file_that_is_replaced_touched_or_removed_stays_readable(tmp_path):
    path = tmp_path / "train.bin"
    first, last = write_tokens(path, [np.arange(10_000) % 97], 97).split(0.5)
    samplers = [WindowSampler(part, 8, 4) for part in (first, last)]
    before = [sampler.batch(3)[0].tolist() for sampler in samplers]
    os.utime(path)
    assert [sampler.batch(3)[0].tolist() for sampler in samplers] == before
    write_tokens(path, [[1, 2, 3]], 97)  # by a rename
    assert [sampler.batch(3)[0].tolist() for sampler in samplers] == before
    path.unlink()
    assert [sampler.batch(3)[0].tolist() for sampler in samplers] == before


def test_token_files_are_pickled_by_their_path(tmp_path):
    """For the workers of a DataLoader."""
    file = write_tokens(tmp_path / "t.bin", [np.arange(1000) % 97, np.arange(500) % 97], 97)
    for part in (file, *file.split(0.3)):
        data = pickle.dumps(part)
        again = pickle.loads(data)
        assert len(data) < 500
        assert again.tokens.tolist() == part.tokens.tolist()
        assert again.document_starts.tolist() == part.document_starts.tolist() and np.array_equal(
            again.checksums, part.checksums
        )
        assert WindowSampler(again, 8, 2).batch(1)[0].equal(WindowSampler(part, 8, 2).batch(1)[0])
