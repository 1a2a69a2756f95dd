"""GenerationConfig: every choice of a generation, checked when it is made. Names and meanings as in transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from gptfast import rng
from gptfast.generation.checks import check_int, check_number, checked_bias, checked_tokens
from gptfast.ops.streams import draw_seed

LEAST_TEMPERATURE = 2**-126  # below, `ops.sample` takes the most likely token
MAX_NEW_TOKENS = 64  # unless said otherwise, and as far as the model has room
_OPEN: Any = None  # not given: `__post_init__` decides, or, where the prompts do, `with_room`
_DRAWING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # what they are where they are not given


@dataclass(frozen=True)
class GenerationConfig:
    """How text is continued. By default greedily: the most likely token each time, as in transformers.

    Args:
        max_new_tokens: at most so many tokens are added to each prompt; None: 64, or what room the block_size leaves behind
            the longest prompt of the call, whichever is less.
        max_length: the same, the longest prompt included (in a tensor its padding too). Where both are given,
            max_new_tokens counts, as in transformers.
        do_sample: whether tokens are drawn. None: they are if one of temperature (not 0), top_k, top_p, min_p and seed is
            given, and there are no beams.
        temperature: divides the logits; 0 takes the most likely token (greedy). None: 1.
        top_k: draw among the k most likely tokens; 0 or None: all.
        top_p: draw among the fewest most likely tokens whose mass reaches p; in (0, 1]. None: 1.
        min_p: draw among tokens at least min_p times as likely as the most likely one; in [0, 1]. None: 0.
        seed: of the draws, in [0, 2**64). None: every call draws one from torch's CPU generator, so that
            `torch.manual_seed` decides the text and two calls differ, and each prompt has draws of its own. With a seed the
            same call writes the same text again: a token depends on (seed, its position, number of the return sequence, logits)
            and on nothing else in the batch. Logits can differ in their last bits with the number of rows, as the
            matrix library rounds differently, which tips a token where two are all but tied (rare; more so in bf16);
            under GPTFAST_GEMM=own they do not on the CPU.
        eos_token_id: an id, or a list of several: a sequence ends with the first of them that comes. None: only
            max_new_tokens ends it.
        pad_token_id: what rows of a tensor that have ended are filled up with; None: the first eos_token_id, or 0. In a
            tensor without attention_mask it is padding where a row begins or ends with it, if there are end tokens and it is
            none.
        stop_strings: a text, or several: a sequence ends with the token that completes one in the new text; needs
            `tokenizer=` beside it.
        repetition_penalty: the score of a token that the sequence or its prompt holds is divided by it where above 0,
            multiplied where below (Keskar et al., arXiv 1909.05858); above 1 avoids repetition.
        presence_penalty: is taken from the score of every token that the new text holds, as OpenAI's; the prompt does not
            count. Above 0 speaks for new tokens, below for those that are there.
        frequency_penalty: the same for every time that the new text holds it.
        no_repeat_ngram_size: n > 0: no n tokens in a row come twice, the prompt included; 0: no such rule.
        logit_bias: {token id: what is added to its logit}; -inf, or what is below the range of 32 bits, bans it.
        suppress_tokens: ids that are never chosen.
        usable_vocab: choose among the first so many ids of the vocabulary only (one padded for speed has more than mean
            anything); 0: among all. `tokenizer=` beside it excludes the ids for which that has no token by itself, but for
            those with a logit_bias above 0 and the end tokens.
        num_return_sequences: continuations of each prompt; with beams: the best so many.
        num_beams: beam search over so many beams when > 1. With do_sample=True the beams are drawn, without replacement.
        num_beam_groups: split the beams into so many groups, each searching with a penalty of diversity_penalty on a
            token for every beam of an earlier group that takes it in the same step (Vijayakumar et al., arXiv 1610.02424).
        diversity_penalty: see num_beam_groups.
        length_penalty: with beams: an ended one is ranked by its log-probability / new tokens ** length_penalty, so
            that above 0 favours long ones.
        early_stopping: with beams: True: stop when num_beams sequences have ended; False: when the best running beam,
            at its present length, could not beat the worst ended one; "never": when it could not at any length.
        overflow: when prompt and new tokens exceed the block_size: "error" beforehand, or "slide": whenever the
            context is full its older half is forgotten and the rest read again.
        prompt_lookup_num_tokens: guess so many tokens at a time where the last ones occurred before, and check them in
            one step; the text is the same, sooner. 0: never.
        max_matching_ngram_size: how many last tokens prompt lookup tries to find, at most.
        num_assistant_tokens: how many tokens an `assistant_model=` guesses at a time.
    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, or two that contradict each other.
    """

    max_new_tokens: int = _OPEN
    max_length: int | None = None
    do_sample: bool | None = None
    temperature: float = _OPEN
    top_k: int = _OPEN
    top_p: float = _OPEN
    min_p: float = _OPEN
    seed: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    stop_strings: str | tuple[str, ...] | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    usable_vocab: int = 0
    num_return_sequences: int = 1
    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    overflow: str = "error"
    prompt_lookup_num_tokens: int = 0
    max_matching_ngram_size: int = 2
    num_assistant_tokens: int = 5

    def __post_init__(self) -> None:
        self._decide_drawing()
        for name, least in _INTS.items():
            if name not in _MAY_BE_NONE or getattr(self, name) is not None:
                check_int(name, getattr(self, name), least)
        for name in _NUMBERS:
            check_number(name, getattr(self, name))
        self._check_ranges()
        self._check_ends()
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", checked_bias(self.logit_bias))
        if self.suppress_tokens is not None:
            object.__setattr__(self, "suppress_tokens", checked_tokens(self.suppress_tokens))
        self._check_drawing()
        if self.num_beams > 1:
            self._check_beams()
        elif self.num_beam_groups > 1 or self.diversity_penalty:
            raise ValueError(
                f"generate: num_beam_groups={self.num_beam_groups}, diversity_penalty={self.diversity_penalty} with one "
                "beam; they are for beam search - set num_beams, or leave them out"
            )

    def _decide_drawing(self) -> None:
        """Fill in what is not given, and whether tokens are drawn."""
        asked = self.seed is not None or any(getattr(self, name) is not None for name in _DRAWING)
        for name, value in _DRAWING.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.do_sample is None and self.num_beams == 1 and self.temperature != 0:
            object.__setattr__(self, "do_sample", asked)

    def _check_ranges(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"generate: temperature is {self.temperature}; expected a number >= 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p is {self.top_p}; expected 0 < top_p <= 1 (1 keeps all tokens)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"generate: min_p is {self.min_p}; expected 0 <= min_p <= 1 (0 keeps all tokens)")
        if self.repetition_penalty <= 0:
            raise ValueError(
                f"generate: repetition_penalty is {self.repetition_penalty}; expected a number > 0 (1 is none)"
            )
        if self.diversity_penalty < 0:
            raise ValueError(f"generate: diversity_penalty is {self.diversity_penalty}; expected a number >= 0")
        if self.seed is not None:
            rng.check_counter("generate", "seed", self.seed, 64)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"generate: early_stopping is {self.early_stopping!r}; expected True, False or 'never'")
        if self.overflow not in ("error", "slide"):
            raise ValueError(f"generate: overflow is {self.overflow!r}; expected 'error' or 'slide'")

    def _check_ends(self) -> None:
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for token in self.eos_ids:
            check_int("eos_token_id", token, 0)
        stops = self.stop_strings
        stops = (stops,) if isinstance(stops, str) else () if stops is None else stops
        if not isinstance(stops, (tuple, list)):
            raise TypeError(f"generate: stop_strings is {stops!r}; expected a text, or a list of texts")
        for text in stops:
            if not isinstance(text, str) or not text:
                raise ValueError(f"generate: stop_strings holds {text!r}; expected texts of at least one character")
        object.__setattr__(self, "stop_strings", tuple(stops))

    def _check_drawing(self) -> None:
        """Drawing and its opposite were not both asked for."""
        if self.do_sample not in (None, True, False):
            raise TypeError(f"generate: do_sample is {self.do_sample!r}; expected True, False or None")
        if self.do_sample and self.temperature == 0:
            raise ValueError(
                "generate: do_sample=True with temperature=0, which draws nothing; raise the temperature or leave "
                "do_sample out"
            )
        if self.do_sample is False and (self.temperature not in (0, 1) or self._cuts()):
            raise ValueError(
                f"generate: do_sample=False with {self._drawing_options()}; without drawing these mean nothing - leave "
                "them or do_sample out"
            )
        if self.num_return_sequences > self.num_beams == 1 and self.do_sample is False and self.temperature != 0:
            raise ValueError(
                f"generate: num_return_sequences is {self.num_return_sequences} without drawing, which writes the same text "
                "each time; give do_sample=True, a temperature or a seed, or as many num_beams"
            )

    def _check_beams(self) -> None:
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"generate: num_return_sequences is {self.num_return_sequences} but num_beams is {self.num_beams}; beam "
                "search returns at most one sequence per beam - raise num_beams"
            )
        if not self.do_sample and (self.temperature not in (0, 1) or self._cuts()):
            raise ValueError(
                f"generate: num_beams={self.num_beams} with {self._drawing_options()}; beam search draws nothing - leave "
                "these at their defaults, or set do_sample=True"
            )
        if abs(self.length_penalty) * math.log(self.max_new_tokens or 1) > 700:  # exp(709) is the largest double
            raise ValueError(
                f"generate: length_penalty is {self.length_penalty}; {self.max_new_tokens} new tokens to this power is "
                "beyond the range of a float - use something between -2 and 2"
            )
        self._check_groups()
        if self.overflow == "slide":
            raise ValueError(
                "generate: overflow='slide' with beams; beams must fit the block_size - use overflow='error'"
            )
        if self.prompt_lookup_num_tokens:
            raise ValueError(
                f"generate: prompt_lookup_num_tokens={self.prompt_lookup_num_tokens} with num_beams={self.num_beams}; "
                "guessed tokens serve one sequence, not beams - leave one out"
            )

    def _check_groups(self) -> None:
        groups = self.num_beam_groups
        if self.num_beams % groups:
            raise ValueError(
                f"generate: num_beams is {self.num_beams} and num_beam_groups {groups}; expected a multiple - every group "
                "has equally many beams"
            )
        if groups > 1 and self.do_sample:
            raise ValueError(f"generate: num_beam_groups={groups} with do_sample=True; diverse beams draw nothing")
        if (groups > 1) != (self.diversity_penalty > 0):
            raise ValueError(
                f"generate: num_beam_groups is {groups} and diversity_penalty {self.diversity_penalty}; groups need a "
                "penalty above 0, or they are all alike, and a penalty needs groups"
            )

    def _cuts(self) -> bool:
        return bool(self.top_k or self.top_p != 1 or self.min_p)

    def _drawing_options(self) -> str:
        names = ["temperature", "top_k", "top_p"] + ["min_p"] * bool(self.min_p)
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn, and not the most likely taken."""
        return bool(self.do_sample) and self.temperature >= LEAST_TEMPERATURE

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a sequence."""
        eos = self.eos_token_id
        return eos if isinstance(eos, tuple) else () if eos is None else (eos,)

    def with_room(self, width: int, longest: int, limit: int) -> GenerationConfig:
        """The config with a max_new_tokens.

        Args:
            width: of the longest prompt with its padding, which max_length counts.
            longest: tokens of the longest prompt.
            limit: the most positions.
        Raises:
            ValueError: max_length leaves no room.
        """
        if self.max_new_tokens is not None:
            return self if self.max_length is None else replace(self, max_length=None)
        if self.max_length is not None:
            if self.max_length <= width:
                raise ValueError(
                    f"generate: max_length is {self.max_length} and the longest prompt has {width} tokens; max_length counts "
                    "prompt and new tokens - raise it, or give max_new_tokens, which counts new ones alone"
                )
            return replace(self, max_new_tokens=self.max_length - width)
        room = MAX_NEW_TOKENS if self.overflow == "slide" else min(MAX_NEW_TOKENS, limit - longest)
        return replace(self, max_new_tokens=max(1, room))  # 1 where there is no room: `check_prompt` says so

    def with_seed(self) -> GenerationConfig:
        """The config with a seed, if it draws: one from torch's generator where none was given."""
        return replace(self, seed=draw_seed()) if self.draws and self.seed is None else self

    @classmethod
    def of(cls, **options: Any) -> GenerationConfig:
        """The config with these options; an unknown one is an error that lists what there is."""
        names = [f.name for f in fields(cls)]
        for name in options:
            if name not in names:
                raise TypeError(f"generate: unknown option {name!r}; expected some of {', '.join(names)}")
        return cls(**options)


_INTS = {  # and the least that each may be
    "max_new_tokens": 1,
    "max_length": 1,
    "pad_token_id": 0,
    "top_k": 0,
    "num_return_sequences": 1,
    "num_beams": 1,
    "num_beam_groups": 1,
    "usable_vocab": 0,
    "no_repeat_ngram_size": 0,
    "prompt_lookup_num_tokens": 0,
    "max_matching_ngram_size": 1,
    "num_assistant_tokens": 1,
}
_MAY_BE_NONE = ("max_new_tokens", "max_length", "pad_token_id")
_NUMBERS = (
    *("temperature", "top_p", "min_p", "length_penalty", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    "diversity_penalty",
)
