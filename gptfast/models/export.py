"""Writing checkpoints in the Hugging Face layout: config.json and safetensors, in one file or in shards."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast._folders import staged_folder
from gptfast._large_files import write_pieces
from gptfast._snapshots import WEIGHTS
from gptfast.checkpoints import hf_layout
from gptfast.checkpoints.families import FAMILIES
from gptfast.checkpoints.family_files import Source, sources
from gptfast.checkpoints.weight_files import INDEX, SINGLE
from gptfast.config import GPTConfig
from gptfast.metadata import GENERATION, metadata_of
from gptfast.models.quantized import format_of
from gptfast.nn.difference import check_values, difference, true_config
from gptfast.nn.transformer import Transformer

_KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def save(
    model: Transformer,
    path: str | os.PathLike[str],
    max_shard_size: int | str = "5GB",
    *,
    heads: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
    patched: bool = False,
) -> None:
    """Write config.json and the weights to the folder `path`, together: a failure leaves what was there.

    transformers loads the result with the same logits wherever it knows the architecture (see
    `hf_layout.model_type`). Tied weights are stored once; a head that is a tensor of its own is stored as such, whatever
    the config says. Other files of the folder stay.

    Args:
        model: on any device, any float dtype; saved in its dtype.
        path: a folder, made if missing.
        max_shard_size: bytes, or text such as "500MB" (10**6); more than that is split into shards with an
            index.
        heads: further tensors by their names in the file, such as those of a task's head.
        settings: further keys of config.json, which replace others.
        patched: methods of gptfast's own classes may be replaced, as probes of a running training do.
    Raises:
        OSError: cannot be written (disk full, no permission).  ValueError: max_shard_size; or the model's modules are not
            what its config says, so that a model read from the folder would be another one.
    """
    limit = _bytes(max_shard_size)
    check(model, patched)
    described(model, heads=heads, settings=settings).write(path, limit)


def check(model: Transformer, patched: bool = False) -> None:
    """Raise ValueError for a model that `save` refuses."""
    check_values("save_pretrained", model)
    if held := format_of(model):
        raise ValueError(
            f"save_pretrained: the model is held in {held} (quantize), and a checkpoint holds floats; nothing was written - "
            "save_adapter writes its adapters; for a whole model load it without quantize, load_adapter and merge_adapter there"
        )
    told = difference(model, saved=True, patched=patched)
    if told is not None:
        raise ValueError(
            f"save_pretrained: {told}; a checkpoint holds a config and the weights of a plain GPT, and nothing was written - "
            "undo or merge the change, set model.config accordingly, or save model.state_dict() with safetensors"
        )


def described(
    model: Transformer, *, heads: Mapping[str, Tensor] | None = None, settings: Mapping[str, Any] | None = None
) -> Description:
    """What `save` writes, without its checks of the model."""
    config, metadata = true_config(model), metadata_of(model)
    state = model.state_dict()
    found = file_tensors(config, state)
    dtype = str(model.wte.weight.dtype).removeprefix("torch.")
    content = hf_layout.to_hf(config, dtype, metadata.config) | dict(settings or {})

    def read(key: str) -> Tensor:
        return heads[key] if heads and key in heads else found[key].form(state[found[key].name])

    sizes = {key: read(key).nbytes for key in (*found, *(heads or {}))}
    return Description(content, metadata.to_write(), sizes, read)


@dataclass(frozen=True)
class Description:
    """The files of a checkpoint folder of a model, before they are written.

    settings, generation: the content of config.json, and of generation_config.json; None: there is none.
    sizes: the bytes of every tensor, by its name in the file. read: the tensor of a name.
    """

    settings: dict[str, Any]
    generation: Any
    sizes: dict[str, int]
    read: Callable[[str], Tensor]

    def copied(self, copy: Callable[[Tensor], Tensor]) -> Description:
        """The same with tensors of its own, so that those of the model may change. copy: makes them."""
        tensors = {name: copy(self.read(name)) for name in self.sizes}
        return replace(self, read=tensors.__getitem__)

    def write(self, path: str | os.PathLike[str], limit: int = 5 * 10**9) -> None:
        """Write the folder, a file of at most `limit` bytes after the other."""
        shards = _split(self.sizes, limit)
        count = f"{len(shards):05d}"
        files = (
            [f"model-{i + 1:05d}-of-{count}.safetensors" for i in range(len(shards))] if len(shards) > 1 else [SINGLE]
        )
        with staged_folder(path, replaces=rf"{WEIGHTS}|generation_config\.json") as stage:
            write_json(stage / hf_layout.CONFIG, self.settings)
            if self.generation is not None:
                write_json(stage / GENERATION, self.generation)
            for file, names in zip(files, shards, strict=True):
                write_tensors(stage / file, {name: self.read(name) for name in names})
            if len(shards) > 1:
                weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
                total = sum(self.sizes.values())
                write_json(stage / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def file_tensors(config: GPTConfig, shapes: Mapping[str, Any]) -> dict[str, Source]:
    """Where each tensor of a file comes from, by its name there. shapes: of our tensors, by name."""
    kind = hf_layout.model_type(config)
    names = [name for name in shapes if name != "lm_head.weight" or not config.tie_weights]
    if kind in FAMILIES:
        return dict(sources(kind, config, names))
    out: dict[str, Source] = {}
    for name in names:
        out[hf_layout.to_file(name, kind)] = Source(name, Tensor.t if hf_layout.is_conv1d(name) else _as_it_is)
        if kind != "gptfast" and not config.bias and name.startswith(("h.", "ln_f.")):
            bias = name.removesuffix("weight") + "bias"  # transformers has biases everywhere
            out[hf_layout.to_file(bias, kind)] = Source(name, _no_bias)
    return out


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _no_bias(weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0])


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, filled into shards of at most `limit` bytes (a larger tensor has its own)."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file: the bytes that `safetensors.torch.save_file` writes, past the system's cache.

    Args:
        path: of the file.
        tensors: on any device; what two of them share is written for each.
        metadata: beside format = pt; in the order of its keys, as safetensors reads them in any.
    Raises:
        OSError: as `write_pieces`.  TypeError: a dtype that such a file cannot have.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **dict(sorted((metadata or {}).items()))}}
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each is aligned
    at = 0
    for name in names:
        x = tensors[name]
        if x.dtype not in _KINDS:
            raise TypeError(f"{path}: {name} has dtype {x.dtype}; expected one of {', '.join(map(str, _KINDS))}")
        entries[name] = {"dtype": _KINDS[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    begin = len(header).to_bytes(8, "little") + header
    write_pieces(path, chain([memoryview(begin)], (_content(tensors[name]) for name in names)), len(begin) + at)


def _content(x: Tensor) -> memoryview:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", size.strip(), re.IGNORECASE) if isinstance(size, str) else None
    number = int(float(match[1]) * _UNITS[match[2].upper()]) if match else size
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(
            f"save_pretrained: max_shard_size is {size!r}; expected bytes, or text such as '500MB' or '5GB'"
        )
    return number
