"""Mapped files that others cut short or write over: an error or a line that names the file, never a bare SIGBUS."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptfast import _mapping
from gptfast._mapping import MappedFile
from gptfast.backend import has_cpu_ops

compiled = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
PAGES = 5
START = """
import faulthandler, mmap, os, sys
from gptfast._mapping import MappedFile
path, recover = sys.argv[1], sys.argv[2] == "recover"
with open(path, "rb") as file:
    mapped = MappedFile(file, path, recover=recover)
os.truncate(path, 4096 + 10)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "some tokens.bin"
    path.write_bytes(bytes(range(256)) * (16 * PAGES))
    return path


def opened(path: Path, recover: bool = True) -> MappedFile:
    with path.open("rb") as file:
        return MappedFile(file, path, recover=recover)


def run(code: str, path: Path, mode: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START + code, str(path), mode]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_what_it_holds_and_when_it_changed(path: Path) -> None:
    mapped = opened(path)
    values = np.frombuffer(mapped, np.uint8)
    assert bytes(mapped) == path.read_bytes() and values[4096 * PAGES - 1] == 255
    mapped.check()
    with path.open("r+b") as file:  # in place
        file.write(b"x")
    os.utime(path, ns=(0, mapped._state[1] + 1))
    with pytest.raises(OSError, match="was changed, cut short") as caught:
        mapped.check()
    assert caught.value.filename == str(path)
    assert mapped.accept()
    mapped.check()
    os.truncate(path, 100)
    assert mapped.changed() and not mapped.accept()


def test_replacing_the_file_is_safe(path: Path, tmp_path: Path) -> None:
    mapped, old = opened(path), path.read_bytes()
    (tmp_path / "new").write_bytes(b"another")
    os.replace(tmp_path / "new", path)
    mapped.check()
    assert bytes(mapped) == old


def test_arrays_keep_the_mapping_and_its_descriptor(path: Path) -> None:
    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    values = np.frombuffer(memoryview(opened(path)), np.uint8)
    gc.collect()
    assert values[-1] == 255
    del values
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_it_is_closed_at_the_end_of_the_interpreter(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the names of modules are None already."""
    with path.open("rb") as file:
        kept = _mapping._Descriptor(file.fileno())
    number = kept._number
    os.fstat(number)
    monkeypatch.setattr(_mapping, "os", None)
    del kept
    with pytest.raises(OSError):
        os.fstat(number)


@compiled
def test_zeros_then_an_error(path: Path) -> None:
    """Also where several threads meet the missing pages at once, and at every later check."""
    code = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    sums = list(pool.map(lambda n: sum(memoryview(mapped)[4096 * n : 4096 * (n + 1)]), [2, 3, 4, 2, 3, 4]))
print(sums, mapped[0], mapped[255])
for _ in range(2):
    try:
        mapped.check()
    except OSError as error:
        print(error)
os.truncate(path, 4096 * 5)  # too late: what was read is not what is there
print(mapped.changed())
"""
    done = run(code, path, "recover")
    assert done.returncode == 0, done.stderr
    first, second, third, last = done.stdout.splitlines()
    assert first == "[0, 0, 0, 0, 0, 0] 0 255" and last == "True"
    assert second == third and "cut short" in second and "some tokens.bin" in second


@compiled
@pytest.mark.parametrize("dump", ["", "faulthandler.enable()"], ids=["plain", "faulthandler"])
def test_a_line_names_the_file(path: Path, dump: str) -> None:
    again = """
os.truncate(path, 4096 * 5)
with open(path, "rb") as file:
    mapped = MappedFile(file, path, recover=False)
os.truncate(path, 100)
"""
    done = run((dump + again if dump else "") + "print(mapped[4096 * 3])", path, "line")
    assert done.returncode == -signal.SIGBUS
    assert f"gptfast: {path} was cut short" in done.stderr, done.stderr
    assert ("Fatal Python error: Bus error" in done.stderr) == bool(dump)


OTHERS = """
def other():
    os.truncate(path, 4096 * 5)
    with open(path, "rb") as file:
        other = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    os.truncate(path, 100)
    return other[8192]

for use in (
    other,
    lambda: os.kill(os.getpid(), 7),
    lambda: signal.raise_signal(7),
    lambda: (mapped.close(), other()),
):
    child = os.fork()
    if not child:
        use()
        os._exit(0)
    print(-os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@compiled
def test_signals_that_are_not_ours_reach_the_old_handler(path: Path) -> None:
    done = run("import signal\n" + OTHERS, path, "line")
    assert (done.stdout.split(), done.stderr) == (["7"] * 4, "")
