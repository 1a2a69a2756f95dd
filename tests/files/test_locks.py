"""Locks between processes: with flock and without, after kills, from other machines; two trainers of one run."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from gptfast import _locks
from gptfast._locks import FileLock, Owner
from gptfast.data import write_tokens
from gptfast.models import GPT, GPTConfig
from gptfast.training import TrainConfig, Trainer
from gptfast.training.run_folder import LOCK

MODES = ["flock", "no flock", "network"]


@pytest.fixture(params=MODES)
def mode(request, monkeypatch) -> str:
    """A local file system; one that refuses flock, as some NFS servers do; a network mount where it is local only."""
    if request.param == "no flock":

        def refuse(descriptor: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(_locks.fcntl, "flock", refuse)
    if request.param != "flock":
        monkeypatch.setattr(_locks, "_is_network", lambda path: True)
        monkeypatch.setattr(_locks, "BEAT", 0.05)
        monkeypatch.setattr(_locks, "LEASE", 0.3)
        monkeypatch.setattr(_locks, "WATCH", 0.3)
    return request.param


def child(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def held_by_child(path: Path) -> int:
    """A child that holds the lock until it is killed."""
    reader, writer = os.pipe()

    def hold() -> None:
        lock = FileLock(path)
        assert lock.acquire() is None
        os.write(writer, b"x")
        time.sleep(600)

    pid = child(hold)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    os.close(writer)
    return pid


def test_the_holder_is_named_and_a_kill_frees(tmp_path: Path, mode: str):
    path = tmp_path / "lock"
    pid = held_by_child(path)
    holder = FileLock(path).acquire(wait=0.2)
    assert (holder.pid, holder.host) == (pid, socket.gethostname())
    assert abs(time.time() - time.mktime(time.strptime(holder.started, "%Y-%m-%d %H:%M:%S"))) < 60
    os.kill(pid, signal.SIGKILL)
    assert code_of(pid) == -9
    assert path.exists()
    lock = FileLock(path)
    assert lock.acquire() is None
    lock.release()
    assert os.listdir(tmp_path) == []


def test_processes_take_turns(tmp_path: Path, mode: str):
    """Four processes add to a number that is read and written in two steps."""
    number = tmp_path / "number"
    number.write_text("0")

    def add() -> None:
        for _ in range(25):
            lock = FileLock(tmp_path / "lock")
            assert lock.acquire(wait=120) is None
            n = int(number.read_text())
            time.sleep(0.001)
            number.write_text(str(n + 1))
            lock.release()

    pids = [child(add) for _ in range(4)]
    assert [code_of(pid) for pid in pids] == [0] * 4
    assert number.read_text() == "100"
    assert os.listdir(tmp_path) == ["number"]


def test_threads_take_turns_and_a_dropped_lock_is_free(tmp_path: Path, mode: str):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.acquire() is None
    assert second.acquire().pid == os.getpid()
    waiting = threading.Thread(target=lambda: second.acquire(wait=60))
    waiting.start()
    first.release()
    waiting.join()
    assert first.acquire().pid == os.getpid()
    second.release()
    assert first.acquire() is None
    del first  # dropped, not released
    assert second.acquire() is None


def test_a_forked_child_that_ends_leaves_the_lock_to_its_parent(tmp_path: Path, mode: str):
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire() is None
    assert code_of(child(lock.release)) == 0
    assert FileLock(tmp_path / "lock").acquire().pid == os.getpid()


def record(path: Path, owner: Owner, age: float = 0.0) -> None:
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (time.time() - age,) * 2)


def test_a_process_number_that_is_used_again_is_another_process(tmp_path: Path, mode: str):
    me = _locks._this_process()
    assert me.ticks is not None
    record(tmp_path / "lock", replace(me, ticks=me.ticks - 1))
    assert FileLock(tmp_path / "lock").acquire() is None


def test_another_machine_holds_while_it_touches_the_file(tmp_path: Path, mode: str):
    path = tmp_path / "lock"
    there = Owner(os.getpid(), "elsewhere", "2026-11-28 09:00:00", "another boot", None)
    record(path, there)
    holder = FileLock(path).acquire()
    assert holder == (None if mode == "flock" else there)  # flock of a local disk says that nobody lives
    if mode == "flock":
        return
    record(path, there, age=3600)  # its clock is an hour behind ours
    touching = threading.Timer(0.1, lambda: os.utime(path, (time.time() - 3599,) * 2))
    touching.start()
    assert FileLock(path).acquire() == there
    touching.join()
    assert FileLock(path).acquire() is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\0" * 9, b'{"pid": "1"}', b"9" * 5000])
def test_a_damaged_record_blocks_nobody_for_long(tmp_path: Path, mode: str, content: bytes, monkeypatch):
    (tmp_path / "lock").write_bytes(content)
    monkeypatch.setattr(_locks, "_WRITING", 0.2)
    assert FileLock(tmp_path / "lock").acquire(wait=10) is None


# ---- two trainers of one run ----------------------------------------------------------------------------------------

SHAPE = GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=7, block_size=8, dropout=0.0)
CONFIG = TrainConfig(max_steps=3, batch_size=2, eval_every=3)


def trainer(folder: Path, **options) -> Trainer:
    tokens = write_tokens(folder / "tokens.bin", [[n % 7 for n in range(200)]], 7)
    return Trainer(GPT(SHAPE), tokens, tokens, CONFIG, folder / "run", progress=False, **options)


def test_a_second_trainer_is_refused_and_the_first_continues(tmp_path: Path):
    first, run = trainer(tmp_path), tmp_path / "run"
    for options in ({}, {"overwrite": True}):
        started = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
        text = rf"run is being trained by process {os.getpid()} on {re.escape(socket.gethostname())}, since {started}; wait"
        with pytest.raises(BlockingIOError, match=text):
            trainer(tmp_path, **options)
    assert first.train().steps == 3
    assert not (run / LOCK).exists()
    assert trainer(tmp_path, overwrite=True).train().steps == 3


def test_a_run_that_was_killed_is_taken_over(tmp_path: Path):
    reader, writer = os.pipe()
    pid = child(lambda: (keep := trainer(tmp_path), os.write(writer, b"x"), time.sleep(600), keep))
    assert os.read(reader, 1) == b"x"
    with pytest.raises(BlockingIOError, match=f"process {pid} on "):
        trainer(tmp_path)
    os.kill(pid, signal.SIGKILL)
    code_of(pid)
    assert (tmp_path / "run" / LOCK).exists()
    assert trainer(tmp_path).train().steps == 3
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.slow
def test_the_command_refuses_a_run_that_another_process_trains(tmp_path: Path):
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("to be or not to be, that is the question\n" * 50)
    command = [sys.executable, "-m", "gptfast", "train", "--out", str(out)]
    sizes = "--n-layer 1 --n-head 1 --n-embd 8 --block-size 8 --batch-size 2 --checkpoint-every 50 --eval-every 1000000"
    first = subprocess.Popen([*command, "--data", str(text), *sizes.split(), "--max-steps", "1000000"])
    try:
        while not (out / "last" / "trainer.json").exists():
            assert first.poll() is None
            time.sleep(0.05)
        second = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert f"is being trained by process {first.pid} on {socket.gethostname()}, since " in second.stderr
        assert "Traceback" not in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
