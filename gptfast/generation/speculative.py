"""Speculative decoding: drafts of several tokens that the model checks in one step.

The text is that of plain decoding, token for token. A sampled token is the argmax of logits / temperature + Gumbel noise,
and the noise is a function of (seed, stream, position), so the model's choice at a position is fixed before anything is
drafted. A draft token is kept if it is that choice. An assistant model samples with the same noise, so it agrees as often
as a drafter can that does not know the model (Daliri et al., "Coupling without communication and drafter-invariant
speculative decoding", arXiv 2408.07978).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Protocol

from gptfast.generation.config import GenerationConfig
from gptfast.generation.request import Sequence
from gptfast.generation.runner import LanguageModel, virtual_tokens
from gptfast.generation.sampling import SamplingContext, choose


class Drafter(Protocol):
    """Proposes the next tokens of sequences."""

    def propose(self, slots: Seq[int], contexts: Seq[SamplingContext], counts: Seq[int]) -> list[list[int]]:
        """At most counts[i] tokens that may follow contexts[i].tokens; slots[i] identifies the sequence between calls."""
        ...

    def free(self, slot: int) -> None:
        """Forget a sequence."""
        ...


class Speculation:
    """The drafts for the sequences of a scheduler: from prompt lookup, from an assistant model, or where text repeats.

    Args:
        assistant: a model with the vocabulary of `model`; None: only prompt lookup.
        model: the model that checks the drafts.
        max_slots, max_len: of the runner of `model`.
        exact: whether that runner gives the same bits however tokens are split over calls.
    Raises:
        TypeError, ValueError: the assistant does not suit the model.
    """

    def __init__(
        self,
        assistant: LanguageModel | None,
        model: LanguageModel,
        max_slots: int,
        max_len: int,
        exact: bool = False,
    ) -> None:
        self._lookup, self._repeats, self._exact = PromptLookup(), Repeats(), exact
        self._assistant: Assistant | None = None
        if assistant is not None:
            check_assistant(assistant, model)
            self._assistant = Assistant(assistant, max_slots, max_len)

    def is_used(self, sequences: Seq[Sequence]) -> bool:
        """Whether any of the sequences asks for drafts in every step."""
        return self._assistant is not None or any(s.request.config.prompt_lookup_num_tokens for s in sequences)

    def drafts(self, sequences: Seq[Sequence]) -> list[list[int]]:
        """A draft for each sequence; empty before its prompt has been read, and where it has no room."""
        drafts: list[list[int]] = [[] for _ in sequences]
        by_drafter: dict[Drafter, list[int]] = {}
        counts = [self._count(sequence) for sequence in sequences]
        for i, sequence in enumerate(sequences):
            if counts[i] > 0:
                by_drafter.setdefault(self._drafter(sequence), []).append(i)
        for drafter, which in by_drafter.items():
            slots, contexts = [sequences[i].slot for i in which], [sequences[i].context for i in which]
            for i, draft in zip(which, drafter.propose(slots, contexts, [counts[i] for i in which]), strict=True):
                drafts[i] = draft
        return drafts

    def _drafter(self, sequence: Sequence) -> Drafter:
        if sequence.request.config.prompt_lookup_num_tokens:
            return self._lookup
        return self._repeats if self._assistant is None else self._assistant

    def _count(self, sequence: Sequence) -> int:
        """The longest draft that a sequence may have."""
        config, wanted = sequence.request.config, sequence.request.config.prompt_lookup_num_tokens
        if not wanted and self._assistant is not None:
            wanted = config.num_assistant_tokens
        elif not wanted and self._exact and sequence.request.draft_repeats:
            wanted = LONGEST_DRAFT
        if not wanted or not sequence.num_new:
            return 0
        return min(
            wanted, config.max_new_tokens - sequence.num_new - 1, sequence.request.max_len - len(sequence.tokens)
        )

    def free(self, slot: int) -> None:
        """Forget a sequence."""
        self._repeats.free(slot)
        if self._assistant is not None:
            self._assistant.free(slot)


class PromptLookup:
    """Drafts what followed the latest earlier occurrence of the last tokens, as transformers' prompt lookup."""

    def propose(self, slots: Seq[int], contexts: Seq[SamplingContext], counts: Seq[int]) -> list[list[int]]:
        return [
            look_up(context.tokens, context.config.max_matching_ngram_size, count)
            for context, count in zip(contexts, counts, strict=True)
        ]

    def free(self, slot: int) -> None:
        pass


def look_up(tokens: Seq[int], longest: int, count: int, shortest: int = 1) -> list[int]:
    """The `count` tokens after the latest earlier occurrence of the last `longest` tokens, or of fewer, at least `shortest`."""
    tokens = list(tokens)
    for n in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        end = tokens[-n:]
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == end:
                return tokens[start + n : start + n + count]
    return []


REPEATED = 3  # number of last tokens that must have occurred before
FIRST_DRAFT, LONGEST_DRAFT = 3, 7  # the row that is checked anyway and seven more are one tile of the engine's products
MOST_WAITS = 8


@dataclass
class _Repetition:
    """What is known of one sequence: its last draft, how long the next one may be, and how many calls it waits."""

    begin: int = 0
    draft: list[int] = field(default_factory=list)
    length: int = FIRST_DRAFT
    failures: int = 0
    waits: int = 0


class Repeats:
    """Drafts where a text repeats itself: longer while the drafts are right, and rarely while they are wrong.

    Between drafts the runner takes many tokens a call, so that a text without repetitions costs one search a call.
    """

    def __init__(self) -> None:
        self._of: dict[int, _Repetition] = {}

    def propose(self, slots: Seq[int], contexts: Seq[SamplingContext], counts: Seq[int]) -> list[list[int]]:
        return [
            self._draft(self._of.setdefault(slot, _Repetition()), context.tokens, count)
            for slot, context, count in zip(slots, contexts, counts, strict=True)
        ]

    def _draft(self, state: _Repetition, tokens: Seq[int], count: int) -> list[int]:
        if state.draft:
            _judge(state, tokens)
        if state.waits:
            state.waits -= 1
            return []
        length = min(count, state.length)
        found = look_up(tokens, REPEATED, length, REPEATED)  # shorter than that where it reaches the end: a period
        state.begin, state.draft = len(tokens), (found * length)[:length]
        return state.draft

    def free(self, slot: int) -> None:
        self._of.pop(slot, None)


def _judge(state: _Repetition, tokens: Seq[int]) -> None:
    """Learn from what came in the place of the last draft."""
    came = list(tokens[state.begin : state.begin + len(state.draft)])
    if came == state.draft:
        state.length, state.failures = LONGEST_DRAFT, 0
    else:
        state.length = FIRST_DRAFT
    if came[0] != state.draft[0]:
        state.failures += 1
        state.waits = min(2**state.failures, MOST_WAITS)
    state.draft = []


class Assistant:
    """Drafts with a smaller model of the same vocabulary.

    Args:
        model: the assistant.
        max_slots: number of sequences at a time.
        max_len: number of positions of a sequence; beyond its own block_size the assistant drafts nothing.
    """

    def __init__(self, model: LanguageModel, max_slots: int, max_len: int) -> None:
        self._limit = min(max_len, model.config.block_size - virtual_tokens(model))
        self._runner = model.runner(max_slots, self._limit)
        self._slot_of: dict[int, int] = {}  # the assistant's slot for each slot of the model's runner
        self._held: dict[int, list[int]] = {}  # the tokens in it

    def propose(self, slots: Seq[int], contexts: Seq[SamplingContext], counts: Seq[int]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in slots]
        for slot, context in zip(slots, contexts, strict=True):
            self._drop_rejected(slot, context.tokens)
        for n in range(max(counts, default=0)):
            active = [i for i, count in enumerate(counts) if len(drafts[i]) == n < count and self._fits(contexts[i], n)]
            if not active:
                break
            so_far = [[*contexts[i].tokens, *drafts[i]] for i in active]
            new = [tokens[len(self._held[slots[i]]) :] for i, tokens in zip(active, so_far, strict=True)]
            logits = self._runner.extend([self._slot_of[slots[i]] for i in active], new)
            asked = [replace(contexts[i], tokens=tokens) for i, tokens in zip(active, so_far, strict=True)]
            for i, tokens, token in zip(active, so_far, choose(logits, asked, self._runner.sample), strict=True):
                self._held[slots[i]] = tokens
                if isinstance(token, int):  # else the assistant's logits are unusable: no draft
                    drafts[i].append(token)
        return drafts

    def _fits(self, context: SamplingContext, drafted: int) -> bool:
        return len(context.tokens) + drafted <= self._limit

    def _drop_rejected(self, slot: int, tokens: Seq[int]) -> None:
        """Truncate the assistant's slot to what it has in common with the sequence."""
        if slot not in self._slot_of:
            self._slot_of[slot], self._held[slot] = self._runner.allocate()[0], []
        held = self._held[slot]
        same = 0
        while same < min(len(held), len(tokens) - 1) and held[same] == tokens[same]:
            same += 1
        self._runner.truncate(self._slot_of[slot], same)
        self._held[slot] = held[:same]

    def free(self, slot: int) -> None:
        if slot in self._slot_of:
            self._runner.free(self._slot_of.pop(slot))
            del self._held[slot]


def check_assistant(assistant: LanguageModel, model: LanguageModel, config: GenerationConfig | None = None) -> None:
    """Raise TypeError or ValueError where `assistant` cannot draft for `model`, or `config` asks for other drafts."""
    if not hasattr(assistant, "runner"):
        raise TypeError(f"generate: assistant_model is a {type(assistant).__name__}; expected a GPT or a compiled one")
    if config is not None and config.num_beams > 1:
        raise ValueError(f"generate: assistant_model with num_beams={config.num_beams}; leave one out")
    if config is not None and config.prompt_lookup_num_tokens:
        raise ValueError(
            f"generate: assistant_model with prompt_lookup_num_tokens={config.prompt_lookup_num_tokens}; only one of them can "
            "draft - leave one out"
        )
    theirs, ours = assistant.config.vocab_size, model.config.vocab_size
    if theirs != ours:
        raise ValueError(
            f"generate: assistant_model has a vocabulary of {theirs} and the model one of {ours}; both must have the same "
            "tokens"
        )
