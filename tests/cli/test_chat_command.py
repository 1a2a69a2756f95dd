"""gptfast chat: replies, commands, Ctrl-C, a conversation that outgrows the context, input from a pipe and a terminal."""

from __future__ import annotations

import functools
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from gptfast import GPT
from gptfast.backend import has_cpu_ops
from gptfast.cli import _dialogue, main
from gptfast.cli._dialogue import Dialogue
from gptfast.finetuning import LoraConfig
from gptfast.finetuning.example_files import read_examples
from gptfast.serving.text import ChoiceText
from gptfast.tokenizer.conversation import ChatFormat
from tests.finetuning.models import gpt
from tests.support.chat_templates import tokenizer_with


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with a template, and the same without: folders by name."""
    found = {}
    for name in ("chatml", ""):
        found[name] = tmp_path_factory.mktemp("chat") / "model"
        tokenizer = tokenizer_with(name)
        gpt(tokenizer.vocab_size, block_size=96).save_pretrained(found[name])
        tokenizer.save(found[name])
    return found


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command on lines of standard input; returns (exit code, stdout, stderr)."""

    def run(*args, lines=()):
        text = "".join(line + "\n" for line in lines)
        monkeypatch.setattr(sys, "argv", ["gptfast", "chat", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capsys.readouterr()

    return run


def reply(folder, messages, model=None, **options):
    """What `generate` writes."""
    from gptfast.tokenizer import load_tokenizer

    tokenizer, model = load_tokenizer(folder), model or GPT.from_pretrained(folder)
    used = ChatFormat.of(tokenizer)
    ids, ends = used.prompt(messages), [tokenizer.eos_id, *used.end_ids]
    options = {"temperature": 0.8, "seed": 0, "stop_strings": used.stops or None, "tokenizer": tokenizer, **options}
    [row] = model.generate([ids], eos_token_id=ends, **options)
    text = ChoiceText(tokenizer, used.stops, ends, flush=used.template is None)
    return "".join(text.push(token) for token in row[len(ids) :]) + text.finish()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("name", ["chatml", ""])
def test_lines_from_a_pipe_are_a_conversation(folders, run, name):
    messages = [{"role": "system", "content": "you are a cat"}, user("the dog")]
    first = reply(folders[name], messages, max_new_tokens=9)
    second = reply(folders[name], [*messages, assistant(first), user("and the log")], max_new_tokens=9)
    options = ["--system", "you are a cat", "--max-new-tokens", 9]
    code, out, err = run("--model", folders[name], *options, lines=["the dog", "", "and the log"])
    assert (code, out) == (0, f"{first}\n{second}\n"), err
    assert ("no chat template: the conversation is a plain transcript" in err) == (name == "")


def test_commands(folders, run, tmp_path):
    first, hello = reply(folders["chatml"], [user("hello")], max_new_tokens=8), [user("hello")]
    another = reply(folders["chatml"], hello, max_new_tokens=8, seed=1)
    later = reply(folders["chatml"], [user("now")], max_new_tokens=8, seed=1)
    saved = tmp_path / "talk.jsonl"
    lines = [
        "/regenerate",
        "hello",
        "/regenerate",
        f"/save {saved}",
        f"/save {saved}",
        "/save",
        "/what",
        "/help",
        "/reset",
        "now",
    ]
    lines += ["/exit", "never read"]
    code, out, err = run("--model", folders["chatml"], "--max-new-tokens", 8, lines=lines)
    assert (code, out) == (0, f"{first}\n{another}\n{later}\n")
    assert first != another
    for said in (
        "there is no reply yet",
        f"(2 messages in {saved})",
        "/save needs the name of a file",
        "/what is no command",
    ):
        assert said in err
    assert "/regenerate   another reply" in err and "(a new conversation)" in err
    assert json.loads(saved.read_text()) == {"messages": [user("hello"), assistant(another)]}
    assert read_examples(saved, "chat").records[0]["messages"][1]["content"] == another
    code, _, err = run(
        "--model", folders["chatml"], "--max-new-tokens", 8, lines=["hello", f"/save {saved}", "/save /no/such/x"]
    )
    assert code == 0 and f"error: {saved} exists; name another file" in err and "/no/such" in err
    assert json.loads(saved.read_text())["messages"][1]["content"] == another


def test_the_oldest_messages_are_left_out_with_a_notice(folders, run):
    lines = [f"the cat sat on the mat {n}" for n in range(7)]
    code, out, err = run("--model", folders["chatml"], "--max-new-tokens", 10, "--system", "a cat", lines=lines)
    assert code == 0 and out.count("\n") >= 7, err
    assert "(the context is full: the oldest 2 messages of the conversation are left out)" in err
    code, _, err = run("--model", folders["chatml"], "--max-new-tokens", 10, lines=["the cat " * 60])
    assert code == 1 and "the context has room for 86 tokens before a reply, and the last message needs" in err


def test_a_length_beside_which_nothing_has_room(folders, run):
    code, out, err = run("--model", folders["chatml"], "--max-new-tokens", 96, lines=["hi"])
    assert (code, out) == (1, "") and "--max-new-tokens is 96; the context of this model is 96 tokens" in err


def test_ctrl_c_stops_the_reply_and_keeps_what_was_said(folders, run, monkeypatch):
    plain = _dialogue.stream

    def interrupted(*args, **options):
        for n, step in enumerate(plain(*args, **options)):
            if n == 5 and options["max_new_tokens"] == 20:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(_dialogue, "stream", interrupted)
    seen = []
    fit = Dialogue.fit

    def watched(self):
        seen.append([dict(message) for message in self.messages])
        return fit(self)

    monkeypatch.setattr(Dialogue, "fit", watched)
    code, out, err = run("--model", folders["chatml"], "--max-new-tokens", 20, lines=["the cat", "and"])
    assert code == 0 and err.count("(stopped)") == 2
    whole = reply(folders["chatml"], [user("the cat")], max_new_tokens=20)
    said = out.split("\n")[0]
    assert said and whole.startswith(said) and len(said) < len(whole)
    assert seen[1] == [user("the cat"), assistant(said), user("and")]


@pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
def test_adapters_and_formats_are_those_of_generate(folders, run, tmp_path):
    model = GPT.from_pretrained(folders["chatml"])
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False))
    model.save_adapter(tmp_path / "adapter")
    wanted = reply(folders["chatml"], [user("the cat")], model.compile_for_inference("int8"), max_new_tokens=10)
    options = ["--max-new-tokens", 10, "--quantize", "int8", "--adapter", tmp_path / "adapter"]
    code, out, err = run("--model", folders["chatml"], *options, lines=["the cat"])
    assert (code, out) == (0, wanted + "\n"), err
    assert wanted != reply(folders["chatml"], [user("the cat")], max_new_tokens=10)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--temperature", "-1"], "--temperature is -1.0; expected a number >= 0"),
        (["--model", "nowhere"], "nowhere"),
        (
            ["--model", "nowhere", "--reasoning-effort", "most"],
            "--reasoning-effort is 'most'; expected one of low, medium",
        ),
        (
            ["--reasoning-effort", "low"],
            "--reasoning-effort: the chat template of this model does not read it; leave it",
        ),
        (["--stop", ""], "--stop holds ''; expected texts of at least one character"),
    ],
)
def test_what_is_wrong_is_one_line(folders, run, options, text):
    code, out, err = run("--model", folders["chatml"], *options, lines=["hello"])
    assert (code, out) == (1, "") and text in err and "Traceback" not in err


def test_a_model_without_a_tokenizer(run, tmp_path):
    """There is nothing that could turn words into its tokens."""
    gpt(64, block_size=96).save_pretrained(tmp_path)
    code, out, err = run("--model", tmp_path, lines=["hello"])
    assert (code, out) == (1, "") and "tokenizer" in err and str(tmp_path) in err and "Traceback" not in err


def test_bytes_that_are_no_text(folders, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gptfast", "chat", "--model", str(folders[""])])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(SystemExit):
        main()
    assert "standard input is not UTF-8" in capsys.readouterr().err


def test_control_characters_do_not_reach_a_terminal(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert _dialogue._shown("a\x1b[2Jé\n\t\x07") == "a\N{REPLACEMENT CHARACTER}[2Jé\n\t\N{REPLACEMENT CHARACTER}"


@pytest.mark.slow
def test_a_terminal(folders):
    """A real process on a real terminal: prompts, Ctrl-C at the prompt, a reply, a command, Ctrl-D."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gptfast", "chat", "--model", folders["chatml"], "--system", "a cat"]
    awake = functools.partial(
        signal.signal, signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it
    child = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=awake
    )
    os.close(theirs)
    shown = ""

    def wait_for(text, since=0, repeat=lambda: None):
        nonlocal shown
        end = time.monotonic() + 60
        while text not in shown[since:]:
            assert time.monotonic() < end and child.poll() is None, shown
            if select.select([ours], [], [], 0.5)[0]:
                shown += os.read(ours, 4096).decode(errors="replace")
            else:
                repeat()

    try:
        wait_for("> ")
        # Python sees a Ctrl-C between the prompt and the first wait for a key only after the next key.
        wait_for("(/exit or Ctrl-D ends)", repeat=lambda: os.kill(child.pid, signal.SIGINT))
        at = len(shown)
        os.write(ours, b"the cat\n")
        wait_for("\n> ", at)
        at = len(shown)
        os.write(ours, b"/reset\n")
        wait_for("(a new conversation)", at)
        wait_for("\n> ", shown.index("(a new conversation)", at))  # before it the terminal is not yet set to read keys
        os.write(ours, b"\x04")
        assert child.wait(30) == 0
    finally:
        child.kill()
        os.close(ours)
