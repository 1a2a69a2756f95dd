"""Put known mistakes into a copy of the tree, one at a time, and see whether the tests find each (`make mutants`).

    python scripts/mutants.py                 all of them: half a minute each, and the build
    python scripts/mutants.py --only clip     those with this in their name or file

Mistakes in C++ are built together behind a switch (the environment variable GPTFAST_MUTANT), those in Python are edits of
the text. First every test that is to find one must pass without any. Ends with 1 if fewer than 95% are found.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent
LEAST = 0.95
ISAS = "csrc/cpu/isa_select.h"  # lists the instruction sets
LIMIT = 900  # seconds for the tests of one mutant
SWITCH = """
extern "C" char* gptfast_mutant_environment(const char*) __asm__("getenv");
static int gptfast_mutant_number() {
  const char* text = gptfast_mutant_environment("GPTFAST_MUTANT");
  int n = 0;
  while (text && *text >= '0' && *text <= '9') n = 10 * n + (*text++ - '0');
  return n;
}
[[maybe_unused]] static const int gptfast_mutant = gptfast_mutant_number();
"""


@dataclass
class Copy:
    """A copy of the tree, with the compiled mutants in it."""

    root: Path

    def environment(self, number: int = 0) -> dict[str, str]:
        more = {"PYTHONPATH": str(self.root), "GPTFAST_MUTANT": str(number), "OMP_NUM_THREADS": "1"}
        return {**os.environ, **more}

    def build(self, compiled: list[Mutant]) -> None:
        """The library with these mutants in it; with none, the one that is there."""
        if not compiled:
            for library in (ROOT / "gptfast").glob("*.so"):
                shutil.copy2(library, self.root / "gptfast")
            return
        print(f"building {len(compiled)} mutants ...", flush=True)
        self._leave_out_avx512()
        header = self.root / "mutant.h"
        header.write_text(SWITCH)
        for mutant in compiled:
            self.edit(mutant, mutant.new.replace("MUTANT", f"(gptfast_mutant == {number_of(mutant)})"))
        compiler = f"{os.environ.get('CXX', 'g++')} -include {header}"
        environment = {**self.environment(), "CXX": compiler, "GPTFAST_CUDA": "0"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        result = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(f"mutants: the build failed\n{result.stdout[-3000:]}{result.stderr[-3000:]}")

    def _leave_out_avx512(self) -> None:
        """Most of the build; AVX2 stands for it."""
        path = self.root / ISAS
        path.write_text(without_avx512(path.read_text(encoding="utf-8")), encoding="utf-8")

    def edit(self, mutant: Mutant, new: str) -> str:
        """Put the mistake in; returns the file's text before."""
        path = self.root / mutant.file
        before = path.read_text(encoding="utf-8")
        path.write_text(before.replace(mutant.old, new), encoding="utf-8")
        return before

    def run(self, tests: tuple[str, ...], number: int = 0) -> tuple[str, str]:
        """How these tests ended ("passed", "failed", "crashed", "too slow", "no tests"), and pytest's last line."""
        files = sorted(str(p.relative_to(self.root)) for p in self.root.glob(tests[0]))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, *tests[1:]]
        try:
            result = subprocess.run(
                command, cwd=self.root, env=self.environment(number), capture_output=True, text=True, timeout=LIMIT
            )
        except subprocess.TimeoutExpired:
            return "too slow", f"over {LIMIT} s"
        lines = [line for line in result.stdout.splitlines() if re.match(r"(FAILED|ERROR|\d+ \w+)", line)]
        how = {0: "passed", 1: "failed", 5: "no tests"}.get(result.returncode, "crashed")
        return how, lines[0] if lines else (result.stdout + result.stderr)[-200:].strip()


def without_avx512(text: str) -> str:
    """The list of instruction sets up to AVX2, with nothing else changed."""
    shorter, count = re.subn(r"(#define GPTFAST_ISAS\(X, PART\) X\(scalar\) X\(avx2\)) X\(avx512\).*", r"\1", text)
    if count != 1:
        sys.exit(
            f"mutants: {ISAS} lists AVX-512 behind AVX2 {count} times; expected once - bring scripts/mutants.py up to date"
        )
    return shorter


def number_of(mutant: Mutant) -> int:
    return MUTANTS.index(mutant) + 1


def problem(mutant: Mutant, root: Path = ROOT) -> str | None:
    """Why this mutant cannot be put in, or None."""
    path = root / mutant.file
    found = path.read_text(encoding="utf-8").count(mutant.old) if path.exists() else 0
    if found != 1:
        return f"{mutant.name}: {mutant.file} has its line {found} times; expected once - bring scripts/mutant_list.py up to date"
    if not list(root.glob(mutant.tests[0])):
        return f"{mutant.name}: no file is called {mutant.tests[0]}"
    return None


def copied(place: Path) -> Copy:
    """Everything that git knows, or would."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    return Copy(place)


def check_without(copy: Copy, mutants: list[Mutant]) -> None:
    for tests in dict.fromkeys(mutant.tests for mutant in mutants):
        how, line = copy.run(tests)
        if how not in ("passed", "no tests"):
            sys.exit(f"mutants: without any mistake {' '.join(tests)} {how}: {line}")


def try_one(copy: Copy, mutant: Mutant) -> bool:
    """Whether the tests find it; prints a line."""
    start = time.monotonic()
    before = None if mutant.compiled else copy.edit(mutant, mutant.new)
    try:
        how, line = copy.run(mutant.tests, number_of(mutant) if mutant.compiled else 0)
    finally:
        if before is not None:
            (copy.root / mutant.file).write_text(before, encoding="utf-8")
    found = how in ("failed", "crashed", "too slow")
    print(
        f"{'found' if found else 'SURVIVED':9}{time.monotonic() - start:6.0f} s  {mutant.name}: {line[:110]}",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the name or of the file")
    wanted = parser.parse_args().only
    mutants = [mutant for mutant in MUTANTS if wanted in mutant.name or wanted in mutant.file]
    problems = [told for mutant in mutants if (told := problem(mutant))]
    if problems or not mutants:
        sys.exit("\n".join(problems) or f"mutants: none has {wanted!r} in its name")
    with tempfile.TemporaryDirectory(prefix="gptfast-mutants-") as folder:
        copy = copied(Path(folder))
        copy.build([mutant for mutant in mutants if mutant.compiled])
        print("the tests, without any mistake ...", flush=True)
        check_without(copy, mutants)
        found = sum(try_one(copy, mutant) for mutant in mutants)
    print(f"{found} of {len(mutants)} were found; expected at least {LEAST:.0%}")
    sys.exit(found < LEAST * len(mutants))


if __name__ == "__main__":
    main()
