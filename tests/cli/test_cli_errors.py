"""Errors on the command line: one line each, and a report for a fault of gptfast."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys

import pytest
import torch

from gptfast import cli
from gptfast.cli import _errors
from gptfast.tokenizer import CharTokenizer
from tests.support.command import LETTERS, save_model


@pytest.fixture
def fails(monkeypatch, capsys, tmp_path):
    """What the command prints to standard error when it raises."""
    monkeypatch.setenv("GPTFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GPTFAST_DEBUG", raising=False)
    monkeypatch.setattr(sys, "argv", ["gptfast", "generate", "--api-key", "sesame"])

    def run(raising):
        monkeypatch.setattr(cli, "app", raising)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 1
        said = capsys.readouterr().err
        assert "Traceback" not in said and said.count("\n") == 2
        return said.splitlines()

    return run


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda: None.get("x"), "AttributeError: 'NoneType' object has no attribute 'get'"),
        (lambda: {}["id"], "KeyError: 'id'"),
        (lambda: [*5], "TypeError: Value after * must be an iterable, not int"),
        (lambda: int("x"), "ValueError: invalid literal for int() with base 10: 'x'"),
        (lambda: [][0], "IndexError: list index out of range"),
        (lambda: torch.zeros(2) @ torch.zeros(3), "RuntimeError: "),
        (lambda: 1 // 0, "ZeroDivisionError: "),
    ],
    ids=lambda value: value[:10] if isinstance(value, str) else "",
)
def test_a_fault_of_ours_is_reported(fails, tmp_path, monkeypatch, fault, said):
    monkeypatch.setattr(_errors, "_PACKAGE", _errors.Path(__file__).parent)  # this file is one of gptfast's
    first, second = fails(fault)
    assert first.startswith(f"error: internal error of gptfast, {said}")
    (report,) = (tmp_path / "cache").iterdir()
    assert second == f"(its traceback is in {report}; please report it with that and the output of `gptfast doctor`)"
    text = report.read_text()
    assert "Traceback (most recent call last)" in text and __file__ in text and text.startswith("gptfast 0")
    assert "gptfast generate\n" in text and "sesame" not in text


def test_a_report_goes_where_it_can_be_written(fails, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("no folder")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(_errors.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    assert f"its traceback is in {tmp_path}/temporary/error-" in fails(lambda: {}["id"])[1]
    monkeypatch.setattr(_errors.tempfile, "gettempdir", lambda: str(tmp_path / "cache"))
    assert fails(lambda: {}["id"])[1].startswith("(GPTFAST_DEBUG=1 shows its traceback; please report")


def refuse():
    raise TypeError("GPTConfig: n_layer is None;\n expected an int")


def read_only():
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), "runs")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (refuse, "error: GPTConfig: n_layer is None; expected an int"),
        (lambda: os.stat("/no/such/file"), "error: [Errno 2] No such file or directory: '/no/such/file'; check"),
        (lambda: os.mkdir(__file__), f"error: [Errno 17] File exists: {__file__!r}; a part of the path is a file"),
        (
            read_only,
            "error: [Errno 30] Read-only file system: 'runs'; nothing can be written there; name another place",
        ),
        (lambda: [None] * 2**60, "error: no memory is left (MemoryError); take a smaller batch, a shorter text or a"),
        (lambda: torch.empty(2**55), "error: no memory is left ("),
    ],
)
def test_a_mistake_is_one_line(fails, tmp_path, monkeypatch, fault, said):
    monkeypatch.setattr(_errors, "_PACKAGE", _errors.Path(__file__).parent)
    first, second = fails(fault)
    assert first.startswith(said) and second == "(GPTFAST_DEBUG=1 shows where it was raised)"
    assert not (tmp_path / "cache").exists()


def test_the_debug_variable_shows_tracebacks(monkeypatch):
    monkeypatch.setenv("GPTFAST_DEBUG", "1")
    monkeypatch.setattr(cli, "app", refuse)
    with pytest.raises(TypeError, match="n_layer is None"):
        cli.main()


def test_an_interrupt_is_no_error(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # PYTHONIOENCODING=ascii, the C locale
def test_a_terminal_without_all_characters_gets_the_text(monkeypatch, errors):
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding="ascii", errors=errors, write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(cli, "app", lambda: print("naïve 🤗 text \udcff"))
    cli.main()
    assert written.getvalue() == b"na?ve ? text ?\n"


@pytest.mark.slow
def test_the_command_writes_to_pipes_and_terminals_of_all_kinds(tmp_path):
    save_model(tmp_path, CharTokenizer.train(LETTERS + "é"), 48)
    ask = [sys.executable, "-m", "gptfast", "generate", "--model", str(tmp_path), "--prompt", "né"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*ask, "--max-new-tokens", "20"], env=env, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith(b"n?")
    long = [*ask, "--max-new-tokens", "100000", "--overflow", "slide"]
    with subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()  # as `| head -c 1` does
        assert process.stderr.read() == b""
        assert process.wait(60) == 1
