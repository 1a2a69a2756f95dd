"""Folders of `save_to_disk` of Hugging Face's datasets, read without that package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gptfast.data import load_documents, prepare

datasets = pytest.importorskip("datasets")

TEXTS = [f"document {n}: Shall I compare thee to a summer's day?\n" * (n % 4 + 1) for n in range(30)]


def dataset(texts: list[str]):
    return datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})


def texts_of(part, tokenizer) -> list[str]:
    return [text for text in tokenizer.decode(part.tokens).split("<|endoftext|>") if text]


def test_a_dataset_is_read_in_order_from_its_shards(tmp_path: Path):
    dataset(TEXTS).save_to_disk(tmp_path / "set", num_shards=3)
    assert [d.text for d in load_documents(tmp_path / "set", text_field="text")] == TEXTS
    dataset(TEXTS).select(range(20, 2, -3)).save_to_disk(tmp_path / "chosen")  # rows by an index
    assert [d.text for d in load_documents(tmp_path / "chosen", text_field="text")] == TEXTS[20:2:-3]


def test_splits_are_for_what_their_names_say(tmp_path: Path):
    parts = {"train": TEXTS[:20], "test": TEXTS[20:25], "validation": TEXTS[25:]}
    datasets.DatasetDict({name: dataset(texts) for name, texts in parts.items()}).save_to_disk(tmp_path / "set")
    done = prepare(tmp_path / "set", "gpt2", tmp_path / "out", text_field="text", val_fraction=0.5)
    assert texts_of(done.train, done.tokenizer) == parts["train"]
    assert texts_of(done.val, done.tokenizer) == parts["validation"]
    assert "the split that" in done.info["split"] and "splits left out: test" in done.notes
    one = prepare(tmp_path / "set" / "train", "gpt2", tmp_path / "one", text_field="text")
    assert one.info["train"]["documents"] + one.info["val"]["documents"] == 20


def test_the_package_datasets_is_not_imported(tmp_path: Path):
    dataset(TEXTS).save_to_disk(tmp_path / "set")
    code = "import sys; from gptfast.data import load_documents as l; l(sys.argv[1], text_field='text'); print({'datasets', 'torch'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "set")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_what_is_refused(tmp_path: Path):
    folder = tmp_path / "set"
    datasets.DatasetDict({"a": dataset(TEXTS), "b": dataset(TEXTS)}).save_to_disk(folder)
    with pytest.raises(ValueError, match=r"is a dataset of Hugging Face; name the field .*text_field.*: 'id', 'text'"):
        load_documents(folder)
    with pytest.raises(ValueError, match="has the splits a, b, and none is named train; give the folder of one"):
        load_documents(folder, text_field="text")
    with pytest.raises(ValueError, match="there is no field 'body'; the fields are 'id', 'text'"):
        load_documents(folder / "a", text_field="body")
    (folder / "a" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(FileNotFoundError, match=r"data-00000-of-00001.arrow is missing, but .*state.json lists it"):
        load_documents(folder / "a", text_field="text")
    (folder / "b" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    with pytest.raises(ValueError, match=r"state.json: expected file names under '_data_files'"):
        load_documents(folder / "b", text_field="text")
