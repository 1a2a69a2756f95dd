"""The processes of one run: what they tell each other, and how long they wait. Rank 0 writes and logs.

Every collective is waited for in small sleeps: a signal is seen within a millisecond, and a rank that is dead or hangs is
named after `timeout` seconds instead of being waited for. Sums go over the ranks in their order, whatever the collective
would do, so that their bits depend on the number of ranks only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 1 << 24  # numbers that are summed at a time
GRACE = 8.0  # seconds for the others after a signal
_LOOK = 0.5  # seconds between two looks whether a rank has failed
_DIAGNOSIS = 2.0  # seconds in which those that live say so
_SLEEPS = (0.0, 0.0, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)


class RankLostError(RuntimeError):
    """A rank does not answer: it died, hangs, or failed by itself."""


class Ranks:
    """This process among those of its run.

    Args:
        rank, size: which one, of how many.
        store: of torch.distributed, for this attempt alone. run_store: for all attempts of torchrun at this run.
        device: of the tensors that are summed.
        timeout: seconds after which a rank that does not take part counts as lost.
        sharding: when the ranks, which have a part of every parameter each, gather and free them: see
            `gptfast.training.sharding`; "": each has the whole model.

    waited: seconds that this process has waited for others. seconds: of the last step's passes, without waiting, by rank.
    """

    def __init__(
        self, rank: int, size: int, store: Any, run_store: Any, device: torch.device, timeout: float, sharding: str = ""
    ) -> None:
        self.rank, self.size, self.device, self.timeout = rank, size, device, timeout
        self.sharding, self.waited = sharding if size > 1 else "", 0.0
        self.seconds: list[float] = []
        self._store, self._run_store, self._done = store, run_store, 0
        self.signalled: Callable[[], bool] = lambda: False  # whether this process was asked to end
        self.step = 0  # for messages
        self._here = f"rank {rank} of {size}"

    @cached_property
    def mesh(self) -> Any:
        """torch's name for all ranks; they make it together, at the same time."""
        from torch.distributed.device_mesh import init_device_mesh  # takes as long as torch

        return init_device_mesh(self.device.type, (self.size,))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def has_begun(self) -> bool:
        """Whether an earlier attempt began the run, so that what its folder holds is of this run."""
        return self._run_store.check(["begun"])

    def begin(self) -> None:
        self._run_store.set("begun", "")

    def rows(self, batch_size: int) -> int:
        """Rows of a batch that each rank takes.

        Raises:
            ValueError: the batch does not divide.
        """
        if batch_size % self.size:
            raise ValueError(
                f"train: `batch_size` is {batch_size} but {self.size} processes share it; expected a multiple of {self.size}"
            )
        return batch_size // self.size

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
        """Sums over the ranks, in their order."""
        return [sum(column) for column in zip(*self.exchange(values, what), strict=True)]

    def sum_gradients(self, parameters: Sequence[nn.Parameter], what: str) -> None:
        """Replace each gradient by its sum over the ranks; one that is missing counts as 0."""
        if self.size == 1:
            return
        for bucket in _buckets(parameters):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
            total, at = self._total(flat, what), 0
            for p in bucket:
                part = total[at : at + p.numel()].view_as(p)
                p.grad = part.clone() if p.grad is None else p.grad.copy_(part)
                at += p.numel()

    def _total(self, flat: Tensor, what: str) -> Tensor:
        """The sum of `flat` over the ranks: each adds its part of the places in the order of the ranks."""
        if flat.is_cuda:
            self._wait(lambda: dist.all_reduce(flat, async_op=True), what)
            return flat
        part = -(-flat.numel() // self.size)
        padded = torch.nn.functional.pad(flat, (0, part * self.size - flat.numel()))
        own, total = padded.new_empty(part), torch.empty_like(padded)
        self.scatter_sum(own, padded, what)
        self._wait(lambda: dist.all_gather(list(total.view(self.size, part)), own, async_op=True), what)
        return total[: flat.numel()]

    def scatter_sum(self, own: Tensor, parts: Tensor, what: str) -> None:
        """Set `own`, (n,), to the sum over the ranks, in their order, of this rank's part of their `parts`, (size * n,)."""
        received = torch.empty_like(parts)
        self._wait(lambda: dist.all_to_all_single(received, parts, async_op=True), what)
        first, *others = received.view(self.size, -1)
        own.copy_(first)
        for other in others:
            own += other

    def gather(self, parts: Tensor, own: Tensor, what: str) -> None:
        """Set `parts`, (size * n,), to what the ranks have as `own`, (n,), which may be a view of this rank's part of it."""
        into, part = list(parts.view(torch.uint8).view(self.size, -1)), own.view(torch.uint8)
        self._wait(lambda: dist.all_gather(into, part, async_op=True), what)

    def same(self, tensors: Iterator[Tensor], what: str) -> None:
        """Give every rank the values that rank 0 has."""
        if self.size > 1:
            for tensor in tensors:
                self._wait(lambda tensor=tensor: dist.broadcast(tensor.detach(), 0, async_op=True), what)

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
                self._store.set(key, "failed")
                raise
            self._store.set(key, "done")
            return result
        if self._told(key, what) != "done":
            raise RankLostError(f"{self._here}: rank 0 failed at {what}; its own message says why")
        return None if others is None else others()

    def _check_main(self) -> None:
        if self._store.check(["error"]):
            raise RankLostError(f"{self._here}: a rank failed; its own message says why")

    def tell(self, key: str, text: str) -> None:
        """Let the others know something under a key that is used once."""
        self._store.set(key, text)

    def ask(self, key: str, what: str) -> str:
        """What a rank tells under this key, however long it takes while it lives. May be called in a thread.

        Raises:
            RankLostError: a rank failed, or did not answer.
        """
        return self._told(key, what, patient=True)

    def _told(self, key: str, what: str, patient: bool = False) -> str:
        try:
            self._until(lambda: self._store.check([key]), what, 20 * self.timeout, self._check_main, patient)
            return self._store.get(key).decode()
        except RankLostError:
            raise
        except RuntimeError as error:
            gone = "the store is gone with the process that kept it"
            raise RankLostError(f"{self._here}: {gone}, {self._during(what)}") from error

    def claims(self) -> bool:
        """Whether this rank is the first that failed, which is the one to print why."""
        try:
            mine = str(self.rank)
            first = self._store.compare_set("error", "", mine).decode() == mine
            self._store.set(f"seen/{self.rank}", "")
            return first
        except RuntimeError:  # the store is gone with the process that kept it
            return True

    def await_seen(self, seconds: float) -> None:
        """Give the others time to see that a rank has failed: the process that keeps the store must outlive their look."""
        end = time.monotonic() + seconds
        others = [f"seen/{rank}" for rank in range(self.size) if rank != self.rank]
        try:
            while time.monotonic() < end and not self._store.check(others):
                time.sleep(0.02)
        except RuntimeError:  # another process kept it, and has left
            return

    def _wait(self, start: Callable[[], Any], what: str) -> None:
        try:
            work = start()
            self._until(work.is_completed, what, self.timeout)
            work.wait()
        except RankLostError:
            raise
        except RuntimeError as error:  # gloo's, when a connection breaks
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RankLostError(f"{self._here}: {self._lost()} {self._during(what)} ({first})") from error

    def _until(
        self,
        ready: Callable[[], bool],
        what: str,
        timeout: float,
        check: Callable[[], None] | None = None,
        patient: bool = False,
    ) -> None:
        start, n, grace = time.monotonic(), 0, None
        looked = start
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
            if check is not None and now - looked > _LOOK:
                check()
                looked = time.monotonic()
        if not patient:
            self.waited += time.monotonic() - start

    def _during(self, what: str) -> str:
        return f"during {what} of step {self.step}" if self.step else f"during {what}"

    def _lost(self) -> str:
        """Which ranks do not say that they live, in words."""
        end = time.monotonic() + _DIAGNOSIS
        missing = [r for r in range(self.size) if r != self.rank]
        try:
            self._store.set(f"lives/{self.rank}", "")
            while missing and time.monotonic() < end:
                missing = [r for r in missing if not self._store.check([f"lives/{r}"])]
                time.sleep(0.02)
        except RuntimeError:
            return "the store is gone with the process that kept it, and a rank did not answer"
        names = ", ".join(map(str, missing)) or "of the others one"
        return f"rank {names} did not answer"


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype and device, at most `BUCKET` numbers together, or one larger one; the same in every step."""
    bucket: list[nn.Parameter] = []
    for p in parameters:
        full = sum(q.numel() for q in bucket) + p.numel() > BUCKET
        if bucket and (full or (p.dtype, p.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket
