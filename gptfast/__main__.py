"""The `gptfast` command: what has to happen before torch, or anything large, is imported."""

from __future__ import annotations

import sys

from gptfast._version import __version__
from gptfast.openmp import bound_spinning


def main() -> None:
    """Run the command line."""
    if sys.argv[1:] == ["--version"]:  # at once, without the imports of the commands
        print(__version__)
        return
    bound_spinning()
    try:
        from gptfast.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
