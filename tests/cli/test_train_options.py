"""gptfast train and prepare: what the options of the data do, and errors in terms of the options."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptfast import cli
from gptfast.cli import _errors
from gptfast.cli._errors import _in_options
from gptfast.models import GPT, GPTConfig
from gptfast.tokenizer import CharTokenizer, load_tokenizer
from gptfast.training import read_checkpoint

TEXT = "Is this a dagger which I see before me,\nThe handle toward my hand? Come, let me clutch thee.\n"
SHAPE = ["--n-layer", "1", "--n-head", "2", "--n-embd", "8", "--block-size", "16"]
SMALL = [*SHAPE, "--batch-size", "2", "--dtype", "float32", "--device", "cpu", "--threads", "1", "--max-steps", "2"]


@pytest.fixture(autouse=True)
def _process(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command changes in this process is put back."""
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "dagger.txt"
    path.write_text(TEXT * 30)
    return path


def gptfast(*arguments: str | Path) -> int:
    sys.argv = ["gptfast", *map(str, arguments)]
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code or 0


@pytest.fixture
def failure(capsys):
    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        assert gptfast(*arguments) == 1
        first, *rest = capsys.readouterr().err.splitlines()
        assert first.startswith("error: ") and not any("Traceback" in line for line in rest)
        return first.removeprefix("error: ")

    return run


@pytest.fixture
def run(text, tmp_path, capsys) -> Path:
    assert gptfast("train", "--data", text, *SMALL, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    return tmp_path / "run"


def write_records(folder: Path) -> Path:
    folder.mkdir()
    rows = [{"n": n, "body": f"{TEXT}{n}\n"} for n in range(30)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "notes.md").write_text("# no\n")
    (folder / "empty.csv").touch()
    return folder


def test_a_run_on_records_reports_what_is_skipped_and_resumes_with_its_stored_options(tmp_path, capsys, failure):
    data = write_records(tmp_path / "data")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--data", data, "--text-field", "body", *SMALL, "--lr-decay-steps", "4"]
    assert gptfast("train", *options, "--max-steps", "4", "--out", whole) == 0
    said = capsys.readouterr().out
    assert "1 other file skipped: .md 1" in said and "1 empty file skipped: empty.csv" in said
    assert "of 30 documents" in said
    assert gptfast("train", *options, "--out", parts) == 0
    stored = read_checkpoint(parts / "last").source["options"]
    assert stored["text_field"] == "body" and "glob" not in stored
    assert gptfast("train", "--resume", "--out", parts, "--max-steps", "4") == 0
    a, b = (load_file(out / "last" / "model.safetensors") for out in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a | b)
    refused = failure("train", "--resume", "--out", parts, "--max-steps", "9", "--text-field", "n")
    assert refused.startswith("train: --text-field is n but the run in")


def test_a_run_on_a_glob_resumes(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.MD").write_text(TEXT * 20)
    (folder / "b.txt").write_text("not this\n" * 100)
    out = tmp_path / "run"
    assert gptfast("train", "--data", folder, "--glob", "*.md", "--glob", "*.rst", *SMALL, "--out", out) == 0
    assert "1 other file skipped: .txt 1" in capsys.readouterr().out
    assert read_checkpoint(out / "last").source["options"]["glob"] == ["*.md", "*.rst"]
    assert gptfast("train", "--resume", "--out", out, "--max-steps", "3") == 0
    assert CharTokenizer.load(out / "last").decode([]) == "" and "x" not in CharTokenizer.load(out / "last").tokens


def test_plain_text_that_is_records_is_warned_of(tmp_path, recwarn):
    data = write_records(tmp_path / "data")
    assert gptfast("train", "--data", data / "a.jsonl", *SMALL, "--out", tmp_path / "run") == 0
    assert [str(w.message) for w in recwarn if "a.jsonl is read as plain text" in str(w.message)]


def test_prepare_takes_the_same_options_and_replaces_nothing_unasked(tmp_path, text, capsys, failure):
    data, out = write_records(tmp_path / "data"), tmp_path / "out"
    options = ["--tokenizer", "char", "--out", out]
    assert gptfast("prepare", "--data", data, "--text-field", "body", *options) == 0
    assert "1 other file skipped: .md 1\n1 empty file skipped: empty.csv\n" in capsys.readouterr().out
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert gptfast("prepare", "--data", data, "--text-field", "body", *options) == 0  # the same again
    refused = failure("prepare", "--data", text, *options)
    assert refused.startswith(f"{out} holds tokens of {data}, ") and "replace that with --overwrite" in refused
    assert failure("prepare", "--data", data, "--text-field", "body", "--seed", "1", *options).startswith(str(out))
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}
    assert gptfast("prepare", "--data", text, *options, "--overwrite") == 0
    assert str(text) in (out / "data.json").read_text()


def test_prepare_does_not_replace_the_tokenizer_of_a_checkpoint(text, run, failure):
    refused = failure("prepare", "--data", text, "--out", run / "best")
    assert refused.startswith(
        f"{run / 'best'} holds tokenizer.json, tokenizer_config.json; replace that with --overwrite"
    )
    assert gptfast("prepare", "--data", text, "--tokenizer", run / "best", "--out", run / "best") == 0


def test_init_from_refuses_a_tokenizer_with_other_ids(text, run, tmp_path, failure):
    (tmp_path / "other.txt").write_text("xyzw " + TEXT.upper() * 30)
    start = ["--init-from", run / "best", "--max-steps", "1", "--threads", "1", "--batch-size", "2"]
    second = ["--out", tmp_path / "second"]
    refused = failure("train", "--data", tmp_path / "other.txt", "--tokenizer", "char", *start, *second)
    assert re.search(
        r"--tokenizer char has other ids than .*best: \d+ is b'.' to the model and b'.' in the text", refused
    )
    assert "leave --tokenizer out" in refused
    assert gptfast("prepare", "--data", tmp_path / "other.txt", "--tokenizer", "char", "--out", tmp_path / "p") == 0
    refused = failure("train", "--data", tmp_path / "p", *start, *second)
    assert "was prepared with other ids" in refused and f"prepare it with --tokenizer {run / 'best'}" in refused
    assert gptfast("train", "--data", text, "--tokenizer", "char", *start, *second) == 0  # the same vocabulary


def test_init_from_a_checkpoint_without_a_tokenizer(text, tmp_path, failure):
    start = [
        "--threads",
        "1",
        "--max-steps",
        "1",
        "--batch-size",
        "2",
        "--eval-batches",
        "1",
        "--out",
        tmp_path / "second",
    ]
    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=16, vocab_size=50257)).save_pretrained(tmp_path / "hf")
    refused = failure("train", "--data", text, "--init-from", tmp_path / "hf", *start)
    assert "has no tokenizer and a vocabulary of 50257; say which with --tokenizer gpt2" in refused
    assert gptfast("train", "--data", text, "--init-from", tmp_path / "hf", "--tokenizer", "gpt2", *start) == 0
    assert load_tokenizer(tmp_path / "second" / "last").vocab_size == 50257
    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=16, vocab_size=99)).save_pretrained(tmp_path / "own")
    refused = failure("train", "--data", text, "--init-from", tmp_path / "own", *start[:-1], tmp_path / "third")
    assert "has no tokenizer and a vocabulary of 99; say which with --tokenizer FOLDER" in refused


def test_block_size_and_the_checkpoints(text, run, tmp_path, capsys, failure):
    start = ["--data", text, "--init-from", run / "best", "--max-steps", "1", "--threads", "1"]
    refused = failure("train", *start, "--block-size", "32", "--out", tmp_path / "a")
    assert refused == (
        f"train: --block-size is 32 but {run / 'best'} has learnt 16 positions; leave it out, give at most 16, or "
        "interpolate them with --extend-context 32"
    )
    assert failure("train", *start, "--n-layer", "3", "--out", tmp_path / "a").startswith("train: --n-layer is 3 but")
    assert gptfast("train", *start, "--block-size", "8", "--out", tmp_path / "b") == 0
    assert f"--block-size 8: the first of the 16 positions of {run / 'best'}" in capsys.readouterr().out


def test_the_folder_of_a_run_is_no_checkpoint(run, text, tmp_path, failure):
    for command in (
        ["generate", "--prompt", "a", "--model", run],
        ["info", run],
        ["train", "--data", text, "--init-from", run],
    ):
        out = ["--out", tmp_path / "x"] if command[0] == "train" else []
        said = failure(*command, *out)
        assert f"{run} is the folder of a training run; name one of its checkpoints: {run / 'best'}" in said
        assert f"{run / 'last'} (the newest)" in said
    shutil.rmtree(run / "best")
    said = failure("generate", "--model", run / "best", "--prompt", "a")
    assert f"{run / 'best'} does not exist, as the run has not been evaluated yet; there is {run / 'last'}" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dropout", "1.5"], "--dropout is 1.5; expected a probability in [0, 1]"),
        (["--n-layer", "0"], "--n-layer is 0; expected at least 1"),
        (["--n-embd", "15"], "--n-embd is 15 but --n-head is 2; --n-embd must be a multiple of --n-head - try --n-embd 14 or 16"),
        (["--learning-rate", "-1"], "--learning-rate is -1.0; expected a number > 0, such as 1e-3"),
        (["--min-lr", "1"], "--min-lr is 1.0 but --learning-rate is 0.002; expected --min-lr <= --learning-rate - lower one or"),
        (["--seed", "-1"], "--seed is -1; expected at least 0"),
        (["--dtype", "float8"], "--dtype is 'float8'; expected one of auto, float32, bfloat16"),
        (["--device", "tpu"], "--device is 'tpu'; expected 'auto', 'cpu' or 'cuda'"),
        (["--optimizer", "sgd"], "--optimizer is 'sgd'; expected one of adamw, muon, lion"),
        (["--threads", "0"], "train: --threads is 0; expected at least 1"),
        (["--timeout", "0"], "train: --timeout is 0.0; expected a number > 0"),
        (["--resume=first"], "train: --resume is 'first'; expected one of last, auto"),
        (["--preset", "gpt9"], "unknown preset 'gpt9'"),
        (["--vocab-size", "300"], "--vocab-size is 300, but the size of 'char' is given; leave it out"),
        (["--tokenizer", "bpe", "--vocab-size", "5"], "--vocab-size is 5; expected at least 257"),
        (["--block-size", "4000"], "the data has 2511 tokens; expected at least 4001 for --block-size 4000"),
        (["--glob", "*.md"], "--glob is '*.md', but "),
        (["--text-field", "x"], "--text-field is 'x', but "),
    ],
)  # fmt: skip
def test_errors_name_the_options_of_train(text, tmp_path, failure, options, said):
    assert failure("train", "--data", text, *SMALL, "--out", tmp_path / "run", *options).startswith(said)


def test_a_complete_run_names_the_option_to_train_on(run, failure):
    said = failure("train", "--resume", "--out", run)
    assert "this run is complete (2 steps" in said and "raise --max-steps (now 2) or --max-minutes (now None)" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--val-fraction", "2"], "--val-fraction is 2.0; expected 0 < --val-fraction < 1"),
        (["--data", "missing"], "'missing' is neither 'shakespeare' nor an existing file or folder"),
        (["--data", "shakespeare:farce"], "genre is 'farce'"),
    ],
)
def test_errors_name_the_options_of_prepare(text, tmp_path, failure, options, said):
    assert failure("prepare", "--data", text, "--out", tmp_path / "out", *options).startswith(said)


@pytest.mark.parametrize(
    "message",
    [
        "runs/max_steps/x.txt is empty",
        "runs/n_embd: the weights do not fit",
        "'max_steps' is unknown",
        "prompts.jsonl, line 3: temperature is -1",
        "prompts.jsonl, line 3: max_steps is -1",
        "run/config.json: n_layer is 'x'; expected a whole number",
        "the seed is 5",
        "give batch_size(4)",
    ],
)
def test_what_is_no_option_stays(monkeypatch, message):
    monkeypatch.setattr(sys, "argv", ["gptfast", "train"])
    options = {name: f"--{name}" for name in ("max_steps", "n_embd", "temperature", "n_layer", "seed", "batch_size")}
    assert _in_options(message, options) == message


def test_a_folder_with_the_name_of_a_function_stays(tmp_path, monkeypatch):
    def my_run():
        raise ValueError("my_run: the weights do not fit")

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as raised:
        my_run()
    assert _errors._without_owners(str(raised.value), raised.value) == "the weights do not fit"
    Path("my_run").mkdir()
    assert _errors._without_owners(str(raised.value), raised.value) == "my_run: the weights do not fit"
