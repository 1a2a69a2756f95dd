"""MXFP4, the four bits of gpt-oss' experts: 32 numbers share a power of two (OCP Microscaling Formats 1.0).

A tensor NAME of shape (E, in, out) is stored as NAME_blocks, (E, out, in / 32, 16) uint8: two codes a byte, the lower half first; and
NAME_scales, (E, out, in / 32) uint8: 127 more than the exponent.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gptfast import _mxfp4
from gptfast.checkpoints.weight_files import StoredTensor

_BLOCKS, _SCALES = "_blocks", "_scales"


def decoded(stored: dict[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    """The tensors by name, those in MXFP4 as one in bfloat16, in which every value is exact; decoded as it is read.

    Args:
        stored: of the files.
        path: of the checkpoint, for messages.
    Raises:
        ValueError: codes without scales, or shapes that do not go together.
    """
    found = dict(stored)
    for key in [key for key in stored if key.endswith(_BLOCKS)]:
        name = key.removesuffix(_BLOCKS)
        blocks, scales = found.pop(key), found.pop(name + _SCALES, None)
        shape = blocks.shape
        bytes_ = blocks.dtype == torch.uint8 and scales is not None and scales.dtype == torch.uint8
        if not bytes_ or len(shape) != 4 or shape[3] != 16 or scales is None or scales.shape != shape[:3]:
            got = "no scales" if scales is None else f"scales {scales.shape} of {scales.dtype}"
            raise ValueError(
                f"{path}: {key} has shape {shape} of {blocks.dtype} beside {got}; expected blocks (E, out, in / 32, 16) and "
                "scales (E, out, in / 32), both uint8"
            )
        whole = (shape[0], 32 * shape[2], shape[1])
        read = partial(_read, blocks, scales, f"{path}: {name}{_SCALES}")
        found[name] = StoredTensor(whole, torch.bfloat16, read, mxfp4=(blocks, scales))
    return found


def _read(blocks: StoredTensor, scales: StoredTensor, where: str, first: int = 0, last: int | None = None) -> Tensor:
    last = blocks.shape[0] if last is None else last
    parts = [mxfp4_values(blocks.read(e, e + 1)[0], scales.read(e, e + 1)[0], where) for e in range(first, last)]
    return torch.stack(parts).transpose(1, 2)


def check_scales(largest: int, where: str) -> None:
    """Raise ValueError where the largest scale is 255, which is no number; `where` names the tensor."""
    if largest == _mxfp4.NAN:
        raise ValueError(f"{where} holds 255, which stands for nan; copy the file again")


def mxfp4_values(blocks: Tensor, scales: Tensor, where: str = "mxfp4") -> Tensor:
    """(..., n, 16) codes and (..., n) scales, uint8 both, as (..., 32 n) bfloat16.

    Raises:
        ValueError: a scale of 255, which is no number; `where` names the tensor.
    """
    check_scales(int(scales.max()) if scales.numel() else 0, where)
    return _mxfp4.dequantize(blocks.flatten(-2), scales).to(torch.bfloat16)
