"""Prepared data in shards: by any number of workers, after a kill, after damage; and the filters of documents."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gptfast.data import TokenFile, TokenShards, WindowSampler, load_prepared, parts, prepare, prepared
from gptfast.data.near_duplicates import NearDuplicates, signature
from gptfast.data.split import choose
from gptfast.tokenizer import CharTokenizer, GPT2Tokenizer, get_tokenizer, load_tokenizer

GPT2 = GPT2Tokenizer()

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "sleeps",
    "all",
    "day",
    "under",
    "oaks",
]


def texts(count: int, seed: int = 0, words: int = 60) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, words)) + f" {n}\n" for n in range(count)]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(3000)))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("own_end", [False, True])
def test_each_document_has_one_end(records: Path, tmp_path: Path, small_steps: None, own_end: bool):
    """Also where the tokenizer ends its texts itself."""
    GPT2.save(tmp_path / "tokenizer")
    settings = tmp_path / "tokenizer/tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "add_eos_token": own_end}))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert (tokenizer.encode("x", "all")[-1] == tokenizer.eos_id) == own_end
    data = prepare(records, tokenizer, tmp_path / "data", text_field="text")
    for part in (data.train, data.val):
        ends = np.flatnonzero(np.asarray(part.tokens) == tokenizer.eos_id)
        assert np.array_equal(ends + 1, [*part.document_starts[1:], len(part)])


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes for any text, and a state to go on from after every batch."""
    monkeypatch.setattr(prepared, "_LARGE", 0)
    monkeypatch.setattr(parts, "_EVERY", 1)


def test_shards_are_one_text_and_do_not_depend_on_workers(records: Path, tmp_path: Path, small_steps: None):
    made = [
        prepare(records, GPT2, tmp_path / str(n), text_field="text", shard_tokens=50_000, workers=n) for n in (1, 2, 3)
    ]
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")
    names = sorted(path.name for path in (tmp_path / "2").glob("*.bin"))
    assert names[0] == "train-00001-of-00004.bin" and names[-1] == "val.bin" and len(names) == 5
    train = load_prepared(tmp_path / "2").train
    assert isinstance(train, TokenShards) and len(TokenFile.open(tmp_path / "2" / names[1])) == 50_000
    assert made[1].info["train"]["tokens"] == len(train) == len(train.tokens)
    wanted, found = set(texts(3000)), []
    for start, end in zip(train.document_starts, [*train.document_starts[1:], len(train)], strict=True):
        ids = train.tokens[int(start) : int(end)]
        assert int(ids[-1]) == train.eos_id
        found.append(made[0].tokenizer.decode(np.asarray(ids)[:-1].tolist()))
    assert set(found) <= wanted and len(found) == made[0].info["train"]["documents"]
    train.verify()


def test_an_array_of_shards_is_that_of_one_file(records: Path, tmp_path: Path):
    shards = prepare(records, GPT2, tmp_path / "many", text_field="text", shard_tokens=30_000).train
    one = prepare(records, GPT2, tmp_path / "one", text_field="text").train
    many, whole = shards.tokens, one.tokens
    assert (many.shape, many.dtype, len(many)) == (whole.shape, whole.dtype, len(whole))
    assert shards.document_starts.tolist() == one.document_starts.tolist()
    np.testing.assert_array_equal(np.asarray(many), whole)
    for index in (slice(5, 9), slice(29_990, 60_010), slice(None, None, 7000), slice(-10, None), slice(7, 7)):
        np.testing.assert_array_equal(np.asarray(many[index]), whole[index])
    assert (many == whole).all() and (many[5:60_010] > many[4:60_009]).tolist() == (
        whole[5:60_010] > whole[4:60_009]
    ).tolist()
    assert many.tobytes() == whole.tobytes() and many.max() == whole.max() and many.tolist() == whole.tolist()
    assert not hasattr(many, "no_such_thing")
    places = np.array([[0, 29_999, 30_000], [-1, 60_000, 5]])
    np.testing.assert_array_equal(many[places], whole[places])
    assert many[-1] == whole[-1] and many[30_000] == whole[30_000]
    with pytest.raises(IndexError, match="out of bounds"):
        many[len(whole)]
    again = pickle.loads(pickle.dumps(shards))
    for used in (shards, again):
        assert WindowSampler(used, 64, 8, seed=3).batch(9)[0].equal(WindowSampler(one, 64, 8, seed=3).batch(9)[0])
    for a, b in zip(shards.split(0.4), one.split(0.4), strict=True):
        np.testing.assert_array_equal(np.asarray(a.tokens), b.tokens)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(a)).tokens, b.tokens)


KILLED = """
import os, signal, sys
from gptfast.data import parts, prepare, prepared
prepared._LARGE, parts._EVERY = 0, 1
from gptfast.data.parts import atomic_write
kept = []
def write(path, content):
    if len(kept) == 2:  # the batch after it has closed the shard that was open then
        os.kill(os.getpid(), signal.SIGKILL)
    kept.append(atomic_write(path, content))
parts.atomic_write = write
prepare(sys.argv[1], "gpt2", sys.argv[2], text_field="text", shard_tokens=30_000, workers=2)
"""


@pytest.mark.slow
def test_a_kill_and_another_call_give_the_same_bytes(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = {"text_field": "text", "shard_tokens": 30_000}
    prepare(records, GPT2, tmp_path / "whole", **options)
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(records), str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (out / "data.json").exists()
    with pytest.raises(FileNotFoundError, match=r"has no data.json; .*interrupted"):
        load_prepared(out)
    assert json.loads((out / ".preparing" / "state.json").read_text())["batches"] == 2
    skipped = []
    original = parts.encode_batches
    monkeypatch.setattr(parts, "encode_batches", lambda *a: skipped.append(a[-1]) or original(*a))
    prepare(records, GPT2, out, **options)
    assert skipped == [2]  # it went on
    assert content(out) == content(tmp_path / "whole")
    until = time.monotonic() + 10
    while any(str(out) in line for line in _commands()) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(str(out) in line for line in _commands())


def _commands() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text().replace("\0", " "))
        except OSError:
            continue  # it has just ended
    return found


def test_an_interruption_is_gone_on_from_unless_its_files_changed(
    records: Path, tmp_path: Path, small_steps: None, monkeypatch
):
    options = {"text_field": "text", "shard_tokens": 30_000, "workers": 1}
    prepare(records, GPT2, tmp_path / "whole", **options)
    for damage in (None, "train-00000.part", "train-00001.part", "train-00001.starts"):
        out = tmp_path / str(damage)
        calls = 0

        def interrupt(path, content, *, write=parts.atomic_write):
            nonlocal calls
            calls += 1
            write(path, content)
            if calls == 2:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(parts, "atomic_write", interrupt)
            with pytest.raises(KeyboardInterrupt):
                prepare(records, GPT2, out, **options)
        place = out / ".preparing"
        assert place.is_dir()
        if damage:
            bad = place / damage
            bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
        prepare(records, GPT2, out, **options)
        assert content(out) == content(tmp_path / "whole")


def test_a_process_that_dies_is_an_error_that_says_so(records: Path, tmp_path: Path, small_steps: None, monkeypatch):
    monkeypatch.setattr(
        "gptfast.data.workers._PROGRAM", "import os, sys; sys.stdin.buffer.read(1); os.kill(os.getpid(), 9)"
    )
    with pytest.raises(RuntimeError, match="a process that works for it ended with code -9"):
        prepare(records, GPT2, tmp_path / "out", text_field="text", workers=2)


def test_text_that_a_process_cannot_encode(records: Path, tmp_path: Path, small_steps: None):
    CharTokenizer.train("abc").save(tmp_path / "abc")
    with pytest.raises(ValueError, match=r"a.jsonl:\d+, counted from character 0: CharTokenizer.encode: text has '.'"):
        prepare(records, tmp_path / "abc", tmp_path / "out", text_field="text", workers=2)
    assert not (tmp_path / "out").exists()


def test_a_damaged_or_foreign_shard_is_named_and_mended(records: Path, tmp_path: Path):
    out = tmp_path / "out"
    options = {"text_field": "text", "shard_tokens": 50_000}
    prepare(records, GPT2, out, **options)
    before = content(out)
    shard = out / "train-00002-of-00004.bin"
    shard.write_bytes(before[shard.name][:5000] + b"\1\1" + before[shard.name][5002:])
    with pytest.raises(ValueError, match=r"train-00002-of-00004.bin: tokens 0 to 50,000 have checksum"):
        load_prepared(out).train.verify()
    again = prepare(records, GPT2, out, **options)
    assert any("written again" in note and shard.name in note for note in again.notes)
    assert content(out) == before
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_prepared(out)
    assert prepare(records, GPT2, out, **options) and content(out) == before
    reversed_words = tmp_path / "b.jsonl"
    reversed_words.write_text("".join(json.dumps({"text": text[::-1]}) + "\n" for text in texts(3000)))
    made = [prepare(path, "char", tmp_path / path.stem, text_field="text") for path in (records, reversed_words)]
    assert made[0].tokenizer.vocab_size == made[1].tokenizer.vocab_size
    other = get_tokenizer("char", "".join(sorted({*"".join(texts(3000))} - {"e"})) + "!")
    made[0] = prepare(records, CharTokenizer.train("".join(texts(3000))), tmp_path / "c", text_field="text")
    other.save(tmp_path / "c")
    with pytest.raises(
        ValueError, match=r"train.bin was made with another vocabulary of \d+ tokens than the tokenizer's"
    ):
        load_prepared(tmp_path / "c")


def test_documents_of_other_lengths_are_left_out_and_counted(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    lengths = [10, 20, 30, 400, 50] * 20
    path.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in lengths))
    done = prepare(path, "char", tmp_path / "out", text_field="text", min_chars=20, max_chars=50)
    sizes = sorted(np.diff([*part.document_starts, len(part)]).tolist() for part in (done.train, done.val))
    assert sorted(size for part in sizes for size in part) == sorted([20, 30, 50] * 20)
    assert "40 of 100 documents left out for their length" in done.notes
    with pytest.raises(
        ValueError, match=r"no document of .*a.jsonl is left: 100 of 100 documents left out for their length"
    ):
        prepare(path, "char", tmp_path / "none", text_field="text", min_chars=1000)
    with pytest.raises(ValueError, match="min_chars is 3 but max_chars is 2"):
        prepare(path, "char", tmp_path / "none", text_field="text", min_chars=3, max_chars=2)
    with pytest.raises(ValueError, match="min_chars is 0"):
        prepare(path, "char", tmp_path / "none", text_field="text", min_chars=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_near_duplicates_of_an_earlier_document_are_left_out(tmp_path: Path, small_steps: None, workers: int):
    originals = texts(60, words=200)
    rng = np.random.default_rng(5)
    near = []
    for text in originals[:20]:
        words = text.split()
        words[int(rng.integers(len(words)))] = "CHANGED"
        near.append("  ".join(words).upper())
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*originals, *near]))
    done = prepare(path, "char", tmp_path / "out", text_field="text", drop_near_duplicates=True, workers=workers)
    kept = {
        done.tokenizer.decode(np.asarray(part.tokens)[a:b].tolist())
        for part in (done.train, done.val)
        for a, b in zip(part.document_starts, [*part.document_starts[1:], len(part)], strict=True)
    }
    assert kept == set(originals)
    assert "20 of 80 documents left out as near-duplicates of an earlier one" in done.notes


def test_signatures_estimate_the_shingles_in_common():
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"w{n}" for n in range(5000)])
    for share in (0.2, 0.5, 0.8):
        a = rng.choice(vocabulary, 2000)
        b = np.concatenate([a[: int(2000 * share)], rng.choice(vocabulary, 2000 - int(2000 * share))])
        shingles = [{tuple(t[i : i + 5]) for i in range(len(t) - 4)} for t in (a.tolist(), b.tolist())]
        jaccard = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
        found = (signature(" ".join(a)) == signature(", ".join(b).upper())).mean()
        assert abs(found - jaccard) < 4 * (jaccard * (1 - jaccard) / 112) ** 0.5 + 1e-9
    assert not (signature("月がとても綺麗ですね") == signature("雨が降っていますから")).any()
    assert (signature("one two") == signature("One  two!")).all() and (signature("") == signature("...")).all()


def test_clusters_are_linked_through_others():
    found, rng = NearDuplicates(), np.random.default_rng(0)
    a, b, c, d = (rng.integers(0, 2**63, 112, dtype=np.uint64) for _ in range(4))
    link_ab, link_bc = b.copy(), c.copy()
    link_ab[:8], link_bc[8:16] = a[:8], b[8:16]
    for one in (c, a, d, link_bc, b, link_ab):  # c - link_bc - b - link_ab - a
        found.add(one)
    assert found.found().tolist() == [False, True, False, True, True, True]


def test_the_choice_for_validation_is_that_of_one_document_after_another():
    rng = np.random.default_rng(1)
    for n in range(200):
        count = int(rng.integers(1, 40))
        sizes = rng.integers(0, 10 ** int(rng.integers(1, 5)), count)
        keys = rng.integers(0, 2**63, count).astype(np.uint64)
        target, size, wanted = 0.3 * sizes.sum(), 0, []
        for k in np.argsort(keys).tolist():
            if len(wanted) < count - 1 and abs(size + sizes[k] - target) < abs(size - target):
                wanted.append(k)
                size += sizes[k]
        ends = size == 0 or not target / 2 <= size <= target * 2
        found = choose(keys, sizes, 0.3)
        assert (found is None) == ends and (ends or found.tolist() == wanted), n
