"""The tree of a beam search: every candidate, and which of them were kept."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch

from gptfast._checks import check_count
from gptfast.generation.runner import LanguageModel, single_threaded_torch, virtual_tokens
from gptfast.generation.textless import likeliest


class Beam(NamedTuple):
    """A node of the tree of a beam search. parent: its index in the list, -1 for the prompt. logprob: of the whole path. kept:
    whether the search went on from it, or ended with it."""

    parent: int
    depth: int
    token: int
    logprob: float
    kept: bool


def beam_tree(model: LanguageModel, ids: Sequence[int], beams: int = 3, steps: int = 4) -> list[Beam]:
    """The candidates of a beam search, level by level: each kept path is continued by its `beams` likeliest tokens, and of all
    these the `beams` likeliest paths are kept.

    Raises:
        TypeError, ValueError: beams or steps out of range, or no room in the context.
    """
    pieces = beam_tree_in_pieces(model, ids, beams, steps)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def beam_tree_in_pieces(
    model: LanguageModel,
    ids: Sequence[int],
    beams: int,
    steps: int,
    tokenizer: Any = None,
    adapter: str | None = None,
) -> Generator[None, None, list[Beam]]:
    """`beam_tree`, a level at a time, so that other work on the model can run in between. The arguments are checked at once.

    Args:
        tokenizer: excludes ids without text.
        adapter: of the model, "__base__" for none; None: the active ones.
    """
    block = model.config.block_size - virtual_tokens(model, adapter)
    check_count("beam_tree", "beams", beams, 1, model.config.vocab_size, " (the vocabulary)")
    check_count("beam_tree", "steps", steps, 1, block - len(ids), " (the room in the context)")
    return _levels(model, list(ids), beams, steps, tokenizer, adapter)


def _levels(
    model: LanguageModel, ids: list[int], beams: int, steps: int, tokenizer: Any, adapter: str | None
) -> Generator[None, None, list[Beam]]:
    runner = model.runner(beams, len(ids) + steps)
    slots, tokens = runner.allocate(1, adapter), [ids]
    tree: list[Beam] = []
    nodes: list[tuple[int, float]] = [(-1, 0.0)]  # of each slot: its node, and the log-probability of the path
    for depth in range(1, steps + 1):
        if depth > 1:
            yield
        with single_threaded_torch(runner), torch.inference_mode():
            logprobs = runner.extend(slots, tokens).float().log_softmax(-1)
            values, found = likeliest(logprobs, beams, tokenizer)
        made = [
            (parent, token, total + value)
            for parent, (row, some) in enumerate(zip(found.tolist(), values.tolist(), strict=True))
            for token, value, total in ((t, v, nodes[parent][1]) for t, v in zip(row, some, strict=True))
        ]
        best = sorted(range(len(made)), key=lambda n: -made[n][2])[:beams]
        first = len(tree)
        tree += [Beam(nodes[of][0], depth, token, total, n in best) for n, (of, token, total) in enumerate(made)]
        if len(slots) < len(best):
            slots += runner.fork(slots[0], len(best) - len(slots))
        runner.copy(slots, [slots[made[n][0]] for n in best])
        tokens, nodes = [[made[n][1]] for n in best], [(first + n, made[n][2]) for n in best]
    return tree
