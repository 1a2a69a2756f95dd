"""The command line of lm-evaluation-harness with our model.

    python -m gptfast.evaluation.harness --model gptfast --model_args pretrained=DIR,dtype=int8 --tasks hellaswag

The arguments are lm-eval's own. Importing this module registers the model "gptfast".
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import metadata

from packaging.version import Version

OLDEST, NEWEST = "0.4.13", "0.4.13"  # lm-eval that this was tested with
DEBUG = "GPTFAST_DEBUG"  # set: tracebacks are shown


def check_version() -> None:
    """Raise ImportError where lm-eval is missing or older than the oldest that this was tested with; warn of a newer one."""
    try:
        version = metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise ImportError(f"lm-eval is not installed; install it with pip install 'lm-eval[api]=={NEWEST}'") from None
    if Version(version) < Version(OLDEST):
        raise ImportError(
            f"lm-eval {version} is older than {OLDEST}, the oldest that this was tested with; install it with "
            f"pip install 'lm-eval[api]=={NEWEST}'"
        )
    if Version(version) > Version(NEWEST):
        warnings.warn(
            f"gptfast: lm-eval {version} is newer than {NEWEST}, the newest that this was tested with; compare a result with "
            "--model hf before relying on it",
            stacklevel=2,
        )


def register() -> None:
    """Make "gptfast" known to lm-eval. Raises ImportError, see `check_version`."""
    check_version()
    import gptfast.evaluation.harness_model  # noqa: F401 (its decorator registers the model)


def main() -> int:
    """Run lm-eval's command line with our model; returns the exit code, 130 after Ctrl-C."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except (ValueError, TypeError, LookupError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get(DEBUG):
            raise
        line = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {line}\n({DEBUG}=1 shows where it was raised)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
else:
    register()
