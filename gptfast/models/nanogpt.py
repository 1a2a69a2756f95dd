"""nanoGPT's checkpoints: ckpt.pt, with the state_dict under "model" and the shape under "model_args"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast._snapshots import current
from gptfast.checkpoints.hf_layout import CONFIG
from gptfast.checkpoints.pickled import check_tensors, read_pickled
from gptfast.checkpoints.weight_files import StoredTensor, WeightFile
from gptfast.config import GPTConfig

FILE_NAME = "ckpt.pt"
SUFFIXES = (".pt", ".pth")
_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_OPTIONS = ("bias", "dropout")


def find(path: Path) -> Path | None:
    """The nanoGPT checkpoint that `path` is, or that lies in this folder instead of a config.json; None: there is none."""
    if path.is_file():
        return path
    inside = path / FILE_NAME
    return inside if inside.is_file() and not current(path, CONFIG).exists() else None


class NanoGPTFile(WeightFile):
    """A ckpt.pt, opened.

    config: what model_args say. The head is tied where its values are those of the token embedding, and the GELU is the
    exact one; for checkpoints without the option bias, which are of a time when nanoGPT had the tanh form (until May 2023),
    that one.
    shapes: of the tensors.

    Args:
        path: the file.
    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, no checkpoint of nanoGPT, of a changed one, or holds more than plain data.
    """

    def __init__(self, path: Path) -> None:
        content = read_pickled(path)
        if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
            raise ValueError(
                f"{path} has no model and model_args; expected a checkpoint of nanoGPT - give the folder of a checkpoint in "
                f"the Hugging Face layout ({CONFIG} and weights), or save yours with save_pretrained"
            )
        found = check_tensors(content["model"], path, "model")
        # torch.compile and DistributedDataParallel wrap the model, and its names
        self._tensors = {name.replace("_orig_mod.", "").removeprefix("module."): x for name, x in found.items()}
        self.shapes = {name: tuple(x.shape) for name, x in self._tensors.items()}
        self.config = _config(content["model_args"], self._tensors, path)

    def stored(self, key: str) -> StoredTensor:
        return StoredTensor.of(self._tensors[key])


def _config(args: Any, tensors: dict[str, Tensor], path: Path) -> GPTConfig:
    if not isinstance(args, dict):
        raise ValueError(f"{path}: model_args is a {type(args).__name__}; expected a dictionary")
    strange = [name for name in args if name not in (*_SIZES, *_OPTIONS)]
    if strange:
        raise ValueError(
            f"{path}: model_args has {strange[0]!r}, which nanoGPT does not have; expected {', '.join((*_SIZES, *_OPTIONS))} "
            "- a changed nanoGPT computes something else"
        )
    missing = [name for name in _SIZES if name not in args]
    if missing:
        raise ValueError(f"{path}: model_args lacks {', '.join(missing)}; the file is damaged, or of another program")
    values = {name: args[name] for name in _SIZES} | {"dropout": args.get("dropout", 0.0)}
    try:
        return GPTConfig(
            **values,
            bias=args.get("bias", True),
            activation="gelu" if "bias" in args else "gelu_tanh",
            tie_weights=_is_tied(tensors),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: model_args: {error}") from error


def _is_tied(tensors: dict[str, Tensor]) -> bool:
    head, embedding = tensors.get("lm_head.weight"), tensors.get("transformer.wte.weight")
    return head is None or embedding is None or torch.equal(head, embedding)
