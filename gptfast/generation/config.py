"""GenerationConfig: every choice of a generation, checked when it is made. Names and meanings as in transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from gptfast import rng


@dataclass(frozen=True)
class GenerationConfig:
    """How text is continued.

    Args:
        max_new_tokens: at most so many tokens are added to each prompt.
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: draw among the k most likely tokens; 0: all.
        top_p: draw among the fewest most likely tokens whose mass reaches p; in (0, 1].
        seed: of the draws, in [0, 2**64). A token depends on (seed, its position, number of the return sequence, logits)
            and on nothing else in the batch. Logits can differ in their last bits with the number of rows, as the
            matrix library rounds differently, which tips a token where two are all but tied (rare; more so in bf16).
        eos_token_id: an id, or a list of several: a sequence ends with the first of them that comes. None: only
            max_new_tokens ends it.
        num_return_sequences: continuations of each prompt; with beams: the best so many.
        num_beams: beam search over so many beams when > 1; the temperature must then be 1 or 0, and nothing is drawn.
        length_penalty: with beams: an ended one is ranked by its log-probability / new tokens ** length_penalty, so
            that above 0 favours long ones.
        early_stopping: with beams: True: stop when num_beams sequences have ended; False: when the best running beam,
            at its present length, could not beat the worst ended one; "never": when it could not at any length.
    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, or two that contradict each other.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    eos_token_id: int | tuple[int, ...] | None = None
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("num_return_sequences", 1), ("num_beams", 1)):
            _check_int(name, getattr(self, name), least)
        for name in ("temperature", "top_p", "length_penalty"):
            _check_number(name, getattr(self, name))
        if self.temperature < 0:
            raise ValueError(f"generate: temperature is {self.temperature}; expected a number >= 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p is {self.top_p}; expected 0 < top_p <= 1 (1 keeps all tokens)")
        rng.check_counter("generate", "seed", self.seed, 64)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"generate: early_stopping is {self.early_stopping!r}; expected True, False or 'never'")
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for token in self.eos_ids:
            _check_int("eos_token_id", token, 0)
        self._check_beams()

    def _check_beams(self) -> None:
        if self.num_beams == 1:
            return
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"generate: num_return_sequences is {self.num_return_sequences} but num_beams is {self.num_beams}; beam "
                "search returns at most one sequence per beam - raise num_beams"
            )
        if self.temperature not in (0, 1) or self.top_k or self.top_p != 1:
            raise ValueError(
                f"generate: num_beams={self.num_beams} with temperature={self.temperature}, top_k={self.top_k}, "
                f"top_p={self.top_p}; beam search draws nothing - leave these at their defaults"
            )
        if abs(self.length_penalty) * math.log(self.max_new_tokens) > 700:  # exp(709) is the largest double
            raise ValueError(
                f"generate: length_penalty is {self.length_penalty}; {self.max_new_tokens} new tokens to this power is "
                "beyond the range of a float - use something between -2 and 2"
            )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a sequence."""
        eos = self.eos_token_id
        return eos if isinstance(eos, tuple) else () if eos is None else (eos,)

    @classmethod
    def of(cls, **options: Any) -> GenerationConfig:
        """The config with these options; an unknown one is an error that lists what there is."""
        names = [f.name for f in fields(cls)]
        for name in options:
            if name not in names:
                raise TypeError(f"generate: unknown option {name!r}; expected some of {', '.join(names)}")
        return cls(**options)


def _check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"generate: {name} is {value!r}; expected an int")
    if value < least:
        raise ValueError(f"generate: {name} is {value}; expected at least {least}")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"generate: {name} is {value!r}; expected a number")
    if not math.isfinite(value):
        raise ValueError(f"generate: {name} is {value}; expected a finite number")
