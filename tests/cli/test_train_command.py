"""gptfast train from the command line: runs, resumes, Ctrl-C, and errors that users can fix."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptfast.models import GPT
from gptfast.ops import gemm
from gptfast.tokenizer import load_tokenizer
from gptfast.training import read_checkpoint
from gptfast.training.log import read_log
from tests.support.train_command import SHAPE, SMALL, TEXT, gptfast, run


def failure(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The error message of a command that must fail, one line without a traceback."""
    assert gptfast(*arguments) == 1
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert not any("Traceback" in line for line in rest)
    return first


def test_train_prints_what_it_does_and_where_things_are(tmp_path, text, capsys):
    out = tmp_path / "run"
    assert run(text, out) == 0
    printed = capsys.readouterr().out
    prepared = json.loads((out / "data" / "data.json").read_text())
    parameters = GPT.from_pretrained(out / "best").num_parameters()
    assert f"model    {parameters / 1e6:.2f}M parameters: 2 layers, 2 heads, 16 channels, block size 16" in printed
    assert f"data     {prepared['train']['tokens']:,} tokens to train on, {prepared['val']['tokens']:,} for" in printed
    assert "char tokenizer" in printed
    assert "1 threads" in printed
    assert "12 steps, 64 tokens a step" in printed
    losses = {r["step"]: r["val_loss"] for r in read_log(out / "log.jsonl") if "val_loss" in r}
    best = min(losses, key=losses.__getitem__)
    assert f"best validation loss {losses[best]:.4f} nats per character at step {best} (over 128 held-out" in printed
    assert re.search(rf"step 12/12  loss \d\.\d{{4}}  val {losses[12]:.4f}", printed)
    for name in ("best", "last", "loss.png", "log.jsonl"):
        assert (out / name).exists()
        assert str(out / name) in printed
    assert f"gptfast generate --model {out / 'best'}" in printed


def test_resume_continues_bit_for_bit_from_the_stored_options(tmp_path, text, capsys):
    more = ["--dropout", "0.2", "--lr-decay-steps", "12", "--seed", "5"]
    assert run(text, tmp_path / "whole", *more) == 0
    assert run(text, tmp_path / "parts", *more, "--max-steps", "6") == 0
    torch.manual_seed(99)  # nothing may depend on torch's own generator
    assert gptfast("train", "--resume", "--out", tmp_path / "parts", "--max-steps", "12") == 0
    assert "resume   from step 6" in capsys.readouterr().out
    for name in ("model", "optimizer"):
        whole, parts = (load_file(tmp_path / r / "last" / f"{name}.safetensors") for r in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole | parts)
    records = [read_log(tmp_path / r / "log.jsonl") for r in ("whole", "parts")]
    assert [[r.get("loss"), r.get("val_loss")] for r in records[0]] == [
        [r.get("loss"), r.get("val_loss")] for r in records[1]
    ]


def test_a_schedule_that_resume_changes_is_reported(tmp_path, text, capsys):
    assert run(text, tmp_path / "run", "--max-steps", "6") == 0
    assert gptfast("train", "--resume", "--out", tmp_path / "run", "--max-steps", "9") == 0
    assert "the learning rate now falls until step 9 instead of 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("forced", "more", "said"),
    [
        ("own", [], None),
        ("own", ["--threads", "2"], None),  # on which no bit depends
        ("torch", ["--dtype", "bfloat16"], "--dtype and GPTFAST_GEMM changed"),
        ("torch", ["--threads", "2"], "GPTFAST_GEMM and --threads changed"),
    ],
)
def test_arithmetic_that_resume_changes_is_reported(tmp_path, text, capsys, monkeypatch, forced, more, said):
    monkeypatch.setattr(gemm, "_FORCED", "own")
    assert run(text, tmp_path / "run", "--max-steps", "6") == 0
    monkeypatch.setattr(gemm, "_FORCED", forced)
    assert gptfast("train", "--resume", "--out", tmp_path / "run", "--max-steps", "9", *more) == 0
    printed = capsys.readouterr().out
    assert ("no longer bit for bit" in printed) == (said is not None)
    assert said is None or said in printed


def test_init_from_starts_anew_from_the_weights_and_tokenizer_of_a_checkpoint(tmp_path, text, capsys):
    assert run(text, tmp_path / "first") == 0
    best = tmp_path / "first" / "best"
    capsys.readouterr()
    options = ["--max-steps", "1", "--learning-rate", "1e-9", "--block-size", "8", "--threads", "1"]
    assert gptfast("train", "--data", text, "--init-from", best, *options, "--out", tmp_path / "second") == 0
    model, old = GPT.from_pretrained(tmp_path / "second" / "last"), GPT.from_pretrained(best)
    assert (model.config.block_size, model.config.resid_pdrop) == (8, 0.1)
    torch.testing.assert_close(model.wte.weight, old.wte.weight, atol=1e-6, rtol=0)
    assert load_tokenizer(tmp_path / "second" / "last").encode("me") == load_tokenizer(best).encode("me")


def test_preset_gives_the_shape_and_options_change_it(tmp_path, text, capsys):
    changes = [*SHAPE, "--n-embd", "8", "--tokenizer", "char", "--max-steps", "1", "--threads", "1"]
    assert gptfast("train", "--data", text, "--preset", "gpt1", *changes, "--out", tmp_path / "run") == 0
    config = GPT.from_pretrained(tmp_path / "run" / "last").config
    assert (config.norm_position, config.n_embd, config.block_size) == ("post", 8, 16)
    assert read_checkpoint(tmp_path / "run" / "last").config.batch_size == 8


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_saves_and_prints_how_to_continue(tmp_path, text, sent, code, capsys):
    out, options = tmp_path / "run", ["--max-steps", "2000", "--lr-decay-steps", "50", "--eval-every", "2000"]
    command = [sys.executable, "-m", "gptfast", "train", "--data", text, *SMALL, "--log-every", "1", *options]
    with subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        log, deadline = out / "log.jsonl", time.monotonic() + 60
        while not (log.exists() and log.read_text().count("\n") > 5) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(sent)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    step = read_checkpoint(out / "last").state.step
    assert f"interrupted at step {step}; saved. Continue with: gptfast train --resume --out {out}" in printed
    assert [r["step"] for r in read_log(log)] == list(range(1, step + 1))
    last = str(step + 5)
    assert gptfast("train", "--resume", "--out", out, "--max-steps", last) == 0
    whole = ["--data", text, *SMALL, "--log-every", "1", *options, "--max-steps", last, "--out", tmp_path / "whole"]
    assert gptfast("train", *whole) == 0
    resumed, uninterrupted = (load_file(folder / "last" / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(resumed[key], uninterrupted[key]) for key in resumed | uninterrupted)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "neither 'shakespeare' nor an existing file or folder"),
        (b"", "is empty"),
        (b"ab\0cd" * 100, "is binary, not text"),
        (b"caf\xe9 " * 100, "is not UTF-8"),
        (b"too short", "--block-size"),
    ],
)
def test_bad_text_is_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "some.txt"
    if content is not None:
        path.write_bytes(content)
    assert message in failure(capsys, "train", "--data", path, *SMALL, "--out", tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n-embd", "15"], "--n-embd is 15 but --n-head is 2"),
        (["--preset", "gpt9"], "unknown preset 'gpt9'"),
        (["--preset", "gpt2", "--init-from", "x"], "--preset and --init-from were both given"),
        (["--init-from", "no/such/folder"], "no/such/folder"),
        (["--dtype", "float8"], "dtype is 'float8'"),
        (["--threads", "0"], "threads is 0; expected at least 1"),
        (["--learning-rate", "-1"], "--learning-rate is -1.0"),
        (["--max-minutes", "0"], "--max-minutes is 0.0"),
        (["--tokenizer", "morse"], "morse"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--resume"], "no training run to resume"),
    ],
)
def test_bad_options_are_one_line(tmp_path, text, capsys, options, message):
    assert message in failure(capsys, "train", "--data", text, *SMALL, "--out", tmp_path / "run", *options)


@pytest.fixture
def short_run(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> Path:
    assert run(text, tmp_path / "run", "--max-steps", "3") == 0
    capsys.readouterr()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "already has a training run; continue it with --resume, replace it with --overwrite"),
        (["--resume"], "this run is complete (3 steps"),
        (["--resume", "--max-steps", "9", "--n-embd", "32"], "--n-embd is 32 but the run in"),
        (["--resume", "--max-steps", "9", "--seed", "7"], "seed is 7 but the run in"),
        (["--resume", "--max-steps", "9", "--tokenizer", "word"], "tokenizer is word but the run in"),
    ],
)
def test_a_run_refuses_what_it_cannot_become(short_run, text, capsys, options, message):
    assert message in failure(capsys, "train", "--data", text, "--out", short_run, *options)


def test_resume_notices_other_data(tmp_path, capsys):
    text, out = tmp_path / "dagger.txt", tmp_path / "run"
    text.write_text(TEXT)
    assert run(str(text), out, "--max-steps", "3") == 0
    kept = (out / "data" / "train.bin").read_bytes()
    text.write_text(TEXT.replace("dagger", "bodkin"))
    assert "the data is not what" in failure(capsys, "train", "--resume", "--max-steps", "9", "--out", out)
    assert "already has a training run" in failure(capsys, "train", "--data", text, "--out", out)
    assert (out / "data" / "train.bin").read_bytes() == kept, "the tokens that the run was trained on"
    assert gptfast("train", "--resume", "--max-steps", "4", "--out", out, "--data", out / "data") == 0


def test_resume_finds_a_text_that_was_moved_and_the_tokens_of_one_that_is_gone(tmp_path, capsys):
    text, out = tmp_path / "dagger.txt", tmp_path / "run"
    text.write_text(TEXT)
    assert run(str(text), out, "--max-steps", "3") == 0
    text = text.rename(tmp_path / "moved.txt")
    assert gptfast("train", "--resume", "--max-steps", "4", "--out", out, "--data", text) == 0
    text.unlink()
    capsys.readouterr()
    assert gptfast("train", "--resume", "--max-steps", "5", "--out", out) == 0
    assert "dagger.txt is no longer there; its tokens are in" in capsys.readouterr().out.replace("\n", " ")
    shutil.rmtree(out / "data")
    assert "dagger.txt' is neither" in failure(capsys, "train", "--resume", "--max-steps", "6", "--out", out)


def test_init_from_refuses_a_tokenizer_of_another_vocabulary(short_run, text, tmp_path, capsys):
    options = ["--init-from", short_run / "best", "--tokenizer", "gpt2", "--out", tmp_path / "second"]
    assert "--tokenizer gpt2 has other ids than" in failure(capsys, "train", "--data", text, *options)


def test_a_truncated_model_is_one_line_and_best_still_resumes_nothing(short_run, capsys):
    path = short_run / "last" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "model.safetensors" in failure(capsys, "train", "--resume", "--max-steps", "9", "--out", short_run)


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_the_end_of_a_document_is_in_the_config(text, tmp_path, kind):
    more = ["--vocab-size", "300"] if kind == "bpe" else []
    assert run(text, tmp_path / "run", "--tokenizer", kind, *more) == 0
    config = json.loads((tmp_path / "run/last/config.json").read_text())
    eos = load_tokenizer(tmp_path / "run/last").eos_id
    assert (eos is None) == (kind == "char")
    assert config["eos_token_id"] == config["bos_token_id"] == eos
    assert GPT.from_pretrained(tmp_path / "run/last").metadata.end_tokens(10**6) == (() if eos is None else (eos,))


def test_unknown_characters(text, tmp_path, capsys):
    """Reported with the remedies; and with --unk taken."""
    assert run(text, tmp_path / "run") == 0
    write = ["generate", "--model", tmp_path / "run/last", "--max-new-tokens", "2", "--prompt"]
    told = failure(capsys, *write, "dagger \u041f")
    assert "'\u041f' (U+041F) at position 7" in told and "--unk" in told and "--tokenizer bpe" in told
    assert run(text, tmp_path / "unk", "--unk") == 0
    assert load_tokenizer(tmp_path / "unk/last").encode("I\u041f")[1] == load_tokenizer(tmp_path / "unk/last").unk_id
    write[2] = tmp_path / "unk/last"
    assert gptfast(*write, "dagger \u041f") == 0
    assert run(text, tmp_path / "unk", "--resume", "--max-steps", "13") == 0
    capsys.readouterr()
    assert "unk is for 'char'" in failure(
        capsys, *("train", "--data", text, "--tokenizer", "bpe", "--unk", "--out", tmp_path / "b")
    )
    assert gptfast("prepare", "--data", text, "--tokenizer", "char", "--unk", "--out", tmp_path / "data") == 0
    assert load_tokenizer(tmp_path / "data").unk_id is not None
    capsys.readouterr()
    assert "leave unk out" in failure(capsys, *("train", "--data", tmp_path / "data", "--unk", "--out", tmp_path / "b"))
