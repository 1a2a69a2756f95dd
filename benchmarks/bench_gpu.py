"""`make bench-gpu`: the CUDA kernels beside PyTorch's own on the GPU at hand; tables, and benchmarks/results/<gpu>.json.

Every comparison is made in turns within one run, with cold caches; a figure is the median over the rounds. A comparison
that is lost is printed like one that is won.

    python benchmarks/bench_gpu.py --try     runs the same code on the emulator with tiny shapes: no figure means anything
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu import attention, decode, memory_bound, training
from gpu.timing import Bench

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
PARTS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "memory": memory_bound.measure,
    "attention": attention.measure,
    "training": training.measure,
    "decode": decode.measure,
}


def emulator() -> Bench:
    sys.path.insert(0, str(ROOT / "tests"))
    import emulated

    emulated.load()
    return Bench(device="cpu", backend="emu", tiny=True)


def file_name(gpu: str) -> str:
    return re.sub(r"\W+", "-", gpu.lower()).strip("-") + ".json"


def write(path: Path, head: dict[str, Any], part: str, rows: list[dict[str, Any]]) -> None:
    """Put the rows of one part in the place of its old ones; those of other parts stay, if they come from the same place."""
    old = json.loads(path.read_text()) if path.exists() else {}
    same = all(old.get(key) == value for key, value in head.items())
    kept = [row for row in old.get("rows", ()) if row.get("part") != part] if same else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, "rows": kept + rows}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--try", action="store_true", dest="trial", help="on the emulator, with tiny shapes")
    parser.add_argument("--only", choices=PARTS, action="append", help="these parts only")
    parser.add_argument("--out", type=Path, help="the JSON file")
    options = parser.parse_args()
    if not options.trial and not torch.cuda.is_available():
        print("bench-gpu: torch sees no NVIDIA GPU, so there is nothing to measure; no figure was written")
        return 2
    bench = emulator() if options.trial else Bench()
    gpu = "emulator (no measurement)" if options.trial else torch.cuda.get_device_name()
    print(f"{gpu}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    path = options.out or (None if options.trial else RESULTS / file_name(gpu))
    head = {"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda, "tiny": bench.tiny}
    failed: list[str] = []
    for part in options.only or PARTS:
        try:
            rows = [{"part": part, **row} for row in PARTS[part](bench)]
        except Exception:  # the other parts are of use without it
            traceback.print_exc()
            failed.append(part)
            continue
        failed += [row["what"] for row in rows if "gptfast" in row.get("refused", {})]
        if path is not None:  # after every part: the next may be cut short
            write(path, head, part, rows)
    if path is not None:
        print(f"\nwritten to {path}")
    if failed:
        print(f"bench-gpu: FAILED: {', '.join(failed)} (above)")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
