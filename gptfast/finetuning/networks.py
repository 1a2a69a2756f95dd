"""The network of a run: made from a model for a new run, or read from the run's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gptfast._files import absolute
from gptfast.finetuning import methods, task_adapters, task_files
from gptfast.finetuning.instructions import set_up_chat
from gptfast.finetuning.options import MethodOptions, TaskOptions
from gptfast.finetuning.sources import Data, class_weights
from gptfast.finetuning.task_model import TaskModel
from gptfast.finetuning.tasks import METRICS
from gptfast.models import GPT
from gptfast.models.locate import resolve
from gptfast.models.stored import StoredModel
from gptfast.tokenizer import BPETokenizer, Tokenizer, has_tokenizer, load_tokenizer
from gptfast.tokenizer.chat import PLAIN, ChatTemplate, with_chat_template


def new_network(task: TaskOptions, method: MethodOptions, data: Data) -> tuple[Any, Any, list[str], dict[str, Any]]:
    """The network that is trained, its tokenizer, sentences for the user, and path and fingerprint of its base.

    The last is {} where the whole network is trained: only an adapter must find its base again.
    """
    place = str(task.model)
    loading: dict[str, Any] = {"dtype": torch.float32, **method.loading()}
    tokenizer = _tokenizer(task)
    notes: list[str] = []
    if not StoredModel(resolve(place)).config.causal and (
        methods.is_adapter(method.method) or task.task not in METRICS
    ):
        raise ValueError(
            f"finetune: {place} is a BERT, which classification, entailment and similarity train by `method` full; got `task` "
            f"{task.task} by {method.method}"
        )
    if task.task in METRICS:
        given: dict[str, Any] = {
            "labels": data.labels or None,
            "class_weights": class_weights(task.class_weights, data),
        }
        if not methods.is_adapter(method.method):
            model = TaskModel.from_pretrained(place, task=task.task, tokenizer=tokenizer, **given, **loading)
            return model, model.tokenizer, notes, {}
        gpt = GPT.from_pretrained(place, **loading)
        base = _base(gpt, place)
        model = TaskModel(gpt, str(task.task), tokenizer=tokenizer, **given)
        methods.attach(gpt, method, base["path"], False)
        return model, model.tokenizer, notes, base
    gpt = GPT.from_pretrained(place, **loading)
    base = _base(gpt, place)
    if task.task == "chat" and ChatTemplate.of(tokenizer) is None and _needs_template(data, tokenizer):
        if method.method == "prompt" and tokenizer.eos_id is not None:  # which would not train new tokens
            tokenizer = with_chat_template(tokenizer, PLAIN)
            notes.append(
                "the tokenizer has no chat template: it gets one of plain words, whose replies end with its end token"
            )
        else:
            tokenizer = set_up_chat(gpt, tokenizer)
            notes.append(
                "the tokenizer has no chat template: it gets ChatML's, with the tokens <|im_start|> and <|im_end|>"
            )
    if methods.is_adapter(method.method):
        methods.attach(gpt, method, base["path"], bool(gpt.new_rows))
    return gpt, tokenizer, notes, base if methods.is_adapter(method.method) else {}


def stored_network(folder: Path, task: TaskOptions, method: MethodOptions, base: Any) -> tuple[Any, Any]:
    """The network in a checkpoint of a run, and its tokenizer.

    Raises:
        ValueError: the base is not the one that the adapter was trained on.
    """
    loading: dict[str, Any] = {"dtype": torch.float32, **method.loading()}
    for name in ("extend_context", "rope_scaling"):  # the checkpoint has its longer context already
        loading.pop(name, None)
    if not methods.is_adapter(method.method):
        if task.task in METRICS:
            model = TaskModel.from_pretrained(folder, **loading)
            return model, model.tokenizer
        return GPT.from_pretrained(folder, **loading), load_tokenizer(folder)
    gpt = GPT.from_pretrained(str(base["path"]), **loading)
    if methods.base_fingerprint(gpt) != base["fingerprint"]:
        # before soft prompts took `quantize`, their runs kept its default, nf4, beside a base that was not quantised
        early = " - or an early gptfast began it, where `quantize` had no effect: start it again" * (
            method.method == "prompt" and method.held_in is not None
        )
        raise ValueError(
            f"finetune: {base['path']} is another model than the one that {folder} was trained on; put the base back, or start "
            f"a new run{early}"
        )
    if task.task in METRICS:
        model = task_adapters.put_on(TaskModel, gpt, folder, {})
        return model, model.tokenizer
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > gpt.config.vocab_size:
        gpt.resize_token_embeddings(tokenizer.vocab_size)
    gpt.load_adapter(folder, methods.NAME)
    return gpt, tokenizer


def _base(gpt: GPT, place: str) -> dict[str, Any]:
    return {"path": absolute(place), "fingerprint": methods.base_fingerprint(gpt)}


def _tokenizer(task: TaskOptions) -> Tokenizer:
    if task.tokenizer is not None:
        return load_tokenizer(task.tokenizer)
    folder = resolve(str(task.model))
    if not folder.is_dir() or not has_tokenizer(folder):
        raise FileNotFoundError(f"{task.model} has no tokenizer; name it with `tokenizer`: gpt2, or a FOLDER")
    return load_tokenizer(folder)


def _needs_template(data: Data, tokenizer: Tokenizer) -> bool:
    """Whether plain prompts and responses would not do: there are messages, or no token ends a response and one can be made."""
    messages = any("messages" in record for part in (data.train, data.held_out) for record in part.records)
    return messages or (tokenizer.eos_id is None and isinstance(tokenizer, BPETokenizer))


def stored_labels(task: TaskOptions, method: MethodOptions) -> list[str] | None:
    """The classes of a head that the model has already.

    Raises:
        ValueError: the model is a checkpoint of a task, and the method needs a language model.
    """
    found = task_files.stored_task(str(task.model))
    if found is None:
        return None
    if task.task not in METRICS or methods.is_adapter(method.method):
        raise ValueError(
            f"finetune: {task.model} is a checkpoint of {found['task']}; {task.task} by {method.method} needs a language model - "
            "start from the one that it was trained from"
        )
    return found.get("labels")
