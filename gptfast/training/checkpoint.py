"""Checkpoints of a run: folders that hold a model and all state that is needed to resume training.

RUN/last and RUN/best each have the files of `GPT.save_pretrained` and of the tokenizer, and

    trainer.json            step, best validation loss, dropout counter, configuration, source of the data, and a
                            checksum of every file: a resumed run is equal bit for bit, or refused
    optimizer.safetensors   the state of the optimizers by names of parameters; of a run that divides it among processes
                            optimizer-00001-of-00002.safetensors and so on (`gptfast.training.parts`)
    ema.safetensors         the average of the weights, where the run keeps one

The order of the data has no state: it is a function of (seed, step). Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gptfast._files import checksum
from gptfast._folders import staged_folder, sync
from gptfast._json import NULL, items, read_json
from gptfast._json import field as json_field
from gptfast._large_files import sum_of, summed
from gptfast._snapshots import EVERYTHING, current, current_files
from gptfast.models.export import write_tensors
from gptfast.ops.gemm import implementations_of
from gptfast.tokenizer import Tokenizer
from gptfast.training.checksums import TRAINER, own_checksum, verify
from gptfast.training.config import TrainConfig
from gptfast.training.config_checks import with_effect
from gptfast.training.optim import optimizer_tensors
from gptfast.training.train_state import TrainState

OPTIMIZER = "optimizer.safetensors"
VERSION = 2


class OtherVersionError(ValueError):
    """A checkpoint of another version of gptfast."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of trainer.json.

    folder: the checkpoint.
    source: how the data was opened, and its fingerprint ("marks").
    dropout: seed and step of the dropout counter; None, None: dropout draws from torch's generator.
    threads: number of CPU threads.
    gemm: layout -> implementation of matrix products, which determines their last bits.
    """

    folder: Path
    state: TrainState
    config: TrainConfig
    source: dict[str, Any]
    dropout: tuple[int | None, int | None]
    threads: int
    gemm: dict[str, str]


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: Any,
    optimizers: Sequence[torch.optim.Optimizer],
    tokenizer: Tokenizer | None,
    state: TrainState,
    config: TrainConfig,
    source: dict[str, Any],
    write: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint folder atomically.

    Args:
        folder: of the checkpoint.
        model: a GPT, or a module with dropout_seed and dropout_step.
        optimizers: of its parameters.
        tokenizer: None: none is written.
        state, config, source: see `Checkpoint`.
        write: writes the model to a folder; None: model.save_pretrained.
    Raises:
        OSError: it cannot be written (disk full, no permission); the previous checkpoint is intact.
    """

    def content(stage: Path) -> dict[str, str]:
        (write or model.save_pretrained)(stage)
        write_tensors(stage / OPTIMIZER, optimizer_tensors(model, optimizers))
        return {}

    write_checkpoint(folder, described_run(model, state, config, source), tokenizer, content)


def described_run(model: Any, state: TrainState, config: TrainConfig, source: dict[str, Any]) -> dict[str, Any]:
    """The content of trainer.json as the run is now, but for the checksums."""
    return {
        "version": VERSION,
        "state": asdict(state),
        "dropout": [model.dropout_seed, model.dropout_step],
        "threads": torch.get_num_threads(),
        "gemm": implementations_of(config.dtype) if next(model.parameters()).device.type == "cpu" else {},
        "source": source,
        "config": asdict(config),
    }


def write_checkpoint(
    folder: str | os.PathLike[str],
    trainer: dict[str, Any],
    tokenizer: Tokenizer | None,
    content: Callable[[Path], dict[str, str]],
) -> None:
    """Write a checkpoint folder atomically.

    Args:
        trainer: of `described_run`.
        tokenizer: None: none is written.
        content: writes model and optimizers to a folder; returns the checksums that it knows, by file.
    Raises:
        OSError: as `save_checkpoint`.
    """
    with staged_folder(folder, replaces=EVERYTHING) as stage:
        with summed() as sums:
            known = content(stage)
        if tokenizer is not None:
            tokenizer.save(stage)
        with ThreadPoolExecutor() as pool:  # syncing waits for the disk while checksums use the CPU
            synced = [pool.submit(sync, file) for file in stage.iterdir()]
            files = {
                file.name: known.get(file.name) or sum_of(file, sums) or checksum(file)
                for file in sorted(stage.iterdir())
            }
        for result in synced:
            result.result()
        trainer = {**trainer, "files": files}
        trainer["files"][TRAINER] = own_checksum(trainer)
        (stage / TRAINER).write_text(json.dumps(trainer, indent=2) + "\n", encoding="utf-8")


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a checkpoint atomically, with hard links if the file system supports them.

    The files of a checkpoint are replaced and never changed, so sharing them is safe.
    """
    with staged_folder(target, replaces=EVERYTHING) as stage:
        for file in current_files(source):
            try:
                os.link(file, stage / file.name)
            except OSError:
                shutil.copy2(file, stage / file.name)


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        FileNotFoundError: the folder has no checkpoint of a training run.
        ValueError: trainer.json is damaged or has another version, or a file is not the one that was saved.
    """
    checkpoint = read_trainer(folder)
    verify(folder)
    return checkpoint


def read_trainer(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read trainer.json alone, without a look at the other files. Raises: as `read_checkpoint`."""
    folder = Path(folder)
    path = current(folder, TRAINER)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}: no training run to resume; check the folder, or start a run without `resume`"
        )
    raw = read_json(path)
    version = raw.get("version") if isinstance(raw, dict) else None
    if version != VERSION:
        raise OtherVersionError(
            f"{path} has version {version}; expected version {VERSION} of a training checkpoint; resume with the gptfast "
            "that wrote it"
        )
    try:
        return _parse(folder, raw)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); resume from another checkpoint, such as RUN/best") from error


def saved_step(folder: str | os.PathLike[str]) -> int:
    """The step of a checkpoint; -1 where there is none that can be read."""
    try:
        return read_checkpoint(folder).state.step
    except (OSError, ValueError):
        return -1


def _parse(folder: Path, raw: dict[str, Any]) -> Checkpoint:
    state = TrainState.read(json_field(raw, "state", dict, TRAINER))
    gemm = json_field(raw, "gemm", dict, TRAINER)
    for key in gemm:
        json_field(gemm, key, str, TRAINER, inside="gemm")
    return Checkpoint(
        folder,
        state,
        TrainConfig(**with_effect(TrainConfig, json_field(raw, "config", dict, TRAINER))),
        json_field(raw, "source", dict, TRAINER),
        _parse_dropout(json_field(raw, "dropout", list, TRAINER)),
        json_field(raw, "threads", int, TRAINER),
        gemm,
    )


def _parse_dropout(pair: list[Any]) -> tuple[int | None, int | None]:
    if pair == [None, None]:
        return None, None
    numbers = items(pair, int, "dropout", TRAINER)
    if len(numbers) != 2 or not (0 <= numbers[0] < 2**64 and 0 <= numbers[1] < 2**32):
        raise ValueError(f"dropout is {numbers}; expected a seed and a step")
    return numbers[0], numbers[1]


def check_source(checkpoint: Checkpoint) -> dict[str, Any]:
    """The source of the data of a run of `gptfast train`.

    Raises:
        ValueError: the checkpoint has none, or a malformed one.
    """
    path, source = checkpoint.folder / TRAINER, checkpoint.source
    json_field(source, "data", str, path, inside="source")
    options = json_field(source, "options", dict, path, inside="source")
    json_field(options, "tokenizer", (str, NULL), path, inside="source.options")
    json_field(options, "vocab_size", (int, NULL), path, None, inside="source.options")
    json_field(options, "unk", (bool, NULL), path, None, inside="source.options")
    json_field(options, "text_field", (str, NULL), path, None, inside="source.options")
    items(json_field(options, "glob", list, path, [], inside="source.options"), str, "source.options.glob", path)
    json_field(source, "marks", dict, path, inside="source")
    return source


def checked_source(source: dict[str, Any] | None) -> dict[str, Any]:
    """The source of a run. Raises TypeError where no checkpoint could hold it, before a step is lost for that."""
    try:
        json.dumps(source)
    except (TypeError, ValueError) as error:
        raise TypeError(f"Trainer: source cannot be written to a checkpoint ({error}); expected JSON values") from error
    if source is not None and not isinstance(source, dict):
        raise TypeError(f"Trainer: source is a {type(source).__name__}; expected a dict of JSON values")
    return source or {}
