"""Many threads at one set of sequences: each call checks and acts on the rows as the one before left them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch

from gptfast.backend import has_cpu_ops
from gptfast.engine.runner import empty_logits
from gptfast.generation.runner import Sampling
from gptfast.generation.torch_runner import CachedSequences
from tests.support.engine_models import model_of

pytestmark = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
THREADS = 8
GREEDY = Sampling(0.0, 0, 1.0, 0, 0)


def together(use: Callable[[int], object], threads: int = THREADS) -> list[Exception | None]:
    """Run use(n) on every thread n at the same moment; what each raised."""
    barrier = threading.Barrier(threads)
    raised: list[Exception | None] = [None] * threads

    def run(n: int) -> None:
        barrier.wait()
        try:
            use(n)
        except Exception as error:  # the test looks at each
            raised[n] = error

    running = [threading.Thread(target=run, args=(n,)) for n in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return raised


@pytest.mark.parametrize("call", ["extend", "decode"])
def test_threads_cannot_fill_a_row_beyond_its_end(call: str) -> None:
    compiled = model_of("gpt2").compile_for_inference("int8", threads=1)
    rooms = [empty_logits(1, 301).zero_() for _ in range(THREADS)]
    sequences, rows = compiled.sequences(1, 64), [0]

    def use(n: int) -> None:
        if call == "extend":
            sequences.extend(rows, [[1, 2]])
        else:
            sequences.decode(rows, rooms[n], steps=3, more=False, samplings=[GREEDY])

    sequences.add()
    for _ in range(60):
        sequences.truncate(0, 0)
        sequences.extend(rows, [[1] * 62])
        raised = together(use)
        assert sequences.lengths == [64]
        assert [error for error in raised if error is None] == [None]
        for error in raised:
            assert error is None or "row 0 holds 64 positions and 2 more do not fit into max_len = 64" in str(error)


def test_threads_that_add_and_release_get_rows_of_their_own() -> None:
    sequences = model_of("gpt2").compile_for_inference("int8", threads=1).sequences(THREADS)
    (like,) = sequences.add()
    sequences.extend([like], [[1, 2, 3]])
    for _ in range(100):
        got: list[list[int]] = [[] for _ in range(THREADS)]

        def use(n: int, got: list[list[int]] = got) -> None:
            got[n] = sequences.add(2, like=like)

        raised = together(use)
        rows = [row for pair in got for row in pair]
        assert sorted(rows) == list(range(1, 7)) and sum(error is not None for error in raised) == THREADS - 3
        assert all(error is None or "2 more rows do not fit, 1 of 8 are free" in str(error) for error in raised)
        raised = together(lambda n, rows=rows: sequences.release(rows[n % 6]), 12)
        assert sum(error is None for error in raised) == 6
        assert sequences.lengths == [3] + [0] * 7


def test_any_calls_at_once_leave_rows_that_compute_what_they_hold() -> None:
    """What is refused is a ValueError, or a RuntimeError where there is no room."""
    compiled = model_of("gpt2").compile_for_inference("int8", threads=1)
    sequences = compiled.sequences(4, 80)

    def act(chance: random.Random) -> None:
        action = chance.choice(["add", "release", "truncate", "reorder", "extend", "decode"])
        rows = [chance.randrange(4) for _ in range(chance.randint(1, 2))]
        if action == "add":
            sequences.add(1, like=chance.choice([None, *rows]))
        elif action == "release":
            sequences.release(rows[0])
        elif action == "truncate":
            sequences.truncate(rows[0], chance.randrange(80))
        elif action == "reorder":
            sequences.reorder(rows, rows[::-1])
        elif action == "extend":
            sequences.extend(rows, [[5] * chance.choice([1, 7, 30]) for _ in rows])
        else:
            logits, samplings = empty_logits(len(rows), 301).zero_(), [GREEDY] * len(rows)
            sequences.decode(rows, logits, steps=9, more=True, samplings=samplings)

    def use(n: int) -> None:
        chance = random.Random(n)
        for _ in range(60):
            with suppress(ValueError, RuntimeError):
                act(chance)

    assert together(use) == [None] * THREADS
    assert all(0 <= length <= 80 for length in sequences.lengths)
    lengths = sequences.lengths
    for row in range(4):
        if 0 < lengths[row] < 80:
            assert sequences.extend([row], [[7]]).isfinite().all()


@pytest.mark.parametrize("call", ["extend", "decode", "reorder"])
def test_a_row_is_there_once_in_a_call(call: str) -> None:
    sequences = model_of("gpt2").compile_for_inference("int8").sequences(4)
    rows = sequences.add(2)
    logits = sequences.extend(rows, [[1], [2]])
    twice = [rows[0], rows[1], rows[0]]
    room = empty_logits(3, 301).zero_()
    uses = {
        "extend": (lambda: sequences.extend(twice, [[1]] * 3), "different rows"),
        "decode": (
            lambda: sequences.decode(twice, room, steps=2, more=True, samplings=[GREEDY] * 3),
            "decode: row 0 is there twice; expected different rows",
        ),
        "reorder": (lambda: sequences.reorder(twice, twice), "rows without repeats"),
    }
    use, message = uses[call]
    with pytest.raises(ValueError, match=message):
        use()
    native = {
        "extend": lambda: sequences._cache.extend(twice, [1] * 3, [1] * 3, True, _capsule(room)),
        "decode": use,
        "reorder": lambda: sequences._cache.copy(twice, twice),
    }[call]
    with pytest.raises(ValueError, match=f"{call}: row 0 is there twice"):
        native()
    assert sequences.lengths == [1, 1, 0, 0] and logits.isfinite().all()


def _capsule(panels: torch.Tensor) -> object:
    width = (panels.shape[1] + 31) // 32 * 32
    return torch.utils.dlpack.to_dlpack(panels.as_strided((panels.shape[0], width), panels.stride()))


def test_the_same_of_a_model_in_torch() -> None:
    """`CachedSequences`: threads take turns, and rows are refused as the engine refuses them."""
    with torch.inference_mode():
        sequences = CachedSequences(model_of("gpt2"), 3, 64)
        rows = sequences.add(2)
        for use, message in (
            (lambda: sequences.extend([0, 0], [[1], [2]]), "extend: rows .0, 0.; expected different rows"),
            (lambda: sequences.extend([2], [[1]]), "extend: row 2 is not in use"),
            (lambda: sequences.reorder([0, 0], [1, 1]), "reorder: rows .0, 0.; expected different rows"),
            (lambda: sequences.reorder([0], [2]), "reorder: row 2 is not in use"),
            (lambda: sequences.add(1, like=2), "add: row 2 is not in use"),
            (lambda: sequences.truncate(0, 1), "truncate: length is 1; row 0 holds 0 positions"),
            (lambda: sequences.release(2), "release: row 2 is not in use"),
        ):
            with pytest.raises(ValueError, match=message):
                use()
        assert sequences.add() == [2], "what was refused took no row"
        sequences.extend(rows[:1], [[1] * 62])
    raised = together(lambda n: sequences.extend(rows[:1], [[1, 2]]))
    assert sequences.lengths == [64, 0, 0] and sum(error is None for error in raised) == 1
