"""The processes of one run: what they tell each other, and how long they wait. Rank 0 writes and logs.

Every collective is waited for in small sleeps: a signal is seen within a millisecond, and a rank that is dead or hangs is
named after `timeout` seconds instead of being waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from gptfast.training.collectives import Collectives
from gptfast.training.messages import GONE, Messages, RankLostError, StoreLostError

GRACE = 8.0  # seconds for the others after a signal
_LOOK = 0.5  # seconds between two looks whether a rank has failed, or is silent
_PATIENCE = 20  # times `timeout` for what may take long, such as a checkpoint
_DIAGNOSIS = 2.0  # seconds in which those that live say so
_SLEEPS = (0.0, 0.0, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)


class Ranks(Collectives, Messages):
    """This process among those of its run.

    Args:
        rank, size: which one, of how many.
        store: of torch.distributed, for this attempt alone. run_store: for all attempts of torchrun at this run.
        device: of the tensors that are summed.
        timeout: seconds after which a rank that does not take part counts as lost.
        sharding: when the ranks, which have a part of every parameter each, gather and free them: see
            `gptfast.training.sharding`; "": each has the whole model.
        tensor: how many ranks in a row divide every attention and MLP (`gptfast.training.tensor_parallel`) and see the same
            rows; with `sharding`.

    waited: seconds that this process has waited for others. seconds: of the last step's passes, without waiting, by rank.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Any,
        run_store: Any,
        device: torch.device,
        timeout: float,
        sharding: str = "",
        tensor: int = 1,
    ) -> None:
        self.rank, self.size, self.device, self.timeout, self.tensor = rank, size, device, timeout, tensor
        self.sharding, self.waited = sharding if size > 1 else "", 0.0
        self.seconds: list[float] = []
        self._store, self._run_store, self._done = store, run_store, 0
        self.signalled: Callable[[], bool] = lambda: False  # whether this process was asked to end
        self.pulse = None
        self.step = 0  # for messages
        self._here = f"rank {rank} of {size}"

    def connect(self) -> None:
        """Connect the ranks that divide a model. All call it at the same time.

        Raises:
            ValueError: they cannot be divided.  RankLostError: a rank did not answer.
        """
        if self.size % self.tensor:
            raise ValueError(
                f"train: `tensor_parallel` is {self.tensor} but there are {self.size} processes; expected a number that divides "
                "them"
            )
        if self.sharding:
            try:
                _ = self.mesh, self.data_group, self._meeting
            except RuntimeError as error:
                raise self._broken(error, "the connection") from error

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def rows(self, batch_size: int) -> int:
        """Rows of a batch in each of its shares.

        Raises:
            ValueError: the batch does not divide.
        """
        if batch_size % self.shares:
            who = f"{self.size} processes" if self.tensor == 1 else f"{self.shares} groups of {self.tensor} processes"
            raise ValueError(
                f"train: `batch_size` is {batch_size} but {who} share it; expected a multiple of {self.shares}"
            )
        return batch_size // self.shares

    def exchange(self, values: Sequence[float], what: str) -> list[list[float]]:
        """The numbers of every rank, by rank. All ranks call it with equally many.

        Args:
            what: for messages, such as "the losses".
        Raises:
            RankLostError: a rank did not answer.
        """
        own = torch.tensor(list(values), dtype=torch.float64)
        if self.size == 1:
            return [own.tolist()]
        found = [torch.empty_like(own) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(found, own, async_op=True), what)
        return [values.tolist() for values in found]

    def sum(self, values: Sequence[float], what: str) -> list[float]:
        """Sums over the shares of a batch, in their order."""
        return [sum(column) for column in zip(*self.exchange(values, what)[:: self.tensor], strict=True)]

    def main_first(self, act: Callable[[], Any], what: str, others: Callable[[], Any] | None = None) -> Any:
        """What `act` returns on rank 0; the others wait until it has, and then call `others` where there is one.

        Raises:
            RankLostError: rank 0 failed or is lost.  Whatever `act` raises, on rank 0.
        """
        self._done += 1
        key = f"done/{self._done}"
        if self.is_main:
            try:
                result = act()
            except BaseException:
                self.claims()  # before the others see it
                with suppress(RuntimeError):
                    self._store.set(key, "failed")
                raise
            self.tell(key, "done")
            return result
        if self._told(key, what) != "done":
            raise RankLostError(f"{self._here}: rank 0 failed at {what}; its own message says why")
        return None if others is None else others()

    def meet(self, what: str) -> None:
        """Wait until all ranks are here, however long that takes while they live; in one thread at a time.

        Raises:
            RankLostError: a rank failed, or did not come.
        """
        own = torch.zeros(1)
        found = [torch.empty_like(own) for _ in range(self.size)]
        try:
            work = dist.all_gather(found, own, group=self._meeting, async_op=True)
            assert work is not None
            self._until(work.is_completed, what, _PATIENCE * self.timeout, long=True, patient=True)
            work.wait()
        except RankLostError:
            raise
        except RuntimeError as error:
            raise self._broken(error, what) from error

    @cached_property
    def _meeting(self) -> Any:
        """Connections for `meet` alone: a thread may wait there while the others are used."""
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=(_PATIENCE + 1) * self.timeout))

    def _told(self, key: str, what: str) -> str:
        def told() -> str:
            self._until(lambda: self._store.check([key]), what, _PATIENCE * self.timeout, long=True)
            return self._store.get(key).decode()

        return self._reach(told, what)

    def _wait(self, start: Callable[[], Any], what: str) -> None:
        try:
            work = start()
            self._until(work.is_completed, what, self.timeout)
            work.wait()
        except RankLostError:
            raise
        except RuntimeError as error:
            raise self._broken(error, what) from error

    def _broken(self, error: RuntimeError, what: str) -> RankLostError:
        """Ours for an error of gloo's or nccl's, as when a connection breaks."""
        lost = self._lost()
        try:
            self._check_main()
        except RankLostError as failed:
            return failed
        except RuntimeError:  # the store is gone, which `lost` says
            pass
        if isinstance(error, StoreLostError):  # `lost` says all
            return RankLostError(f"{self._here}: {lost} {self._during(what)}")
        # without the place in gloo's source, and advice
        text = str(error).split("\n")[0].split("] ", 1)[-1].split(". ")[0]
        return RankLostError(f"{self._here}: {lost} {self._during(what)} ({text or type(error).__name__})")

    def _until(
        self,
        ready: Callable[[], bool],
        what: str,
        timeout: float,
        long: bool = False,
        patient: bool = False,
    ) -> None:
        """Wait. long: for what may take long; meanwhile a rank that fails or is silent is noticed."""
        start, n, grace = time.monotonic(), 0, None
        looked = start
        if long and self.pulse is not None:
            self.pulse.listen()
        while not ready():
            time.sleep(_SLEEPS[min(n // 20, len(_SLEEPS) - 1)])
            n, now = n + 1, time.monotonic()
            if grace is None and self.signalled():
                grace = now + (self.timeout if patient else GRACE)
            if grace is not None and now > grace:
                raise RankLostError(f"{self._here}: a signal came, and {self._lost()} {self._during(what)}")
            if now - start > timeout:
                raise RankLostError(
                    f"{self._here}: {self._lost()} {self._during(what)} within {timeout:g} s (timeout); a longer time: "
                    "`timeout`"
                )
            if long and now - looked > _LOOK:
                self._check_main()
                self._listen(what)
                looked = time.monotonic()
        if not patient:
            self.waited += time.monotonic() - start

    def _lost(self) -> str:
        """Which ranks do not say that they live, in words."""
        end = time.monotonic() + _DIAGNOSIS
        missing = [r for r in range(self.size) if r != self.rank]
        try:
            self._store.set(f"lives/{self.rank}", "")
            while missing and time.monotonic() < end:
                missing = [r for r in missing if not self._store.check([f"lives/{r}"])]
                time.sleep(0.02)
        except StoreLostError as error:
            return str(error)
        except RuntimeError:
            return f"{GONE}, and a rank did not answer"
        names = ", ".join(map(str, missing)) or "of the others one"
        return f"rank {names} did not answer"
