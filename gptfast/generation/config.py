"""GenerationConfig: every choice of a generation, checked when it is made. Names and meanings as in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from gptfast._options import Real, Whole, default_of, describe_fields, option, options_of
from gptfast.generation.checks import check_int, check_number, check_ranges, checked_bias, checked_tokens
from gptfast.generation.combinations import check_combination

LEAST_TEMPERATURE = 2**-126  # below, `ops.sample` takes the most likely token
# The default lengths, as far as the model has room; the server's is OpenAI's 16 (`gptfast.serving.protocol`).
MAX_NEW_TOKENS = 64  # of a call from Python, which returns when all of the text is there
TEXT_TOKENS = 200  # of the command line and of batch files, whose texts are for reading: a paragraph
_OPEN: Any = None  # not given: `__post_init__` decides, or, where the prompts do, `with_room`
_DRAWING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # what they are where they are not given


@describe_fields
@dataclass(frozen=True)
class GenerationConfig:
    """How text is continued. By default greedily: the most likely token each time, as in transformers.

    With a seed the same call returns the same text: a token depends on (seed, its position, number of the return sequence,
    logits) and on nothing else in the batch. Without one every call draws a seed from torch's CPU generator:
    `torch.manual_seed` decides the text, two calls differ, and so do the draws of two prompts. Logits can differ in their
    last bits with the number of rows, because the matrix library rounds differently. That changes a token only where two
    are nearly equally likely (rare; more often in bf16), and never on the CPU under GPTFAST_GEMM=own.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, or two that contradict each other.
    """

    max_new_tokens: int = option(
        _OPEN,
        "Largest number of tokens to add to each prompt.",
        words=f"{MAX_NEW_TOKENS}, or fewer where the longest prompt leaves less room in the block_size",
        allowed=Whole(1),
    )
    max_length: int | None = option(
        None,
        "Largest number of tokens, the longest prompt included (in a tensor with its padding). `max_new_tokens` takes "
        "precedence, as in transformers.",
        allowed=Whole(1),
    )
    do_sample: bool | None = option(
        None,
        "Draw tokens instead of taking the most likely one; with `num_beams` the beams are drawn, without replacement.",
        words="True if `temperature` (not 0), `top_k`, `top_p`, `min_p` or `seed` is given and there are no beams",
    )
    temperature: float = option(
        _OPEN,
        "Divides the logits. Below 1: safer and more repetitive text. Above 1: more varied text. 0: always the most likely "
        "token (greedy).",
        words="1.0",
        allowed=Real(),
    )
    top_k: int = option(_OPEN, "Draw among the k most likely tokens; 0: among all.", words="0", allowed=Whole())
    top_p: float = option(
        _OPEN,
        "Draw among the fewest most likely tokens whose probabilities add up to p, in (0, 1].",
        words="1.0",
        allowed=Real(),
    )
    min_p: float = option(
        _OPEN,
        "Draw among tokens at least p times as likely as the most likely one, in [0, 1].",
        words="0.0",
        allowed=Real(),
    )
    seed: int | None = option(
        None,
        "Seed of the draws, in [0, 2**64): the same seed gives the same text.",
        words="drawn from torch's generator",
    )
    eos_token_id: int | tuple[int, ...] | None = option(
        None, "The end token, or several: a sequence ends with the first one. None: only max_new_tokens ends it."
    )
    pad_token_id: int | None = option(
        None,
        "Fills the rows of a tensor after their end. In a prompt without attention_mask it is padding at both ends of a row, "
        "if there are end tokens and it is none of them.",
        words="the first end token, or 0",
        allowed=Whole(),
    )
    stop_strings: str | tuple[str, ...] | None = option(
        None,
        "A text, or several: the token that completes one ends the sequence.",
    )
    repetition_penalty: float = option(
        1.0,
        "Divides the logit of every token of the prompt and the new text where it is above 0, and multiplies it where below "
        "(Keskar et al., arXiv 1909.05858). Above 1: less repetition.",
        allowed=Real(),
    )
    presence_penalty: float = option(
        0.0,
        "Subtracted once from the logit of every token that occurs in the new text (as OpenAI's). Above 0: less repetition; "
        "below 0: more.",
        allowed=Real(),
    )
    frequency_penalty: float = option(
        0.0,
        "Subtracted from the logit of a token for each time that it occurs in the new text (as OpenAI's).",
        allowed=Real(),
    )
    no_repeat_ngram_size: int = option(
        0, "n: no n tokens in a row occur twice, the prompt included; 0: no such rule.", allowed=Whole()
    )
    logit_bias: Mapping[int, float] | None = option(
        None, "{token id: number added to its logit}; -inf, or a number below the range of 32 bits, bans the token."
    )
    suppress_tokens: tuple[int, ...] | None = option(None, "Token ids that are never chosen.")
    usable_vocab: int = option(
        0,
        "Choose among the first ids of the vocabulary, this many, where it is padded; 0: among all. `tokenizer=` excludes the "
        "ids that have no token, except those with a logit_bias above 0 and the end tokens.",
        allowed=Whole(),
    )
    num_return_sequences: int = option(1, "Continuations of each prompt; with beams: the best ones.", allowed=Whole(1))
    num_beams: int = option(
        1, "Above 1: beam search for the most likely text over this many beams, instead of drawing.", allowed=Whole(1)
    )
    num_beam_groups: int = option(
        1,
        "Splits the beams into groups. Each group is searched with a penalty on a token for every beam of an earlier group "
        "that takes it in the same step (Vijayakumar et al., arXiv 1610.02424).",
        allowed=Whole(1),
    )
    diversity_penalty: float = option(0.0, "The penalty of num_beam_groups.", allowed=Real())
    length_penalty: float = option(
        1.0,
        "With beams: a finished beam is ranked by log-probability / new tokens ** length_penalty. Above 0 favours longer "
        "text, below 0 shorter.",
        allowed=Real(),
    )
    early_stopping: bool | str = option(
        False,
        "With beams. True: stop when num_beams sequences have ended. False: stop when the best running beam, at its present "
        'length, cannot beat the worst ended one. "never": stop when it cannot at any length.',
    )
    overflow: str = option(
        "error",
        "When prompt and new tokens exceed the block size: 'error' before the first token, or 'slide': each time the context "
        "is full, drop its older half and read the rest again.",
        allowed=("error", "slide"),
    )
    prompt_lookup_num_tokens: int = option(
        0,
        "Guess this many tokens at a time where the last tokens occurred before, and check them in one step: the same text, "
        "sooner. 0: never.",
        allowed=Whole(),
    )
    max_matching_ngram_size: int = option(
        2, "Largest number of last tokens that prompt lookup searches for.", allowed=Whole(1)
    )
    num_assistant_tokens: int = option(5, "Tokens that an `assistant_model=` guesses at a time.", allowed=Whole(1))

    def __post_init__(self) -> None:
        self._decide_drawing()
        for name, described in options_of(type(self)).items():
            value, allowed = getattr(self, name), described.allowed
            if isinstance(allowed, Whole) and (value is not None or default_of(type(self), name) is not None):
                check_int(name, value, allowed.least)
            elif isinstance(allowed, Real):
                check_number(name, value)
        check_ranges(self)
        self._check_ends()
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", checked_bias(self.logit_bias))
        if self.suppress_tokens is not None:
            object.__setattr__(self, "suppress_tokens", checked_tokens(self.suppress_tokens))
        check_combination(self)

    def _decide_drawing(self) -> None:
        """Fill in what is not given, and whether tokens are drawn."""
        asked = self.seed is not None or any(getattr(self, name) is not None for name in _DRAWING)
        for name, value in _DRAWING.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.do_sample is None and self.num_beams == 1 and self.temperature != 0:
            object.__setattr__(self, "do_sample", asked)

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

    @property
    def is_sampling(self) -> bool:
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
        if not self.is_sampling or self.seed is not None:
            return self
        from gptfast.ops.streams import draw_seed  # here, because the command line reads this module without torch

        return replace(self, seed=draw_seed())

    @classmethod
    def of(cls, **options: Any) -> GenerationConfig:
        """The config with these options; an unknown one is an error that lists what there is."""
        names = [f.name for f in fields(cls)]
        for name in options:
            if name not in names:
                raise TypeError(f"generate: unknown option {name!r}; expected some of {', '.join(names)}")
        return cls(**options)
