"""gptfast generate --input: what the file of texts holds, also after kills, and what bad input says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from gptfast import batch
from gptfast.batch import read_jobs, run_jobs
from gptfast.tokenizer import CharTokenizer
from tests.support.command import BLOCK, LETTERS, save_model

LINES = [
    '"ROMEO:"',
    '{"prompt": "to be", "temperature": 0, "max_new_tokens": 9}',
    "",
    '{"prompt": "or not", "num_return_sequences": 3, "seed": 4}',
    '{"prompt": "a b", "num_beams": 3, "num_return_sequences": 2, "temperature": 1, "max_new_tokens": 5}',
    '{"prompt": "so", "stop_strings": ["e", "a"], "logit_bias": {"3": -100}}',
    *(json.dumps({"prompt": letter * 2, "seed": n}) for n, letter in enumerate("abcdefghijklmnop")),
]


@pytest.fixture(scope="module")
def chars(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("chars"), CharTokenizer.train(LETTERS)
    return str(path), save_model(path, tokenizer), tokenizer


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def work(source, chars, **options):
    return read_jobs(source, chars[1], chars[2], {"temperature": 0.8, "seed": 0, **options})


def test_every_line_is_its_single_run_in_the_order_of_the_input(chars, source, tmp_path, run):
    path, model, tokenizer = chars
    output = tmp_path / "new" / "texts.jsonl"
    code, out, err = run("--model", path, "--input", source, "--output", output, "--batch-size", 4)
    assert (code, out) == (0, "") and f"21 texts in {output}, 0 of them from before;" in " ".join(err.split())
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [result["line"] for result in results] == [1, 2, *range(4, 23)]
    for result, job in zip(results, work(source, chars), strict=True):
        rows = model.generate([job.ids], tokenizer=tokenizer, **job.options)
        new = [row[len(job.ids) :] for row in rows]
        assert [c["text"] for c in result["completions"]] == [tokenizer.decode(row) for row in new]
        assert [c["tokens"] for c in result["completions"]] == [len(row) for row in new]
    assert [c["finish_reason"] for c in results[1]["completions"]] == ["length"] and results[0]["prompt"] == "ROMEO:"
    assert results[4]["completions"][0]["finish_reason"] == "stop"
    before = output.stat().st_mtime_ns, output.read_bytes()
    code, _, err = run("--model", path, "--input", source, "--output", output)
    assert code == 0 and "21 of them from before" in " ".join(err.split()) and output.read_bytes() == before[1]


def test_a_job_that_was_cut_off_continues(chars, source, tmp_path, monkeypatch):
    todo, whole, cut = work(source, chars), tmp_path / "whole", tmp_path / "cut"
    run_jobs(todo, whole, *chars[1:])

    class Stop(Exception):
        pass

    def stop_at(lines, tokens):
        if lines == 7 and tokens:
            raise Stop

    with pytest.raises(Stop):
        run_jobs(todo, cut, *chars[1:], batch_size=3, progress=stop_at)
    kept = cut.read_bytes()
    assert len(kept.splitlines()) == 7
    with cut.open("ab") as file:
        file.write(b'{"line": 22, "prompt": "half a li')  # what a power cut may leave
    done, ran = [], batch._run
    monkeypatch.setattr(batch, "_run", lambda todo, *args: ran(done.extend(todo) or todo, *args))
    run_jobs(todo, cut, *chars[1:], batch_size=3)
    assert cut.read_bytes() == whole.read_bytes() and len(done) == len(todo) - 7


def test_lines_hold_no_default_options_and_continue(chars, source, tmp_path, monkeypatch):
    todo, output = work(source, chars, presence_penalty=0.0, num_beams=1), tmp_path / "out.jsonl"
    run_jobs(todo, output, *chars[1:])
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(line["options"].get("presence_penalty") != 0 and line["options"].get("num_beams") != 1 for line in lines)
    assert sum(line["options"].get("temperature") == 0.8 for line in lines) > 5
    by_line = {job.line: job for job in todo}
    older = [{**line, "options": by_line[line["line"]].options} for line in lines]  # with all of them
    before = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in older).encode()
    output.write_bytes(before)
    monkeypatch.setattr(batch, "_run", lambda todo, *args: pytest.fail("nothing is left to do"))
    run_jobs(todo, output, *chars[1:])
    assert output.read_bytes() == before
    with pytest.raises(ValueError, match="is not the result of a line of this input with these options"):
        run_jobs(work(source, chars, presence_penalty=0.5), output, *chars[1:])


@pytest.mark.slow
def test_a_killed_job_continues(chars, tmp_path, run):
    source, output, whole = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    source.write_text("".join(json.dumps({"prompt": "ab", "seed": n, "max_new_tokens": 9}) + "\n" for n in range(200)))
    args = ["generate", "--model", chars[0], "--input", str(source), "--output", str(output), "--batch-size", "2"]
    code = "import sys; from gptfast.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *args], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not output.exists() or output.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = output.read_bytes()
    assert kept.endswith(b"\n") and 5 <= kept.count(b"\n") < 200
    assert run(*args[1:])[0] == 0
    assert run("--model", chars[0], "--input", source, "--output", whole, "--batch-size", 20)[0] == 0
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (
            "{",
            r"line 2: not JSON \(Expecting property name .* at column 2\); expected a value such as \"To be\" in quotes",
        ),
        ("3", 'line 2: expected a JSON string, or an object with a "prompt"'),
        ("{}", 'line 2: expected a JSON string, or an object with a "prompt"'),
        ('{"prompt": ""}', 'line 2: expected a JSON string, or an object with a "prompt"'),
        ('{"prompt": "a", "temperatur": 1}', "line 2: generate: unknown option 'temperatur'"),  # codespell:ignore
        ('{"prompt": "a", "temperature": -1}', "line 2: generate: temperature is -1"),
        ('{"prompt": "a", "top_k": "3"}', "line 2: generate: top_k is '3'; expected an int"),
        ('{"prompt": "€"}', "line 2: .*'€' .* is not among the"),
        ('{"prompt": "a", "max_new_tokens": 40}', "line 2: generate: prompt has 1 tokens and max_new_tokens is 40"),
        (json.dumps("a" * BLOCK), "line 2: generate: prompt has 40 tokens"),
        ('{"prompt": [1, 2]}', 'line 2: expected a JSON string, or an object with a "prompt"'),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "line 2: logit_bias holds 'x'; expected token ids as keys"),
        ('{"prompt": "a", "logit_bias": {"99": 1}}', "line 2: generate: logit_bias holds token 99"),
        ('{"prompt": "a", "eos_token_id": 99}', "line 2: generate: eos_token_id is 99"),
        ('{"prompt": "a\\ud800"}', r"line 2: the prompt has '\\ud800' at character 1, half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_before_any_work(chars, tmp_path, run, line, match):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f'"a"\n{line}\n{line}\n', encoding="utf-8")
    code, out, err = run("--model", chars[0], "--input", source, "--output", output)
    assert (code, out) == (1, "") and "(and 1 more bad lines)" in err and not output.exists()
    with pytest.raises(ValueError, match=match):
        work(source, chars)


def test_a_pipe_is_refused_before_any_work(chars, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"cannot write .*pipe: it is a device or a pipe"):
        run_jobs([], tmp_path / "pipe", *chars[1:])


def test_no_prompts_are_an_error(chars, tmp_path):
    (tmp_path / "x").write_text("\n \n")
    with pytest.raises(ValueError, match=r'x has no prompts; expected lines such as {"prompt": "Once"}'):
        work(tmp_path / "x", chars)


def test_lines_have_their_own_default_of_the_temperature(chars, tmp_path, run):
    """The command line's 0.8 is for lines that draw; one with beams needs not say that it does not."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{}, {"num_beams": 3}, {"num_beams": 3, "do_sample": True}, {"temperature": 0.3}]
    source.write_text("".join(json.dumps({"prompt": "ab", "max_new_tokens": 4, **row}) + "\n" for row in rows))
    assert run("--model", chars[0], "--input", source, "--output", output)[0] == 0
    told = [json.loads(line)["options"].get("temperature") for line in output.read_text().splitlines()]
    assert told == [0.8, None, 0.8, 0.3]
    code, _, err = run("--model", chars[0], "--input", source, "--output", output, "--temperature", "0.9")
    assert code == 1 and "line 2: generate: num_beams=3 with temperature=0.9" in " ".join(err.split())


@pytest.mark.parametrize("cut", [b"", b"{", b'{"line": 1, "prompt": "RO', b'{"line": 1}'])
def test_what_a_crash_left_of_the_first_line_is_dropped(chars, source, tmp_path, cut):
    output = tmp_path / "out.jsonl"
    output.write_bytes(cut)
    run_jobs(work(source, chars)[:2], output, *chars[1:])
    assert [json.loads(line)["line"] for line in output.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("other", ["input", "options", "file", "file without an end", "one line", "itself"])
def test_the_output_of_another_job_is_left_alone(chars, source, tmp_path, other):
    output = tmp_path / "out.jsonl"
    run_jobs(work(source, chars)[:3], output, *chars[1:])
    before = output.read_bytes()
    if other == "input":
        source.write_text('"something else"\n')
    elif other != "options":
        files = {"file": b"a diary\n", "file without an end": b"a diary\nthat goes on", "one line": b"a diary"}
        output.write_bytes(before := files.get(other, source.read_bytes().removesuffix(b"\n")))
    todo = work(source, chars, repetition_penalty=1.5 if other == "options" else 1.0)
    with pytest.raises(
        ValueError, match=r"out.jsonl, line 1 is not the result of a line of this input with these options"
    ):
        run_jobs(todo, output, *chars[1:])
    assert output.read_bytes() == before


def test_a_text_that_fails_is_reported_and_the_others_are_written(chars, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    V = chars[1].config.vocab_size
    banned = json.dumps({"prompt": "a", "logit_bias": {str(n): -1e39 for n in range(V)}})
    source.write_text(f'"a"\n{banned}\n"b"\n')
    run_jobs(work(source, chars), output, *chars[1:])
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [len(r["completions"]) for r in results] == [1, 0, 1] and "no token is left" in results[1]["error"]


def test_a_full_disk_leaves_whole_lines(chars, source, tmp_path, monkeypatch):
    output, write, calls = tmp_path / "out.jsonl", os.write, []

    def short(file, data):
        calls.append(1)
        return write(file, data) if len(calls) < 4 else write(file, data[:10])

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(OSError, match=r"out.jsonl: only a part of a line was taken; free some disk space"):
        run_jobs(work(source, chars), output, *chars[1:])
    assert output.read_bytes().count(b"\n") == 3 and output.read_bytes().endswith(b"\n")


def test_a_line_may_bound_prompt_and_new_tokens_together(chars, tmp_path):
    source, output = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    source.write_text('{"prompt": "ROM", "max_length": 9}\n{"prompt": "ROM", "max_length": 9, "max_new_tokens": 2}\n')
    run_jobs(work(source, chars), output, *chars[1:])
    assert [json.loads(line)["completions"][0]["tokens"] for line in output.read_text().splitlines()] == [6, 2]
    source.write_text('{"prompt": "ROM", "max_length": 3}\n')
    with pytest.raises(ValueError, match="line 1: generate: max_length is 3 and the longest prompt has 3 tokens"):
        work(source, chars)
