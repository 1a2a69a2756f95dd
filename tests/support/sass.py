"""What disassembled kernels say of themselves - their main loop, what stands between its products - and what is expected."""

from __future__ import annotations

import re
from dataclasses import dataclass

WAIT_FOR_SCORES = r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1"  # all groups of products but the last
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x\d")  # until so many groups of products are under way


@dataclass(frozen=True)
class Code:
    """Instructions in the order of their addresses, without predicates, such as `LDS.128 R4, [R2]`."""

    instructions: tuple[str, ...]
    jumps: tuple[tuple[int, int], ...]  # from, to: indices of instructions

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, x) is not None for x in self.instructions)

    def loop(self, pattern: str) -> Code:
        """The shortest loop that holds all instructions of a kind. Jumps back from code that is out of the way (waits that try
        again, rare branches), which the compiler puts behind everything else, span more than a loop."""
        at = [n for n, x in enumerate(self.instructions) if re.match(pattern, x)]
        loops = [(b, a) for a, b in self.jumps if b <= at[0] and at[-1] <= a]
        first, last = min(loops, key=lambda span: span[1] - span[0])
        return Code(self.instructions[first : last + 1], ())

    def under_products(self, pattern: str) -> int:
        """How many such instructions run while one group of products is under way: from the wait for all groups but one to the
        next wait for all."""
        after = self.instructions[
            [WAIT.match(x) is not None and x.endswith("1") for x in self.instructions].index(True) :
        ]
        until = [WAIT.match(x) is not None and x.endswith("0") for x in after].index(True)
        return Code(after[:until], ()).count(pattern)

    def widest_gap(self) -> int:
        """The most instructions between two neighbouring products of one group."""
        gaps, since = [0], None
        for x in self.instructions:
            if x.startswith("HGMMA"):
                gaps += [] if since is None else [since]
                since = 0
            elif x.startswith("WARPGROUP"):
                since = None
            elif since is not None:
                since += 1
        return max(gaps)

    def loads_at_once(self) -> int:
        """The most 8- and 16-byte loads from memory that are asked for before one of their registers is used.

        Branches are taken as they lie; a load that is on its way from one turn of a loop to the next counts where it is
        asked for.
        """
        waiting: list[set[int]] = []
        most = 0
        for x in self.instructions:
            used = {int(n) for n in re.findall(r"\bR(\d+)", x)}
            if match := re.match(r"LDG\.E\.(?:EF\.)?(64|128)\S* R(\d+), \S*\[R(\d+)", x):
                width, first, address = int(match[1]) // 32, int(match[2]), int(match[3])
                used = {address, address + 1}
            if any(used & registers for registers in waiting):
                waiting.clear()
            if match:
                waiting.append(set(range(first, first + width)))
                most = max(most, len(waiting))
        return most


def code_of(text: str) -> Code:
    """The body of a function as cuobjdump prints it."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", text, re.M)
    index = {int(address, 16): n for n, (address, _) in enumerate(found)}
    targets = ((n, re.match(r"BRA\b.*?\b0x([0-9a-f]+)$", x)) for n, (_, x) in enumerate(found))
    jumps = tuple((n, index[int(m[1], 16)]) for n, m in targets if m and int(m[1], 16) in index)
    return Code(tuple(x for _, x in found), jumps)


@dataclass(frozen=True)
class Warpgroups:
    """The main loop of a kernel of Hopper: both of its 16-bit variants.

    Args:
        unit: the file.
        variant: what their mangled names have in common: head dim, warpgroups or whether rows are keys, dropout.
        products: HGMMA instructions of a tile.
        under_products: exponentials, at least, that run while a product does: all of a tile. 0: products are waited for.
        gap: other instructions between two products of a group, at most: a product of 64 columns takes 32 cycles. Where there
            is dropout its bits are made here.
        moves: R2UR, at most: operands that the compiler does not know to be the same in all lanes.
    """

    unit: str
    variant: str
    products: int
    under_products: int
    gap: int
    moves: int

    @property
    def id(self) -> str:
        return self.unit.split("_")[2] + self.variant


FWD, BWD = "causal_attention_fwd_sm90", "causal_attention_bwd_sm90"
WARPGROUPS = [
    Warpgroups(FWD, "Li64ELi3EEELb0", 12, 64, gap=10, moves=4),
    Warpgroups(FWD, "Li64ELi2EEELb1", 12, 64, gap=10, moves=4),
    Warpgroups(FWD, "Li128ELi2EEELb0", 16, 64, gap=10, moves=4),
    Warpgroups(FWD, "Li128ELi2EEELb1", 16, 64, gap=10, moves=4),
    Warpgroups(BWD, "Li64ELb0EEELb0", 12, 32, gap=12, moves=4),  # dq
    Warpgroups(BWD, "Li64ELb1EEELb0", 16, 32, gap=18, moves=4),  # dk and dv
    Warpgroups(BWD, "Li64ELb0EEELb1", 12, 32, gap=42, moves=4),
    Warpgroups(BWD, "Li64ELb1EEELb1", 16, 32, gap=52, moves=4),
    Warpgroups(BWD, "Li128ELb0EEELb0", 20, 32, gap=18, moves=4),
    Warpgroups(BWD, "Li128ELb1EEELb0", 24, 0, gap=18, moves=4),  # no register is left for a second tile
    Warpgroups(BWD, "Li128ELb0EEELb1", 20, 32, gap=60, moves=4),
    Warpgroups(BWD, "Li128ELb1EEELb1", 24, 0, gap=44, moves=84),  # nor to keep descriptors ready
]
# Of a thread: what lets as many blocks run on a multiprocessor of 65,536 registers as the launch bounds and the notes say.
REGISTERS = [
    ("attention_forward_sm90.*Li64ELi3E", "sm_90a", 128),
    ("attention_(forward|backward)_sm90", "sm_90a", 168),
    ("embedding_bwd_kernel", "sm_80", 64),  # four blocks of 256 threads
    ("sample_(part_|join_|)kernel", "sm_80", 64),  # one of 1024
    ("attend_split.*Li1EE", "sm_80", 128),  # four of 128 threads, each with 8 loads under way, for one query a head
    ("attend_split", "sm_80", 255),  # two
    ("attend_split.*Li1EE", "sm_90a", 128),
    ("attend_split", "sm_90a", 255),
    ("linear_few_kernel.*Li4E", "sm_90a", 80),
    ("linear_few_kernel.*Li12E", "sm_90a", 128),
    (
        "row_products",
        "sm_80",
        128,
    ),  # four of 128 threads, each with 8 loads of 16 bytes under way: 64 KB; 64 registers spill
    ("cross_entropy", "sm_80", 32),  # four of 512
    ("quantized_(rows|products)", "sm_80", 128),  # two of 256
    ("linear_few_kernel.*Li4E", "sm_80", 80),  # three of 256, each thread with 4 loads of 16 bytes under way
    ("linear_few_kernel.*Li12E", "sm_80", 128),  # two, with 12
    ("quantized_products_sm90", "sm_90a", 168),
    (
        r"norm_fwd_kernelILb0.*Li[48]ELi1ELi(8|16|32)E",
        "sm_80",
        40,
    ),  # twelve of 128, each thread with one vector of a head
    (r"norm_bwd_kernelILb0.*Li[48]ELi1ELi(8|16|32)E", "sm_80", 80),  # two of 384
    ("swiglu_kernel", "sm_80", 64),  # four of 256
    ("rotary_kernel", "sm_80", 128),  # two of 256, with 8 loads under way
    (r"activation_\wwd_kernel.*ReluSquared", "sm_80", 48),  # five of 256
]
# Dynamic shared memory of a block in bytes, at most, and so how many blocks stay on a multiprocessor of an H100 (228 KB, of which
# a block has 1 KB more than it asks for; 227 KB are the most that one may have).
MULTIPROCESSOR = 228 << 10
SHARED_MEMORY = {
    "forward D=64": (180 << 10, 1),
    "forward D=64 dropout": (163 << 10, 1),
    "forward D=128": (195 << 10, 1),
    "backward D=64": (102 << 10, 2),  # registers leave room for one
    "backward D=128": (198 << 10, 1),
    "cross_entropy in place, bf16": (100 << 10, 2),
    "sample, bf16": (121 << 10, 1),
    "sample, fp32": (218 << 10, 1),
}
