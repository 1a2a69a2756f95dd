"""Continuing prompts. This knows token ids and, but for stop strings, nothing of text.  B rows, T positions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gptfast.generation import cuda_graphs
from gptfast.generation.arguments import unpack
from gptfast.generation.beam import beam_search
from gptfast.generation.config import GenerationConfig
from gptfast.generation.prompts import read_prompts
from gptfast.generation.request import Request, Token
from gptfast.generation.runner import LanguageModel
from gptfast.generation.scheduler import Scheduler, check_top
from gptfast.generation.scoring import score
from gptfast.generation.speculative import check_assistant
from gptfast.generation.stopping import Stopping
from gptfast.generation.textless import choosing_text


@dataclass(frozen=True)
class Step:
    """One step of `stream`: what each row got. Rows are prompts x return sequences, those of one prompt together.

    Args:
        tokens: the new token of each row; None where the row had ended before.
        logprobs: its log-probability under the model (before temperature, top-k and top-p), None likewise; empty
            unless asked for.
        top: the most likely next tokens of each row as (token, probability at the temperature, before top-k and
            top-p; at 1 when the temperature is 0), best first; empty unless asked for.
    """

    tokens: list[int | None]
    logprobs: list[float | None]
    top: list[list[tuple[int, float]]]


@dataclass(frozen=True)
class Generation:
    """What `generate` returns with return_logprobs=True. Rows are prompts x return sequences.

    Args:
        sequences: as `generate` returns without it.
        logprobs: of each new token of each row, its log-probability under the model, before everything that changes
            scores.
        scores: with beams: what they were ranked by; else None.
    """

    sequences: Tensor | list[list[int]]
    logprobs: list[list[float]]
    scores: list[float] | None = None


class Streamer(Protocol):
    """Is told tokens as they come; transformers' streamers are such."""

    def put(self, value: Tensor) -> None:
        """First the prompts, (B, T), then the new token of each row, (B,)."""
        ...

    def end(self) -> None:
        """All rows have ended."""
        ...


def generate(
    model: LanguageModel,
    ids: Any = None,
    *,
    tokenizer: Any = None,
    assistant_model: LanguageModel | None = None,
    streamer: Streamer | None = None,
    return_logprobs: bool = False,
    **options: Any,
) -> Any:
    """Continue prompts, as `transformers.generate` returns them: prompt and new tokens. Greedily, unless told otherwise.

    Args:
        model: a GPT, whose training flags are the same afterwards, or a compiled engine.
        ids: (B, T) or (T,) tensor of integers; or a list of id lists of any lengths, which are not padded (or one list of
            ids, or numpy arrays). Or a BatchEncoding or dict with input_ids, which may be expanded (**batch) too;
            input_ids= is another name.
        tokenizer: of `gptfast.tokenizer`, for stop_strings; and ids for which it has no token are not chosen (see
            `GenerationConfig.usable_vocab`).
        assistant_model: a smaller model of the same vocabulary that guesses tokens ahead (speculative decoding): the
            text is the same, sooner.
        streamer: is told the tokens as they come; for one prompt with one return sequence.
        return_logprobs: whether to return a `Generation`.
        options: the fields of `GenerationConfig`; and attention_mask, shaped as ids: 0 where these are padding, on the left or
            the right. A row is continued as without its padding, and returned with it, the new tokens behind.
    Returns:
        For a tensor: (B * num_return_sequences, T + n) int64, ended rows filled up with pad_token_id, or the (first)
        eos_token_id. For lists: one id list per prompt and return sequence. An eos token is part of its sequence. With
        return_logprobs: a `Generation` with these.
    Raises:
        TypeError, ValueError: see `GenerationConfig` and `read_prompts`.  RuntimeError: the logits hold nan.
    """
    ids, mask, options = unpack(ids, options)
    config = choosing_text(GenerationConfig.of(**options), tokenizer, model.config.vocab_size)
    given, config = read_prompts(ids, mask, model, config)
    prompts, apart, config = given.rows, config.seed is None, config.with_seed()
    stopping = Stopping(config, tokenizer)
    if streamer is not None and (len(prompts) * config.num_return_sequences > 1 or config.num_beams > 1):
        raise ValueError(
            f"generate: streamer with {len(prompts)} prompts, num_return_sequences={config.num_return_sequences}, "
            f"num_beams={config.num_beams}; it follows one sequence - use gptfast.generation.stream for several"
        )
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise TypeError(f"generate: streamer is a {type(streamer).__name__}; expected an object with put and end")
    if assistant_model is not None:
        check_assistant(assistant_model, model, config)
    if config.num_beams > 1:
        rows, scores = beam_search(model, prompts, config, stopping, apart)
        copies = [prompt for prompt in prompts for _ in range(config.num_return_sequences)]
        logprobs = [score(model, row, len(p)) for row, p in zip(rows, copies, strict=True)] if return_logprobs else []
    else:
        requests = _requests(prompts, config, stopping, apart, logprobs=return_logprobs)
        logprobs = _run(model, requests, assistant_model, streamer)
        rows, scores = [row.tokens for request in requests for row in request.rows], None
    sequences = given.returned(rows, config)
    return Generation(sequences, logprobs, scores) if return_logprobs else sequences


def _requests(
    prompts: list[list[int]], config: GenerationConfig, stopping: Stopping, apart: bool, **told: Any
) -> list[Request]:
    """A request for each prompt. `apart`: nobody named the seed, and equal prompts get different draws."""
    copies = config.num_return_sequences
    firsts = [n * copies if apart else 0 for n in range(len(prompts))]
    return [
        Request(prompt, config, stopping, first_stream=first, **told)
        for prompt, first in zip(prompts, firsts, strict=True)
    ]


def _run(
    model: LanguageModel, requests: list[Request], assistant: LanguageModel | None, streamer: Streamer | None
) -> list[list[float]]:
    """Run the requests to their end; returns the log-probabilities of the new tokens of each row, where asked for."""
    if assistant is None and streamer is None and cuda_graphs.takes(model, requests):
        cuda_graphs.run(model, requests)
        _raise_error(requests)
        return []
    scheduler = _scheduler(model, requests, assistant)
    if streamer is not None:
        streamer.put(torch.tensor([requests[0].prompt], dtype=torch.int64, device="cpu"))
    logprobs: dict[tuple[int, int], list[float]] = {}
    while scheduler.waiting or scheduler.running:
        for token in scheduler.step():
            if token.logprob is not None:
                logprobs.setdefault((id(token.request), token.stream), []).append(token.logprob)
            if streamer is not None:
                streamer.put(torch.tensor([token.id], dtype=torch.int64, device="cpu"))
        _raise_error(requests)
    if streamer is not None:
        streamer.end()
    return [logprobs.get((id(request), row.stream), []) for request in requests for row in request.rows]


def _scheduler(model: LanguageModel, requests: list[Request], assistant: LanguageModel | None) -> Scheduler:
    """One that runs all of them at once, in as many steps as the longest takes."""
    config = requests[0].config
    longest = max(len(request.prompt) for request in requests) + config.max_new_tokens
    scheduler = Scheduler(
        model,
        max_rows=len(requests) * config.num_return_sequences,
        max_len=min(longest, model.config.block_size),
        assistant_model=assistant,
    )
    for request in requests:
        scheduler.submit_request(request)
    return scheduler


def _raise_error(requests: list[Request]) -> None:
    for request in requests:
        if request.error is not None:
            raise request.error


def stream(
    model: LanguageModel,
    ids: Any = None,
    *,
    tokenizer: Any = None,
    assistant_model: LanguageModel | None = None,
    logprobs: bool = False,
    top: int = 0,
    **options: Any,
) -> Iterator[Step]:
    """As `generate` without beams, yielding each step when it is made. The arguments are checked at once.

    Args:
        model: a GPT, which runs in torch, or on a CPU sooner `gptfast.engine.engine_for(model) or model`.
        ids, tokenizer, assistant_model, options: as in `generate`.
        logprobs: whether each Step tells the log-probabilities of its tokens.
        top: how many of the most likely next tokens each Step tells.
    Returns:
        An iterator of one `Step` per position, until every row has ended.
    Raises:
        TypeError, ValueError: as `generate`.
    """
    ids, mask, options = unpack(ids, options)
    config = GenerationConfig.of(**options)
    if config.num_beams > 1:
        raise ValueError("stream: num_beams must be 1; beams change their past until the end - use generate")
    check_top("stream", top)
    given, config = read_prompts(ids, mask, model, config)
    prompts, apart, config = given.rows, config.seed is None, config.with_seed()
    stopping = Stopping(config, tokenizer)
    if assistant_model is not None:
        check_assistant(assistant_model, model, config)
    told = {"logprobs": logprobs, "top": top, "top_temperature": config.temperature or 1.0}
    requests = _requests(prompts, config, stopping, apart, **told)
    return _steps(model, requests, assistant_model)


def _steps(model: LanguageModel, requests: list[Request], assistant: LanguageModel | None) -> Iterator[Step]:
    scheduler = _scheduler(model, requests, assistant)
    rows = [(request, n) for request in requests for n in range(request.config.num_return_sequences)]
    made: dict[tuple[int, int], deque[Token]] = {(id(request), n): deque() for request, n in rows}
    wants_logprobs, wants_top = requests[0].logprobs, requests[0].top
    while True:
        while not all(made[id(request), n] or _ended(request, n) for request, n in rows):
            for token in scheduler.step():
                made[id(token.request), token.stream].append(token)
            _raise_error(requests)
        tokens = [made[id(request), n].popleft() if made[id(request), n] else None for request, n in rows]
        if not any(tokens):
            return
        yield Step(
            tokens=[token and token.id for token in tokens],
            logprobs=[token and token.logprob for token in tokens] if wants_logprobs else [],
            top=[token.top if token else [] for token in tokens] if wants_top else [],
        )


def _ended(request: Request, stream: int) -> bool:
    return bool(request.rows) and request.rows[stream].finish is not None
