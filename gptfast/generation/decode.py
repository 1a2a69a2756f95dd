"""The decoding loop. It knows token ids and nothing of text.  B rows, V vocabulary."""

from __future__ import annotations

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
        logprobs: its log-probability under the model (before temperature, top-k and top-p), None likewise; empty
            unless asked for.
        top: the most likely next tokens of each row as (token, probability at the temperature, before top-k and
            top-p; at 1 when the temperature is 0), best first; empty unless asked for.
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
        TypeError, ValueError: see `GenerationConfig` and `read_prompts`.  RuntimeError: the logits hold nan.
    """
    config = GenerationConfig.of(**options)
    prompts = read_prompts(ids, model, config)
    if config.num_beams > 1:
        with for_generation(model):
            rows = beam_search(model, prompts, config)
    else:
        rows = [list(prompt) for prompt in prompts for _ in range(config.num_return_sequences)]
        for step in _decode(model, prompts, config):
            for row, token in zip(rows, step.tokens, strict=True):
                if token is not None:
                    row.append(token)
    return _as_tensor(rows, config, ids.device) if isinstance(ids, Tensor) else rows


def stream(model: GPT, ids: Any, *, logprobs: bool = False, top: int = 0, **options: Any) -> Iterator[Step]:
    """As `generate` without beams, yielding each step when it is made. The arguments are checked at once.

    Args:
        model, ids, options: as in `generate`.
        logprobs: whether each Step tells the log-probabilities of its tokens.
        top: how many of the most likely next tokens each Step tells.
    Returns:
        An iterator of one `Step` per position, until every row has ended.
    Raises:
        TypeError, ValueError: as `generate`.
    """
    config = GenerationConfig.of(**options)
    if config.num_beams > 1:
        raise ValueError("stream: num_beams must be 1; beams change their past until the end - use generate")
    if not isinstance(top, int) or top < 0:
        raise ValueError(f"stream: top is {top!r}; expected an int >= 0 (0 tells none)")
    return _decode(model, read_prompts(ids, model, config), config, logprobs, top)


def _decode(
    model: GPT, prompts: list[list[int]], config: GenerationConfig, logprobs: bool = False, top: int = 0
) -> Iterator[Step]:
    copies, eos = config.num_return_sequences, set(config.eos_ids)
    positions = torch.tensor([len(prompt) for prompt in prompts for _ in range(copies)])  # of the tokens to draw
    streams = torch.arange(copies).repeat(len(prompts))
    ended = [False] * len(positions)
    with for_generation(model):
        logits, cache = prefill(model, prompts, copies, config.max_new_tokens)
    for n in range(config.max_new_tokens):
        with for_generation(model):  # not around the yield: the caller's code runs there
            tokens = ops.sample(
                logits,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                seed=config.seed,
                position=positions + n,
                stream=streams,
            )
            drawn = tokens.tolist()
            step = Step(
                tokens=_hide(drawn, ended),
                logprobs=_hide(_logprobs(logits, tokens), ended) if logprobs else [],
                top=_top(logits, top, config.temperature) if top else [],
            )
        yield step
        ended = [was or token in eos for was, token in zip(ended, drawn, strict=True)]
        if all(ended) or n + 1 == config.max_new_tokens:
            return
        with for_generation(model):
            logits = model(tokens[:, None], cache=cache, last_only=True)


def _hide(values: list[Any], ended: list[bool]) -> list[Any]:
    return [None if was else value for was, value in zip(ended, values, strict=True)]


def _logprobs(logits: Tensor, tokens: Tensor) -> list[float]:
    return logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()


def _top(logits: Tensor, count: int, temperature: float) -> list[list[tuple[int, float]]]:
    probs = (logits.float() / (temperature or 1.0)).softmax(-1)
    values, ids = probs.topk(min(count, probs.shape[-1]))
    return [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]


def _as_tensor(rows: list[list[int]], config: GenerationConfig, device: torch.device) -> Tensor:
    longest, fill = max(map(len, rows)), (config.eos_ids or (0,))[0]
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], device=device)
