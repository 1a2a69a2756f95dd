"""The functions `generate` and `stream`: prompts in, token ids out.  B prompts, T positions."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gptfast._checks import check_count
from gptfast.generation.arguments import unpack
from gptfast.generation.beam import beam_search
from gptfast.generation.config import GenerationConfig
from gptfast.generation.prompts import read_prompts
from gptfast.generation.request import Request, Token
from gptfast.generation.runner import LanguageModel
from gptfast.generation.scheduler import Scheduler
from gptfast.generation.scoring import score
from gptfast.generation.speculative import check_assistant
from gptfast.generation.textless import choosing_text

# Tokens of a sequence in the first call of the runner. Ctrl-C is handled between calls, and a call costs as much as a few tokens
# of a small model: after one that took less than SHORT seconds the next makes twice as many, after another half as many.
STEPS_PER_CALL, SHORT = 16, 0.02


@dataclass(frozen=True)
class Step:
    """One step of `stream`. Its sequences are prompts x return sequences, those of one prompt together.

    Args:
        tokens: the new token of each sequence; None where it has ended before.
        logprobs: its log-probability under the model, before temperature, top-k and top-p; None likewise. Empty unless
            asked for.
        top: the most likely next tokens of each sequence as (token, probability at the temperature, before top-k and
            top-p; at 1 when the temperature is 0), best first. Empty unless asked for.
    """

    tokens: list[int | None]
    logprobs: list[float | None]
    top: list[list[tuple[int, float]]]


@dataclass(frozen=True)
class Generation:
    """What `generate` returns with return_logprobs=True, for prompts x return sequences.

    Args:
        sequences: what `generate` returns without it.
        logprobs: for each sequence the log-probabilities of its new tokens under the model, before all processing.
        scores: with beams: the scores that they are ranked by; else None.
    """

    sequences: Tensor | list[list[int]]
    logprobs: list[list[float]]
    scores: list[float] | None = None


class Streamer(Protocol):
    """Receives tokens as they are generated; compatible with transformers' streamers."""

    def put(self, value: Tensor) -> None:
        """Receives the prompt, (1, T), then each new token, (1,)."""
        ...

    def end(self) -> None:
        """Called after the last token."""
        ...


def generate(
    model: LanguageModel,
    ids: Any = None,
    *,
    tokenizer: Any = None,
    assistant_model: LanguageModel | None = None,
    streamer: Streamer | None = None,
    return_logprobs: bool = False,
    adapter_names: Sequence[str] | None = None,
    draft_repeats: bool = False,
    prefix_embeds: Any = None,
    **options: Any,
) -> Any:
    """Continue prompts and return prompt and new tokens, as `transformers.generate`; greedily by default.

    Args:
        model: a GPT (its training flags are restored afterwards), a compiled one, or a runner.
        ids: (B, T) or (T,) tensor of integers; or a list of id lists of any lengths, which are not padded (or one list of
            ids, or numpy arrays). Or a BatchEncoding or dict with input_ids, which may also be expanded (**batch);
            input_ids= is another name.
        tokenizer: of `gptfast.tokenizer`, for stop_strings. Ids for which it has no token are not generated (see
            `GenerationConfig.usable_vocab`).
        assistant_model: a smaller model of the same vocabulary that drafts tokens (speculative decoding): the same text,
            faster.
        streamer: receives the tokens as they are generated; for one prompt with one return sequence.
        return_logprobs: whether to return a `Generation`.
        adapter_names: the adapter of each prompt, "__base__" for none; None: the active ones for all.
        draft_repeats: guess tokens where the text of a single sequence repeats itself, and check them in one step: the same
            text, sooner. Only the native engine does.
        prefix_embeds: (B, n, C), or a list of (n, C): vectors before each prompt, such as projected patches of an image. They
            take positions, and are not returned. Not with beams, assistant_model or overflow="slide".
        options: fields of `GenerationConfig`; and attention_mask, shaped as ids: 0 for padding, on the left or the right. A
            prompt is continued as without its padding, and returned with it, the new tokens behind.
    Returns:
        For a tensor: (B * num_return_sequences, T + n) int64, shorter sequences filled with pad_token_id, or the (first)
        eos_token_id. For lists: one id list per prompt and return sequence. An end token is part of its sequence. With
        return_logprobs: a `Generation`.
    Raises:
        TypeError, ValueError: see `GenerationConfig` and `read_prompts`.  RuntimeError: the logits hold nan.
    """
    ids, mask, options = unpack(ids, options)
    config = choosing_text(GenerationConfig.of(**options), tokenizer, model.config.vocab_size)
    if prefix_embeds is not None:
        _check_prefix_use(config, assistant_model)
    given, config = read_prompts(ids, mask, model, config, adapter_names, prefix_embeds)
    prompts, apart, config = given.rows, config.seed is None, config.with_seed()
    adapters = given.adapters
    alone = len(prompts) * config.num_return_sequences == 1 and streamer is None and assistant_model is None
    wanted = {"logprobs": return_logprobs, "draft_repeats": draft_repeats and alone}
    requests = _requests(prompts, config, tokenizer, apart, adapters, **wanted)
    if streamer is not None:
        _check_streamer(streamer, len(prompts), config)
    if assistant_model is not None:
        check_assistant(assistant_model, model, config)
    scores: list[float] | None = None
    if config.num_beams > 1:
        runner = model.runner(len(prompts) * config.num_beams, max(map(len, prompts)) + config.max_new_tokens)
        texts, scores = beam_search(runner, prompts, config, requests[0].stopping, apart, adapters)
        each = zip(prompts, adapters, strict=True)
        copies = [(len(prompt), adapter) for prompt, adapter in each for _ in range(config.num_return_sequences)]
        logprobs = [score(runner, t, *of) for t, of in zip(texts, copies, strict=True)] if return_logprobs else []
    else:
        for request, prefix in zip(requests, given.prefixes, strict=True):
            request.prefix = prefix
        logprobs = _run(model, requests, assistant_model, streamer)
        texts = [sequence.tokens for request in requests for sequence in request.sequences]
    sequences = given.returned(texts, config)
    return Generation(sequences, logprobs, scores) if return_logprobs else sequences


def _check_prefix_use(config: GenerationConfig, assistant: Any) -> None:
    told = {"num_beams": config.num_beams > 1, "assistant_model": assistant is not None}
    told["overflow='slide'"] = config.overflow == "slide"
    for name, given in told.items():
        if given:
            raise ValueError(f"generate: prefix_embeds with {name}; leave one out")


def _check_streamer(streamer: Any, prompts: int, config: GenerationConfig) -> None:
    if prompts * config.num_return_sequences > 1 or config.num_beams > 1:
        raise ValueError(
            f"generate: streamer with {prompts} prompts, num_return_sequences={config.num_return_sequences}, "
            f"num_beams={config.num_beams}; it follows one sequence - use gptfast.generation.stream for several"
        )
    if not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise TypeError(f"generate: streamer is a {type(streamer).__name__}; expected an object with put and end")


def _requests(
    prompts: list[list[int]],
    config: GenerationConfig,
    tokenizer: Any,
    apart: bool,
    adapters: list[str | None],
    **fields: Any,
) -> list[Request]:
    """A request for each prompt. apart: the seed was drawn, not given, and equal prompts get different streams."""
    copies = config.num_return_sequences
    firsts = [n * copies if apart else 0 for n in range(len(prompts))]
    return [
        Request(prompt, config, tokenizer, first_stream=first, adapter=adapter, **fields)
        for prompt, first, adapter in zip(prompts, firsts, adapters, strict=True)
    ]


def _run(
    model: LanguageModel, requests: list[Request], assistant: LanguageModel | None, streamer: Streamer | None
) -> list[list[float]]:
    """Run the requests to their end; returns the log-probabilities of the new tokens of each sequence, if asked for."""
    scheduler = _scheduler(model, requests, assistant)
    if streamer is not None:
        streamer.put(torch.tensor([requests[0].prompt], dtype=torch.int64, device="cpu"))
    logprobs: dict[tuple[int, int], list[float]] = {}
    steps, begin = STEPS_PER_CALL, time.perf_counter()
    while scheduler.waiting or scheduler.running:
        for token in scheduler.step(1 if streamer is not None else steps):
            if token.logprob is not None:
                logprobs.setdefault((id(token.request), token.index), []).append(token.logprob)
            if streamer is not None:
                streamer.put(torch.tensor([token.id], dtype=torch.int64, device="cpu"))
        _raise_error(requests)
        end = time.perf_counter()
        steps, begin = 2 * steps if end - begin < SHORT else max(STEPS_PER_CALL, steps // 2), end
    if streamer is not None:
        streamer.end()
    return [logprobs.get((id(request), s.index), []) for request in requests for s in request.sequences]


def _scheduler(model: LanguageModel, requests: list[Request], assistant: LanguageModel | None) -> Scheduler:
    """A scheduler that runs all of the requests at once."""
    config = requests[0].config
    longest = max(len(request.prompt) + request.before for request in requests) + config.max_new_tokens
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
    adapter_names: Sequence[str] | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Generate as `generate` does, without beams, and yield each step. The arguments are checked at once.

    Args:
        model, ids, tokenizer, assistant_model, adapter_names, options: as in `generate`.
        logprobs: whether each Step holds the log-probabilities of its tokens.
        top: how many of the most likely next tokens each Step holds.
    Returns:
        An iterator of one `Step` per position, until every sequence has ended.
    Raises:
        TypeError, ValueError: as `generate`.
    """
    ids, mask, options = unpack(ids, options)
    config = GenerationConfig.of(**options)
    if config.num_beams > 1:
        raise ValueError("stream: num_beams must be 1; beams change their past until the end - use generate")
    check_count("stream", "top", top, 0)
    given, config = read_prompts(ids, mask, model, config, adapter_names)
    prompts, apart, config = given.rows, config.seed is None, config.with_seed()
    if assistant_model is not None:
        check_assistant(assistant_model, model, config)
    wanted = {"logprobs": logprobs, "top": top, "top_temperature": config.temperature or 1.0}
    requests = _requests(prompts, config, tokenizer, apart, given.adapters, **wanted)
    return _steps(_scheduler(model, requests, assistant_model), requests)


def _steps(scheduler: Scheduler, requests: list[Request]) -> Iterator[Step]:
    places = [(request, n) for request in requests for n in range(request.config.num_return_sequences)]
    made: dict[tuple[int, int], deque[Token]] = {(id(request), n): deque() for request, n in places}
    wants_logprobs, wants_top = requests[0].logprobs, requests[0].top
    while True:
        while not all(made[id(request), n] or _has_ended(request, n) for request, n in places):
            for token in scheduler.step():
                made[id(token.request), token.index].append(token)
            _raise_error(requests)
        tokens = [made[id(request), n].popleft() if made[id(request), n] else None for request, n in places]
        if not any(tokens):
            return
        yield Step(
            tokens=[token and token.id for token in tokens],
            logprobs=[token and token.logprob for token in tokens] if wants_logprobs else [],
            top=[token.top if token else [] for token in tokens] if wants_top else [],
        )


def _has_ended(request: Request, n: int) -> bool:
    return bool(request.sequences) and request.sequences[n].finish is not None
