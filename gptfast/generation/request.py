"""What a `Scheduler` runs: requests, their return sequences, and the tokens that these get."""

from __future__ import annotations

from dataclasses import dataclass, field

from gptfast.generation.config import GenerationConfig
from gptfast.generation.stopping import Stopping


@dataclass(frozen=True)
class Token:
    """A new token of one row.

    Args:
        request, stream: whose it is: the request, and the number of the return sequence.
        id: the token.
        logprob: its log-probability under the model (before everything that changes scores), if asked for.
        top: the most likely tokens at this place as (token, probability at `Request.top_temperature`, before everything
            else that changes scores), best first, as many as asked for.
    """

    request: Request
    stream: int
    id: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Row:
    """One return sequence of a request in the making."""

    request: Request
    stream: int
    index: int  # in Sequences; -1: in none
    tokens: list[int]
    start: int = 0  # the first token that the model still sees; > 0 after a slide
    finish: str | None = None  # "stop", "length", "cancelled" or "error"

    @property
    def new(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def made(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


@dataclass(eq=False)
class Request:
    """A prompt with its return sequences, as `Scheduler.submit` made it.

    Args:
        prompt, config: what was asked for.
        logprobs: whether `Token`s tell log-probabilities.
        top: how many of the most likely tokens they tell.
        top_temperature: at which temperature they do.
        first_stream: the stream of the first return sequence, the others follow: requests with the same seed and
            different streams are independent, and are drawn together.
        rows: the return sequences; one until the prompt has been read.
        error: what went wrong; None: nothing.
    """

    prompt: list[int]
    config: GenerationConfig
    stopping: Stopping
    logprobs: bool = False
    top: int = 0
    top_temperature: float = 1.0
    first_stream: int = 0
    rows: list[Row] = field(default_factory=list)
    error: RuntimeError | None = None

    @property
    def done(self) -> bool:
        """Whether all of its return sequences have ended."""
        return bool(self.rows) and all(row.finish for row in self.rows)

    @property
    def open(self) -> int:
        """How many of its return sequences have not ended."""
        return self.config.num_return_sequences - sum(row.finish is not None for row in self.rows)
