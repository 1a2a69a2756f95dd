"""Batch files: a file of prompts, one JSON value a line, to a file of texts. A run that was killed can be resumed.

Each result is one line, written by one system call when its text is complete. A line that a crash of the machine cut short
is dropped on resuming. At the end the file is put into the order of the input.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gptfast._files import atomic_write, check_target, read_bytes, read_text
from gptfast.generation import LanguageModel, Request, Scheduler, generate
from gptfast.generation.config import TEXT_TOKENS, GenerationConfig
from gptfast.generation.prompts import check_prompt
from gptfast.metadata import metadata_of, without_greedy
from gptfast.tokenizer import Tokenizer, encode_prompt, lenient

BEGINNING = b'{"line": '  # first bytes of each line of an output
STEPS_PER_CALL = 16  # tokens of a sequence per call of the runner when no job is waiting
STEPS_WHILE_WAITING = 4  # fewer, so that a sequence that ends is soon replaced


@dataclass(frozen=True)
class Job:
    """A line of the input.

    Args:
        line: its number, from 1.
        prompt: the text.
        ids: the tokens of the text.
        options: generation options, as given.
        config: the same options, checked.
    """

    line: int
    prompt: str
    ids: list[int]
    options: dict[str, Any]
    config: GenerationConfig


def read_jobs(
    path: str | os.PathLike[str],
    model: LanguageModel,
    tokenizer: Tokenizer,
    options: dict[str, Any],
    drawing: Mapping[str, Any] | None = None,
    special_tokens: bool = True,
) -> list[Job]:
    """Read the jobs in a file: each line is a JSON string (the prompt), or an object with "prompt" and options.

    Args:
        path: a UTF-8 file; empty lines are skipped.
        model, tokenizer: used to check the prompts.
        options: default fields of `GenerationConfig`.
        drawing: more defaults, for lines that sample (no beams, or beams with do_sample).
        special_tokens: whether special tokens in prompts are recognised, see `gptfast.tokenizer.encode_prompt`.
    Raises:
        ValueError: a bad line; the message names the line, the fault, and the number of other bad lines.
    """
    jobs, errors = [], []
    for number, text in enumerate(read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            jobs.append(_read_job(number, text, model, tokenizer, options, drawing or {}, special_tokens))
        except (ValueError, TypeError) as error:
            errors.append(f"{path}, line {number}: {error}")
    if errors:
        more = f" (and {len(errors) - 1} more bad lines)" if len(errors) > 1 else ""
        raise ValueError(errors[0] + more)
    if not jobs:
        raise ValueError(f'{path} has no prompts; expected lines such as {{"prompt": "Once"}}')
    return jobs


def _read_job(
    number: int,
    text: str,
    model: LanguageModel,
    tokenizer: Tokenizer,
    options: dict[str, Any],
    drawing: Mapping[str, Any],
    special_tokens: bool,
) -> Job:
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply; expected a prompt, or an object with options") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f'not JSON ({error.msg} at column {error.colno}); expected a value such as "To be" in quotes, or {{"prompt": …}}'
        ) from None
    value = {"prompt": value} if isinstance(value, str) else value
    prompt = value.pop("prompt", None) if isinstance(value, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ValueError('expected a JSON string, or an object with a "prompt" of at least one character')
    _check_characters(prompt)
    ids = encode_prompt(tokenizer, prompt, special_tokens)
    options = {**options, **value}
    if isinstance(options.get("logit_bias"), dict):
        options["logit_bias"] = _token_keys(options["logit_bias"])
    asked = options.get("do_sample")
    if options.get("num_beams", 1) == 1 if asked is None else asked:
        options = {**(without_greedy(drawing) if asked else drawing), **options}
    if options.get("max_length") is None:
        options.setdefault("max_new_tokens", default_new_tokens(model, len(ids), options))
    config = GenerationConfig.of(**options).with_room(len(ids), len(ids), model.config.block_size)
    Request(ids, config, tokenizer)  # checks stop strings
    check_prompt("", ids, model.config.vocab_size, model.config.block_size, config)
    return Job(number, prompt, ids, options, config)


def _check_characters(prompt: str) -> None:
    """Refuse half of a surrogate pair, which JSON can express and UTF-8 cannot."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        half = prompt[error.start]
        raise ValueError(f"the prompt has {half!r} at character {error.start}, half of a surrogate pair") from None


def _token_keys(bias: dict[str, Any]) -> dict[int, Any]:
    """logit_bias with int keys; JSON has only strings as keys."""
    for token in bias:
        if not (token.isascii() and token.isdigit()):
            raise ValueError(f"logit_bias holds {token!r}; expected token ids as keys")
    return {int(token): value for token, value in bias.items()}


def default_new_tokens(model: LanguageModel, length: int, options: dict[str, Any]) -> int:
    """The checkpoint's max_new_tokens, else TEXT_TOKENS, as far as it fits behind a prompt of `length` tokens.

    1 where nothing fits, so that the check of the prompt fails with its message.
    """
    most = metadata_of(model).defaults().get("max_new_tokens", TEXT_TOKENS)
    if options.get("overflow") == "slide":
        return most
    return max(1, min(most, model.config.block_size - length))


def run_jobs(
    jobs: list[Job],
    output: str | os.PathLike[str],
    model: LanguageModel,
    tokenizer: Tokenizer,
    batch_size: int = 16,
    progress: Callable[[int, int], None] = lambda lines, tokens: None,
) -> None:
    """Run the jobs that `output` does not contain yet, and append the line of each when it ends.

    Args:
        jobs: what `read_jobs` returned.
        output: the file; a line is {"line", "prompt", "completions": [{"text", "finish_reason", "tokens"}], "options"}, with
            the options that differ from the default, and with "error" where generation failed.
        model, tokenizer: used to generate, with the weights that the model has now.
        batch_size: maximum number of sequences at a time.
        progress: called with (number of lines in `output`, tokens of the new line): once at the start with 0 tokens, then
            after each line.
    Raises:
        ValueError: `output` has lines of other prompts or options.  OSError: it cannot be written.
    """
    path, tokenizer = Path(output), lenient(tokenizer)
    check_target(path)
    done = _read_done(path, jobs)
    todo = [job for job in jobs if job.line not in done]
    progress(len(done), 0)
    if todo:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _Lines(path) as lines:
            for job, result in _run(todo, model, tokenizer, batch_size):
                done[job.line] = _as_line(job, result)
                lines.append(done[job.line])
                progress(len(done), sum(completion["tokens"] for completion in result["completions"]))
    atomic_write(path, b"".join(done[job.line] for job in jobs))


def _read_done(path: Path, jobs: list[Job]) -> dict[int, bytes]:
    """The complete lines of the output, by number. An incomplete last line, left by a crash, is cut off.

    A file that is not such an output stays as it is.
    """
    if not path.exists() or path.stat().st_size == 0:
        return {}
    *whole, rest = read_bytes(path).split(b"\n")
    cut_short = rest[: len(BEGINNING)] == BEGINNING[: len(rest)]
    by_line, done = {job.line: job for job in jobs}, {}
    for n, line in enumerate(whole or ([] if cut_short else [rest]), start=1):
        try:
            found = json.loads(line)
            job = by_line[found["line"]]
            asked = json.loads(json.dumps(_told(job.options)))
            same = found["prompt"] == job.prompt and _told(dict(found["options"])) == asked
        except (ValueError, KeyError, TypeError, RecursionError):
            same = False
        if not same:
            raise ValueError(
                f"{path}, line {n} is not the result of a line of this input with these options; name another --output, "
                "or remove the file to begin again"
            )
        done[job.line] = line + b"\n"
    if rest:
        os.truncate(path, path.stat().st_size - len(rest))
    return done


def _as_line(job: Job, result: dict[str, Any]) -> bytes:
    whole = {"line": job.line, "prompt": job.prompt, **result, "options": _told(job.options)}
    return json.dumps(whole, ensure_ascii=False).encode("utf-8") + b"\n"


def _told(options: dict[str, Any]) -> dict[str, Any]:
    """The options that differ from their default."""
    defaults = {f.name: f.default for f in fields(GenerationConfig)}
    return {name: value for name, value in options.items() if name not in defaults or value != defaults[name]}


class _Lines:
    """Appends lines to a file, each completely or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _Lines:
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def append(self, line: bytes) -> None:
        before = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(f"cannot write {self._path}: only a part of a line was taken; free some disk space")
        except OSError:
            os.ftruncate(self._file, before)
            raise


def _run(
    jobs: list[Job], model: LanguageModel, tokenizer: Tokenizer, batch_size: int
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Each job with its result, in the order in which they end."""
    runner = model.runner(1, 1)  # the same weights for all jobs
    for job in jobs:
        if job.config.num_beams > 1:
            try:
                texts = generate(runner, [job.ids], tokenizer=tokenizer, **job.options)
            except RuntimeError as error:  # bad logits: the other jobs go on
                yield job, _result(tokenizer, job, [], error)
                continue
            reason = Request(job.ids, job.config, tokenizer).stopping.reason
            new = [text[len(job.ids) :] for text in texts]
            yield job, _result(tokenizer, job, [(tokens, reason(tokens)) for tokens in new])
    todo = deque(job for job in jobs if job.config.num_beams == 1)
    copies = max((job.config.num_return_sequences for job in todo), default=0)
    if not todo:
        return
    scheduler = Scheduler(runner, max_rows=max(batch_size, copies))
    running: dict[Request, Job] = {}
    while todo or running:
        while todo and not scheduler.waiting:
            job = todo.popleft()
            running[scheduler.submit(job.ids, tokenizer=tokenizer, **job.options)] = job
        scheduler.step(STEPS_WHILE_WAITING if scheduler.waiting else STEPS_PER_CALL)
        for request in [request for request in running if request.done]:
            job = running.pop(request)
            yield job, _result(tokenizer, job, [(s.new, s.finish) for s in request.sequences], request.error)


def _result(
    tokenizer: Tokenizer, job: Job, new: list[tuple[list[int], str | None]], error: RuntimeError | None = None
) -> dict[str, Any]:
    """new: the new tokens of each sequence, and why it ended."""
    if error is not None:
        return {"completions": [], "error": str(error)}
    eos = job.config.eos_ids
    return {
        "completions": [
            {
                "text": tokenizer.decode([token for token in tokens if token not in eos]),
                "finish_reason": reason,
                "tokens": len(tokens),
            }
            for tokens, reason in new
        ]
    }
