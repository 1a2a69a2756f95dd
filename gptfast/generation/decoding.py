"""One step of a batch: extend the sequences, then choose their next tokens.  N sequences, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import zip_longest

import torch
from torch import Tensor

from gptfast.generation.request import Request, Sequence, Token
from gptfast.generation.runner import Runner
from gptfast.generation.sampling import SAMPLING_ERRORS, choose, over_temperature
from gptfast.generation.textless import likeliest

Logits = Tensor | list[Tensor]  # (N, V) without drafts; with drafts, for each sequence, (1 + its draft tokens, V)


def extend(runner: Runner, sequences: list[Sequence], drafts: list[list[int]]) -> Logits:
    """Append the tokens that each slot lacks, and its draft; returns the logits of its last token and of its draft."""
    lengths = runner.lengths
    tokens = [
        _missing(runner, sequence, lengths[sequence.slot]) + draft
        for sequence, draft in zip(sequences, drafts, strict=True)
    ]
    if not any(drafts):
        return runner.extend([sequence.slot for sequence in sequences], tokens)
    logits: dict[int, Tensor] = {}
    for last_only in (True, False):
        which = [i for i, draft in enumerate(drafts) if bool(draft) != last_only]
        if which:
            part = runner.extend([sequences[i].slot for i in which], [tokens[i] for i in which], last_only)
            for i, values in zip(which, part, strict=True):
                logits[i] = values.view(-1, values.shape[-1])
    return [logits[i] for i in range(len(sequences))]


def _missing(runner: Runner, sequence: Sequence, length: int) -> list[int]:
    """The tokens behind the first `length`. A sequence that outgrows its slot drops the older half and is read again."""
    start = first_visible(len(sequence.tokens), sequence.request.max_len)
    if start != sequence.start:
        runner.truncate(sequence.slot, 0)
        sequence.start, length = start, 0
    return sequence.tokens[start + length :]


def first_visible(length: int, limit: int) -> int:
    """The first of `length` tokens in a context of `limit`, which drops its older half whenever it is full."""
    half = max(1, limit // 2)
    return max(0, -(-(length - limit) // half)) * half


def select(logits: Logits, sources: list[int]) -> Logits:
    """The logits of the sequences in `sources`."""
    return logits[sources] if isinstance(logits, Tensor) else [logits[source] for source in sources]


def multi_step(runner: Runner, sequences: list[Sequence], logits: Tensor, max_tokens: int) -> list[Token]:
    """Let the runner draw up to `max_tokens` tokens of each sequence; all of them need only logits.

    Args:
        logits: as `runner.extend` returned them for these sequences.
    """
    limits = [max_tokens]
    for sequence in sequences:
        limits.append(sequence.request.config.max_new_tokens - sequence.num_new)
        limits.append(sequence.request.max_len - len(sequence.tokens) + 1)  # up to a slide
        if not sequence.num_new:
            limits.append(1)  # deliver the first token immediately
    stop_ids = {token for sequence in sequences for token in sequence.request.config.eos_ids}
    slots, params = [sequence.slot for sequence in sequences], [sequence.context.params for sequence in sequences]
    drawn = runner.decode_steps(slots, logits, max(1, min(limits)), params, list(stop_ids))
    each = list(zip(sequences, drawn, strict=True))
    if all(tokens[-1] >= 0 and sequence.request.stopping.by_last_token for sequence, tokens in each):
        made = [_append_all(sequence, tokens) for sequence, tokens in each]
        return made[0] if len(made) == 1 else [token for step in zip_longest(*made) for token in step if token]
    new: list[Token] = []
    for n in range(max(map(len, drawn))):
        for sequence, tokens in each:
            if n < len(tokens):
                token = tokens[n] if tokens[n] >= 0 else RuntimeError(SAMPLING_ERRORS[tokens[n]])
                _append(sequence, token, new)
    return new


def _append_all(sequence: Sequence, tokens: list[int]) -> list[Token]:
    """Append tokens of which only the last can end the sequence: a look at each costs as much as half of its step in a small model."""
    request = sequence.request
    sequence.tokens += tokens
    sequence.finish = request.stopping.reason(sequence.tokens, len(request.prompt))
    return [Token(request, sequence.index, token, None, []) for token in tokens]


def single_step(runner: Runner, sequences: list[Sequence], logits: Logits, drafts: list[list[int]]) -> list[Token]:
    """Choose the next token of every sequence; where it is the draft's, go on with the token behind it."""
    new: list[Token] = []
    active, n = list(range(len(sequences))), 0
    while active:
        now = logits if isinstance(logits, Tensor) else torch.stack([logits[i][n] for i in active])
        chosen = choose(now, [sequences[i].context for i in active], runner.sample)
        details = _details(now, [sequences[i].request for i in active], chosen)
        for i, token, (logprob, top) in zip(active, chosen, details, strict=True):
            _append(sequences[i], token, new, logprob, top)
        active = [
            i
            for i in active
            if n < len(drafts[i]) and not sequences[i].finish and drafts[i][n] == sequences[i].tokens[-1]
        ]
        n += 1
    for sequence, draft in zip(sequences, drafts, strict=True):
        if draft and not sequence.finish:  # the slot holds rejected tokens of the draft
            runner.truncate(sequence.slot, len(sequence.tokens) - 1)
    return new


def _append(
    sequence: Sequence,
    token: int | RuntimeError,
    new: list[Token],
    logprob: float | None = None,
    top: list[tuple[int, float]] | None = None,
) -> None:
    """Append the next token, unless the sequence has ended, as when another one of its request failed."""
    if sequence.finish:
        return
    request = sequence.request
    if isinstance(token, RuntimeError):
        request.error = token
        request.end("error")
        return
    sequence.tokens.append(token)
    new.append(Token(request, sequence.index, token, logprob, top or []))
    sequence.finish = request.stopping.reason(sequence.tokens, len(request.prompt))


def _details(
    logits: Tensor, requests: Seq[Request], chosen: Seq[int | RuntimeError]
) -> list[tuple[float | None, list[tuple[int, float]]]]:
    """For each row of logits the log-probability of its token, and the most likely tokens, where asked for."""
    if not any(request.logprobs or request.top for request in requests):
        return [(None, [])] * len(requests)
    found: list[tuple[float | None, list[tuple[int, float]]]] = []
    for row, request, token in zip(logits, requests, chosen, strict=True):
        logprob, top = None, []
        if isinstance(token, int):
            if request.logprobs:
                logprob = row.log_softmax(-1)[token].item()
            if request.top:
                probs = over_temperature(row, request.top_temperature).softmax(-1)
                values, ids = likeliest(probs, request.top, request.tokenizer)
                top = list(zip(ids.tolist(), values.tolist(), strict=True))
        found.append((logprob, top))
    return found
