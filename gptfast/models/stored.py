"""A checkpoint folder, opened: config.json and the headers of its safetensors, of one save and compared with each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptfast._files import open_read
from gptfast._json import field, items, read_json
from gptfast._snapshots import current, read_whole
from gptfast.models import hf_layout
from gptfast.models.config import GPTConfig
from gptfast.models.export import CONFIG, INDEX, SINGLE
from gptfast.models.metadata import Metadata, read_metadata

_SINUSOIDS = 2**28  # numbers in a table that is computed, and that no file can vouch for


class StoredModel:
    """What a checkpoint says about its model, before anything of its size is built or read.

    The files stay open, and what was there when they were opened is what `tensors` reads, whoever saves meanwhile.

    Args:
        folder: a checkpoint folder.
    Raises:
        FileNotFoundError: a file is missing in it.
        ValueError: a damaged or truncated file, another architecture, or numbers in config.json that the tensors
            contradict.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, self.metadata, self._files = read_whole(
            folder, lambda: (*read_settings(folder), _open_weights(folder))
        )
        _compare(
            self.config, {k: shape for _, file in self._files for k, shape in _shapes(file).items()}, folder / CONFIG
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, under its name in the file."""
        for path, file in self._files:
            for key in file.keys():  # noqa: SIM118 - not a dict
                try:
                    yield key, file.get_tensor(key)
                except SafetensorError as error:
                    raise _damaged(path, error) from error


def read_settings(folder: Path) -> tuple[GPTConfig, Metadata]:
    """The configuration of a checkpoint folder, and what it says beside that.

    Raises:
        FileNotFoundError: there is none.  ValueError: damaged, of another architecture, or out of range.
    """
    file = current(folder, CONFIG)
    raw = read_json(file)
    values = hf_layout.from_hf(raw, file)
    try:
        config = GPTConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    return config, read_metadata(folder, hf_layout.extra_keys(raw), file)


def has_weights(folder: Path) -> bool:
    """Does a folder hold safetensors of a model?"""
    return current(folder, SINGLE).exists() or current(folder, INDEX).exists()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        FileNotFoundError: none, or a shard that the index names is missing.  ValueError: damaged index.
    """
    if current(folder, SINGLE).exists():
        return [current(folder, SINGLE)]
    if current(folder, INDEX).exists():
        return _shards(folder)
    pickled = sorted(f.name for f in folder.glob("*.bin"))
    remedy = (
        f"{pickled[0]} is a pickle, which can run any program and is never loaded; convert it where you "
        f"trust it: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(...)"
        if pickled
        else "copy the weights of the checkpoint there"
    )
    raise FileNotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}; {remedy}")


def _shards(folder: Path) -> list[Path]:
    index = current(folder, INDEX)
    weight_map = field(read_json(index), "weight_map", dict, index)
    names = sorted(set(items(list(weight_map.values()), str, "weight_map", index)))
    if not names or any(name != os.path.basename(name) for name in names):
        raise ValueError(f"{index}: weight_map does not map tensors to files beside it; copy the index again")
    missing = [name for name in names if not current(folder, name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)} of the {len(names)} shards in {INDEX}; copy the rest"
        )
    return [current(folder, name) for name in names]


def _open_weights(folder: Path) -> list[tuple[Path, Any]]:
    return [(path, _open(path)) for path in weight_files(folder)]


def _open(path: Path) -> Any:
    open_read(path).close()  # whose errors name the file
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: SafetensorError) -> ValueError:
    return ValueError(f"{path} is damaged or cut short ({error}); copy or download the file again")


def _shapes(file: Any) -> dict[str, tuple[int, ...]]:
    return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict


def _compare(config: GPTConfig, stored: dict[str, tuple[int, ...]], file: Path) -> None:
    """Refuse numbers that the tensors contradict, so that what is built from them is about as large as the files.

    Raises:
        ValueError: naming the key in config.json.
    """
    shapes = {hf_layout.from_file(key): (key, shape) for key, shape in stored.items()}
    if config.n_layer > len(stored):
        raise _contradiction(file, "n_layer", config.n_layer, f"the weights are {len(stored)} tensors in all")
    sizes = [("wte.weight", 1, "n_embd", config.n_embd), ("wte.weight", 0, "vocab_size", config.vocab_size)]
    if config.position_embedding == "learned":
        sizes.append(("wpe.weight", 0, "n_positions", config.block_size))
    elif config.block_size > max(1, _SINUSOIDS // config.n_embd):
        limit = max(1, _SINUSOIDS // config.n_embd)
        raise ValueError(f"{file}: n_positions is {config.block_size}; expected at most {limit} computed positions")
    sizes.append(("h.0.mlp.c_fc.weight", 1, "n_inner", config.inner_dim))
    for name, axis, key, value in sizes:
        tensor, shape = shapes.get(name, (name, ()))
        if len(shape) != 2 or shape[axis] != value:
            got = f"{tensor} has shape {shape}" if shape else f"{tensor} is missing"
            raise _contradiction(file, key, value, got)


def _contradiction(file: Path, key: str, value: int, got: str) -> ValueError:
    return ValueError(f"{file}: {key} is {value}, but {got}; use the {CONFIG} and the weights of one checkpoint")
