"""Guessing tokens ahead, so that the model checks several in one step.

The text is that of plain decoding, token for token. A drawn token is the argmax of logits / temperature + Gumbel noise,
and the noise is a function of (seed, stream, position): which token the model chooses at a position is settled before
anything is guessed. A guess is kept while it is that token. An assistant draws its guesses with the same noise, which
makes them agree as often as a drafter can without knowing the model (Daliri et al., "Coupling without communication and
drafter-invariant speculative decoding", arXiv 2408.07978).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from gptfast.generation.config import GenerationConfig
from gptfast.generation.runner import LanguageModel
from gptfast.generation.sampling import Context, choose


class Drafter(Protocol):
    def propose(self, rows: Sequence[int], contexts: Sequence[Context], counts: Sequence[int]) -> list[list[int]]:
        """At most counts[i] tokens that may follow contexts[i].tokens; rows[i] names the sequence from step to step."""
        ...

    def release(self, row: int) -> None:
        """Forget a sequence."""
        ...


class PromptLookup:
    """Guesses what followed when the last tokens occurred before (the latest time), as transformers' prompt lookup."""

    def propose(self, rows: Sequence[int], contexts: Sequence[Context], counts: Sequence[int]) -> list[list[int]]:
        return [
            look_up(context.tokens, context.config.max_matching_ngram_size, count)
            for context, count in zip(contexts, counts, strict=True)
        ]

    def release(self, row: int) -> None:
        pass


def look_up(tokens: Sequence[int], longest: int, count: int) -> list[int]:
    """The `count` tokens after the latest earlier occurrence of the last `longest` tokens, or of fewer of them."""
    tokens = list(tokens)
    for n in range(min(longest, len(tokens) - 1), 0, -1):
        end = tokens[-n:]
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == end:
                return tokens[start + n : start + n + count]
    return []


class Assistant:
    """Guesses with a smaller model of the same vocabulary.

    Args:
        model: the assistant.
        rows: the most sequences at a time.
        max_len: the most positions of a sequence that it is asked about; beyond its own block_size it is silent.
    """

    def __init__(self, model: LanguageModel, rows: int, max_len: int) -> None:
        self._limit = min(max_len, model.config.block_size)
        self._sequences = model.sequences(rows, self._limit)
        self._row_of: dict[int, int] = {}
        self._held: dict[int, list[int]] = {}  # the tokens in each row's cache

    def propose(self, rows: Sequence[int], contexts: Sequence[Context], counts: Sequence[int]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in rows]
        for row, context in zip(rows, contexts, strict=True):
            self._forget_rejected(row, context.tokens)
        for n in range(max(counts, default=0)):
            active = [i for i, count in enumerate(counts) if len(drafts[i]) == n < count and self._fits(contexts[i], n)]
            if not active:
                break
            so_far = [[*contexts[i].tokens, *drafts[i]] for i in active]
            new = [tokens[len(self._held[rows[i]]) :] for i, tokens in zip(active, so_far, strict=True)]
            logits = self._sequences.extend([self._row_of[rows[i]] for i in active], new)
            asked = [replace(contexts[i], tokens=tokens) for i, tokens in zip(active, so_far, strict=True)]
            for i, tokens, token in zip(active, so_far, choose(logits, asked), strict=True):  # type: ignore[arg-type]
                self._held[rows[i]] = tokens
                if isinstance(token, int):  # else the assistant's logits are of no use: no guess
                    drafts[i].append(token)
        return drafts

    def _fits(self, context: Context, drafted: int) -> bool:
        return len(context.tokens) + drafted <= self._limit

    def _forget_rejected(self, row: int, tokens: Sequence[int]) -> None:
        if row not in self._row_of:
            self._row_of[row], self._held[row] = self._sequences.add()[0], []
        held = self._held[row]
        same = 0
        while same < min(len(held), len(tokens) - 1) and held[same] == tokens[same]:
            same += 1
        self._sequences.truncate(self._row_of[row], same)
        self._held[row] = held[:same]

    def release(self, row: int) -> None:
        if row in self._row_of:
            self._sequences.release(self._row_of.pop(row))
            del self._held[row]


def check_assistant(assistant: LanguageModel, model: LanguageModel, config: GenerationConfig | None = None) -> None:
    """Raise TypeError or ValueError where `assistant` cannot guess for `model`, or `config` asks for other guesses."""
    if not hasattr(assistant, "sequences"):
        raise TypeError(f"generate: assistant_model is a {type(assistant).__name__}; expected a GPT or a compiled one")
    if config is not None and config.num_beams > 1:
        raise ValueError(f"generate: assistant_model with num_beams={config.num_beams}; leave one out")
    if config is not None and config.prompt_lookup_num_tokens:
        raise ValueError(
            f"generate: assistant_model with prompt_lookup_num_tokens={config.prompt_lookup_num_tokens}; one of them can "
            "guess - leave one out"
        )
    theirs, ours = assistant.config.vocab_size, model.config.vocab_size
    if theirs != ours:
        raise ValueError(
            f"generate: assistant_model has a vocabulary of {theirs} and the model one of {ours}; it must speak the same "
            "tokens"
        )
