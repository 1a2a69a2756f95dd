"""Writing of checkpoints: at once, or in a background thread while training goes on."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

from gptfast._large_files import paced
from gptfast.training.copies import Copies
from gptfast.training.ranks import RankLostError

Job = Callable[[], None]
_REST = 50  # seconds that a writer rests for one of the processor: it then costs a training that has all cores 2%


class Saver:
    """Writes the checkpoints of a run, one at a time.

    A save in the background takes effect when it is complete; a kill before that leaves the previous checkpoint. Its writing
    begins after the next step, which has waited for the copies already.

    Args:
        background: write in a thread.
    """

    def __init__(self, background: bool) -> None:
        self.background = background
        self._copies = Copies()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._begins = threading.Event()
        self._steps = 0  # since the save in the background was asked for
        self._awaited = threading.Event()  # nothing is gained by writing slowly

    def begin(self, size: int = 0) -> Copies | None:
        """Wait for the save before, whose error is raised; returns the memory for the copies of the next one, None: it needs none.

        size: bytes of the copies, for which memory is to be taken from the system now.
        """
        if not self.background:
            return None
        self.finish()
        self._copies.begin(size)
        return self._copies

    def save(self, job: Job) -> None:
        """Run a job that writes a checkpoint. In the background it must write copies, as training changes the originals.

        Raises:
            Whatever the job raises, or in the background what the one before it raised.
        """
        if not self.background:
            return job()
        self.finish()
        self._awaited.clear()
        self._begins.clear()
        self._steps = 0
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, job: Job) -> None:
        _yield_to_training()
        self._begins.wait()
        try:
            with paced(lambda seconds: self._awaited.wait(_REST * seconds)):
                job()
        except BaseException as error:  # raised where training can end
            self._error = error

    def before_step(self) -> None:
        """To be called before every step. Raises the error of a save in the background, if it failed."""
        self._steps += 1
        if self._steps > 1:
            self._begins.set()
        self._check()

    def _check(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self) -> None:
        """Wait for the save in the background. Raises its error, if it failed."""
        self._hurry()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._check()

    def _hurry(self) -> None:
        self._awaited.set()
        self._begins.set()

    def close(self, after: BaseException) -> None:
        """Wait for the save in the background after training failed with `after`; not if a rank is lost, which it would wait for."""
        self._hurry()
        if self._thread is not None and not isinstance(after, RankLostError):
            self._thread.join()


def _yield_to_training() -> None:
    """Give this thread, and those that it starts, only the time that training leaves.

    A step that has all cores waits for the slowest of its threads: what a writer takes from one core is lost on all.
    """
    if sys.platform == "linux":  # elsewhere the priority is of the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
