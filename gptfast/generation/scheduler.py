"""Continuous batching: requests join and leave between the steps of one running batch.

A request's text is what its single run gives: a token depends on its row's logits and on (seed, stream, position), never
on the other rows (see `CachedSequences` for the last bits of logits).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast.generation.config import GenerationConfig
from gptfast.generation.prompts import check_prompt, read_prompt
from gptfast.generation.request import Request, Row, Token
from gptfast.generation.runner import LanguageModel, beside
from gptfast.generation.sampling import FAULTS, Context, choose, sampling_of, takes_logits_as_they_are
from gptfast.generation.speculative import Assistant, Drafter, PromptLookup, check_assistant
from gptfast.generation.stopping import Stopping
from gptfast.generation.textless import choosing_text, likeliest


class Scheduler:
    """Runs requests together, one token of each per step. Not for several threads at once.

    Args:
        model: a `GPT`, which runs in torch, or on a CPU sooner `gptfast.engine.engine_for(model) or model`.
        max_rows: the most sequences at a time.
        max_positions: the most positions that the running requests may come to hold together; None: no bound but
            max_rows rows of max_len.
        max_len: the most positions of a sequence; None: block_size.
        max_prompt_tokens: so many tokens of new prompts are read per step at most (but one prompt at least), so that
            running texts are not kept waiting; None: no bound.
        assistant_model: guesses tokens ahead; see `speculative`.
    Raises:
        TypeError, ValueError: a number out of range, or an assistant of another vocabulary.
    """

    def __init__(
        self,
        model: LanguageModel,
        max_rows: int = 16,
        max_positions: int | None = None,
        max_len: int | None = None,
        max_prompt_tokens: int | None = None,
        assistant_model: LanguageModel | None = None,
    ) -> None:
        _check_count("max_rows", max_rows)
        for name, value in (
            ("max_positions", max_positions),
            ("max_len", max_len),
            ("max_prompt_tokens", max_prompt_tokens),
        ):
            if value is not None:
                _check_count(name, value)
        self.model = model
        self.max_len = model.config.block_size if max_len is None else max_len
        self.max_rows = max_rows
        self.max_positions = max_rows * self.max_len if max_positions is None else max_positions
        self.max_prompt_tokens = max_prompt_tokens
        self._sequences = model.sequences(max_rows, self.max_len)
        self._lookup = PromptLookup()
        self._assistant: Assistant | None = None
        if assistant_model is not None:
            check_assistant(assistant_model, model)
            self._assistant = Assistant(assistant_model, max_rows, self.max_len)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def waiting(self) -> int:
        """How many requests have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many requests have begun and not ended."""
        return len(self._running)

    def submit(
        self, prompt: Any, *, tokenizer: Any = None, logprobs: bool = False, top: int = 0, **options: Any
    ) -> Request:
        """Queue a prompt (a list of ids); it joins as soon as there is room, in the order of submission.

        Args:
            prompt: token ids, in a list, a 1-D tensor or an array.
            tokenizer: for stop strings; ids for which it has no token are not chosen.
            logprobs, top: what `Token`s tell.
            options: fields of `GenerationConfig`, without beams; each request without a seed draws its own.
        Raises:
            TypeError, ValueError: bad options or prompt, or more than this scheduler can ever hold.
        """
        config = GenerationConfig.of(**options)
        check_top("Scheduler", top)
        prompt = read_prompt("", prompt)
        return self.submit_request(Request(prompt, config, Stopping(config, tokenizer), logprobs, top))

    def submit_request(self, request: Request) -> Request:
        """As `submit`, of a request that was made elsewhere."""
        self.check(request)
        tokenizer, config = request.stopping.tokenizer, self._with_room(request).with_seed()
        request.config = choosing_text(config, tokenizer, self.model.config.vocab_size)
        request.stopping = Stopping(config, tokenizer)
        self._waiting.append(request)
        return request

    def check(self, request: Request) -> None:
        """Raise what `submit` raises. This alone may be called from any thread."""
        config = self._with_room(request)
        if config.num_beams > 1:
            raise ValueError(
                "Scheduler: num_beams must be 1; beams are searched together - use gptfast.generation.generate"
            )
        check_prompt("", request.prompt, self.model.config.vocab_size, self.max_len, config)
        positions = self._room(len(request.prompt), config) * config.num_return_sequences
        if config.num_return_sequences > self.max_rows or positions > self.max_positions:
            raise ValueError(
                f"Scheduler: num_return_sequences={config.num_return_sequences} of {len(request.prompt)} + "
                f"{config.max_new_tokens} positions never fit into max_rows={self.max_rows}, "
                f"max_positions={self.max_positions}; ask for less or raise these"
            )

    def cancel(self, request: Request) -> None:
        """End a request at once; its rows are free for others. Nothing happens to one that is done."""
        self._end(request, "cancelled")

    def run(self) -> None:
        """Steps until every request is done."""
        while self._waiting or self._running:
            self.step()

    @torch.inference_mode()
    def step(self, most: int = 1) -> list[Token]:
        """Let requests join, then give every running row its next token, or several, where guesses were right.

        Args:
            most: so many at once, where the model's own threads can make them and nothing has to be looked at between two;
                for whoever cannot use them one by one.
        """
        self._admit()
        rows = [row for request in self._running for row in request.rows if not row.finish]
        if not rows:
            return []
        with beside(self._sequences):
            drafts = self._draft(rows)
            logits, together = self._extend(rows, drafts)
            for request in self._running:
                if len(request.rows) < request.config.num_return_sequences:
                    self._fork(request, rows, drafts, logits)
                    together = None
            made = self._burst(rows, together, most) if together is not None else None
            if made is None:
                made = self._accept(rows, drafts, logits, together)
        for row in rows:
            if row.finish:
                self._free(row)
        self._running = [request for request in self._running if not request.done]
        return made

    def hurry(self) -> None:
        """From any thread: a step that makes several tokens ends with its present one, as there is something to do."""
        self._sequences.interrupt()

    def _reserve(self, request: Request) -> int:
        """Positions that the open rows of a request may come to hold."""
        return self._room(len(request.prompt), request.config) * request.open

    def _room(self, length: int, config: GenerationConfig) -> int:
        """Positions that one row may come to hold."""
        return min(length + config.max_new_tokens, self.max_len)

    def _with_room(self, request: Request) -> GenerationConfig:
        length = len(request.prompt)
        return request.config.with_room(length, length, self.max_len)

    def _admit(self) -> None:
        rows = sum(request.open for request in self._running)
        positions, read = sum(map(self._reserve, self._running)), 0
        while self._waiting:
            request = self._waiting[0]
            rows += request.open
            positions += self._reserve(request)
            if rows > self.max_rows or positions > self.max_positions:
                return
            if read and self.max_prompt_tokens is not None and read + len(request.prompt) > self.max_prompt_tokens:
                return
            read += len(request.prompt)
            self._waiting.popleft()
            request.rows = [Row(request, 0, self._sequences.add()[0], list(request.prompt))]
            self._running.append(request)

    def _fork(self, request: Request, rows: list[Row], drafts: list[list[int]], logits: list[Tensor]) -> None:
        """The prompt has been read: the other return sequences begin as copies of the first."""
        first = request.rows[0]
        indices = self._sequences.add(request.config.num_return_sequences - 1, like=first.index)
        copies = [Row(request, n, i, list(first.tokens), first.start) for n, i in enumerate(indices, start=1)]
        request.rows += copies
        rows += copies
        drafts += [[] for _ in copies]
        logits += [logits[rows.index(first)]] * len(copies)

    def _draft(self, rows: list[Row]) -> list[list[int]]:
        """The guesses for each row; none before its prompt has been read, or where it slides."""
        drafts: list[list[int]] = [[] for _ in rows]
        by_drafter: dict[Drafter, list[int]] = {}
        counts = [0] * len(rows)
        for i, row in enumerate(rows):
            config = row.request.config
            lookup = config.prompt_lookup_num_tokens
            wanted = lookup or (config.num_assistant_tokens if self._assistant else 0)
            counts[i] = min(wanted, config.max_new_tokens - row.made - 1, self.max_len - len(row.tokens))
            if counts[i] > 0 and row.made:
                by_drafter.setdefault(self._lookup if lookup else self._assistant, []).append(i)  # type: ignore[arg-type]
        for drafter, which in by_drafter.items():
            contexts = [_context(rows[i]) for i in which]
            proposed = drafter.propose([rows[i].index for i in which], contexts, [counts[i] for i in which])
            for i, draft in zip(which, proposed, strict=True):
                drafts[i] = draft
        return drafts

    def _extend(self, rows: list[Row], drafts: list[list[int]]) -> tuple[list[Tensor], Tensor | None]:
        """Logits of each row's last token and of its guesses, (1 + guesses, V); all in one, (N, V), if nothing is guessed."""
        lengths = self._sequences.lengths
        inputs = [self._unread(row, lengths[row.index]) + draft for row, draft in zip(rows, drafts, strict=True)]
        if not any(drafts):
            together = self._sequences.extend([row.index for row in rows], inputs)
            assert isinstance(together, Tensor)
            return list(together[:, None]), together
        logits: dict[int, Tensor] = {}
        for last_only in (True, False):
            which = [i for i, draft in enumerate(drafts) if bool(draft) != last_only]
            if which:
                part = self._sequences.extend([rows[i].index for i in which], [inputs[i] for i in which], last_only)
                for i, values in zip(which, part, strict=True):
                    logits[i] = values.view(-1, values.shape[-1])
        return [logits[i] for i in range(len(rows))], None

    def _unread(self, row: Row, length: int) -> list[int]:
        """The tokens behind the first `length`. A row that would outgrow its room forgets and reads again."""
        start = first_visible(len(row.tokens), self.max_len)
        if start != row.start:
            self._sequences.truncate(row.index, 0)
            row.start, length = start, 0
        return row.tokens[start + length :]

    def _accept(
        self, rows: list[Row], drafts: list[list[int]], logits: list[Tensor], together: Tensor | None
    ) -> list[Token]:
        """Choose the next token of every row, and go on with those whose guess it is."""
        made: list[Token] = []
        going, n = list(range(len(rows))), 0
        while going:
            now = torch.stack([logits[i][n] for i in going]) if together is None else together
            contexts = [_context(rows[i]) for i in going]
            chosen = choose(now, contexts, self._sequences)
            details = _details(now, [rows[i].request for i in going], chosen)
            for i, token, (logprob, top) in zip(going, chosen, details, strict=True):
                self._take(rows[i], token, made, logprob, top)
            going = [
                i for i in going if n < len(drafts[i]) and not rows[i].finish and drafts[i][n] == rows[i].tokens[-1]
            ]
            n += 1
        for row, draft in zip(rows, drafts, strict=True):
            if draft and not row.finish:  # the last token has not been read; wrong guesses have
                self._sequences.truncate(row.index, len(row.tokens) - 1)
        return made

    def _take(
        self,
        row: Row,
        token: int | RuntimeError,
        made: list[Token],
        logprob: float | None = None,
        top: Sequence[tuple[int, float]] = (),
    ) -> None:
        """Append a row's next token, if it has not ended (as when another row of its request met an error)."""
        if row.finish:
            return
        if isinstance(token, RuntimeError):
            row.request.error = token
            self._end(row.request, "error")
            return
        row.tokens.append(token)
        made.append(Token(row.request, row.stream, token, logprob, list(top)))
        row.finish = row.request.stopping.reason(row.new)

    def _burst(self, rows: list[Row], logits: Tensor, most: int) -> list[Token] | None:
        """Up to `most` tokens of each row without coming back in between; None where that cannot be, or is but one."""
        if not all(row.made and _may_burst(row.request) for row in rows):  # a first token is told at once
            return None
        steps = min(most, *(row.request.config.max_new_tokens - row.made for row in rows))
        steps = min(steps, *(self.max_len - len(row.tokens) + 1 for row in rows))  # up to a slide
        if steps < 2:
            return None
        samplings = [sampling_of(_context(row)) for row in rows]
        ends = {token for row in rows for token in row.request.config.eos_ids}  # another row's only shorten a burst
        indices = [row.index for row in rows]
        new = self._sequences.decode(indices, logits, steps=steps, more=False, samplings=samplings, ends=list(ends))
        if new is None:
            return None
        made: list[Token] = []
        for n in range(steps):
            for row, tokens in zip(rows, new, strict=True):
                if n < len(tokens):
                    self._take(row, tokens[n] if tokens[n] >= 0 else RuntimeError(FAULTS[tokens[n]]), made)
        return made

    def _end(self, request: Request, finish: str) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
            request.rows = [Row(request, 0, -1, list(request.prompt))]
        for row in request.rows:
            if not row.finish:
                row.finish = finish
                self._free(row)
        self._running = [running for running in self._running if running is not request]

    def _free(self, row: Row) -> None:
        if row.index < 0:
            return
        if self._assistant is not None:
            self._assistant.release(row.index)
        self._sequences.release(row.index)
        row.index = -1


def first_visible(length: int, limit: int) -> int:
    """The first of `length` tokens that a context of `limit` still shows, when it forgets half whenever it is full."""
    half = max(1, limit // 2)
    return max(0, -(-(length - limit) // half)) * half


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"Scheduler: {name} is {value!r}; expected an int of at least 1")


def check_top(what: str, top: Any) -> None:
    if not isinstance(top, int) or top < 0:
        raise ValueError(f"{what}: top is {top!r}; expected an int >= 0 (0 tells none)")


def _context(row: Row) -> Context:
    request = row.request
    return Context(request.config, (request.first_stream + row.stream) % 2**32, row.tokens, len(request.prompt))


def _may_burst(request: Request) -> bool:
    """Whether its tokens need nothing but logits and a seed."""
    return takes_logits_as_they_are(request.config) and not (request.logprobs or request.top)


def _details(
    logits: Tensor, requests: Sequence[Request], chosen: Sequence[int | RuntimeError]
) -> list[tuple[float | None, list[tuple[int, float]]]]:
    """For each row of logits (B, V) the log-probability of its token and the most likely ones, where asked for."""
    if not any(request.logprobs or request.top for request in requests):
        return [(None, [])] * len(requests)
    found: list[tuple[float | None, list[tuple[int, float]]]] = []
    for row, request, token in zip(logits, requests, chosen, strict=True):
        logprob, top = None, []
        if isinstance(token, int):
            if request.logprobs:
                logprob = row.log_softmax(-1)[token].item()
            if request.top:
                probs = (row / request.top_temperature).softmax(-1)
                values, ids = likeliest(probs, request.top, request.stopping.tokenizer)
                top = list(zip(ids.tolist(), values.tolist(), strict=True))
        found.append((logprob, top))
    return found
