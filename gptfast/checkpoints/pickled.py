"""Files of torch.save. PyTorch's restricted reader is all that opens them: it makes tensors, numbers, texts and containers
of these, and refuses what names any other code."""

from __future__ import annotations

import pickle
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast._files import open_read

_ZIP = b"PK\3\4"  # how files begin since torch 1.6; the older ones cannot be mapped
_DAMAGE = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(EOFError, OSError, struct.error),
)  # what the reader meets in a file that is cut short, changed, or none of torch.save


def read_pickled(path: Path) -> Any:
    """The content of a file of torch.save, on the CPU. Newer files are mapped: a tensor is read when it is used.

    Raises:
        OSError: the file cannot be read.
        ValueError: it names other code than that of tensors, which could do anything; or it is damaged, or no such file.
    """
    with open_read(path) as file:
        mapped = file.read(len(_ZIP)) == _ZIP
    try:
        with torch.device("cpu"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise _damaged(path, error) from error
        raise ValueError(
            f"{path} is a pickle that names {named[1]}, beside tensors, and so could run any program; it is not loaded - "
            "convert it where you trust it, to safetensors or to a dictionary of tensors alone"
        ) from error
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def check_tensors(found: Any, path: Path, inside: str = "") -> dict[str, Tensor]:
    """A dictionary of ordinary CPU tensors by name, of which none is larger than its file.

    Args:
        found: what was read.
        path: the file, for messages.
        inside: where in the file.
    Raises:
        ValueError: it is something else.
    """
    where = f"{path}: {inside}" if inside else f"{path}: the content"
    if not isinstance(found, dict):
        raise ValueError(f"{where} is a {type(found).__name__}; expected a dictionary of tensors")
    for name, x in found.items():
        if not isinstance(name, str) or not isinstance(x, Tensor):
            raise ValueError(f"{where} has a {type(x).__name__} under {name!r}; expected tensors under their names")
        plain = type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided and x.device.type == "cpu"
        if not plain or x.is_quantized:
            raise ValueError(
                f"{where} has {name!r}, a {type(x).__name__} with {x.layout} on {x.device}; expected plain dense tensors"
            )
        if x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise ValueError(f"{where} has {name!r} of shape {tuple(x.shape)}, more than is stored; save it contiguous")
    return {name: x.detach() for name, x in found.items()}


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return ValueError(
        f"{path} is damaged or cut short, or no file of torch.save ({reason}); copy or download the file again"
    )
