"""Requests, the sequences that they ask for, and the tokens that these get."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gptfast.generation.config import GenerationConfig
from gptfast.generation.json_grammar import JsonGrammar
from gptfast.generation.sampling import SamplingContext, needs_only_logits
from gptfast.generation.stopping import Stopping


@dataclass(eq=False, slots=True)  # one for each token of each sequence: cheap to make
class Token:
    """A new token of a sequence.

    Args:
        request: the request that it belongs to.
        index: number of the return sequence in the request.
        id: the token.
        logprob: its log-probability under the model, before processors and temperature; None unless asked for.
        top: the most likely tokens at this position as (token, probability at `Request.top_temperature`, before all other
            processing), best first; empty unless asked for.
    """

    request: Request
    index: int
    id: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Sequence:
    """A return sequence that is being generated.

    Args:
        request: the request that it belongs to.
        index: its number in the request.
        slot: its slot in the runner; -1: none.
        tokens: prompt and new tokens.
        start: first token in the context; above 0 after overflow="slide".
        finish: why it ended: "stop", "length", "cancelled" or "error"; None: it has not.
    """

    request: Request
    index: int
    slot: int
    tokens: list[int]
    start: int = 0
    finish: str | None = None

    @property
    def new(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def num_new(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def context(self) -> SamplingContext:
        """What its next token depends on, besides the logits."""
        request = self.request
        stream = (request.first_stream + self.index) % 2**32
        allowed = None if request.grammar is None else request.grammar.allowed
        return SamplingContext(request.config, stream, self.tokens, len(request.prompt), allowed)

    @property
    def needs_only_logits(self) -> bool:
        """Whether its next token can be drawn by a runner, from logits and the number of positions in its slot alone."""
        return self.start == 0 and self.request.needs_only_logits


@dataclass(eq=False)
class Request:
    """A prompt with its options and its return sequences.

    Args:
        prompt: token ids.
        config: the options.
        tokenizer: of `gptfast.tokenizer`; for stop strings, and to exclude ids that have no text.
        logprobs: whether each `Token` holds its log-probability.
        top: how many of the most likely tokens each `Token` holds.
        top_temperature: the temperature of their probabilities.
        adapter: of the model, "__base__" for none; None: the active ones.
        max_len: number of positions of a sequence, without the virtual tokens of a soft prompt; a scheduler sets it.
        draft_repeats: whether drafts are made where the text repeats itself; only a runner that `repeats_exactly` makes them.
        first_stream: Philox stream of the first return sequence; the others follow. Requests with the same seed and
            different streams are independent, and are drawn in one call.
        grammar: says which tokens may follow, and where the text is complete; None: no such rule.
        prefix: (n, C) vectors before the prompt, see `gptfast.generation.generate`; None: there are none.
        sequences: the return sequences; only the first until the prompt has been read.
        error: why the request failed; None: it has not.
    Raises:
        TypeError, ValueError: stop strings without a tokenizer of `gptfast.tokenizer`.
    """

    prompt: list[int]
    config: GenerationConfig
    tokenizer: Any = None
    logprobs: bool = False
    top: int = 0
    top_temperature: float = 1.0
    draft_repeats: bool = False
    first_stream: int = 0
    adapter: str | None = None
    grammar: JsonGrammar | None = None
    prefix: Tensor | None = None
    max_len: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    error: RuntimeError | None = None
    stopping: Stopping = field(init=False)
    needs_only_logits: bool = field(init=False)

    def __post_init__(self) -> None:
        self.replace_config(self.config)

    def replace_config(self, config: GenerationConfig) -> None:
        """Set the config, and what follows from it."""
        self.config = config
        self.stopping = Stopping(config, self.tokenizer, self.grammar)
        details = self.logprobs or self.top or self.grammar is not None
        self.needs_only_logits = needs_only_logits(config) and not details

    @property
    def before(self) -> int:
        """Number of vectors before the prompt."""
        return 0 if self.prefix is None else len(self.prefix)

    @property
    def done(self) -> bool:
        """Whether all return sequences have ended."""
        return bool(self.sequences) and all(sequence.finish for sequence in self.sequences)

    @property
    def num_open(self) -> int:
        """Number of return sequences that have not ended."""
        return self.config.num_return_sequences - sum(sequence.finish is not None for sequence in self.sequences)

    def end(self, finish: str) -> None:
        """End all return sequences that have not ended."""
        for sequence in self.sequences:
            sequence.finish = sequence.finish or finish
