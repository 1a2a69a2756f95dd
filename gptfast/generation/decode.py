"""The decoding loop. It knows token ids and nothing of text.  B rows, V vocabulary."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptfast import ops
from gptfast.generation.beam import beam_search
from gptfast.generation.config import GenerationConfig
from gptfast.generation.prompts import for_generation, prefill, read_prompts

if TYPE_CHECKING:
    from gptfast.models import GPT


@dataclass(frozen=True)
class Step:
    """One step of the loop: what each row got. Rows are prompts x return sequences, those of one prompt together.

    Args:
        tokens: the new token of each row; None where the row had ended before.
        logprobs: its log-probability under the model (before temperature, top-k and top-p); None likewise.
        top: the most likely next tokens of each row as (token, probability at the temperature), best first; empty
            unless they were asked for.
    """

    tokens: list[int | None]
    logprobs: list[float | None]
    top: list[list[tuple[int, float]]]


def generate(model: GPT, ids: Any, **options: Any) -> Tensor | list[list[int]]:
    """Continue prompts, as `transformers.generate` returns them: prompt and new tokens.

    Args:
        model: a GPT; its training flags are the same afterwards.
        ids: (B, T) int64 tensor; or a list of id lists of any lengths, which are not padded.
        options: the fields of `GenerationConfig`.
    Returns:
        For a tensor: (B * num_return_sequences, T + n) int64, ended rows filled up with the (first) eos_token_id. For
        lists: one id list per prompt and return sequence. An eos token is part of its sequence.
    Raises:
        TypeError, ValueError: see `GenerationConfig` and `read_prompts`.
    """
    config = GenerationConfig.of(**options)
    if config.num_beams > 1:
        prompts = read_prompts(ids, model, config.max_new_tokens)
        with for_generation(model):
            rows = beam_search(model, prompts, config)
    else:
        rows, _ = deque(_decode(model, ids, config, 0), maxlen=1)[0]
    return _as_tensor(rows, config, ids.device) if isinstance(ids, Tensor) else rows


def stream(model: GPT, ids: Any, *, top: int = 0, **options: Any) -> Iterator[Step]:
    """As `generate` without beams, yielding each step when it is made.

    Args:
        model, ids, options: as in `generate`.
        top: how many of the most likely next tokens each Step tells.
    Yields:
        A `Step` per position, until every row has ended.
    """
    config = GenerationConfig.of(**options)
    if config.num_beams > 1:
        raise ValueError("stream: num_beams must be 1; beams change their past until the end - use generate")
    for _, step in _decode(model, ids, config, top):
        yield step


def _decode(model: GPT, ids: Any, config: GenerationConfig, top: int) -> Iterator[tuple[list[list[int]], Step]]:
    """Yields (all rows so far, the step that was just made)."""
    prompts = read_prompts(ids, model, config.max_new_tokens)
    copies, eos = config.num_return_sequences, set(config.eos_ids)
    rows = [list(prompt) for prompt in prompts for _ in range(copies)]
    streams = torch.arange(copies).repeat(len(prompts))
    ended = [False] * len(rows)
    with for_generation(model):
        logits, cache = prefill(model, prompts, copies, config.max_new_tokens)
    for n in range(config.max_new_tokens):
        with for_generation(model):
            if n:
                last = torch.tensor([[row[-1]] for row in rows], device=logits.device)
                logits = model(last, cache=cache, last_only=True)
            positions = torch.tensor([len(row) for row in rows])
            tokens = ops.sample(
                logits,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                seed=config.seed,
                position=positions,
                stream=streams,
            ).tolist()
            step = _describe(logits, tokens, ended, config, top)
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)  # ended rows keep pace with the cache; _finish cuts them
        ended = [was or token in eos for was, token in zip(ended, tokens, strict=True)]
        yield _finish(rows, prompts, copies, eos), step
        if all(ended):
            return


def _finish(rows: list[list[int]], prompts: list[list[int]], copies: int, eos: set[int]) -> list[list[int]]:
    """The rows up to and with their first end token behind the prompt."""
    finished = []
    for n, row in enumerate(rows):
        start = len(prompts[n // copies])
        end = next((i + 1 for i in range(start, len(row)) if row[i] in eos), len(row))
        finished.append(row[:end])
    return finished


def _describe(logits: Tensor, tokens: list[int], ended: list[bool], config: GenerationConfig, top: int) -> Step:
    logprobs = logits.float().log_softmax(-1)
    picked = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best: list[list[tuple[int, float]]] = [[] for _ in tokens]
    if top:
        probs = (logits.float() / (config.temperature or 1.0)).softmax(-1)
        values, ids = probs.topk(min(top, probs.shape[-1]))
        best = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return Step(
        tokens=[None if e else t for e, t in zip(ended, tokens, strict=True)],
        logprobs=[None if e else p for e, p in zip(ended, picked, strict=True)],
        top=best,
    )


def _as_tensor(rows: list[list[int]], config: GenerationConfig, device: torch.device) -> Tensor:
    longest, fill = max(map(len, rows)), (config.eos_ids or (0,))[0]
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], device=device)
