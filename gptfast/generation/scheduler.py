"""Scheduler: continuous batching. Requests join and leave the running batch between steps.

The text of a request does not depend on the others: a token is a function of the logits of its own sequence and of (seed,
stream, position). See the runners for the last bits of logits.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from gptfast._checks import check_count
from gptfast.generation import decoding
from gptfast.generation.config import GenerationConfig
from gptfast.generation.prompts import check_prompt, read_prompt
from gptfast.generation.request import Request, Sequence, Token
from gptfast.generation.runner import LanguageModel, single_threaded_torch, virtual_tokens
from gptfast.generation.speculative import Speculation
from gptfast.generation.textless import choosing_text
from gptfast.nn.selection import check_adapter


class Scheduler:
    """Runs requests together. Not thread-safe, but for `check` and `interrupt`.

    Args:
        model: a `GPT`, a `CompiledGPT` or a `Runner`. The scheduler asks for one runner, and keeps it: it generates with
            the weights that the model has now (see `Runner`).
        max_rows: number of sequences at a time.
        max_positions: number of positions that the running requests may need together; None: `max_rows * max_len`.
        max_len: number of positions of a sequence; None: block_size. A soft prompt may leave a request fewer.
        max_prompt_tokens: number of prompt tokens per step, so that running sequences do not wait long for new ones; one
            prompt is always read. None: no limit.
        assistant_model: drafts tokens; see `gptfast.generation.speculative`.
    Raises:
        TypeError, ValueError: a number out of range, or an assistant with another vocabulary.
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
        check_count("Scheduler", "max_rows", max_rows)
        for name, value in (
            ("max_positions", max_positions),
            ("max_len", max_len),
            ("max_prompt_tokens", max_prompt_tokens),
        ):
            if value is not None:
                check_count("Scheduler", name, value)
        self.config = model.config
        self.max_len = model.config.block_size if max_len is None else max_len
        self.max_rows = max_rows
        self.max_positions = max_rows * self.max_len if max_positions is None else max_positions
        self.max_prompt_tokens = max_prompt_tokens
        self.runner = model.runner(max_rows, self.max_len)
        self._speculation = Speculation(assistant_model, model, max_rows, self.max_len, self.runner.repeats_exactly)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def waiting(self) -> int:
        """Number of requests that have not started."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of requests that have started and not ended."""
        return len(self._running)

    def submit(
        self,
        prompt: Any,
        *,
        tokenizer: Any = None,
        logprobs: bool = False,
        top: int = 0,
        adapter: str | None = None,
        **options: Any,
    ) -> Request:
        """Queue a prompt. Requests start in the order of submission, when there is room.

        Args:
            prompt: token ids, in a list, a 1-D tensor or an array.
            tokenizer, logprobs, top, adapter: see `Request`.
            options: fields of `GenerationConfig`, without beams. Each request without a seed draws its own.
        Raises:
            TypeError, ValueError: bad options or prompt, or more than this scheduler can ever hold.
        """
        config = GenerationConfig.of(**options)
        check_count("Scheduler", "top", top, 0)
        return self.submit_request(Request(read_prompt("", prompt), config, tokenizer, logprobs, top, adapter=adapter))

    def submit_request(self, request: Request) -> Request:
        """Queue a request; see `submit`."""
        self.check(request)
        config = self._with_room(request).with_seed()
        request.max_len = self._limit(request)
        request.replace_config(choosing_text(config, request.tokenizer, self.config.vocab_size))
        self._waiting.append(request)
        return request

    def check(self, request: Request) -> None:
        """Raise what `submit_request` raises. Thread-safe."""
        config = self._with_room(request)
        if request.adapter is not None:
            check_adapter("generate", self.runner.adapters, request.adapter)
        if config.num_beams > 1:
            raise ValueError(
                "Scheduler: num_beams must be 1; beams are searched together - use gptfast.generation.generate"
            )
        limit, virtual = self._limit(request), virtual_tokens(self.runner, request.adapter) + request.before
        check_prompt("", request.prompt, self.config.vocab_size, limit, config, virtual, request.before)
        positions = self._positions(request, config) * config.num_return_sequences
        if config.num_return_sequences > self.max_rows or positions > self.max_positions:
            raise ValueError(
                f"Scheduler: num_return_sequences={config.num_return_sequences} of {len(request.prompt)} + "
                f"{config.max_new_tokens} positions never fit into max_rows={self.max_rows}, "
                f"max_positions={self.max_positions}; ask for less or raise these"
            )

    def cancel(self, request: Request) -> None:
        """End a request and free its slots, unless it is done."""
        if request in self._waiting:
            self._waiting.remove(request)
            request.sequences = [Sequence(request, 0, -1, list(request.prompt))]
        request.end("cancelled")
        self._free(request.sequences)

    @torch.inference_mode()
    def step(self, max_tokens: int = 1) -> list[Token]:
        """Start waiting requests, then generate the next token of every running sequence, or several of them.

        Args:
            max_tokens: upper bound of the tokens of a sequence in this call. More than one only where the runner can decode
                without returning to Python and no option needs each token. Drafts that are right count extra.
        """
        self._admit()
        sequences = [s for request in self._running for s in request.sequences if not s.finish]
        if not sequences:
            return []
        with single_threaded_torch(self.runner):
            drafts = self._speculation.drafts(sequences)
            logits = decoding.extend(self.runner, sequences, drafts)
            sources = self._fork(sequences, drafts)
            if sources is not None:
                logits = decoding.select(logits, sources)
            plain = sources is None and all(sequence.needs_only_logits for sequence in sequences)
            if isinstance(logits, Tensor) and plain:
                most = 1 if self._speculation.is_used(sequences) else max_tokens
                tokens = decoding.multi_step(self.runner, sequences, logits, most)
            else:
                tokens = decoding.single_step(self.runner, sequences, logits, drafts)
        self._free([sequence for sequence in sequences if sequence.finish])
        return tokens

    def interrupt(self) -> None:
        """Thread-safe: a multi-token step stops after its current token."""
        self.runner.interrupt()

    def _admit(self) -> None:
        """Start waiting requests while there is room."""
        rows = sum(request.num_open for request in self._running)
        positions, read = sum(map(self._reserved, self._running)), 0
        while self._waiting:
            request = self._waiting[0]
            rows += request.num_open
            positions += self._reserved(request)
            if rows > self.max_rows or positions > self.max_positions:
                return
            if read and self.max_prompt_tokens is not None and read + len(request.prompt) > self.max_prompt_tokens:
                return
            read += len(request.prompt)
            self._waiting.popleft()
            own = {} if request.prefix is None else {"prefix": request.prefix}
            slot = self.runner.allocate(1, request.adapter, **own)[0]
            request.sequences = [Sequence(request, 0, slot, list(request.prompt))]
            self._running.append(request)

    def _reserved(self, request: Request) -> int:
        """Number of positions that the open sequences of a request may need."""
        return self._positions(request, request.config) * request.num_open

    def _positions(self, request: Request, config: GenerationConfig) -> int:
        """Number of positions that a sequence may need."""
        return min(len(request.prompt) + config.max_new_tokens, self._limit(request))

    def _limit(self, request: Request) -> int:
        """The most positions of a sequence."""
        virtual = virtual_tokens(self.runner, request.adapter) + request.before
        return min(self.max_len, self.config.block_size - virtual)

    def _with_room(self, request: Request) -> GenerationConfig:
        length = len(request.prompt)
        return request.config.with_room(length, length, self._limit(request))

    def _fork(self, sequences: list[Sequence], drafts: list[list[int]]) -> list[int] | None:
        """Make the other return sequences of the requests whose prompt has just been read, as copies of the first.

        They are appended to `sequences` and `drafts`. Returns for each sequence the place of the one whose logits it has;
        None: there are no new ones.
        """
        count_before = len(sequences)
        sources = list(range(count_before))
        for request in self._running:
            first, count = request.sequences[0], request.config.num_return_sequences
            if len(request.sequences) < count:
                slots = self.runner.fork(first.slot, count - 1)
                copies = [
                    Sequence(request, n, s, list(first.tokens), first.start) for n, s in enumerate(slots, start=1)
                ]
                sources += [sequences.index(first)] * len(copies)
                request.sequences += copies
                sequences += copies
                drafts += [[] for _ in copies]
        return sources if len(sources) > count_before else None

    def _free(self, ended: list[Sequence]) -> None:
        for sequence in ended:
            if sequence.slot >= 0:
                self._speculation.free(sequence.slot)
                self.runner.free(sequence.slot)
                sequence.slot = -1
        self._running = [request for request in self._running if not request.done]
