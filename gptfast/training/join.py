"""Joining the processes that torchrun, or anything else that sets RANK and WORLD_SIZE, has started."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from gptfast.training.messages import AnsweringStore
from gptfast.training.ranks import Ranks

_TO_PRINT = 1.0  # seconds in which the rank that failed first prints why
_TO_SEE = 3.0  # seconds in which the others see that one has failed; they look every half second
_ANSWER = 20.0  # seconds in which the store answers, or less where `timeout` is
_SPARE = 60.0  # seconds by which torch's own timeout is longer: ours names the rank


def attempt() -> int:
    """How often torchrun has started this run again."""
    return _number("TORCHELASTIC_RESTART_COUNT", "0")


def is_started_by_launcher() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(timeout: float, device: str = "auto", sharding: str = "", tensor: int = 1) -> Ranks | None:
    """This process among the others; None where it was started alone.

    Every attempt of torchrun has keys of its own in the store that they share: else gloo would connect to the addresses of
    the attempt that died.

    Args:
        timeout: seconds to wait for the others, here and later.
        device: as in `TrainConfig`; on GPUs each process takes the one of its local rank.
        sharding, tensor: as in `Ranks`.
    Raises:
        RuntimeError: the port is in use, or not all came.  ValueError: a variable is not a number, or `tensor` is not 1
            where this process was started alone.
    """
    if not is_started_by_launcher():
        if tensor > 1:
            raise ValueError(
                f"train: `tensor_parallel` is {tensor} but there is 1 process; start several: torchrun --nproc-per-node "
                f"{tensor} -m gptfast train ..."
            )
        return None
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if not 0 <= rank < size:
        raise ValueError(f"train: RANK is {rank} and WORLD_SIZE {size}; expected 0 <= RANK < WORLD_SIZE")
    shared = _store(rank, size, timeout)
    store = dist.PrefixStore(f"gptfast/{attempt()}", shared)  # pyright: ignore[reportPrivateImportUsage]
    keeper = "torchrun" if _torchrun_keeps_store() else "rank 0"
    told = AnsweringStore(store, keeper, min(timeout, _ANSWER))
    _await_all(told, rank, size, timeout)
    gpu = device != "cpu" and torch.cuda.is_available()
    place = torch.device("cpu")
    if gpu:
        place = torch.device("cuda", _number("LOCAL_RANK", str(rank)) % torch.cuda.device_count())
        torch.cuda.set_device(place)
    if size > 1:
        options = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=timeout + _SPARE)}
        group = dist.PrefixStore("group", store)  # pyright: ignore[reportPrivateImportUsage]
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=group, **options)
        except (RuntimeError, dist.DistError) as error:
            raise RuntimeError(
                f"train: rank {rank} of {size} could not connect to the others ({str(error).splitlines()[0]}); see what "
                "they print, and check that they reach each other (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
            ) from error
    run_store = dist.PrefixStore("gptfast/run", shared)  # pyright: ignore[reportPrivateImportUsage]
    run_told = AnsweringStore(run_store, keeper, min(timeout, _ANSWER))
    return Ranks(rank, size, told, run_told, place, timeout, sharding, tensor)


@contextmanager
def joined(timeout: float, device: str = "auto", sharding: str = "", tensor: int = 1) -> Iterator[Ranks | None]:
    """`join` around a block. Where several ranks fail, the first raises its error and the others end in silence."""
    ranks = join(timeout, device, sharding, tensor)
    try:
        if ranks is not None:
            ranks.begin_pulse()
            ranks.connect()
        yield ranks
    except Exception:
        if dist.is_initialized() and ranks is not None:
            atexit.register(_leave, ranks)
        if ranks is not None and not ranks.claims():
            time.sleep(_TO_PRINT)  # torchrun ends the other ranks when the first one leaves
            raise SystemExit(1) from None
        raise
    if ranks is not None:
        ranks.end_pulse()
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave(ranks: Ranks) -> None:
    """Exit with 1 without closing the connections: torch would wait for a rank that hangs."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _keeps_store(ranks.rank):
        ranks.await_seen(_TO_SEE)
    os._exit(1)


def _number(name: str, default: str | None = None) -> int:
    text = os.environ.get(name, default)
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"train: {name} is {text!r}; expected a whole number, as torchrun sets it") from None


def _keeps_store(rank: int) -> bool:
    """Whether the store of the run lives in this process, and not in torchrun's."""
    return rank == 0 and not _torchrun_keeps_store()


def _torchrun_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(rank: int, size: int, timeout: float) -> Any:
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), _number("MASTER_PORT", "29500")
    serves = _keeps_store(rank)
    try:
        return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            host, port, size, serves, timeout=timedelta(seconds=timeout), wait_for_workers=False, multi_tenant=False
        )
    except (RuntimeError, dist.DistError) as error:
        if serves and "EADDRINUSE" in str(error):
            raise RuntimeError(
                f"train: rank 0 of {size} cannot listen at {host}, port {port}, which is in use; end the program that "
                "uses it, or choose another port with torchrun --master-port or MASTER_PORT"
            ) from error
        first = str(error).splitlines()[0]
        raise RuntimeError(
            f"train: rank {rank} of {size} found no rank 0 at {host}, port {port}, within {timeout:g} s ({first}); check "
            "that it was started and that MASTER_ADDR and MASTER_PORT are the same for all"
        ) from error


def _await_all(store: Any, rank: int, size: int, timeout: float) -> None:
    """Wait until every rank has come.

    Raises:
        RuntimeError: some did not; it names them.
    """
    end = time.monotonic() + timeout
    missing = list(range(size))
    try:
        store.set(f"here/{rank}", "")
        while missing := [r for r in missing if not store.check([f"here/{r}"])]:
            if time.monotonic() > end:
                break
            time.sleep(0.02)
    except RuntimeError as error:
        raise RuntimeError(
            f"train: rank {rank} of {size} lost the process that keeps the store while it waited for the others; see what that "
            "one prints, and start all again"
        ) from error
    if missing:
        raise RuntimeError(
            f"train: rank {rank} of {size} waited {timeout:g} s (`timeout`), but rank {', '.join(map(str, missing))} "
            "did not come; start all processes at about the same time, with the same MASTER_ADDR and MASTER_PORT"
        )
