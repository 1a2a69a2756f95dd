"""Pages of code that need not be resident are dropped, and none that holds anything of its own."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys

import pytest

from gptfast._pages import drop_code

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pagemap is Linux's")

DROP = """
import torch
from gptfast._pages import drop_code

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssFile")) / 1024

before = resident()
drop_code()
after = resident()
assert (torch.ones(64, 64) @ torch.ones(64, 64)).sum() == 64**3
print(before - after)
"""


def test_code_that_ran_once_is_dropped():
    """60 MB of torch's; what runs again comes back."""
    done = subprocess.run([sys.executable, "-c", DROP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 30, done.stdout


def test_a_page_that_was_written_stays(tmp_path):
    """As a debugger's breakpoint."""
    path = tmp_path / "code"
    path.write_bytes(b"\x90" * (1 << 21))
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with path.open("rb") as file:
        code = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    code[5000] = 0xCC
    place = ctypes.addressof(ctypes.c_char.from_buffer(code))
    assert libc.mprotect(place, len(code), mmap.PROT_READ | mmap.PROT_EXEC) == 0
    drop_code()
    assert code[5000] == 0xCC and code[5001] == 0x90
    assert libc.mprotect(place, len(code), mmap.PROT_READ | mmap.PROT_WRITE) == 0
