"""python -m tests.fuzz [PART …] [--minutes N] [--seed S] [--case N]: look for faults by chance; exit code 1 where there are."""

from __future__ import annotations

import argparse
import importlib
import random
import sys

from . import runner

PARTS = ["files", "server", "ops", "disk_faults"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=60.0, help="of all parts together")
    parser.add_argument("--seed", type=int, default=None, help="another one each time, unless given")
    parser.add_argument("--case", type=int, default=None, help="only this case of one part, in this process")
    given = parser.parse_args()
    parts = given.parts or PARTS
    seed = random.SystemRandom().randrange(2**31) if given.seed is None else given.seed
    if given.case is not None:
        found = runner.run_case(importlib.import_module(f"tests.fuzz.{parts[0]}").make, seed, given.case)
        print(found or "nothing found")
        return bool(found)
    faults = 0
    for part in parts:
        report = importlib.import_module(f"tests.fuzz.{part}").run(given.minutes * 60 / len(parts), seed)
        tried = ", ".join(f"{kind} {count}" for kind, count in sorted(report.tried.items()))
        print(f"{part}: {sum(report.tried.values())} cases ({tried}), {len(report.findings)} findings")
        print(*report.findings, sep="\n", flush=True)
        faults += len(report.findings)
    print(f"seed {seed}: {faults} findings")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
