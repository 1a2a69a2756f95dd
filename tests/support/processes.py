"""`gptfast train` in several processes: with torchrun, or started one by one."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from gptfast.training.log import read_log

STEPS = 50
ARGUMENTS = [
    *(
        "--n-layer",
        "2",
        "--n-head",
        "2",
        "--n-embd",
        "32",
        "--block-size",
        "32",
        "--dropout",
        "0.1",
        "--batch-size",
        "8",
    ),
    *(
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--max-steps",
        str(STEPS),
        "--lr-decay-steps",
        str(STEPS),
    ),
    *("--grad-accum", "2", "--eval-every", "25", "--eval-batches", "3", "--checkpoint-every", "10", "--log-every", "1"),
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train_command(text: str | Path, out: Path, *more: str | Path) -> list[str]:
    return ["-m", "gptfast", "train", "--data", str(text), *ARGUMENTS, "--out", str(out), *map(str, more)]


def torchrun(processes: int, *command: str, restarts: int = 0) -> subprocess.Popen[str]:
    options = ["--nproc-per-node", str(processes), "--max-restarts", str(restarts), "--master-port", str(free_port())]
    return _start(["-m", "torch.distributed.run", *options, *command], {})


def ranks(processes: int, *command: str, first: int = 0, count: int | None = None) -> list[Forked]:
    """Processes with the variables that torchrun sets, without its agent; `count` of them from rank `first` on."""
    port = str(free_port())
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    chosen = range(first, processes if count is None else first + count)
    return [Forked(command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in chosen]


def _start(arguments: list[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen([sys.executable, *arguments], env=environment, start_new_session=True, **pipes)


# what a run in several processes imports, which takes longer than a small run
_IMPORTED = (
    *("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint.hf_storage"),
    *("gptfast.cli.train", "gptfast.training.start", "gptfast.training.join", "gptfast.training.tensor_parallel"),
    *("matplotlib.pyplot", "rich.progress"),
)


def forking() -> None:
    """Let `multiprocessing`'s "forkserver" fork a process that has imported what runs need."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(_IMPORTED))


class Forked:
    """`python -m gptfast ...` without the seconds of its imports: the fork of a process that has made them and nothing else.

    It has the methods of `subprocess.Popen` that the tests use.

    Args:
        command: "-m", "gptfast" and its arguments.
        variables: of the environment.
    """

    def __init__(self, command: Sequence[str], variables: dict[str, str]) -> None:
        forking()
        descriptor, name = tempfile.mkstemp()
        os.close(descriptor)
        self._output, self._said = Path(name), ""
        environment = {**os.environ, **variables}
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_run, args=(list(command[2:]), environment, name))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("gptfast", timeout or 0.0)
        if self._output.exists():
            self._said = self._output.read_text(errors="replace")
            self._output.unlink()
        return self._said, None

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(arguments: list[str], environment: dict[str, str], said: str) -> None:
    os.setsid()
    output = os.open(said, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:], code = ["gptfast", *arguments], 1
    try:
        runpy.run_module("gptfast", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


Process = subprocess.Popen[str] | Forked


def finish(process: Process, seconds: float = 120) -> tuple[int, str]:
    """(exit code, what it printed); its group is killed where it does not end in time."""
    try:
        said = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"still running after {seconds} s: {process.communicate()[0][-3000:]}") from None
    return process.returncode, said


def await_step(out: Path, step: int, process: Process, seconds: float = 90) -> None:
    """Wait until a run has logged a step."""
    log, end = out / "log.jsonl", time.monotonic() + seconds
    while not (log.exists() and any(r["step"] >= step for r in read_log(log))):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < end
        time.sleep(0.005)


def workers(agent: subprocess.Popen[str]) -> dict[int, int]:
    """The process numbers of torchrun's workers, by rank."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    found = {}
    for pid in children:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        for variable in variables:
            if variable.startswith(b"RANK="):
                found[int(variable[5:])] = int(pid)
    return found


def losses(out: Path) -> dict[int, float]:
    """The training loss of every step, each of which must be there once."""
    found = [(r["step"], r["loss"]) for r in read_log(out / "log.jsonl") if "loss" in r]
    assert len(found) == len(dict(found))
    return dict(found)


def stored_step(out: Path) -> int:
    return json.loads((out / "last" / "trainer.json").read_text())["state"]["step"]
