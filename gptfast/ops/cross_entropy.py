"""Log-softmax and negative log-likelihood in one pass over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast._checks import check_choice
from gptfast.backend import resolve, transformed
from gptfast.ops import reference
from gptfast.ops._checks import check_float, check_int, check_number, check_same_device
from gptfast.ops._registry import differentiable, forbid_double_backward, register_fake

OP = "cross_entropy"


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """-log softmax(logits)[target], as `F.cross_entropy` with class indices.

    loss = (1 - e) (lse - x_target) + e (lse - mean(x)), e the label smoothing (Szegedy et al., arXiv 1512.00567), and
    lse = log sum exp(x), kept relative to the largest logit: as exact for confident rows and for logits far from 0.
    -inf logits (masked tokens) are legal; rows that are ignored may hold anything. Computed in fp32 for every dtype,
    also under autocast.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64.
        targets: (...), int64, in [0, V) or ignore_index.
        ignore_index: targets of this value are excluded from the loss and the mean.
        reduction: "mean" over the targets that are not ignored (nan if all are, as in torch), "sum" or "none".
        label_smoothing: e in [0, 1].
        backend: see `gptfast.backend`.
    Returns:
        float32 (float64 for float64 logits): a scalar, or (...) for "none".
    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.  IndexError: a target outside the vocabulary.
    """
    check_float(OP, logits=logits)
    check_loss(OP, targets, logits.shape[:-1], reduction, label_smoothing)
    check_same_device(OP, logits=logits, targets=targets)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{OP}: logits has shape {tuple(logits.shape)}; expected (..., V) with V >= 1")
    check_int(OP, "ignore_index", ignore_index)
    check_targets(OP, targets, logits.shape[-1], ignore_index)
    rows, flat = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).long()
    runs_on = resolve(OP, backend, logits)
    if runs_on == "eager":
        loss = reference.cross_entropy(
            rows, flat, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
        )
    else:
        loss, _ = _fused(runs_on, rows, flat, ignore_index, float(label_smoothing))
    return reduce_loss(loss, targets, ignore_index, reduction)


def check_loss(op: str, targets: Tensor, shape: tuple[int, ...], reduction: str, label_smoothing: float) -> None:
    """Checks of the options that cross_entropy and linear_cross_entropy share."""
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.int32):
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"{op}: targets has dtype {got}; expected int64 class indices")
    if tuple(targets.shape) != tuple(shape):
        raise ValueError(f"{op}: targets has shape {tuple(targets.shape)}; expected {tuple(shape)}, one per row")
    check_number(op, "label_smoothing", label_smoothing)
    check_choice(op, "reduction", reduction, ("mean", "sum", "none"))
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}; expected a number in [0, 1]")


def check_targets(op: str, targets: Tensor, vocab_size: int, ignore_index: int | None) -> None:
    """Raise IndexError for a target outside the vocabulary. While tracing and on other devices the kernel checks."""
    if torch.compiler.is_compiling() or targets.device.type != "cpu" or transformed():
        return
    bad = (targets < 0) | (targets >= vocab_size)
    if ignore_index is not None:
        bad &= targets != ignore_index
    if bad.any():
        value = targets[bad][0].item()
        ignored = "" if ignore_index is None else f", or ignore_index ({ignore_index})"
        raise IndexError(
            f"{op}: a target is {value}; expected 0 to {vocab_size - 1}{ignored} - "
            "check that tokenizer and model have one vocabulary size"
        )


def reduce_loss(loss: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Reduce (N,) losses, 0 where ignored. Sums are float64, so their order does not change the result."""
    if reduction == "none":
        return loss.view(targets.shape)
    total = loss.double().sum()
    if reduction == "mean":
        total = total / (targets != ignore_index).sum()
    return total.to(loss.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, *ctx.options = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, call: Any, dloss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return call("cross_entropy_bwd", dloss, *ctx.saved_tensors, *ctx.options), None, None, None


@register_fake("cross_entropy_fwd")
def _(logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float) -> tuple[Tensor, Tensor]:
    rows = targets.shape[0]
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, 2, dtype=torch.float32)


@register_fake("cross_entropy_bwd")
def _(dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
    return logits.new_empty(logits.shape)


@register_fake("cross_entropy_in_place")
def _(logits: Tensor, targets: Tensor, dloss: Tensor | None, ignore_index: int, label_smoothing: float) -> Tensor:
    return logits.new_empty(targets.shape[0], dtype=torch.float32)


_fused = differentiable("cross_entropy_fwd", _save, _backward)
forbid_double_backward(OP, "cross_entropy_bwd")
