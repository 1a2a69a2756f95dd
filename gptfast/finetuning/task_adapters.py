"""Adapters of task models: folders in peft's format that hold the head of the task beside the adapter, and no base.

adapter_config.json         peft's, with the head among modules_to_save, and the folder of the base
adapter_model.safetensors   the adapter, and the head under transformers' names
task_config.json            labels, and what transformers' keys do not say
special_tokens.safetensors  rows of the delimiters, which the base may not have
and the files of the tokenizer.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from gptfast._folders import staged_folder
from gptfast._json import NULL, field, items, read_json
from gptfast._snapshots import EVERYTHING, current, read_whole
from gptfast.checkpoints.adapter_files import CONFIG, WEIGHTS, check_finite, embedding_rows
from gptfast.checkpoints.weight_files import open_weights
from gptfast.finetuning import task_files
from gptfast.finetuning.special_tokens import PAD, USUAL, note_new_rows
from gptfast.models import GPT
from gptfast.models.adapters import files
from gptfast.models.export import write_json, write_tensors
from gptfast.models.locate import hub_name, resolve
from gptfast.models.vocabulary import set_rows
from gptfast.nn.difference import is_tied
from gptfast.tokenizer import has_tokenizer, load_tokenizer

TaskModel = Any  # of gptfast.finetuning.task_model, which imports this module

TASK, TOKENS = "task_config.json", "special_tokens.safetensors"


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Does a folder hold an adapter, and no model?"""
    return current(path, CONFIG).is_file() and not current(path, "config.json").is_file()


def save(model: TaskModel, path: Path, name: str) -> None:
    """Write an adapter of a task model with its head; see the module.

    peft reads it on transformers' ForSequenceClassification of the base with the same logits, where the delimiters are
    tokens of the base.

    Raises:
        OSError, ValueError: as `GPT.save_adapter`.
    """
    gpt = model.gpt
    with staged_folder(path, replaces=EVERYTHING) as stage:
        ids = sorted({i for i in model.special_tokens.values() if i is not None})
        files.save(gpt, stage, name, elsewhere=ids)
        with safe_open(stage / WEIGHTS, framework="pt") as opened:
            metadata = opened.metadata() or {}
        prefix = files.head_prefix(gpt, name)
        heads = {prefix + key: x.detach().cpu().contiguous() for key, x in task_files.heads_of(model).items()}
        write_tensors(stage / WEIGHTS, {**load_file(stage / WEIGHTS), **heads}, metadata)
        config = read_json(stage / CONFIG)
        head = "multiple_choice_head" if model.task == "choice" else "score"
        config["modules_to_save"] = [*(config.get("modules_to_save") or []), head]
        own_type = gpt.adapters.configs[name].task_type
        config["task_type"] = own_type or (None if model.task == "choice" else "SEQ_CLS")
        write_json(stage / CONFIG, config)
        own = {"labels": model.labels, "vocab_size": gpt.config.vocab_size, "rows": ids}
        write_json(stage / TASK, {**task_files.own_settings(model), **own})
        if ids:
            tables = {"wte": gpt.wte.weight} if is_tied(gpt) else {"wte": gpt.wte.weight, "lm_head": gpt.lm_head.weight}
            write_tensors(stage / TOKENS, {key: x.detach()[ids].cpu().contiguous() for key, x in tables.items()})
        if model.tokenizer is not None:
            model.tokenizer.save(stage)


def load(
    cls: type[TaskModel],
    path: Path,
    given: dict[str, Any],
    dtype: torch.dtype | None,
    base: str | os.PathLike[str] | None,
    overrides: dict[str, Any],
    revision: str | None = None,
) -> TaskModel:
    """A task model in evaluation mode: the base with an adapter, whose name is "default", and the head.

    Args:
        cls: TaskModel.
        path: a folder of `save`, or of peft's for transformers' ForSequenceClassification.
        given: arguments of TaskModel; None: as stored. Of peft's folders the labels are LABEL_0, ….
        dtype, overrides: of the base, as `GPT.from_pretrained`, quantize and double_quant too.
        base: where the base is, a language model or a checkpoint of a task, whose head is left out; None: where the folder
            says.
        revision: of the base, where that is a model of the hub; None: what the folder says.
    Raises:
        FileNotFoundError, ValueError: as `GPT.from_pretrained` and `GPT.load_adapter`; or a head that does not fit the task.
    """
    place, told = (base, None) if base else _base_of(path)
    if place is None:
        raise ValueError(f"{path}: the adapter does not say which model it belongs to; say it with base=")
    if revision is None and not Path(place).exists():  # as peft, which reads a folder whatever the file says
        revision = told
    try:
        found = resolve(place, revision)
        gpt = task_files.without_head(found, dtype, overrides)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is an adapter of {place}: {error}; say where its base is with base="
        ) from error
    gpt.name_or_path, gpt.revision = hub_name(place, revision)
    return put_on(cls, gpt, path, given, found)


def put_on(
    cls: type[TaskModel],
    gpt: GPT,
    path: Path,
    given: dict[str, Any],
    place: Path | None = None,
) -> TaskModel:
    """As `load`, on a base that is loaded. place: where it is, for a tokenizer that the folder lacks."""
    task, rows = read_whole(path, lambda: (_task(path), _rows(path)))
    stored: dict[str, Any] = {}
    if task is not None:
        stored = _arguments(gpt, task, rows, path)
    heads = files.load(gpt, path, "default", False)
    arguments = {
        **(stored or _of_peft(gpt, heads)),
        **{name: value for name, value in given.items() if value is not None},
    }
    if arguments.get("tokenizer") is None:
        found = [
            folder
            for folder in (path, *([] if place is None else [place]))
            if folder.is_dir() and has_tokenizer(folder)
        ]
        arguments["tokenizer"] = load_tokenizer(found[0]) if found else None
    model = task_files.made(cls, gpt, arguments, given, path)
    task_files.fill(model, heads, path)
    return model.eval()


def _base_of(path: Path) -> tuple[str | None, str | None]:
    """Where the base is, and its revision."""
    raw = read_whole(path, lambda: read_json(current(path, CONFIG)))
    names = ("base_model_name_or_path", "revision")
    place, revision = (field(raw, name, (str, NULL), path / CONFIG, None) for name in names)
    return place, revision


def _task(path: Path) -> dict[str, Any] | None:
    file = current(path, TASK)
    return read_json(file) if file.is_file() else None


def _rows(path: Path) -> dict[str, Tensor]:
    file = current(path, TOKENS)
    rows = dict(open_weights(file).tensors()) if file.is_file() else {}
    for key, x in rows.items():
        check_finite(file, key, x)
    return rows


def _arguments(gpt: GPT, task: dict[str, Any], rows: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The arguments of TaskModel that the folder says; the rows of its delimiters are put into the base.

    Raises:
        ValueError: damaged, or rows of another width.
    """
    file = path / TASK
    labels = items(field(task, "labels", list, file), str, "labels", file)
    size, ids = field(task, "vocab_size", int, file), items(field(task, "rows", list, file), int, "rows", file)
    C, V = gpt.config.n_embd, gpt.config.vocab_size
    tables = {"wte": gpt.wte, "lm_head": gpt.lm_head}
    fits = all(key in tables and x.shape == (len(ids), C) for key, x in rows.items()) and ("wte" in rows or not ids)
    whole = size - V > len(ids) and embedding_rows(path) == size  # a base that had new tokens before the task's
    if not fits or any(not 0 <= i < size for i in ids) or size < V or (size - V > len(ids) and not whole):
        raise ValueError(
            f"{path}: the rows of its special tokens do not fit a model of {V} tokens and {C} channels; load its own base"
        )
    if size > V:
        with torch.random.fork_rng(devices=[]):
            set_rows(gpt, size, V, size)
    note_new_rows(gpt, range(V, size))
    with torch.no_grad():
        for key, x in rows.items():
            weight, x = tables[key].weight, x.to(tables[key].weight)
            note_new_rows(gpt, [i for i, own in zip(ids, x, strict=True) if not torch.equal(weight[i], own)])
            weight[ids] = x
    return task_files.own_arguments(task, labels, file)


def _of_peft(gpt: GPT, heads: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of TaskModel of a folder that says only what peft's do: rows without delimiters, as transformers'."""
    pad = gpt.metadata.config.get(f"{PAD}_token_id")
    tokens = {**dict.fromkeys(USUAL, None), PAD: pad if isinstance(pad, int) else None}
    if any(key.startswith(task_files.CHOICE) for key in heads):
        return {"task": "choice", "special_tokens": tokens}
    classes = next((len(x) for key, x in heads.items() if key == "score.weight"), 0)
    if classes == 1:
        return {"task": "similarity", "special_tokens": tokens}
    labels = [f"LABEL_{n}" for n in range(classes)] or None
    return {"task": "classification", "labels": labels, "special_tokens": tokens}
