"""Many threads at one runner: each call checks and acts on the slots as the call before left them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch

from gptfast.backend import has_cpu_ops
from gptfast.engine.runner import empty_logits
from gptfast.generation.sampling import SamplingParams
from gptfast.generation.torch_runner import TorchRunner
from tests.support.engine_models import model_of

pytestmark = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
THREADS = 8
GREEDY = SamplingParams(0.0, 0, 1.0, 0, 0)


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
    runner, rows = compiled.runner(1, 64), [0]

    def use(n: int) -> None:
        if call == "extend":
            runner.extend(rows, [[1, 2]])
        else:
            runner.decode_steps(rows, rooms[n], 3, [GREEDY])

    runner.allocate()
    for _ in range(60):
        runner.truncate(0, 0)
        runner.extend(rows, [[1] * 62])
        raised = together(use)
        assert runner.lengths == [64]
        assert [error for error in raised if error is None] == [None]
        for error in raised:
            assert error is None or "slot 0 holds 64 positions and 2 more do not fit into max_len = 64" in str(error)


def test_threads_that_fork_and_free_get_slots_of_their_own() -> None:
    runner = model_of("gpt2").compile_for_inference("int8", threads=1).runner(THREADS)
    (first,) = runner.allocate()
    runner.extend([first], [[1, 2, 3]])
    for _ in range(100):
        got: list[list[int]] = [[] for _ in range(THREADS)]

        def use(n: int, got: list[list[int]] = got) -> None:
            got[n] = runner.fork(first, 2)

        raised = together(use)
        rows = [row for pair in got for row in pair]
        assert sorted(rows) == list(range(1, 7)) and sum(error is not None for error in raised) == THREADS - 3
        assert all(error is None or "2 more slots, but 1 of 8 are free" in str(error) for error in raised)
        raised = together(lambda n, rows=rows: runner.free(rows[n % 6]), 12)
        assert sum(error is None for error in raised) == 6
        assert runner.lengths == [3] + [0] * 7


def test_any_calls_at_once_leave_rows_that_compute_what_they_hold() -> None:
    """What is refused is a ValueError, or a RuntimeError where there is no room."""
    compiled = model_of("gpt2").compile_for_inference("int8", threads=1)
    runner = compiled.runner(4, 80)

    def act(chance: random.Random) -> None:
        action = chance.choice(["allocate", "fork", "free", "truncate", "copy", "extend", "decode"])
        rows = [chance.randrange(4) for _ in range(chance.randint(1, 2))]
        if action == "allocate":
            runner.allocate()
        elif action == "fork":
            runner.fork(rows[0], 1)
        elif action == "free":
            runner.free(rows[0])
        elif action == "truncate":
            runner.truncate(rows[0], chance.randrange(80))
        elif action == "copy":
            runner.copy(rows, rows[::-1])
        elif action == "extend":
            runner.extend(rows, [[5] * chance.choice([1, 7, 30]) for _ in rows])
        else:
            runner.decode_steps(rows, empty_logits(len(rows), 301).zero_(), 9, [GREEDY] * len(rows))

    def use(n: int) -> None:
        chance = random.Random(n)
        for _ in range(60):
            with suppress(ValueError, RuntimeError):
                act(chance)

    assert together(use) == [None] * THREADS
    assert all(0 <= length <= 80 for length in runner.lengths)
    lengths = runner.lengths
    for row in range(4):
        if 0 < lengths[row] < 80:
            assert runner.extend([row], [[7]]).isfinite().all()


@pytest.mark.parametrize("call", ["extend", "decode_steps", "copy"])
def test_a_slot_is_there_once_in_a_call(call: str) -> None:
    runner = model_of("gpt2").compile_for_inference("int8").runner(4)
    rows = runner.allocate(2)
    logits = runner.extend(rows, [[1], [2]])
    twice = [rows[0], rows[1], rows[0]]
    room = empty_logits(3, 301).zero_()
    uses = {
        "extend": (lambda: runner.extend(twice, [[1]] * 3), "distinct slots"),
        "decode_steps": (
            lambda: runner.decode_steps(twice, room, 2, [GREEDY] * 3),
            "decode_steps: slot 0 is given twice; expected distinct slots",
        ),
        "copy": (lambda: runner.copy(twice, twice), "distinct slots"),
    }
    use, message = uses[call]
    with pytest.raises(ValueError, match=message):
        use()
    native = {
        "extend": lambda: runner._cache.extend(twice, [1] * 3, [1] * 3, True, _capsule(room)),
        "decode_steps": use,
        "copy": lambda: runner._cache.copy(twice, twice),
    }[call]
    with pytest.raises(ValueError, match=f"{call}: slot 0 is given twice"):
        native()
    assert runner.lengths == [1, 1, 0, 0] and logits.isfinite().all()


def _capsule(panels: torch.Tensor) -> object:
    width = (panels.shape[1] + 31) // 32 * 32
    return torch.utils.dlpack.to_dlpack(panels.as_strided((panels.shape[0], width), panels.stride()))


def test_the_same_of_a_model_in_torch() -> None:
    """`TorchRunner`: threads take turns, and rows are refused as the engine refuses them."""
    with torch.inference_mode():
        runner = TorchRunner(model_of("gpt2"), 3, 64)
        rows = runner.allocate(2)
        for use, message in (
            (lambda: runner.extend([0, 0], [[1], [2]]), "extend: slots .0, 0.; expected distinct slots"),
            (lambda: runner.extend([2], [[1]]), "extend: slot 2 is not in use"),
            (lambda: runner.copy([0, 0], [1, 1]), "copy: slots .0, 0.; expected distinct slots"),
            (lambda: runner.copy([0], [2]), "copy: slot 2 is not in use"),
            (lambda: runner.fork(2, 1), "fork: slot 2 is not in use"),
            (lambda: runner.truncate(0, 1), "truncate: length is 1; slot 0 holds 0 positions"),
            (lambda: runner.free(2), "free: slot 2 is not in use"),
        ):
            with pytest.raises(ValueError, match=message):
                use()
        assert runner.allocate() == [2], "what was refused took no row"
        runner.extend(rows[:1], [[1] * 62])
    raised = together(lambda n: runner.extend(rows[:1], [[1, 2]]))
    assert runner.lengths == [64, 0, 0] and sum(error is None for error in raised) == 1
