"""What a library of macOS (Mach-O, 64 bits) says of itself: what it loads, what it wants from whom, what it exports."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path

ARM64, DYLIB = 0x0100000C, 6
DYNAMIC_LOOKUP = -2  # the ordinal of "whoever has it"


@dataclass
class Library:
    """One file.

    Args:
        loads: install names of the libraries it loads; the first has ordinal 1.
        undefined: symbols that others must have.
        bound: symbols that the loader looks up, each with the ordinal of the library that must have it.
        oldest: the oldest macOS that takes it, such as (14, 0).
        exports: bytes of the tree of exported names.
    """

    machine: int
    kind: int
    name: str = ""
    loads: list[str] = field(default_factory=list)
    searched: list[str] = field(default_factory=list)
    undefined: set[str] = field(default_factory=set)
    bound: dict[str, int] = field(default_factory=dict)
    oldest: tuple[int, int] = (0, 0)
    signed: bool = False
    exports: bytes = b""

    def has(self, symbol: str) -> bool:
        """Is this symbol, with its leading underscore, exported?"""
        tree, at, rest = self.exports, 0, symbol.encode()
        while tree:
            size, at = _number(tree, at)
            if not rest:
                return size > 0
            at += size
            children, at = tree[at], at + 1
            for _ in range(children):
                end = tree.index(b"\0", at)
                label, (child, at) = tree[at:end], _number(tree, end + 1)
                if rest.startswith(label):
                    rest, at = rest[len(label) :], child
                    break
            else:
                return False
        return False


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A number in LEB128, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def read(path: Path) -> Library:
    """The library in a file."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic, machine, _, kind, commands = struct.unpack_from("<5I", data)
        assert magic == 0xFEEDFACF, f"{path} is no Mach-O file of 64 bits"
        library, at = Library(machine, kind), 32
        for _ in range(commands):
            command, size = struct.unpack_from("<2I", data, at)
            fields = struct.unpack_from(f"<{size // 4 - 2}I", data, at + 8)
            body = data[at : at + size]
            if command in (0xC, 0x80000018, 0x8000001F):  # load, weakly, and re-export
                library.loads.append(_text(body, fields[0]))
            elif command == 0xD:
                library.name = _text(body, fields[0])
            elif command == 0x8000001C:
                library.searched.append(_text(body, fields[0]))
            elif command == 0x32:
                library.oldest = (fields[1] >> 16, fields[1] >> 8 & 0xFF)
            elif command == 0x1D:
                library.signed = True
            elif command in (0x22, 0x80000022):  # all that the loader needs, in one command
                library.exports = data[fields[8] : fields[8] + fields[9]]
                for start, count in (fields[2:4], fields[6:8]):  # at once, and when first called
                    library.bound |= _bound(data[start : start + count])
            elif command == 0x80000033:
                library.exports = data[fields[0] : fields[0] + fields[1]]
            elif command == 2:
                library.undefined = _undefined(data, *fields)
            at += size
    return library


def _undefined(data: mmap.mmap, symbols: int, count: int, strings: int, _: int) -> set[str]:
    names = set()
    for n in range(count):
        name, kind, _section, _described, value = struct.unpack_from("<IBBHQ", data, symbols + 16 * n)
        if kind & 0xE0 == 0 and kind & 0x0F == 1 and not value:  # external and undefined, not for debuggers
            start = strings + name
            names.add(data[start : data.find(b"\0", start)].decode())
    return names


def _bound(program: bytes) -> dict[str, int]:
    """What the loader's small program (BIND_OPCODE_…) binds."""
    found, ordinal, name, at = {}, 0, "", 0
    while at < len(program):
        operation, small, at = program[at] & 0xF0, program[at] & 0x0F, at + 1
        if operation == 0x10:
            ordinal = small
        elif operation == 0x20:
            ordinal, at = _number(program, at)
        elif operation == 0x30:
            ordinal = small - 16 if small else 0  # special ones are negative
        elif operation == 0x40:
            name = _text(program, at)
            at += len(name) + 1
        elif operation in (0x60, 0x70, 0x80):  # an addend, a place, a step
            at = _number(program, at)[1]
        elif operation >= 0x90:
            found[name] = ordinal
            for _ in range({0xA0: 1, 0xC0: 2}.get(operation, 0)):
                at = _number(program, at)[1]
    return found
