"""A lock between processes: a file that says who holds it, and that a kill does not leave locked.

`flock` decides wherever the file system has it: the kernel frees it when its holder ends, however that ends. Where it
does not (some network and FUSE mounts), the file itself is the lock. Its record names the process, and

* a record of this machine holds while a process with this number and this start time exists;
* a record of another machine (or of a container, whose process numbers mean nothing here) holds while the file is
  touched, every five seconds. On network mounts this counts even where `flock` succeeds: it may end at this machine.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gptfast._files import explained

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

BEAT, LEASE, WATCH = 5.0, 60.0, 12.0  # seconds: between touches; of silence; for which a silent file is watched
_POLL, _WRITING, _RECORD = 0.05, 5.0, 4096  # seconds, seconds, and bytes of a lock file that count
_NO_FLOCK = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF}
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "ceph", "9p", "afs", "gpfs", "beegfs", "glusterfs"}


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. machine: where `pid` means something; ticks: when the process started, as that machine counts."""

    pid: int
    host: str
    started: str
    machine: str
    ticks: int | None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


_UNKNOWN = Owner(0, "an unknown host", "a moment ago", "", None)


class FileLock:
    """The lock at `path`, whose folder exists. One holder at a time, threads of one process included.

    The file is made when the lock is taken and removed when it is released, which dropping this object does too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._release: weakref.finalize | None = None

    def acquire(self, wait: float = 0.0) -> Owner | None:
        """Take the lock, within `wait` seconds. None where that went well, else who holds it.

        Raises:
            OSError: the file cannot be written.
        """
        deadline = time.monotonic() + wait
        while True:
            taken = _take(self.path)
            if isinstance(taken, int):
                self._hold(taken)
                return None
            if time.monotonic() >= deadline:
                return taken
            time.sleep(_POLL)

    def release(self) -> None:
        """Free the lock and remove its file; nothing where it is not held."""
        if self._release is not None:
            self._release()

    def _hold(self, descriptor: int) -> None:
        ending, touching = threading.Event(), None
        if _is_network(self.path) or _flock(descriptor) is None:
            touching = threading.Thread(target=_touch, args=(descriptor, ending), daemon=True)
            touching.start()
        self._release = weakref.finalize(self, _free, self.path, descriptor, ending, touching, os.getpid())
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(asdict(_this_process())).encode(), 0)
        except OSError as error:
            self.release()
            raise explained(error, f"cannot write {self.path}") from error


def holder(path: Path) -> tuple[Owner, bool] | None:
    """Who holds the lock at `path`, and whether that process lives (on other machines: touched it lately); None: nobody."""
    try:
        owner = _parse(path.read_bytes()[:_RECORD]) or _UNKNOWN
    except OSError:
        return None
    return owner, _exists(owner) if owner.machine == _machine() else _silence(path) < LEASE


@contextmanager
def courtesy(folder: Path, alone: bool) -> Iterator[None]:
    """Wait, half a second at most, until the readers of a folder (for `alone`) or its writer have finished.

    An advisory lock on the folder itself (`flock`), so that a fast writer and a reader do not starve each other. No
    guarantee depends on it: where it cannot be taken, the block runs without.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        end = time.monotonic() + 0.5
        while fcntl is not None and _flock(descriptor, alone) is False and time.monotonic() < end:
            time.sleep(0.001)
        yield
    finally:
        os.close(descriptor)


def _free(path: Path, descriptor: int, ending: threading.Event, touching: threading.Thread | None, pid: int) -> None:
    ending.set()
    if touching is not None and os.getpid() == pid:
        touching.join()
    if os.getpid() == pid and _is_at(descriptor, path):  # a forked child leaves the file to its parent
        path.unlink(missing_ok=True)
    os.close(descriptor)


def _touch(descriptor: int, ending: threading.Event) -> None:
    while not ending.wait(BEAT):
        os.utime(descriptor)


def _take(path: Path) -> int | Owner:
    """The descriptor of the lock file, now ours, or who holds it."""
    while True:
        new, descriptor = _open(path)
        if descriptor is None:
            continue
        keep = False
        try:
            locked, record = _flock(descriptor), b"" if new else os.pread(descriptor, _RECORD, 0)
            owner = _parse(record)
            if locked is False:
                return owner or _UNKNOWN
            if not new and _is_held(owner, path, flock=locked is True):
                return owner or _UNKNOWN
            if not new and locked is None:
                _remove(path, record)
            elif _is_at(descriptor, path):  # else its holder removed it between our open and our lock
                keep = True
                return descriptor
        finally:
            if not keep:
                os.close(descriptor)


def _open(path: Path) -> tuple[bool, int | None]:
    """The lock file, made if it is missing: was it made, and a descriptor (None: it has just been removed)."""
    if path.is_symlink():
        path.unlink()  # a lock is no link, and what it leads to is not ours
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
    with suppress(FileExistsError):
        return True, os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return False, os.open(path, flags)
    except FileNotFoundError:
        return False, None


def _is_held(owner: Owner | None, path: Path, flock: bool) -> bool:
    """Does another process hold a file that this one could open, and lock where there is flock?"""
    if flock:
        return owner is not None and owner.machine != _machine() and _is_network(path) and _lives(owner, path)
    if owner is None:
        return _silence(path) < _WRITING  # just made: its record comes
    return _lives(owner, path)


def _remove(path: Path, found: bytes) -> None:
    """Remove a dead lock, but not one that another process put in its place meanwhile."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if aside.read_bytes()[:_RECORD] != found:
        os.rename(aside, path)
    else:
        aside.unlink()


def _lives(owner: Owner, path: Path) -> bool:
    if owner.machine == _machine():
        return _exists(owner)
    if _silence(path) < LEASE:
        return True
    before, end = _touched(path), time.monotonic() + WATCH  # clocks differ: a touch in this time decides
    while time.monotonic() < end and _touched(path) == before:
        time.sleep(_POLL)
    return _touched(path) != before


def _exists(owner: Owner) -> bool:
    if owner.ticks is not None:
        return _ticks(owner.pid) == owner.ticks
    try:
        os.kill(owner.pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _silence(path: Path) -> float:
    """Seconds since the file was touched."""
    mark = _touched(path)
    return 0.0 if mark is None else time.time() - mark / 1e9


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _this_process() -> Owner:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return Owner(os.getpid(), socket.gethostname(), started, _machine(), _ticks(os.getpid()))


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _ticks(pid: int) -> int | None:
    """When a process started, in ticks since the boot; None where there is none, or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()  # a name may hold blanks
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _parse(record: bytes) -> Owner | None:
    try:
        owner = Owner(**json.loads(record))
    except (ValueError, TypeError):
        return None
    texts = isinstance(owner.host, str) and isinstance(owner.started, str) and isinstance(owner.machine, str)
    return owner if texts and type(owner.pid) is int and type(owner.ticks) in (int, type(None)) else None


def _flock(descriptor: int, alone: bool = True) -> bool | None:
    """True: locked; False: another holds it; None: there are no such locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _is_network(path: Path) -> bool:
    """Does the folder lie on a mount that other machines see?  By /proc/self/mountinfo; False where there is none."""
    device = os.stat(path.parent).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return False
    kinds = {line.partition(" - ")[2].split(" ")[0] for line in mounts if line.split(" ")[2] == number}
    return any(kind in _NETWORK or kind.startswith("fuse") for kind in kinds)
