"""Files of examples: what is read, and what is said about bad ones."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from gptfast.finetuning import TaskModel, read_examples
from tests.finetuning.models import EXAMPLES, LABELS, bpe, gpt

GOOD: dict[str, list[dict[str, Any]]] = {
    **EXAMPLES,
    "lm": [{"text": "a"}],
    "chat": [
        {"prompt": "a", "response": "b"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ],
}


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


@pytest.mark.parametrize("task", GOOD)
def test_every_task_is_read(tmp_path, task):
    path = write(tmp_path, *GOOD[task])
    found = read_examples(path, task, LABELS.get(task))
    assert found.records == GOOD[task]
    assert found.where == [f"{path}, line {n + 1}" for n in range(len(GOOD[task]))]
    packed = tmp_path / "train.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    listed = tmp_path / "train.json"
    listed.write_text(json.dumps(GOOD[task]))
    assert read_examples(packed, task).records == read_examples(listed, task).records == GOOD[task]


def as_csv(rows: list[dict[str, Any]], delimiter: str) -> str:
    out, fields = io.StringIO(), list(dict.fromkeys(name for row in rows for name in row))
    table = csv.DictWriter(out, fields, delimiter=delimiter)
    table.writeheader()
    table.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return out.getvalue()


@pytest.mark.parametrize("task", GOOD)
def test_tables_have_the_examples_of_json(tmp_path, task):
    pa, parquet, feather = (pytest.importorskip(f"pyarrow{part}") for part in ("", ".parquet", ".feather"))
    for name, delimiter in (("a.csv", ","), ("b.csv", ";"), ("a.tsv", "\t")):
        (tmp_path / name).write_text("\ufeff" + as_csv(GOOD[task], delimiter), encoding="utf-8")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    table = pa.Table.from_pylist(GOOD[task], pa.schema(schema_of(pa, GOOD[task])))
    parquet.write_table(table, tmp_path / "a.parquet")
    feather.write_feather(table, tmp_path / "a.arrow")
    for name in ("a.csv", "b.csv", "a.tsv", "a.csv.gz", "a.parquet", "a.arrow"):
        found = read_examples(tmp_path / name, task, LABELS.get(task))
        wanted = [{k: v for k, v in row.items() if v != ""} for row in GOOD[task]]
        assert [{k: v for k, v in row.items() if v != ""} for row in found.records] == wanted, name
        place = "line 2" if ".csv" in name or ".tsv" in name else "record 1"
        assert found.where[0] == f"{tmp_path / name}, {place}"


def schema_of(pa: Any, rows: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Types of all fields; pyarrow looks at the first row alone."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [(name, pa.infer_type([row[name] for row in rows if name in row])) for name in names]


def test_cells_of_csv(tmp_path):
    path = tmp_path / "a.csv"
    for label, kept in (("1", 1), ("-3", -3), ("007", "007"), ("1.5", "1.5"), ("yes", "yes")):
        path.write_text(f"text,label\na,{label}\n")
        assert read_examples(path, "classification").records == [{"text": "a", "label": kept}]
    path.write_text('context,choices,label\n1 + 1 is,"[""1"", ""2""]",2\n')
    assert read_examples(path, "choice").records[0]["label"] == "2", "the text of a choice, not a place"


@pytest.mark.parametrize(
    ("task", "name", "content", "text"),
    [
        ("classification", "a.csv", "text,label\na,\n", r"a\.csv, line 2: label is ''; expected the name"),
        ("classification", "a.csv", "text,genre\na,b\n", r"line 2: there is no field 'label'"),
        ("classification", "a.csv", "text,label,text\na,b,c\n", r"line 1: there is more than one field 'text'"),
        ("classification", "a.csv", "text,label\na,b,c\n", r"line 2: the record has 3 values; expected 2"),
        ("classification", "a.csv", "\n", r"a\.csv is empty; expected a first line with the names of its fields"),
        ("classification", "a.csv", "text,label\n", r"a\.csv has no examples; expected one a line"),
        (
            "similarity",
            "a.tsv",
            "text1\ttext2\tscore\na\tb\tmany\n",
            "line 2: score is 'many'; expected a finite number",
        ),
        ("choice", "a.csv", "context,choices,label\na,b|c,0\n", r"line 2, choices is not valid JSON"),
        ("chat", "a.csv", "messages\nhello\n", r"line 2, messages is not valid JSON"),
        ("lm", "a.parquet", "PAR1", r"a\.parquet is damaged or no Parquet file"),
        ("lm", "a.parquet.gz", "", r"a\.parquet\.gz is a compressed Parquet file"),
    ],
)
def test_bad_tables(tmp_path, task, name, content, text):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=text):
        read_examples(tmp_path / name, task)


def test_labels_are_sorted(tmp_path):
    rows = [{"text": "a", "label": x} for x in (10, 9, 2, 9)]
    labels = read_examples(write(tmp_path, *rows), "classification").labels()
    assert labels == ["2", "9", "10"]
    model = TaskModel(gpt(300), "classification", labels, bpe())
    assert model.batch(rows)["labels"].tolist() == [2, 1, 0, 1], "a label that is a name is no index"
    rows = [{"text": "a", "label": x} for x in (1, -10, 0, -1)]
    assert read_examples(write(tmp_path, *rows), "classification").labels() == ["-10", "-1", "0", "1"]
    rows = [{"text": "a", "label": x} for x in ("b", "a")]
    assert read_examples(write(tmp_path, *rows), "classification").labels() == ["a", "b"]


@pytest.mark.parametrize(
    ("task", "lines", "text"),
    [
        ("lm", [{"text": "a"}, '{"text": '], "train.jsonl, line 2 is not valid JSON"),
        ("lm", ["", {"text": "a"}, "3"], "train.jsonl, line 3: the record is 3; expected an object"),
        ("lm", [{"text": "a"}, {"txt": "a"}], "line 2: there is no field 'text'"),
        ("lm", [{"text": None}], "line 1: text is None"),
        ("lm", [], "train.jsonl has no examples"),
        ("classification", [{"text": "a"}], "line 1: there is no field 'label'"),
        ("classification", [{"text": 3, "label": "a"}], "line 1: text is 3; expected a text"),
        ("classification", [{"text": "a", "label": 1.5}], "line 1: label is 1.5"),
        ("classification", [{"text": "a", "label": " "}], "line 1: label is ' '"),
        (
            "classification",
            ['{"text": "a", "text": "b", "label": "c"}'],
            "line 1 is not valid JSON (the key 'text' occurs",
        ),
        (
            "classification",
            ['[{"text": "a", "label": "b", "label": "c"}]'],
            "record 1 is not valid JSON (the key 'label'",
        ),
        ("entailment", [{"premise": "a", "label": "x"}], "line 1: there is no field 'hypothesis'"),
        ("similarity", [{"text1": "a", "text2": "b", "score": None}], "line 1: score is None"),
        ("choice", [{"context": "a", "choices": ["b", "c"], "label": 5}], "line 1: the label 5 is not in the set"),
        (
            "choice",
            [{"context": "a", "choices": ["b", "b"], "label": "b"}],
            "line 1: the label 'b' is the text of several",
        ),
        ("chat", [{"prompt": "a"}], "line 1: there is no field 'response'"),
    ],
)
def test_bad_lines(tmp_path, task, lines, text):
    with pytest.raises(ValueError) as error:
        read_examples(write(tmp_path, *lines), task)
    assert text in str(error.value)


def test_sets_of_labels(tmp_path):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}]
    with pytest.raises(ValueError, match="all 2 examples have the label 'x'; a classifier needs"):
        read_examples(write(tmp_path, *rows), "classification").labels()
    with pytest.raises(ValueError, match="line 1: the label 'x' is not in the set; expected one of 'y', 'z'"):
        read_examples(write(tmp_path, *rows), "classification", ["y", "z"])


@pytest.mark.parametrize("labels", [["1", "2", "3"], ["-1", "1"], ["0.5", "1.5"], ["none", "1"]])
def test_a_number_beside_classes_called_by_numbers_is_no_index(tmp_path, labels):
    rows = [{"text": "a", "label": 0}]
    with pytest.raises(ValueError, match="line 1: the label 0 is not in the set"):
        read_examples(write(tmp_path, *rows), "classification", labels)
    assert len(read_examples(write(tmp_path, *rows), "classification", ["no", "yes"])) == 1


def test_a_number_is_the_place_of_a_choice_and_a_text_the_choice():
    """Also where the choices are numbers."""
    model = TaskModel(gpt(300), "choice", tokenizer=bpe())
    rows = [{"context": "1 + 1 is", "choices": ["1", "2", "0"], "label": x} for x in (0, 1, 2, "0", "1", "2")]
    assert model.batch(rows)["labels"].tolist() == [0, 1, 2, 2, 0, 1]


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_examples(tmp_path / "none.jsonl", "lm")
    with pytest.raises(FileNotFoundError):
        read_examples(tmp_path / "a.csv", "lm")
    with pytest.raises(IsADirectoryError, match="this is a folder; name a file"):
        read_examples(tmp_path, "lm")
    (tmp_path / "a.txt").write_text("text\na\n")
    with pytest.raises(
        ValueError, match=r"a\.txt: expected a file of records, .*, not in \.txt; name it so if it is one"
    ):
        read_examples(tmp_path / "a.txt", "lm")
    (tmp_path / "a").write_text("{}")
    with pytest.raises(ValueError, match=r"ends in \.jsonl, \.ndjson, \.json, \.csv, .*; name it so if it is one"):
        read_examples(tmp_path / "a", "lm")
    with pytest.raises(ValueError, match="task is 'tags'; expected one of"):
        read_examples(write(tmp_path, {}), "tags")
