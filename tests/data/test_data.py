"""Documents, their split, and `gptfast prepare`."""

from __future__ import annotations

import json
import os
import re
import resource
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gptfast.data import (
    Document,
    load_documents,
    load_prepared,
    open_data,
    prepare,
    prepared,
    split_documents,
    write_tokens,
)
from gptfast.data import learn as learning
from gptfast.tokenizer import CharTokenizer, GPT2Tokenizer, load_tokenizer

TEXT = "".join(f"line {i} of a small book, it's {i * i}\n" for i in range(300))


def test_shakespeare_is_embedded():
    documents = load_documents("shakespeare")
    assert len(documents) == 42
    assert sum(document.size for document in documents) == 5_053_902
    genres = {genre: load_documents(f"shakespeare:{genre}") for genre in ("comedy", "history", "tragedy", "poetry")}
    assert sum(map(len, genres.values())) == 42
    assert {d.name for d in genres["poetry"]} >= {"sonnets", "lovers_complaint"}
    assert "To be, or not to be" in next(d.text for d in genres["tragedy"] if d.name == "hamlet")
    assert len(load_documents("shakespeare:poetry, history")) == len(genres["poetry"]) + len(genres["history"])


def test_files_and_folders(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "z.txt").write_text("zz")
    (tmp_path / "c.txt").write_text("größe")
    (tmp_path / "ignored.md").write_text("no")
    documents = load_documents(tmp_path)
    assert [(d.name, d.text, d.size) for d in documents] == [("b/deep/z.txt", "zz", 2), ("c.txt", "größe", 7)]
    assert [(d.name, d.text) for d in load_documents(tmp_path / "ignored.md")] == [("ignored.md", "no")]


def test_what_load_documents_refuses(tmp_path):
    with pytest.raises(ValueError, match="genre is 'farce'; expected some of comedy, history"):
        load_documents("shakespeare:farce")
    with pytest.raises(FileNotFoundError, match="'shakspere' is neither 'shakespeare' nor an existing file"):
        load_documents("shakspere")
    with pytest.raises(ValueError, match=r"has no .txt file"):
        load_documents(tmp_path)
    write_tokens(tmp_path / "t.bin", [[1, 2]], vocab_size=5)
    with pytest.raises(ValueError, match="holds tokens, not text"):
        load_documents(tmp_path / "t.bin")


def test_split_keeps_whole_documents_apart():
    documents = load_documents("shakespeare")
    split = split_documents(documents, 0.1, seed=3)
    names = [d.name for d in split.train + split.val]
    assert sorted(names) == sorted(d.name for d in documents)
    assert sum(d.size for d in split.val) / sum(d.size for d in documents) == pytest.approx(0.1, abs=0.02)
    assert f"{len(split.val)} of 42 documents" in split.note
    assert split_documents(documents[::-1], 0.1, seed=3).val == split.val  # whatever the order
    assert {split_documents(documents, 0.1, seed=s).val[0].name for s in range(8)} != {split.val[0].name}


def test_a_new_document_does_not_reshuffle_the_split():
    documents = [Document(f"d{i}", "x" * 100) for i in range(100)]
    before = {d.name for d in split_documents(documents, 0.1).val}
    after = {d.name for d in split_documents([*documents, Document("new", "x" * 100)], 0.1).val}
    assert len(before ^ after) <= 2


@pytest.mark.parametrize("sizes", [[4000], [4000, 4000], [8000, 3000, 500]])
def test_a_few_big_documents_lend_their_ends(sizes):
    documents = [Document(f"d{i}", (f"{i} line\n" * size)[:size]) for i, size in enumerate(sizes)]
    split = split_documents(documents, 0.1)
    assert [a.text + b.text for a, b in zip(split.train, split.val, strict=True)] == [d.text for d in documents]
    assert all(d.text.endswith("\n") for d in split.train)
    assert sum(d.size for d in split.val) / sum(sizes) == pytest.approx(0.1, abs=0.02)
    assert "the last 10% of " + ("the text" if len(sizes) == 1 else "each") in split.note


@pytest.mark.parametrize(
    "text", ["öl 🎭\r\n" * 90, "🎭" * 500, "x" * 7 + "\r\n" + "y", "\ufeff" + "a line\n" * 99, "é\r\n" * 8]
)
@pytest.mark.parametrize("fraction", [0.1, 0.33, 0.5])
def test_the_ends_of_a_file_are_whole_characters_and_lines(tmp_path, text, fraction):
    path = tmp_path / "book.txt"
    path.write_bytes(text.encode())
    [document] = load_documents(path)
    split = split_documents([document], fraction)
    train, val = split.train[0], split.val[0]
    assert train.text + val.text == document.text == text.removeprefix("\ufeff").replace("\r\n", "\n")
    assert train.size + val.size == len(text.encode())
    assert all("".join(part.blocks(5)) == part.text for part in (document, train, val))
    if text.count("\n") > 50:
        assert train.text.endswith("\n")


def test_something_is_left_to_train_on():
    split = split_documents([Document(f"d{i}", "x" * 100) for i in range(10)], 0.97)
    assert (len(split.train), len(split.val)) == (1, 9)


@pytest.mark.parametrize(
    ("documents", "fraction", "message"),
    [
        ([Document("d", TEXT)], 0.0, "val_fraction is 0.0; expected 0 < val_fraction < 1"),
        ([Document("d", TEXT)], float("nan"), "val_fraction is nan"),
        ([], 0.1, "documents is empty"),
        ([Document("tiny", "ab")], 0.1, "tiny and the like are too short for a validation part of 10%"),
    ],
)
def test_what_split_refuses(documents, fraction, message):
    with pytest.raises(ValueError, match=message):
        split_documents(documents, fraction)


@pytest.fixture
def book(tmp_path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("kind", ["gpt2", "char", "word", "bpe"])
def test_prepare(book, tmp_path, kind):
    done = prepare(book, kind, tmp_path / "out", vocab_size=300 if kind == "bpe" else None)
    loaded = load_prepared(tmp_path / "out")
    for part, text in (
        ("train", TEXT[: done.info["train"]["bytes"]]),
        ("val", TEXT[-done.info["val"]["bytes"] :]),
    ):
        file = getattr(loaded, part)
        ids = file.tokens.tolist()
        if file.eos_id is not None:
            assert ids.pop() == file.eos_id
        if kind != "word" or part == "train":
            assert loaded.tokenizer.decode(ids) == text
        assert loaded.info[part] == {"documents": 1, "tokens": len(file), "bytes": len(text)}
    assert done.info["train"]["bytes"] + done.info["val"]["bytes"] == len(TEXT)
    assert loaded.info["split"] == "validation: the last 10% of the text"


def test_characters_of_the_validation_text_are_known(tmp_path):
    (tmp_path / "book.txt").write_text(TEXT + "Ω\n")
    done = prepare(tmp_path / "book.txt", "char", tmp_path / "out")
    assert done.tokenizer.decode(done.val.tokens).endswith("Ω\n")


def stamps(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("kind", ["char", "gpt2"])
def test_prepare_again_does_nothing(book, tmp_path, kind):
    out = tmp_path / "out"
    prepare(book, kind, out)
    before = stamps(out)
    prepare(book, kind, out)
    prepare(str(book), GPT2Tokenizer() if kind == "gpt2" else kind, out)
    assert stamps(out) == before


@pytest.mark.parametrize("change", ["text", "tokenizer", "vocab_size", "seed", "damage", "interrupted"])
def test_prepare_again_after_a_change(tmp_path, change):
    data, out = tmp_path / "texts", tmp_path / "out"
    data.mkdir()
    for i in range(20):
        (data / f"{i}.txt").write_text(TEXT[i * 100 : i * 100 + 150])
    options = {"tokenizer": "bpe", "vocab_size": 270, "seed": 0}
    before = prepare(data, out_dir=out, **options)
    first = before.train.tokens.tolist(), before.val.tokens.tolist()
    if change == "text":
        for i in range(20):
            (data / f"{i}.txt").write_text(TEXT[i * 100 : i * 100 + 150].upper())
    elif change == "damage":
        content = (out / "train.bin").read_bytes()
        (out / "train.bin").write_bytes(content[:70] + b"\1\1" + content[72:])
    elif change == "interrupted":
        (out / "data.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"has no data.json; .*interrupted - run it .again"):
            load_prepared(out)
    else:
        options[change] = {"tokenizer": "word", "vocab_size": 280, "seed": 1}[change]
    after = prepare(data, out_dir=out, **options)
    second = after.train.tokens.tolist(), after.val.tokens.tolist()
    assert (first == second) == (change in ("damage", "interrupted"))
    assert any("written again" in note and "train.bin" in note for note in after.notes) == (change == "damage")
    after.train.verify()


def test_the_files_do_not_depend_on_the_number_of_workers(book, tmp_path):
    files = []
    for workers in (1, 3):
        prepare(book, "gpt2", tmp_path / str(workers), workers=workers)
        files.append([(tmp_path / str(workers) / name).read_bytes() for name in ("train.bin", "val.bin")])
    assert files[0] == files[1]
    with pytest.raises(ValueError, match="workers is 0; expected at least 1"):
        prepare(book, "gpt2", tmp_path / "0", workers=0)


def test_a_full_disk_leaves_the_old_data(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT * 20)
    prepare(tmp_path / "a.txt", "char", out)
    before = stamps(out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write to .*out: File too large; what was there is intact"):
            prepare(tmp_path / "b.txt", "char", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stamps(out) == before
    assert load_prepared(out).tokenizer.decode(load_prepared(out).val.tokens) == TEXT[-len(load_prepared(out).val) :]


def test_tokens_tokenizer_and_manifest_are_replaced_together(book, tmp_path, monkeypatch):
    def crash(self):
        raise KeyboardInterrupt

    prepare(book, "bpe", tmp_path / "out", vocab_size=270)
    before = stamps(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(CharTokenizer, "files", crash)
        with pytest.raises(KeyboardInterrupt):
            prepare(book, "char", tmp_path / "out")
    assert stamps(tmp_path / "out") == before
    assert load_prepared(tmp_path / "out").tokenizer.vocab_size == 270
    prepare(book, "char", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [
        "data.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "train.bin",
        "val.bin",
    ]
    (tmp_path / "out" / "data.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no data.json; .*interrupted"):
        load_prepared(tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\0b", "bad.txt is binary"),
        (b"caf\xe9", "bad.txt is not UTF-8 .byte 0xe9 at byte 3"),
    ],
)
def test_bad_text_is_found_before_anything_is_written(tmp_path, content, message):
    (tmp_path / "good.txt").write_text(TEXT)
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, "gpt2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_that_a_given_tokenizer_lacks(book, tmp_path):
    CharTokenizer.train("abc").save(tmp_path / "abc")
    with pytest.raises(ValueError, match=r"book.txt, counted from character 0: CharTokenizer.encode: text has 'l'"):
        prepare(book, tmp_path / "abc", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_open_data(book, tmp_path):
    prepared = open_data(book, tmp_path / "cache", "char")
    assert prepared.folder == tmp_path / "cache"
    again = open_data(tmp_path / "cache", tmp_path / "unused")
    assert again.train.tokens.tolist() == prepared.train.tokens.tolist()
    tokens = open_data(tmp_path / "cache" / "train.bin", tmp_path / "unused")
    assert len(tokens.train) + len(tokens.val) == len(prepared.train)
    assert re.match(r"validation: the last 10\.0% of the tokens", tokens.info["split"])
    assert not (tmp_path / "unused").exists()
    with pytest.raises(ValueError, match="leave tokenizer and vocab_size out"):
        open_data(tmp_path / "cache", tmp_path, "gpt2")
    with pytest.raises(ValueError, match=r"'char', which is trained on text, but .* holds tokens"):
        open_data(tmp_path / "cache" / "train.bin", tmp_path, "char")
    with pytest.raises(ValueError, match=r"was made with a vocabulary of .* but the tokenizer has 50257"):
        open_data(tmp_path / "cache" / "train.bin", tmp_path, "gpt2")


def test_a_manifest_of_another_version(book, tmp_path):
    prepare(book, "char", tmp_path / "out")
    (tmp_path / "out" / "data.json").write_text(json.dumps({"version": 2}))
    with pytest.raises(ValueError, match="expected version 1; prepare the data again"):
        load_prepared(tmp_path / "out")


def test_the_command(book, tmp_path):
    from gptfast.cli.prepare import prepare as command

    app = typer.Typer()
    app.command()(command)
    arguments = [
        "--data",
        str(book),
        "--tokenizer",
        "bpe",
        "--vocab-size",
        "300",
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    counts = load_prepared(tmp_path / "out").info
    for part in ("train", "val"):
        assert f"{part} 1 {counts[part]['bytes']:,} {counts[part]['tokens']:,}" in words
    assert "vocabulary: 300 tokens" in words
    assert "the last 10% of the text" in words
    missing = CliRunner().invoke(app, ["--data", str(tmp_path / "missing"), "--out", str(tmp_path / "x")])
    assert missing.exit_code != 0


def test_merges_are_learnt_from_a_part_of_a_large_text(tmp_path, monkeypatch):
    """The same part each time, from all over the text, and said."""
    text = "".join(f"word{'abcdefghij'[i % 10]} {i}\n" for i in range(60_000))
    (tmp_path / "book.txt").write_text(text)
    monkeypatch.setattr(learning, "LEARNT", len(text) // 3)
    monkeypatch.setattr(Document.blocks, "__defaults__", (10_000,))
    sample = list(learning._sample(iter("abcdefghij"), 0.3))
    assert sample == ["d", "g", "j"]
    made = [prepare(tmp_path / "book.txt", "bpe", tmp_path / out, vocab_size=400) for out in "ab"]
    assert made[0].notes[1] == "bpe: learnt from 0 of 1 MB, taken evenly from all the text"
    assert made[0].tokenizer.merges == made[1].tokenizer.merges
    monkeypatch.undo()
    whole = prepare(tmp_path / "book.txt", "bpe", tmp_path / "c", vocab_size=400)
    assert len(whole.notes) == 1 and whole.tokenizer.merges != made[0].tokenizer.merges
    assert {"word", " 1"} <= {made[0].tokenizer.decode([i]) for i in range(400)}


def test_preparing_loads_no_tokenizer_again_and_its_fingerprint_is_that_of_the_saved_files(tmp_path, monkeypatch):
    """Data that older versions prepared is found."""
    tokenizer = CharTokenizer.train("To be, or not to be\n", unk=True)
    tokenizer.save(tmp_path / "saved")
    for file in (tmp_path / "saved").iterdir():
        assert tokenizer.files()[file.name] == file.read_bytes()
    loaded = []
    monkeypatch.setattr(prepared, "load_tokenizer", lambda folder: loaded.append(folder) or load_tokenizer(folder))
    (tmp_path / "text.txt").write_text(TEXT)
    data = prepare(tmp_path / "text.txt", tokenizer, tmp_path / "out")
    assert data.tokenizer is tokenizer and not loaded
    again = prepare(tmp_path / "text.txt", tmp_path / "saved", tmp_path / "out")
    assert loaded == [tmp_path / "out"] and again.info["fingerprint"] == data.info["fingerprint"]
