"""From the options of `gptfast train` to a Trainer: a new run, or one that goes on."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptfast._locks import FileLock
from gptfast._snapshots import current
from gptfast.backend import has_amx
from gptfast.data import PreparedData, TokenFile, open_data
from gptfast.models import GPT, GPTConfig
from gptfast.models.pretrained import resolve
from gptfast.ops.gemm import methods_of, multiplied_by
from gptfast.tokenizer import has_tokenizer, load_tokenizer
from gptfast.training.checkpoint import Checkpoint, check_source, lock_run, read_checkpoint
from gptfast.training.config import TrainConfig
from gptfast.training.trainer import Trainer

SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 128, "dropout": 0.0, "learning_rate": 2e-3}
_LARGE = {"batch_size": 8, "learning_rate": 6e-4}  # GPT-3's rate for 125M (arXiv 2005.14165, table 2.1)
_FINETUNE = {"batch_size": 8, "learning_rate": 1e-4, "dropout": 0.1}
_SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "dropout")
_TRAIN = tuple(f.name for f in fields(TrainConfig))
_MAY_CHANGE = {
    *("max_steps", "max_minutes", "lr_decay_steps", "learning_rate", "min_lr", "warmup_steps", "grad_clip"),
    *(
        "batch_size",
        "grad_accum",
        "eval_every",
        "eval_batches",
        "checkpoint_every",
        "log_every",
        "threads",
        "data",
        "dtype",
        "device",
    ),
    *("out", "resume", "tensorboard", "overwrite"),
}
_MARKED = 1 << 20  # tokens
GPT2_SIZES = (50257, 50304)  # of GPT-2's vocabulary: as it is, and padded as nanoGPT does


@dataclass(frozen=True)
class Run:
    """A Trainer that is ready, and its data."""

    trainer: Trainer
    data: PreparedData
    checkpoint: Checkpoint | None  # where it goes on from
    note: str = ""  # about the model

    def changed_arithmetic(self) -> list[str]:
        """Options that decide how numbers are rounded, and are not as they were before the run was resumed."""
        if self.checkpoint is None:
            return []
        stored, old, new = self.checkpoint, self.checkpoint.config, self.trainer.config
        changed = [f"--{name}" for name in ("dtype", "device") if getattr(old, name) != getattr(new, name)]
        with multiplied_by(stored.gemm):
            ways = methods_of(old.dtype)
        if any(ways.get(layout, way) != way for layout, way in stored.gemm.items()):
            changed.append("GPTFAST_GEMM")
        libraries = any(way != "own" for way in ways.values()) or (new.optimizer == "muon" and has_amx())
        if stored.threads != torch.get_num_threads() and libraries and self.trainer.device.type == "cpu":
            changed.append("--threads")
        return changed


def new_run(given: dict[str, Any]) -> Run:
    """A run from the beginning.

    Args:
        given: options of `gptfast train` that were given, by the names of its parameters.
    Raises:
        OSError, TypeError, ValueError, ImportError: whatever is wrong with them or with the data.
        BlockingIOError: another process trains there.
    """
    with _locked(given) as lock:
        return _new_run(given, lock)


def resumed_run(given: dict[str, Any]) -> Run:
    """The run in `given["out"]`, from its last checkpoint on.

    Raises:
        As `new_run`; FileNotFoundError: no run there; ValueError: an option that a run cannot change, or other data.
    """
    if not Path(given["out"]).is_dir():
        read_checkpoint(Path(given["out"]) / "last")  # says that there is none
    with _locked(given) as lock:
        return _resumed_run(given, lock)


@contextmanager
def _locked(given: dict[str, Any]) -> Iterator[FileLock]:
    """The lock of the run, released where the block fails; a folder that was made for it is then removed again."""
    out = Path(given["out"])
    made = not out.exists()
    lock = lock_run(out)
    try:
        yield lock
    except BaseException:
        lock.release()
        if made:
            with suppress(OSError):  # something was written there
                out.rmdir()
        raise


def _new_run(given: dict[str, Any], lock: FileLock) -> Run:
    if "preset" in given and "init_from" in given:
        raise ValueError(
            "train: --preset and --init-from were both given; a checkpoint has its shape already - leave --preset out"
        )
    start = {"init_from": _FINETUNE, "preset": _LARGE}
    defaults = next((values for name, values in start.items() if name in given), SMALL)
    config = _train_config({**defaults, **given})
    _set_threads(given.get("threads"))
    model = GPT.from_pretrained(given["init_from"], dtype=torch.float32) if "init_from" in given else None
    tokenizer = _tokenizer(given, model)
    data = _open(given, tokenizer)
    if model is not None:
        _check_ids(given, data)
    torch.manual_seed(config.seed)
    positions = None if model is None else model.config.block_size
    model = _untrained(given, defaults, data) if model is None else _reshaped(model, given, defaults)
    size, note = model.config.block_size, ""
    if positions is not None and size < positions:
        note = f"--block-size {size}: the first of the {positions} positions of {given['init_from']}"
    options = {name: value for name, value in given.items() if name not in _MAY_CHANGE}
    source = {"data": _absolute(given["data"]), "options": {**options, "tokenizer": tokenizer}, "marks": _marks(data)}
    overwrite = given.get("overwrite", False)
    return replace(_run(model, data, config, given, source=source, overwrite=overwrite, lock=lock), note=note)


def _resumed_run(given: dict[str, Any], lock: FileLock) -> Run:
    last = Path(given["out"]) / "last"
    checkpoint = read_checkpoint(last)
    source = check_source(checkpoint)
    _set_threads(given.get("threads", checkpoint.threads))
    model = GPT.from_pretrained(last)
    _refuse_changes(given, checkpoint, model)
    config = checkpoint.config.replace(**{k: v for k, v in given.items() if k in _TRAIN and k in _MAY_CHANGE})
    data = _open({**source["options"], "data": source["data"], **given}, source["options"]["tokenizer"])
    if _marks(data) != source["marks"]:
        raise ValueError(
            f"train: the data is not what {last} was trained on; resume with the same data, or start a new run from "
            f"these weights with --init-from {last}"
        )
    return _run(model, data, config, given, source=source, resume=checkpoint, lock=lock)


def _run(model: GPT, data: PreparedData, config: TrainConfig, given: dict[str, Any], **options: Any) -> Run:
    board = given.get("tensorboard", False)
    trainer = Trainer(
        model, data.train, data.val, config, given["out"], tokenizer=data.tokenizer, tensorboard=board, **options
    )
    return Run(trainer, data, options.get("resume"))


def _train_config(options: dict[str, Any]) -> TrainConfig:
    chosen = {name: value for name, value in options.items() if name in _TRAIN and name != "block_size"}
    if "max_minutes" in chosen:
        chosen.setdefault("max_steps", None)
    return TrainConfig(**chosen)


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"train: --threads is {threads}; expected at least 1")
    torch.set_num_threads(threads)


def _tokenizer(given: dict[str, Any], model: GPT | None) -> str | None:
    """What is asked for; else that of the checkpoint or preset, and characters for a small model of one's own."""
    if "tokenizer" in given or _is_prepared(given["data"]):
        return given.get("tokenizer")
    if model is None:
        return "gpt2" if "preset" in given else "char"
    folder = resolve(given["init_from"])
    if not has_tokenizer(folder):
        size = model.config.vocab_size
        hint = "--tokenizer gpt2, if it was trained with GPT-2's tokens" if size in GPT2_SIZES else "--tokenizer FOLDER"
        raise ValueError(
            f"train: {given['init_from']} has no tokenizer and a vocabulary of {size}; say which with {hint}"
        )
    return str(folder)


def _check_ids(given: dict[str, Any], data: PreparedData) -> None:
    """Refuse ids that mean something else to the checkpoint that training starts from.

    Raises:
        ValueError: they do.
    """
    folder, tokenizer = resolve(given["init_from"]), data.tokenizer
    if not has_tokenizer(folder):
        return
    try:
        own = load_tokenizer(folder)
    except ValueError:
        if "tokenizer" not in given:
            raise
        return  # of a kind that is not known here, which is why another one was named
    for token in filter(own.has_token, range(min(own.vocab_size, tokenizer.vocab_size))):
        if tokenizer.has_token(token) and (a := own.decode_bytes([token])) != (b := tokenizer.decode_bytes([token])):
            if "tokenizer" in given:
                cause = f"--tokenizer {given['tokenizer']} has other ids than {given['init_from']}"
                remedy = "leave --tokenizer out, and the text is cut as the checkpoint knows it"
            else:
                cause = f"--data {given['data']} was prepared with other ids than {given['init_from']} has"
                remedy = f"prepare it with --tokenizer {given['init_from']}"
            raise ValueError(
                f"train: {cause}: {token} is {a!r} to the model and {b!r} in the text; {remedy}, or leave --init-from out"
            )


def _is_prepared(data: str) -> bool:
    from gptfast.data import is_token_file

    return current(data, "data.json").exists() or is_token_file(data)


def _open(given: dict[str, Any], tokenizer: str | None) -> PreparedData:
    cache = Path(given["out"]) / "data"
    options: dict[str, Any] = {name: given.get(name) for name in ("vocab_size", "glob", "text_field")}
    options["unk"] = bool(given.get("unk"))
    return open_data(given["data"], cache, tokenizer, **options)


def _untrained(given: dict[str, Any], defaults: dict[str, Any], data: PreparedData) -> GPT:
    shape = {name: given[name] for name in _SHAPE if name in given}
    vocab_size, eos = data.tokenizer.vocab_size, data.tokenizer.eos_id
    if "preset" in given:
        model = GPT(GPTConfig.preset(given["preset"], **shape, vocab_size=vocab_size))
    else:
        sizes = {name: value for name, value in {**defaults, **shape}.items() if name in _SHAPE}
        model = GPT(GPTConfig(**sizes, vocab_size=vocab_size))
    model.metadata.config = {} if eos is None else {"bos_token_id": eos, "eos_token_id": eos}
    return model


def _reshaped(model: GPT, given: dict[str, Any], defaults: dict[str, Any]) -> GPT:
    """A loaded model with another dropout or a smaller block_size; its other sizes are what they are."""
    for name in ("n_layer", "n_head", "n_embd"):
        stored = getattr(model.config, name)
        if given.get(name, stored) != stored:
            raise ValueError(
                f"train: {_option(name)} is {given[name]} but {given['init_from']} has {stored}, which it keeps; leave it out"
            )
    size, longest = given.get("block_size", 0), model.config.block_size
    if size > longest and model.config.position_embedding == "learned":
        raise ValueError(
            f"train: --block-size is {size} but {given['init_from']} has learnt {longest} positions; leave it out, or give at "
            f"most {longest}"
        )
    changes = {"dropout": given.get("dropout", defaults["dropout"])}
    if "block_size" in given:
        changes["block_size"] = given["block_size"]
    return GPT.from_pretrained(given["init_from"], dtype=torch.float32, **changes)


def _refuse_changes(given: dict[str, Any], checkpoint: Checkpoint, model: GPT) -> None:
    stored = {**vars(checkpoint.config), **vars(model.config), "dropout": model.config.resid_pdrop}
    stored |= checkpoint.source["options"]
    for name, value in given.items():
        if name not in _MAY_CHANGE and value != stored.get(name):
            raise ValueError(
                f"train: {_option(name)} is {value} but the run in {given['out']} has {stored.get(name)}, which it cannot change; "
                f"leave it out, or start a new run with --init-from {checkpoint.folder}"
            )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _absolute(data: str) -> str:
    return str(Path(data).resolve()) if Path(data).exists() else data


def _marks(data: PreparedData) -> dict[str, list[int]]:
    """Enough to recognise the tokens again: how many, and a checksum of the first million."""
    return {"train": _mark(data.train), "val": _mark(data.val)}


def _mark(part: TokenFile) -> list[int]:
    return [len(part), zlib.crc32(np.ascontiguousarray(part.tokens[:_MARKED]).data)]
