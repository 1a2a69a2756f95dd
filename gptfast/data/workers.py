"""Processes that work for this one: functions of `gptfast.data.work` are called there, on several cores.

They are started as programs of their own, not forked from this one and not by `multiprocessing`, which would run a user's
script again: `prepare` can be called from any place. A process ends when this one does, however that ends.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from gptfast._busy import usable_cores
from gptfast.data import work
from gptfast.tokenizer import Tokenizer

T = TypeVar("T")
R = TypeVar("R")

_PROGRAM = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
sys.path[:] = json.loads(sys.argv[1])
from gptfast.data.work import serve
serve()
"""


class Workers:
    """Threads of this process, or processes.

    Args:
        count: how many; None: one a core that this process may use.
        processes: False: threads, which start at once and share the memory of this process.
    """

    def __init__(self, count: int | None, processes: bool) -> None:
        self.count = count or usable_cores()
        self._wanted = processes and self.count > 1
        self._idle: deque[_Process] = deque()
        self._all: list[_Process] = []
        self._local: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            process.close()

    def use(self, tokenizer: Tokenizer) -> str:
        """The tokenizer of `encode`; returns who encodes, in words. Processes load it while this one goes on. A tokenizer of a
        class that is not ours stays in this process: its files may not tell all of it."""
        if self._wanted and type(tokenizer).__module__.startswith("gptfast.tokenizer."):
            self._start()
            files = tokenizer.files()
            for process in self._all:
                process.send("set_tokenizer", files)
            return f"{self.count} processes"
        self._local["tokenizer"] = tokenizer
        return f"{self.count} thread{'s' if self.count > 1 else ''}"

    def _start(self) -> None:
        while len(self._all) < self.count:
            self._all.append(_Process())
            self._idle.append(self._all[-1])

    def call(self, name: str, argument: Any) -> Any:
        """The result of a function of `gptfast.data.work`; for as many threads at once as there are workers.

        Raises:
            Whatever the function raises.  RuntimeError: its process died.
        """
        if not self._all or (name == "encode" and "tokenizer" in self._local):
            return getattr(work, name)(self._local, argument)
        with self._lock:
            process = self._idle.pop()
        try:
            return process.call(name, argument)
        finally:
            with self._lock:
                self._idle.append(process)

    def map(self, name: str, arguments: Iterable[Any]) -> Generator[Any]:
        """The results of a function, in the order of the arguments; a few of them are read ahead."""
        if self._wanted and "tokenizer" not in self._local:
            self._start()
        return mapped(lambda argument: self.call(name, argument), iter(arguments), self.count)


def mapped(function: Callable[[T], R], items: Iterator[T], threads: int) -> Generator[R]:
    """The results of a function on several threads, in the order of the items; a few items are read ahead."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class _Process:
    """A process that calls functions of `gptfast.data.work`: pickled requests on its input, results on its output."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path)]
        self._waiting = 0  # calls whose results are still to be read
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def call(self, name: str, argument: Any) -> Any:
        while self._waiting:
            self._receive()
        self.send(name, argument)
        return self._receive()

    def send(self, name: str, argument: Any) -> None:
        """Begin a call without waiting for it; the next `call` does."""
        assert self._process.stdin is not None
        try:
            pickle.dump((name, argument), self._process.stdin, protocol=5)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._death() from error
        self._waiting += 1

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        try:
            fine, result = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._death() from error
        self._waiting -= 1
        if not fine:
            raise result
        return result

    def _death(self) -> RuntimeError:
        return RuntimeError(
            f"prepare: a process that works for it ended with code {self._process.wait()} (-9: killed, perhaps for want of "
            "memory); run the command again, with fewer `workers` if memory is short"
        )

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:
                pass  # it is gone already
        self._process.wait()
