"""Patched language models of transformers: the loss without holding the logits, which are computed when they are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from gptfast import ops
from gptfast.integrations.joined import holding, is_held, is_watched, version_of
from gptfast.integrations.lazy import Later, lazy
from gptfast.integrations.modules import Linear, runs
from gptfast.integrations.swap import derive, mark

LOSS_OPTIONS = ("num_items_in_batch", "shift_labels", "ignore_index")  # of transformers' loss functions
_CHUNK = 1024  # rows whose logits are held for token accuracies


class Head(Linear):
    """The head of a language model: a `torch.nn.Linear` whose product is put off inside `holding`."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and is_held(self, input):
            return input.new_empty(0)
        return super().forward(input)


mark(Head, nn.Linear)


@cache
def language_model_class(original: type[nn.Module], generates: bool) -> type[nn.Module]:
    """The subclass of a language model of transformers that computes its loss by `gptfast.ops.linear_cross_entropy`.

    generates: whether it also generates by gptfast.
    """

    @wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, original.forward, args, kwargs)

    members = {"generate": _generate_of(original)} if generates else {}
    return derive(language_model_class, original, generates, forward=forward, **members)


def _generate_of(original: Any) -> Callable[..., Any]:
    from gptfast.integrations.hf_generate import generate as by_gptfast

    @wraps(original.generate)
    def generate(self: nn.Module, inputs: Any = None, generation_config: Any = None, *args: Any, **options: Any) -> Any:
        if args:
            return original.generate(self, inputs, generation_config, *args, **options)
        return by_gptfast(self, original.generate, inputs, generation_config, **options)

    return generate


def _forward(model: Any, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    wants_accuracy = bool(kwargs.pop("return_token_accuracy", False))
    labels, head = kwargs.get("labels"), model.get_output_embeddings()
    if labels is None or not _may_wait(model, head, kwargs):
        return plain(model, *args, **kwargs)
    options = {name: value for name, value in kwargs.items() if name not in ("labels", *LOSS_OPTIONS)}
    loss_options = {name: kwargs[name] for name in LOSS_OPTIONS if kwargs.get(name) is not None}
    with holding(head) as held:
        outputs = plain(model, *args, **{**options, "return_dict": True})
    hidden = held.input
    if hidden is None:
        raise RuntimeError(
            f"{type(model).__name__}: its head was not called by its forward; restore(model) and report this"
        )
    targets = _targets(labels, **loss_options).to(hidden.device)
    loss = _loss(hidden, head.weight, targets, **loss_options)
    outputs = type(outputs)(**{**{field.name: vars(outputs)[field.name] for field in fields(outputs)}, "loss": loss})
    if wants_accuracy:
        object.__setattr__(outputs, "token_accuracy", _token_accuracy(head, hidden, targets, **loss_options))
    return lazy(outputs, _logits_of(head, hidden))


def _may_wait(model: Any, head: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the product of the head can be put off unseen, and the loss is the usual one."""
    if type(head) is not Head or head.bias is not None or torch.compiler.is_compiling() or is_watched(head):
        return False
    plain_tuple = kwargs.get("return_dict") is False or not getattr(model.config, "return_dict", True)
    kept = kwargs.get("logits_to_keep", 0)
    if plain_tuple or not isinstance(kept, int) or kept != 0 or not isinstance(kwargs["labels"], Tensor):
        return False
    return ("loss_function" in _names(type(model).gptfast_original) and model.loss_function is ForCausalLMLoss) or (
        "CrossEntropyLoss" in _names(type(model).gptfast_original)
    )


def _names(original: type[nn.Module]) -> tuple[str, ...]:
    """Names that a forward uses, below transformers' decorators."""
    return inspect.unwrap(original.forward).__code__.co_names


def _targets(labels: Tensor, shift_labels: Tensor | None = None, ignore_index: int = -100, **_: Any) -> Tensor:
    """The token that follows each position."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels


def _loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    **_: Any,
) -> Tensor:
    rows, flat = hidden.flatten(0, -2), targets.reshape(-1)
    reduction = "mean" if num_items_in_batch is None else "sum"
    if runs(rows, weight):
        total = ops.linear_cross_entropy(rows, weight, flat, ignore_index=ignore_index, reduction=reduction)
    else:
        logits = F.linear(rows, weight).float()
        total = F.cross_entropy(logits, flat, ignore_index=ignore_index, reduction=reduction)
    if num_items_in_batch is None:
        return total
    items = num_items_in_batch.to(total.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    return total / items


@torch.no_grad()
def _token_accuracy(head: nn.Module, hidden: Tensor, targets: Tensor, ignore_index: int = -100, **_: Any) -> Tensor:
    """Share of the targets that have the largest logit, a scalar; the logits of some rows at a time."""
    rows, flat = hidden.detach().flatten(0, -2), targets.reshape(-1)
    best = torch.cat([head(part).argmax(-1) for part in rows.split(_CHUNK)])
    counts = flat != ignore_index
    return ((best == flat) & counts).sum() / counts.sum()


def _logits_of(head: Any, hidden: Tensor) -> Later:
    """head(hidden), as it would have been computed now."""
    kind, grad = hidden.device.type, torch.is_grad_enabled()
    cast, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    weight, version = head.weight, version_of(head.weight)

    def compute() -> Tensor:
        if head.weight is not weight or version_of(weight) != version:
            raise RuntimeError(
                "outputs.logits: the head's weight has changed since the forward pass, and the logits had not been computed; "
                "read outputs.logits before optimizer.step()"
            )
        with torch.set_grad_enabled(grad), torch.autocast(kind, dtype=dtype, enabled=cast):
            return head(hidden)

    shape = (*hidden.shape[:-1], weight.shape[0])
    return Later(compute, hidden, weight, shape, dtype if cast and hidden.dtype != torch.float64 else hidden.dtype)
