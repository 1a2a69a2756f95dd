"""What `--data` reads of a folder, and files of records: JSON Lines, JSON lists, CSV, Parquet, packed ones."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import sys
import tracemalloc
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast.data import json_records as module
from gptfast.data import load_documents, load_prepared, open_data, prepare, write_tokens
from gptfast.data.corpus import load_corpus

TEXTS = ['To be, or "not" to be;', "größe\nand {braces} 🤗", "the, third", "x" * 300]
ROWS = [{"id": n, "text": text, "meta": {"k": [n]}} for n, text in enumerate(TEXTS)]


def as_csv(delimiter: str, rows: list[dict] = ROWS) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter)
    writer.writerow(["id", "text"])
    writer.writerows([row["id"], row["text"]] for row in rows)
    return buffer.getvalue().encode()


def as_parquet(texts: list, kind: pa.DataType | None = None, **options) -> bytes:
    sink = io.BytesIO()
    column = pa.array(texts, kind or pa.string())
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": column}), sink, **options)
    return sink.getvalue()


def as_arrow(texts: list, writer, kind: pa.DataType | None = None) -> bytes:
    """In batches of two rows."""
    sink = io.BytesIO()
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, kind or pa.string())})
    with writer(sink, table.schema) as file:
        file.write_table(table, max_chunksize=2)
    return sink.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FILES = {
    "a.jsonl": LINES,
    "a.ndjson": b"\n" + LINES.rstrip() + b"\n\n \n",
    "bom.JSONL": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
    "lines.json": LINES,
    "list.json": json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
    "short.json": b" \n" + json.dumps(ROWS).encode(),
    "a.csv": as_csv(","),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(","),
    "semicolon.csv": as_csv(";"),
    "blank.csv": b"\n \r\n" + as_csv(","),
    "a.tsv": as_csv("\t"),
    "a.parquet": as_parquet(TEXTS, row_group_size=2),
    "large.parquet": as_parquet(TEXTS, pa.large_string()),
    "dictionary.parquet": as_parquet(TEXTS, pa.dictionary(pa.int32(), pa.string())),
    "stream.arrow": as_arrow(TEXTS, pa.ipc.new_stream),
    "file.arrow": as_arrow(TEXTS, pa.ipc.new_file),
    "a.ipc": as_arrow(TEXTS, pa.ipc.new_stream, pa.large_string()),
    "a.feather": as_arrow(TEXTS, pa.ipc.new_file, pa.dictionary(pa.int32(), pa.string())),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.csv.bz2": bz2.compress(as_csv(",")),
    "list.json.xz": lzma.compress(json.dumps(ROWS).encode()),
    "a.jsonl.zst": pa.Codec("zstd").compress(LINES, asbytes=True),
}


@pytest.mark.parametrize("name", FILES)
def test_each_record_is_a_document(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    documents = load_documents(tmp_path / name, text_field="text")
    assert [document.text for document in documents] == TEXTS
    assert [document.size for document in documents] == [len(text.encode()) for text in TEXTS]
    assert len({document.name for document in documents}) == 4
    assert [d.text for d in load_documents(tmp_path, text_field="text")] == TEXTS  # and in a folder


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(
        st.dictionaries(
            st.text(max_size=4), st.none() | st.integers() | st.text() | st.lists(st.booleans()), max_size=3
        )
    ),
    chunk=st.integers(1, 40),
    indent=st.none() | st.integers(0, 2),
)
def test_a_list_is_read_as_json_reads_it_however_it_is_cut(tmp_path_factory, values, chunk, indent):
    path = tmp_path_factory.mktemp("list") / "a.json"
    path.write_text(json.dumps([{**value, "text": "t"} for value in values], indent=indent))
    old, module._CHUNK = module._CHUNK, chunk
    try:
        with path.open("rb") as file:
            assert list(module._List(file, path).values()) == json.loads(path.read_text())
    finally:
        module._CHUNK = old


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"body": "b", "id": 1}\n', r"a.jsonl, line 2: there is no field 'text'; the fields are 'body', 'id'"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 5}\n', "a.jsonl, line 3: the field 'text' is 5; expected a text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", b'"a"\n', "a.jsonl, line 1: the record is \"a\"; expected an object with the field 'text'"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "a.jsonl, line 1 is not UTF-8 .byte 0xe9 at byte 13"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1 holds .* half of a surrogate pair"),
        ("a.jsonl", b"", "has no text: it has no records"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n', "has no text: 2 records without text skipped"),
        ("a.json", b'[{"text": "a"}, {"body": 1}]', "a.json, record 2: there is no field 'text'; the fields are 'body'"),
        ("a.json", b'[{"text": "a"},]', "a.json, record 1 has a comma behind it, and is the last one; remove"),
        ("a.json", b'[{"text": "a"},\n', "a.json is damaged or cut short: its JSON list has no end"),
        ("a.json", b'[{"text": nil}]', "a.json, record 1 is not valid JSON .Expecting value at 'nil}]'.; correct it"),
        ("a.json", b'[{"text": "a"}, {"text": "b",}]', "a.json, record 2 is not valid JSON .*at '}]'"),
        ("a.json", b'[{"text": "a", "more": ' + b"[" * 200 + b"]" * 200 + b"}]", "a.json, record 1 is nested more than 100"),
        ("a.json", b'[{"text": "a"},\n{"text": "caf\xe9"}]', "a.json, line 2 is not UTF-8 .byte 0xe9 at byte 13"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"},\n', "a.jsonl, line 2 ends with a comma; expected one object a line"),
        ("a.jsonl", b'{\n "text": "a"\n}\n', "a.jsonl, line 1 does not end its object; .*`jq -c .` puts each on a line"),
        ("a.jsonl", b"{'text': 'a'}\n", "a.jsonl, line 1 is written as Python's dict; expected JSON"),
        ("a.jsonl", b'{"text": "a", ', "a.jsonl, line 1 is not valid JSON .*damaged or cut short"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "a.jsonl is UTF-16 .byte order mark at byte 0.; convert it: iconv .*utf8.jsonl"),
        ("a.jsonl", gzip.compress(LINES), "a.jsonl is packed, and its name does not say so; rename it to a.jsonl.gz"),
        ("a.csv", as_csv(",").decode().encode("utf-16"), "a.csv is UTF-16 .byte order mark"),
        ("a.csv", b"\n \nid,body\n1,a\n", "a.csv, line 3: there is no field 'text'"),
        ("a.csv", b"\n\nid,text\n1,a\n\n2\n", "a.csv, line 6: the record has 1 values; expected 2, as line 3 has"),
        ("a.csv", b"\n", "a.csv is empty; expected a first line with the names of its fields, 'text' among them"),
        ("a.csv.gz", gzip.compress(b"id,text\n1,a\n2,caf\xe9\n"), "a.csv.gz, line 3 is not UTF-8 .byte 0xe9 at byte 5"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "'{' where ',' is expected"),
        ("a.json", b'[{"text": "a"}', "a.json is damaged or cut short: its JSON list has no end"),
        ("a.json", b'[{"text": "a', "a.json is damaged or cut short: its JSON list has no end"),
        ("a.json", b'[{"text": "a"}]\n[]', "a.json has text after its list"),
        ("a.json", b'[{"text": "\\ud800"}]', "record 1 holds .* half of a surrogate pair"),
        ("a.json", b'[{"text": "caf\xe9"}]', "a.json, line 1 is not UTF-8"),
        ("a.csv", b"id,body\n1,a\n", "a.csv, line 1: there is no field 'text'; the fields are 'id', 'body'"),
        ("a.csv", b"text,text\n1,a\n", "a.csv, line 1: there is more than one field 'text'"),
        ("a.csv", b'id,text\n1,"two\nlines"\n2\n', "a.csv, line 4: the record has 1 values; expected 2, as line 1 has"),
        ("a.csv", b'id,text\n1,"a"b\n', "a.csv, line 2: .*expected CSV with quotes doubled"),
        ("a.csv", b'id,text\n1,"a\n', "a.csv, line 2: unexpected end of data"),
        ("a.csv", b"id,text\n1,caf\xe9\n", "a.csv, line 2 is not UTF-8 .byte 0xe9 at byte 5"),
        ("a.parquet", b"PAR1 nonsense", "a.parquet is damaged or no Parquet file"),
        ("a.parquet", as_parquet([1, 2], pa.int64()), "a.parquet: the field 'text' is of type int64; expected string; the fields are 'id', 'text'"),
        ("a.arrow", b"ARROW1 nonsense", "a.arrow is damaged or no Arrow file"),
        ("a.arrow", b"nonsense", "a.arrow is damaged or no Arrow file"),
        ("a.arrow", as_arrow(TEXTS, pa.ipc.new_stream)[:-60], "a.arrow is damaged or no Arrow file"),
        ("a.arrow", as_arrow([1, 2], pa.ipc.new_stream, pa.int64()), "a.arrow: the field 'text' is of type int64; expected string"),
        ("a.arrow.gz", b"", "a compressed Arrow file"),
        ("a.jsonl.gz", b"nonsense", "a.jsonl.gz is damaged or cut short"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-20], "a.jsonl.gz is damaged or cut short"),
        ("a.jsonl.bz2", b"nonsense", "a.jsonl.bz2 is damaged or no .bz2 file"),
        ("a.jsonl.xz", b"nonsense", "a.jsonl.xz is damaged or cut short"),
        ("a.jsonl.zst", b"nonsense" * 9, "a.jsonl.zst is damaged or no .zst file"),
        ("a.parquet.gz", b"", "a compressed Parquet file"),
        ("a.txt", b"text", "text_field is 'text', but .*a.txt is no file of records; expected .jsonl, "),
    ],
)  # fmt: skip
def test_a_bad_record_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        load_documents(tmp_path / name, text_field="text")


def test_a_field_that_parquet_lacks(tmp_path):
    (tmp_path / "a.parquet").write_bytes(as_parquet(["a"]))
    with pytest.raises(ValueError, match="there is no field 'body'; the fields are 'id', 'text'"):
        load_documents(tmp_path / "a.parquet", text_field="body")


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow"])
def test_columns_without_pyarrow_are_one_line(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(FILES[name])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=rf"to read .*{name} .*: pip install 'gptfast-kernels\[data\]'"):
        load_documents(tmp_path / name, text_field="text")


def test_pyarrow_is_imported_for_parquet_alone(tmp_path):
    import subprocess

    (tmp_path / "a.jsonl").write_bytes(LINES)
    code = "import sys; from gptfast.data import load_documents as l; l(sys.argv[1], text_field='text'); print('pyarrow' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.jsonl")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_records_without_text_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "a"}\n{"text": null}\n')
    corpus = load_corpus(tmp_path / "a.jsonl", text_field="text")
    assert [d.text for d in corpus.documents] == ["a"]
    assert corpus.notes == ["2 records without text skipped"]


def test_a_long_field_of_csv_and_its_limit(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "y" * 300_000 + "\n")
    assert load_documents(tmp_path / "a.csv", text_field="text")[0].size == 300_000
    assert csv.field_size_limit() == limit


def test_records_do_not_stay_in_memory(tmp_path):
    import tracemalloc

    with (tmp_path / "a.jsonl").open("w") as file:
        for n in range(40):
            file.write(json.dumps({"text": f"{n}" + "z" * 500_000}) + "\n")
    tracemalloc.start()
    documents = load_documents(tmp_path / "a.jsonl", text_field="text")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(d.size for d in documents) > 20_000_000
    assert peak < 8_000_000
    assert documents[7].text.startswith("7z") and documents[39].text.startswith("39z")


@pytest.fixture
def folder(tmp_path) -> Path:
    place = tmp_path / "texts"
    (place / "deep").mkdir(parents=True)
    (place / ".git").mkdir()
    files = {"a.txt": "alpha", "B.TXT": "beta", "deep/c.Txt": "gamma", "empty.txt": "", "mark.txt": "\ufeff"}
    files |= {
        "one.lic": "l",
        "two.LIC": "l",
        "read.md": "# m",
        "deep/READ.MD": "# n",
        "README": "r",
        ".git/x.txt": "hidden",
    }
    for name, text in files.items():
        (place / name).write_text(text)
    return place


def test_what_a_folder_holds_and_is_not_read_is_counted(folder):
    corpus = load_corpus(folder)
    assert [(d.name, d.text) for d in corpus.documents] == [
        ("B.TXT", "beta"),
        ("a.txt", "alpha"),
        ("deep/c.Txt", "gamma"),
    ]
    assert corpus.notes == [
        "6 other files skipped: .lic 2, .md 2, hidden 1, no suffix 1",
        "2 empty files skipped: empty.txt, mark.txt",
    ]


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("*.md", ["deep/READ.MD", "read.md"]),
        (["*.md", "*.txt"], ["B.TXT", "a.txt", "deep/READ.MD", "deep/c.Txt", "read.md"]),
        ("deep/*.md", ["deep/READ.MD"]),
        ("**/*.lic", ["one.lic", "two.LIC"]),
        ("README", ["README"]),
    ],
)
def test_glob_chooses_files(folder, glob, names):
    assert [d.name for d in load_documents(folder, glob=glob)] == names


def test_packed_text_is_text(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("größe\r\n".encode()))
    (tmp_path / "b.txt").write_text("b")
    assert [(d.name, d.text) for d in load_documents(tmp_path)] == [("a.txt.gz", "größe\n"), ("b.txt", "b")]
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"a\0b"))
    with pytest.raises(ValueError, match=r"c.txt.gz is binary"):
        load_documents(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"glob": "*.rst"},
            r"has no \*.rst file to read; it has .txt 5, .lic 2, .md 2, hidden 1, no suffix 1 - choose others",
        ),
        ({"glob": ["empty.*"]}, r"has no empty.\* file to read; it has .txt 4, .lic 2, .md 2, empty.\*, empty 1"),
        (
            {"text_field": "text"},
            "has no .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .ipc, .feather file to read; it has .txt 5",
        ),
    ],
)
def test_a_folder_without_anything_to_read_lists_what_it_has(folder, options, said):
    with pytest.raises(ValueError, match=said):
        load_documents(folder, **options)


def test_an_empty_folder_and_one_of_empty_files(tmp_path):
    with pytest.raises(ValueError, match=r"has no .txt file to read; it is empty"):
        load_documents(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"it has .txt, empty 1"):
        load_documents(tmp_path)


def test_links_are_counted_or_followed(folder, tmp_path):
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    (folder / "linked").symlink_to(tmp_path / "texts" / "deep")
    (folder / "z.txt").symlink_to(folder / "a.txt")
    os.mkfifo(folder / "pipe.txt")
    corpus = load_corpus(folder)
    assert corpus.documents[-1].text == "alpha"
    assert "link to a folder 1" in corpus.notes[0] and "no file (a broken link, a pipe) 2" in corpus.notes[0]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "list.json"])
def test_records_read_as_plain_text_are_warned_of(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    for data, options in ((tmp_path / name, {}), (tmp_path, {"glob": "*"})):
        with pytest.warns(UserWarning, match=rf"{name} is read as plain text.*--text-field"):
            assert len(load_documents(data, **options)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_documents(tmp_path / name, text_field="text")


def test_options_that_data_has_no_use_for(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    write_tokens(tmp_path / "t.bin", [[1, 2]], vocab_size=5)
    for data in (tmp_path / "a.txt", "shakespeare"):
        with pytest.raises(ValueError, match=r"glob is '\*.md', but .* is no folder; leave it out"):
            load_documents(data, glob="*.md")
    with pytest.raises(ValueError, match="text_field is 'text', but shakespeare has no fields"):
        load_documents("shakespeare", text_field="text")
    with pytest.raises(ValueError, match="holds tokens; leave text_field out"):
        open_data(tmp_path / "t.bin", tmp_path / "out", text_field="text")
    with pytest.raises(FileNotFoundError, match="'missing' is neither"):
        load_documents("missing", glob="*.md")


def test_prepare_keeps_the_options_and_the_notes(folder, tmp_path):
    for name in ("a.txt", "B.TXT", "deep/c.Txt"):
        (folder / name).write_text("alpha beta gamma\n" * 40)
    done = prepare(folder, "char", tmp_path / "out", glob=["*.txt"])
    stored = load_prepared(tmp_path / "out").info
    assert stored["glob"] == ["*.txt"] and stored["text_field"] is None
    assert stored["notes"] == done.info["notes"] == load_corpus(folder, ["*.txt"]).notes
    (folder / "new.md").write_text("m")
    assert ".md 3" in prepare(folder, "char", tmp_path / "out", glob=["*.txt"]).info["notes"][0]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_records_are_tokenised_with_an_end_each(tmp_path, name):
    texts = [f"the text number {n}\n" * (n % 3 + 1) for n in range(40)]
    content = {
        "a.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts).encode(),
        "a.parquet": as_parquet(texts),
    }
    (tmp_path / name).write_bytes(content[name])
    done = prepare(tmp_path / name, "gpt2", tmp_path / "out", text_field="text")
    assert done.info["train"]["documents"] + done.info["val"]["documents"] == 40
    found = [
        text for part in (done.train, done.val) for text in done.tokenizer.decode(part.tokens).split("<|endoftext|>")
    ]
    assert sorted(filter(None, found)) == sorted(texts)


def test_a_packed_text_is_unpacked_in_blocks(tmp_path):
    """A file that unpacks to more than the memory can be prepared."""
    line = "To be, or not to be: that is the question, naïve as it is\n"
    count = (16 << 20) // len(line.encode())
    with gzip.open(tmp_path / "long.txt.gz", "wt", encoding="utf-8", compresslevel=1) as file:
        file.writelines([line] * count)
    tracemalloc.start()
    try:
        (document,) = load_documents(tmp_path / "long.txt.gz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert document.size == count * len(line.encode()) and peak < 4 << 20, f"{peak / 2**20:.1f} MB for 16 MB of text"
    assert next(iter(document.blocks(len(line.encode())))) == line
