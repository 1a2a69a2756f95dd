"""Text to token files: `gptfast.data.prepare` with GPT-2's tokenizer beside tiktoken's own batch encoding; memory of a BPE.

    python benchmarks/bench_tokenizer.py [--text FILE] [--megabytes 100] [--rounds 5] [--memory]

Without --text, distinct Python sources and documents of this machine are gathered in the temporary folder. Both read the
file and write their ids as uint16; they take turns in one process, on one core and on two. tiktoken is given the text in
the pieces that gptfast cuts, and holds all ids until it writes. --memory: the peak of a process that learns a BPE from
the text and encodes it (at 200 MB, with --megabytes 200).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gptfast._files import read_text
from gptfast.data import prepare
from gptfast.tokenizer import GPT2Tokenizer
from gptfast.tokenizer.pieces import GPT2, blocks_of, pieces

KINDS = (".py", ".rst", ".md", ".txt")
CHILD = """
import resource, sys
from gptfast.data import prepare
prepare(sys.argv[1], "bpe", sys.argv[2], progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def gather(path: Path, size: int) -> None:
    """Distinct texts of this machine in one file."""
    seen, written = set(), 0
    with path.open("wb") as file:
        for source in sorted(_sources()):
            try:
                content = source.read_bytes()
                content.decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.md5(content).digest()
            if b"\0" in content or digest in seen:
                continue
            seen.add(digest)
            written += file.write(content + b"\n")
            if written >= size:
                return
    print(f"only {written / 1e6:.0f} MB of text are on this machine")


def _sources() -> Iterator[Path]:
    roots = {Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix, "/usr/lib", "/usr/share")}
    for root in roots:
        for folder, _, names in os.walk(root):
            yield from (Path(folder, name) for name in names if name.endswith(KINDS))


def ours(text: Path, out: Path, cores: int) -> None:
    prepare(text, "gpt2", out / "ours", val_fraction=0.1, progress=False)


def theirs(text: Path, out: Path, cores: int) -> None:
    encoding = GPT2Tokenizer()._encoding
    parts = list(pieces(blocks_of(read_text(text)), GPT2))
    ids = encoding.encode_ordinary_batch(parts, num_threads=cores)
    with (out / "theirs.bin").open("wb") as file:
        for part in ids:
            np.array(part, np.uint16).tofile(file)
        os.fsync(file.fileno())


def seconds(encode: Callable[[Path, Path, int], None], text: Path, cores: int) -> float:
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        encode(text, Path(out), cores)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    text = options.text or Path(tempfile.gettempdir()) / f"bench_tokenizer_{options.megabytes}.txt"
    if not text.exists():
        gather(text, options.megabytes * 10**6)
    megabytes = text.stat().st_size / 1e6
    print(f"{text}: {megabytes:.1f} MB; medians of {options.rounds} rounds")
    if options.memory:
        with tempfile.TemporaryDirectory() as out:
            child = subprocess.run([sys.executable, "-c", CHILD, text, out], capture_output=True, text=True, check=True)
        print(f"bpe: peak {float(child.stdout):.0f} MB")
        return
    allowed = sorted(os.sched_getaffinity(0))
    for cores in sorted({1, min(2, len(allowed))}):
        os.sched_setaffinity(0, allowed[:cores])  # threads that are made later inherit it
        rounds = [(seconds(ours, text, cores), seconds(theirs, text, cores)) for _ in range(options.rounds)]
        a, b = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(theirs / ours for ours, theirs in rounds)
        print(f"{cores} cores: gptfast {megabytes / a:.2f} MB/s, tiktoken {megabytes / b:.2f} MB/s, ratio {ratio:.2f}")
        print("         " + ", ".join(f"{ours:.2f}/{theirs:.2f} s" for ours, theirs in rounds))


if __name__ == "__main__":
    main()
