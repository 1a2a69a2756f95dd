"""Error messages of the command line: one line for a user's mistake, a report for an internal error."""

from __future__ import annotations

import dis
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from gptfast._files import cache_folder, remedy_of
from gptfast._version import __version__
from gptfast.cli._names import as_options

DEBUG = "GPTFAST_DEBUG"  # set: tracebacks are shown
_PACKAGE = Path(__file__).parent.parent
# Where we raise them with a text.
_MISTAKES = (ValueError, TypeError, LookupError, RuntimeError, NotImplementedError, MemoryError)
_RAISE = dis.opmap["RAISE_VARARGS"]
_OWNER = re.compile(r"(?:^|(?<=: ))([A-Za-z_]\w*(?:\.\w+)*): ")
_OTHER_NAMES = {  # parameters of the library -> the parameter of a command that sets them
    **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), "dropout"),
    "stop_strings": "stop",
    "out_dir": "out",
}
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
)  # in messages of torch and C++


def wants_traceback() -> bool:
    return bool(os.environ.get(DEBUG))


def print_error(error: Exception, options: dict[str, str] | None = None) -> None:
    """Print an error to standard error, in one line that names the file, key or option.

    An error that no check of gptfast raised is an internal error: its traceback goes to a file, which the line names.

    Args:
        options: the options of the command, such as {"max_steps": "--max-steps"}; None: {}.
    """
    mistake = _is_users_mistake(error)
    if _lacks_memory(error) and not mistake:
        _print(
            f"error: no memory is left ({_first_line(error)}); take a smaller batch, a shorter text or a smaller model"
        )
    elif not mistake:
        return _print_internal_error(error)
    else:
        _print(f"error: {_in_options(_without_owners(_one_line(error), error), options or {})}{_remedy(error)}")
    _print(f"({DEBUG}=1 shows where it was raised)")


def _print(line: str) -> None:
    print(line, file=sys.stderr)


def _remedy(error: Exception) -> str:
    """What to do about an error of the system whose text does not say it, behind a semicolon; "": nothing is known."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return ""
    if error.strerror != os.strerror(error.errno):
        return ""
    remedy = remedy_of(error)
    return f"; {remedy}" if remedy else ""


def _one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _without_owners(text: str, error: BaseException) -> str:
    """The message without the functions and classes of gptfast in front of it."""
    names = _names_around(error)

    def drop(match: re.Match[str]) -> str:
        ours = set(match[1].split(".")) <= names and not Path(match[1]).exists()
        return "" if ours and match[1] not in sys.argv[1:2] else match[0]  # the name of the command stays

    return _OWNER.sub(drop, text)


def _names_around(error: BaseException | None) -> set[str]:
    """The names of the functions in a traceback, and of gptfast's functions and classes in their modules."""
    names: set[str] = set()
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            names.add(frame.f_code.co_name)
            around = [*frame.f_globals.values(), *map(type, frame.f_locals.values())]
            ours = [v for v in around if str(getattr(v, "__module__", "")).startswith("gptfast") and callable(v)]
            names.update(getattr(v, "__name__", "") for v in ours)
        error = error.__cause__ or error.__context__
    return names


def _in_options(text: str, options: dict[str, str]) -> str:
    """The message with the options of the command line in place of the names of parameters.

    Names in a file (", line 3: temperature is …"; n_embd in config.json, lr in run.toml, unless it was given) stay.
    """
    options = options | {name: options[parameter] for name, parameter in _OTHER_NAMES.items() if parameter in options}
    text = as_options(text, options)
    if re.search(r", (line|record) \d+", text):
        return text
    of_file = re.search(r"\.(json|toml)\b", text)  # .jsonl is data
    for name, option in options.items():
        if of_file and not _is_given(option):
            continue
        text = re.sub(rf"(?<![\w./'\"=-]){name}=True\b", option, text)
        text = re.sub(rf"(?<![\w./'\"=-]){name}=(?=[\w'\"\[-])", f"{option} ", text)
        if "_" in name:
            text = re.sub(rf"(?<![\w./'\"-]){name}(?![\w/='\"(]|\.\w)(?!: )", option, text)
        else:
            text = re.sub(rf"(^|[;:,] |\bbut |\band ){name}(?= is [-\d'\"n\[i])", rf"\g<1>{option}", text)
    return text


def _is_given(option: str) -> bool:
    return any(argument == option or argument.startswith(f"{option}=") for argument in sys.argv)


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NO_MEMORY)
    )


def _is_users_mistake(error: Exception) -> bool:
    """Whether the user can correct it: a check of gptfast raised it, or the system for a file."""
    if isinstance(error, (OSError, ImportError)):
        return True
    last = _last(error.__traceback__)
    if not isinstance(error, _MISTAKES) or last is None or not _is_ours(last):
        return False
    return _raises(last) or (isinstance(error, (ValueError, RuntimeError)) and _is_native(error))


def _last(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _is_ours(trace: TracebackType) -> bool:
    return Path(trace.tb_frame.f_code.co_filename).is_relative_to(_PACKAGE)


def _raises(trace: TracebackType) -> bool:
    """Whether the error comes from a `raise` statement, and not from another operation."""
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == _RAISE


def _is_native(error: Exception) -> bool:
    """Whether gptfast's compiled code raised it: such messages begin with the name of the function."""
    name, colon, _ = str(error).partition(": ")
    return bool(colon) and name.replace("_", "").replace(".", "").isalnum()


def _print_internal_error(error: Exception) -> None:
    report = _write_report(error)
    where = f"its traceback is in {report}" if report else f"{DEBUG}=1 shows its traceback"
    _print(f"error: internal error of gptfast, {type(error).__name__}: {_first_line(error)}")
    _print(f"({where}; please report it with that and the output of `gptfast doctor`)")


def _write_report(error: Exception) -> Path | None:
    """Write the traceback to a file; returns its path, or None if no folder is writable."""
    torch = getattr(sys.modules.get("torch"), "__version__", "not imported")
    machine = f"gptfast {__version__}, Python {platform.python_version()}, torch {torch}, {platform.platform()}"
    command = "gptfast " + " ".join(sys.argv[1:2])  # no more: arguments may contain keys and texts
    text = "\n".join([machine, command, "", *traceback.format_exception(error)])
    name = time.strftime("error-%Y%m%d-%H%M%S") + f"-{os.getpid()}.txt"
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            return folder / name
        except OSError:
            continue  # the next folder
    return None


def _folders() -> Iterator[Path]:
    yield cache_folder()
    yield Path(tempfile.gettempdir())
