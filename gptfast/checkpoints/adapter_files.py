"""Adapter folders in peft's format, read: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

from gptfast._json import expect, read_json
from gptfast._snapshots import current, read_whole
from gptfast.checkpoints import hf_layout
from gptfast.checkpoints.adapter_config import AdapterConfig, from_peft
from gptfast.checkpoints.prompt_config import PromptTuningConfig
from gptfast.checkpoints.weight_files import WeightFile, open_weights

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX, MARK, QUANTIZED = "base_model.model.", "gptfast_base", "gptfast_quantized_base"
PROMPT = "prompt_embeddings"  # the tensor of a soft prompt


class AdapterFile(NamedTuple):
    """A folder of an adapter, opened. path: of its weights. told: their metadata, such as the mark of the base."""

    folder: Path
    config: AdapterConfig
    path: Path
    weights: WeightFile
    told: dict[str, str]

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors by their names in the file. Raises ValueError for one that is not finite."""
        for key, x in self.weights.tensors():
            check_finite(self.path, key, x)
            yield key, x

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by gptfast's names. Raises ValueError for one that is not finite."""
        return {our_key(key): x for key, x in self.stored()}

    def check_base(self, mine: str) -> None:
        """Raise ValueError for an adapter of another base. mine: mark of the model's; "": unknown."""
        theirs = self.told.get(MARK)
        if theirs and mine and theirs != mine:
            raise ValueError(
                f"{self.folder}: the adapter was trained on another base: {theirs} is not this model's {mine}; load its own "
                "base, or say any_base=True"
            )


def open_adapter(folder: Path) -> AdapterFile:
    """Open the folder of an adapter.

    Raises:
        OSError, ValueError: missing or damaged files.
    """
    if not current(folder, CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}; expected the folder of an adapter")
    return read_whole(folder, lambda: _opened(folder))


def _opened(folder: Path) -> AdapterFile:
    file = current(folder, CONFIG)
    config = from_peft(expect(read_json(file), dict, "", file), file)
    path = current(folder, WEIGHTS)
    if not path.is_file():
        path = current(folder, OLD_WEIGHTS)
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds {CONFIG} but no {WEIGHTS}; the adapter is half written - copy or save it again"
        )
    weights = open_weights(path)
    if path.name == OLD_WEIGHTS:
        return AdapterFile(folder, config, path, weights, {})
    with safe_open(path, framework="pt") as opened:
        return AdapterFile(folder, config, path, weights, opened.metadata() or {})


def check_finite(path: Path, key: str, x: Tensor) -> None:
    """Raise ValueError for a tensor of an adapter or a task's head with values that fp32, in which it is held, does not have."""
    if x.is_floating_point() and not x.float().isfinite().all():
        raise ValueError(
            f"{path}: {key} holds nan or infinities; the file is damaged, or the training that wrote it went wrong - take an "
            "earlier checkpoint"
        )


def embedding_rows(folder: Path) -> int | None:
    """The rows of the token embedding of which an adapter has a copy; None: it has none.

    Raises:
        OSError, ValueError: as `open_adapter`.
    """
    shapes = open_adapter(folder).weights.shapes
    return next((shape[0] for key, shape in shapes.items() if our_key(key) == "wte.weight"), None)


def our_key(key: str) -> str:
    """A key without what depends on the architecture and on how the model was wrapped."""
    name = key.removeprefix(PREFIX).removeprefix("base_model.")
    return hf_layout.from_file(name) or name


def check_prompt(width: int, config: PromptTuningConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise ValueError for a file that does not hold the soft prompt of its configuration, or one of another width."""
    if PROMPT not in tensors:
        raise ValueError(f"{folder}: {PROMPT} is missing; the adapter is half written - copy or save it again")
    values = tensors[PROMPT]
    if values.dim() != 2 or len(values) != config.n:
        raise ValueError(
            f"{folder}: {PROMPT} is {tuple(values.shape)} and the configuration says {config.n} virtual tokens; copy or save "
            "the adapter again"
        )
    if values.shape[1] != width:
        raise ValueError(
            f"{folder}: the adapter does not fit this model: {PROMPT} is {tuple(values.shape)} and this model's width "
            f"{width}; load the base that it was trained on"
        )
