"""Files of examples: what is read, and what is said about bad ones."""

from __future__ import annotations

import gzip
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
    (tmp_path / "a.csv").write_text("text\na\n")
    with pytest.raises(
        ValueError, match=r"a\.csv: expected a file of JSON Lines, .*, not in \.csv; write it .*read_csv\(FILE\)"
    ):
        read_examples(tmp_path / "a.csv", "lm")
    (tmp_path / "a").write_text("{}")
    with pytest.raises(ValueError, match=r"ends in \.jsonl, \.ndjson, \.json; name it so if it is one"):
        read_examples(tmp_path / "a", "lm")
    with pytest.raises(ValueError, match="task is 'tags'; expected one of"):
        read_examples(write(tmp_path, {}), "tags")
