"""Put the libraries of a wheel into this tree, for `make test WHEEL=1`: tests then run on the build that is released."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(wheel: str) -> None:
    for old in (ROOT / "gptfast").glob("*.so"):
        old.unlink()
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("gptfast/") and name.endswith(".so")]
        for name in names:
            archive.extract(name, ROOT)
            os.utime(ROOT / name, (0, 0))  # older than every object, so that the next build links its own again
    if not names:
        sys.exit(f"take_libraries: {wheel} has no libraries")
    print(f"took {', '.join(names)} of {wheel}")


if __name__ == "__main__":
    main(*sys.argv[1:])
