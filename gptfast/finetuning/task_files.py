"""Checkpoints of task models, in the form of transformers' ForSequenceClassification and DoubleHeadsModel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast._folders import destination, staged_folder
from gptfast._json import NULL, expect, field
from gptfast._snapshots import EVERYTHING
from gptfast.checkpoints import hf_layout
from gptfast.checkpoints.adapter_files import check_finite
from gptfast.checkpoints.bert import CLASSIFIER
from gptfast.checkpoints.families import FAMILIES
from gptfast.checkpoints.weight_files import StoredTensor
from gptfast.finetuning.examples import DELIMITERS
from gptfast.finetuning.special_tokens import PAD, USUAL, delimiters_of_bert
from gptfast.models import BERT, GPT, export
from gptfast.models.locate import hub_name, resolve
from gptfast.models.pretrained import build
from gptfast.models.quantized import check_format
from gptfast.models.stored import StoredModel
from gptfast.nn.difference import check_values
from gptfast.tokenizer import has_tokenizer, load_tokenizer

TaskModel = Any  # of gptfast.finetuning.task_model, which imports this module

SETTINGS = "gptfast_task"  # key of config.json: what transformers' keys do not say
CHOICE, SCORE = "multiple_choice_head.summary.", "score."  # of a BERT CLASSIFIER
_CLASSES = {
    "gpt2": ("GPT2ForSequenceClassification", "GPT2DoubleHeadsModel"),
    "openai-gpt": ("OpenAIGPTForSequenceClassification", "OpenAIGPTDoubleHeadsModel"),
    "gptfast": ("TaskModel", "TaskModel"),
}
_SUMMARY = {  # how transformers' DoubleHeadsModel reads a row: at mc_token_ids, by one linear layer
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_activation": None,
    "summary_proj_to_labels": True,
}
_OURS = (
    *(SETTINGS, "id2label", "label2id", "num_labels", "problem_type"),
    *("pad_token_id", "summary_first_dropout", *_SUMMARY),
)


def save(model: TaskModel, path: Path) -> None:
    """Write config.json, the weights and the tokenizer to the folder `path`, together.

    transformers loads the folder with the same logits: classification and entailment as ForSequenceClassification,
    similarity too (each order's score; ours is their sum), choice as DoubleHeadsModel.

    Raises:
        OSError, ValueError: as `GPT.save_pretrained`.
    """
    check_values("save_pretrained", model.gpt)
    with staged_folder(path, replaces=EVERYTHING) as stage:
        export.save(model.gpt, stage, heads=heads_of(model), settings=_settings(model))
        if model.tokenizer is not None:
            model.tokenizer.save(stage)
    if isinstance(model.gpt, GPT) and model.gpt.adapters is None:  # as `GPT.save_pretrained`
        gpt = model.gpt
        gpt.new_rows, gpt.name_or_path, gpt.revision = frozenset(), str(destination(path)), None


def prefix_of(model: TaskModel) -> str:
    """What the names of the head's tensors begin with."""
    return CHOICE if model.task == "choice" else SCORE if model.gpt.config.causal else CLASSIFIER


def heads_of(model: TaskModel) -> dict[str, Tensor]:
    """The head by transformers' names."""
    prefix = prefix_of(model)
    return {prefix + name: x for name, x in model.score.state_dict().items()}


def _settings(model: TaskModel) -> dict[str, Any]:
    config, choice = model.gpt.config, model.task == "choice"
    names = model.labels or ["LABEL_0"]  # transformers counts a head's outputs by its labels
    own = own_settings(model)
    settings = {
        "architectures": [_class_of(hf_layout.model_type(config), choice)],
        "id2label": {str(n): name for n, name in enumerate(names)},
        "label2id": {name: n for n, name in enumerate(names)},
        "pad_token_id": model.special_tokens.get(PAD),
        SETTINGS: own,
    }
    if choice:
        return {**settings, **_SUMMARY, "summary_first_dropout": config.resid_pdrop}
    return {**settings, "problem_type": "single_label_classification" if model.labels else "regression"}


def _class_of(kind: str, choice: bool) -> str:
    """transformers' class for a task of an architecture; ours where it has none."""
    if kind in _CLASSES:
        return _CLASSES[kind][choice]
    if kind == "bert":
        return "BertForSequenceClassification"
    found = FAMILIES[kind].architecture.replace("ForCausalLM", "ForSequenceClassification")
    return "TaskModel" if choice or kind == "nanochat" else found


def own_settings(model: TaskModel) -> dict[str, Any]:
    """What transformers' keys do not say."""
    weights = model.class_weights
    return {
        "task": model.task,
        "special_tokens": model.special_tokens,
        "class_weights": None if weights is None else weights.tolist(),
    }


class StoredTask(StoredModel):
    """A checkpoint whose head, where it has one, is kept apart from the GPT: after `tensors`, in `heads`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.heads: dict[str, Tensor] = {}
        self.names = {name for file in self._files for name in file.shapes}

    def tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        for name, x in super().tensors():
            if name.startswith((SCORE, CHOICE, CLASSIFIER)):
                self.heads[name] = x.read()
            else:
                yield name, x

    @property
    def settings_file(self) -> Path:
        return self.path / hf_layout.CONFIG


def load(
    cls: type[TaskModel],
    path: str | os.PathLike[str],
    given: dict[str, Any],
    dtype: torch.dtype | None,
    overrides: dict[str, Any],
    revision: str | None = None,
) -> TaskModel:
    """A task model in evaluation mode.

    Args:
        cls: TaskModel.
        path: a folder of `save`, or of transformers' GPT2ForSequenceClassification, GPT2DoubleHeadsModel or their
            openai-gpt forms, whose rows have no delimiters, or BertForSequenceClassification; or a language model as in `GPT.from_pretrained`, which gets a
            new head.
        given: arguments of TaskModel; None: as stored. The tokenizer is that of the folder, where it has one.
        dtype, overrides, revision: as `GPT.from_pretrained`, quantize and double_quant too.
    Raises:
        FileNotFoundError, ValueError: as `GPT.from_pretrained`; or a head that does not fit the task.
    """
    stored = StoredTask(folder := resolve(path, revision))
    gpt, kind, settings = _opened(stored, dtype, overrides)
    gpt.name_or_path, gpt.revision = hub_name(path, revision)
    arguments = {**_stored_arguments(kind, settings, stored.settings_file), **_said(given)}
    if arguments.get("tokenizer") is None and folder.is_dir() and has_tokenizer(folder):
        arguments["tokenizer"] = load_tokenizer(folder)
    if kind and not stored.config.causal and SETTINGS not in settings and "special_tokens" not in _said(given):
        arguments["special_tokens"] = delimiters_of_bert(arguments["special_tokens"], arguments.get("tokenizer"))
    if arguments.get("task") is None:
        raise ValueError(f"{path} is a language model without a head; say which one it gets with task=")
    model = made(cls, gpt, arguments, given, stored.path)
    if kind is not None:
        fill(model, stored.heads, stored.path)
    return model.eval()


def without_head(folder: Path, dtype: torch.dtype | None, overrides: dict[str, Any]) -> Any:
    """The GPT or BERT of a checkpoint of a task, or a language model, in evaluation mode; as `load`."""
    return _opened(StoredTask(folder), dtype, overrides)[0]


def _opened(
    stored: StoredTask, dtype: torch.dtype | None, overrides: dict[str, Any]
) -> tuple[Any, str | None, dict[str, Any]]:
    """The GPT or BERT of a checkpoint, which head is stored beside it, and what its config.json says of that head."""
    kind, overrides = _kind(stored), dict(overrides)
    if kind is not None and "lm_head.weight" not in stored.names:
        overrides = {"tie_weights": True, **overrides}
    quantize, double_quant = overrides.pop("quantize", None), overrides.pop("double_quant", False)
    check_format(quantize, double_quant)
    gpt: Any = build(GPT if stored.config.causal else BERT, stored, dtype, overrides, quantize, double_quant)
    settings = {name: gpt.metadata.config.pop(name) for name in _OURS if kind and name in gpt.metadata.config}
    return gpt, kind, settings


def stored_task(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The arguments of TaskModel that a checkpoint says; None for a language model.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    stored = StoredTask(resolve(path))
    kind = _kind(stored)
    if kind is None:
        return None
    return _stored_arguments(kind, dict(stored.metadata.config), stored.settings_file)


def _kind(stored: StoredTask) -> str | None:
    """Which head a checkpoint has: "score", "choice", or None."""
    if any(name.startswith(CHOICE) for name in stored.names):
        return "choice"
    return "score" if any(name.startswith((SCORE, CLASSIFIER)) for name in stored.names) else None


def made(
    cls: type[TaskModel], gpt: GPT | BERT, arguments: dict[str, Any], given: dict[str, Any], path: Path
) -> TaskModel:
    """A task model of arguments of which `given` are not from the folder `path`; it is named where none of them are to blame."""
    try:
        return cls(gpt, **arguments)
    except (TypeError, ValueError) as error:
        if _said(given):
            raise
        raise ValueError(f"{path}: {error}") from error


def _said(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _stored_arguments(kind: str | None, settings: dict[str, Any], file: Path) -> dict[str, Any]:
    """The arguments of TaskModel that a config.json says.

    Raises:
        ValueError: damaged, or a head that gptfast does not compute.
    """
    if kind is None:
        return {}
    labels = _labels(settings, file)
    own = field(settings, SETTINGS, (dict, NULL), file, None)
    if own is not None:
        return own_arguments(own, labels, file)
    pad = field(settings, "pad_token_id", (int, NULL), file, None)
    tokens = {**dict.fromkeys(USUAL, None), PAD: pad}
    if kind == "choice":
        for key, wanted in _SUMMARY.items():
            if settings.get(key, wanted) != wanted:
                raise ValueError(f"{file}: {key} is {settings[key]!r}; gptfast computes {wanted!r} - use transformers")
        return {"task": "choice", "special_tokens": tokens}
    problem = field(settings, "problem_type", (str, NULL), file, None)
    if problem == "multi_label_classification":
        raise ValueError(f"{file}: problem_type is {problem}, which gptfast does not compute; use transformers")
    if len(labels) == 1:
        return {"task": "similarity", "special_tokens": tokens}
    return {"task": "classification", "labels": labels, "special_tokens": tokens}


def own_arguments(own: dict[str, Any], labels: list[str], file: Path) -> dict[str, Any]:
    """The arguments of TaskModel that `own_settings` says. Raises ValueError if damaged."""
    task = field(own, "task", str, file, inside=SETTINGS)
    if task not in DELIMITERS:
        raise ValueError(f"{file}: {SETTINGS}.task is {task!r}; expected one of {', '.join(DELIMITERS)}")
    tokens = field(own, "special_tokens", dict, file, inside=SETTINGS)
    for name, token in tokens.items():
        expect(token, (int, NULL), f"{SETTINGS}.special_tokens.{name}", file)
    weights = field(own, "class_weights", (list, NULL), file, None, inside=SETTINGS)
    named = task in ("classification", "entailment")
    return {"task": task, "labels": labels if named else None, "special_tokens": tokens, "class_weights": weights}


def _labels(settings: dict[str, Any], file: Path) -> list[str]:
    """The names of the classes by index; transformers leaves out those of a head with two."""
    found = field(settings, "id2label", (dict, NULL), file, None) or {"0": "LABEL_0", "1": "LABEL_1"}
    wanted = [str(n) for n in range(len(found))]
    if sorted(found, key=lambda key: int(key) if key.isdecimal() else -1) != wanted:
        raise ValueError(f"{file}: id2label has the keys {', '.join(found)}; expected {', '.join(wanted)}")
    return [expect(found[n], str, f"id2label.{n}", file) for n in wanted]


def fill(model: TaskModel, heads: dict[str, Tensor], path: Path) -> None:
    """Put a stored head in place.

    Raises:
        ValueError: it has another shape than the task's, or other tensors, or values that are not finite.
    """
    for name, x in heads.items():
        check_finite(path, name, x)
    prefix = prefix_of(model)
    found = {name.removeprefix(prefix): x for name, x in heads.items()}
    shapes = {name: tuple(x.shape) for name, x in found.items()}
    wanted = {name: tuple(x.shape) for name, x in model.score.state_dict().items()}
    if shapes != wanted:
        raise ValueError(
            f"{path}: its head has the tensors {shapes}; {model.task}"
            f"{f' with {len(model.labels)} labels' if model.labels else ''} needs {wanted}"
        )
    model.score.load_state_dict(found)
