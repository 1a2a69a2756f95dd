"""Checks of what a task model is given: labels, class weights, tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ENTAILMENT = ("entailment", "neutral", "contradiction")


def checked_labels(task: str, labels: Any) -> list[str]:
    """The names of a task's classes, [] for tasks without. Raises TypeError or ValueError for others."""
    if task in ("similarity", "choice"):
        if labels:
            raise ValueError(f"TaskModel: labels is {labels!r}, but {task} has none; leave it out")
        return []
    if labels is None and task == "entailment":
        return list(ENTAILMENT)
    if isinstance(labels, str) or not isinstance(labels, Sequence) or not all(isinstance(x, str) for x in labels):
        raise TypeError(f"TaskModel: labels is {labels!r}; expected the names of the classes, such as ['no', 'yes']")
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"TaskModel: labels is {list(labels)!r}; expected at least two classes with different names")
    return list(labels)


def checked_weights(labels: list[str], given: Any) -> Tensor | None:
    """class_weights as (classes,) float32 on the CPU; None: there are none. Raises ValueError for others."""
    if given is None:
        return None
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in labels]
        if unknown:
            raise ValueError(f"TaskModel: class_weights names {unknown[0]!r}; expected labels of {', '.join(labels)}")
        given = [given.get(label, 1.0) for label in labels]
    weights = torch.as_tensor(given, dtype=torch.float32, device="cpu")
    if (
        weights.shape != (len(labels),)
        or not labels
        or not bool((weights >= 0).all() and weights.any())
        or not bool(weights.isfinite().all())
    ):
        raise ValueError(
            f"TaskModel: class_weights is {weights.tolist()}; expected one finite number >= 0 for each of {labels or 'no labels'}, not all 0"
        )
    return weights


def check_arguments(task: str, classes: int, ids: Any, labels: Any, places: Tensor | None, mask: Tensor | None) -> None:
    """Check the arguments of `TaskModel.forward`; the values of labels and mc_token_ids on the CPU alone. Under `torch.compile`
    a graph checks them as it runs, with a RuntimeError."""
    dims = {"similarity": "(B, 2, T)", "choice": "(B, N, T)"}.get(task, "(B, T)")
    fits = isinstance(ids, Tensor) and ids.dim() == dims.count(",") + 1
    if not fits or (task == "similarity" and ids.shape[1] != 2) or not ids.numel():
        got = f"has shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"is a {type(ids).__name__}"
        raise ValueError(f"TaskModel: ids {got}; expected {dims} token ids for {task}, see TaskModel.batch")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"TaskModel: ids has dtype {ids.dtype}; expected token ids of torch.int64 or torch.int32")
    for name, x, shape in (("mc_token_ids", places, ids.shape[:-1]), ("attention_mask", mask, ids.shape)):
        _check_tensor(name, x)
        if x is not None and x.shape != shape:
            raise ValueError(f"TaskModel: {name} has shape {tuple(x.shape)}; expected {tuple(shape)}")
    if places is not None:
        _check_places(places, ids.shape[-1])
    _check_tensor("labels", labels)
    if labels is None:
        return
    if labels.shape != ids.shape[:1]:
        raise ValueError(f"TaskModel: labels has shape {tuple(labels.shape)}; expected {tuple(ids.shape[:1])}")
    classes = ids.shape[1] if task == "choice" else classes
    if task == "similarity":
        return
    if labels.dtype != torch.int64 or not _within("labels", labels, classes):
        raise ValueError(
            f"TaskModel: labels is {labels.tolist()[:8]}, {labels.dtype}; expected int64 indices in [0, {classes})"
        )


def _check_tensor(name: str, x: Any) -> None:
    if x is not None and not isinstance(x, Tensor):
        raise TypeError(f"TaskModel: {name} is a {type(x).__name__}; expected a tensor, see TaskModel.batch")


def _check_places(places: Tensor, T: int) -> None:
    if places.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"TaskModel: mc_token_ids has dtype {places.dtype}; expected positions of torch.int64")
    if not _within("mc_token_ids", places, T):
        raise ValueError(f"TaskModel: mc_token_ids is {places.tolist()}; expected positions in [0, {T})")


def _within(name: str, x: Tensor, end: int) -> bool:
    """Whether the values of a tensor are in [0, end), where they can be looked at; a graph is told to look."""
    if x.device.type != "cpu":
        return True
    if torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(
            ((x >= 0) & (x < end)).all(), f"TaskModel: {name} has an index outside its range"
        )
        return True
    return int(x.min()) >= 0 and int(x.max()) < end
