"""LM head, log-softmax and loss, chunk by chunk: the (N, V) logits never exist as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast.backend import has_cpu_ops, resolve
from gptfast.ops import reference
from gptfast.ops._common import autocast, check_float, check_same_device, forbid_double_backward
from gptfast.ops.cross_entropy import check_loss, check_targets, reduce_loss

OP = "linear_cross_entropy"
CHUNK_BYTES = 64 << 20  # of logits held at a time


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(hidden @ weight^T, targets), holding the logits of a chunk of rows at a time.

    With reduction "mean" or "sum" the gradients are computed in the forward pass, from the logits while they are
    there (Hsu et al., Liger Kernel, arXiv 2410.10989), so backward only scales them; with "none" backward computes the
    logits once more. The gradient of weight is summed over the chunks in fp32.

    Args:
        hidden: (..., C), float32, bfloat16, float16 or float64. Under autocast both factors are cast, as `F.linear`.
        weight: (V, C).
        targets: (...), int64, in [0, V) or ignore_index.
        ignore_index, reduction, label_smoothing: as in `cross_entropy`.
        backend: see `gptfast.backend`.
    Returns:
        float32 (float64 for float64 inputs): a scalar, or (...) for "none".
    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.  IndexError: a target outside the vocabulary.
    """
    rows, weight, flat = _checked(OP, hidden, weight, targets, ignore_index)
    check_loss(OP, targets, hidden.shape[:-1], reduction, label_smoothing)
    if resolve(OP, backend, rows) == "eager":
        loss = reference.linear_cross_entropy(
            rows, weight, flat, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
        )
        return reduce_loss(loss, targets, ignore_index, reduction)
    options = (ignore_index, float(label_smoothing))
    if reduction == "none":
        return RowLossFunction.apply(rows, weight, flat, *options).view(targets.shape)
    count = (flat != ignore_index).sum()
    unit = torch.ones((), dtype=torch.float32) if reduction == "sum" else 1.0 / count.float()
    return TotalLossFunction.apply(rows, weight, flat, unit, *options)


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, backend: str | None = None) -> Tensor:
    """log softmax(hidden @ weight^T)[target] per row, for scoring: perplexity, ranking, beam search.

    Args:
        hidden: (..., C).  weight: (V, C).  targets: (...), int64 in [0, V).
        backend: see `gptfast.backend`.
    Returns:
        (...) float32, without gradient; use `linear_cross_entropy(..., reduction="none")` to train on it.
    Raises:
        As `linear_cross_entropy`.
    """
    with torch.no_grad():
        return -linear_cross_entropy(hidden, weight, targets, ignore_index=-1, reduction="none", backend=backend)


def _checked(
    op: str, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, C) rows, weight, (N,) targets, in the autocast dtype where autocast is on."""
    check_float(op, hidden=hidden, weight=weight)
    check_same_device(op, hidden=hidden, weight=weight, targets=targets)
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; "
            "expected hidden (..., C) and weight (V, C)"
        )
    hidden, weight = autocast(hidden, weight)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"{op}: hidden is {hidden.dtype} but weight is {weight.dtype}; cast one, or use torch.autocast")
    if isinstance(targets, Tensor) and not targets.is_floating_point():
        check_targets(op, targets, weight.shape[0], ignore_index)
        targets = targets.reshape(-1).long()
    return hidden.reshape(-1, hidden.shape[-1]), weight, targets


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    rows = max(16, CHUNK_BYTES // (weight.shape[0] * hidden.element_size()))
    return [slice(n, min(n + rows, hidden.shape[0])) for n in range(0, hidden.shape[0], rows)]


def _row_losses(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
    """(N,) losses, without gradients."""
    op = torch.ops.gptfast
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    for part in _chunks(hidden, weight):
        logits = hidden[part] @ weight.T
        loss[part] = op.cross_entropy_fwd(logits, targets[part], ignore_index, label_smoothing)[0]
    return loss


def _losses_and_slopes(
    dloss: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) losses, and the gradients of sum(dloss * loss): dhidden in hidden's dtype, dweight in weight's."""
    op = torch.ops.gptfast
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    dweight = torch.zeros(weight.shape, dtype=torch.float32)
    for part in _chunks(hidden, weight):
        logits = hidden[part] @ weight.T
        loss[part], lse = op.cross_entropy_fwd(logits, targets[part], ignore_index, label_smoothing)
        dlogits = op.cross_entropy_bwd(dloss[part], logits, targets[part], lse, ignore_index, label_smoothing)
        torch.mm(dlogits, weight, out=dhidden[part])
        if hidden.dtype == torch.float32:
            dweight.addmm_(dlogits.T, hidden[part])
        else:
            dweight += dlogits.T @ hidden[part]  # a chunk's product is rounded once, the sum is fp32
    return loss, dhidden, dweight.to(weight.dtype)


class TotalLossFunction(torch.autograd.Function):
    """unit * sum of the row losses."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, unit: Tensor, ignore_index: int, smoothing: float
    ) -> Tensor:
        op = torch.ops.gptfast
        if not any(ctx.needs_input_grad[:2]):
            return (
                op.linear_cross_entropy_fwd(hidden, weight, targets, ignore_index, smoothing).double().sum().float()
                * unit
            )
        dloss = unit.expand(hidden.shape[0])
        loss, dhidden, dweight = op.linear_cross_entropy_bwd(dloss, hidden, weight, targets, ignore_index, smoothing)
        ctx.save_for_backward(dhidden, dweight)
        return loss.double().sum().float() * unit

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return dhidden * dtotal.to(dhidden.dtype), dweight * dtotal.to(dweight.dtype), None, None, None, None


class RowLossFunction(torch.autograd.Function):
    """The row losses themselves; each may have its own upstream gradient, so backward computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, smoothing: float
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.options = (ignore_index, smoothing)
        return torch.ops.gptfast.linear_cross_entropy_fwd(hidden, weight, targets, ignore_index, smoothing)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        op = torch.ops.gptfast
        _, dhidden, dweight = op.linear_cross_entropy_bwd(dloss, *ctx.saved_tensors, *ctx.options)
        return dhidden, dweight, None, None, None


def _register() -> None:
    """The chunk loops as operators of their own, so that torch.compile sees one call and not the loop."""
    library = torch.library.Library("gptfast", "FRAGMENT")
    arguments = "Tensor hidden, Tensor weight, Tensor targets, int ignore_index, float label_smoothing"
    library.define(f"linear_cross_entropy_fwd({arguments}) -> Tensor")
    library.define(f"linear_cross_entropy_bwd(Tensor dloss, {arguments}) -> (Tensor, Tensor, Tensor)")
    library.impl("linear_cross_entropy_fwd", _row_losses, "CPU")
    library.impl("linear_cross_entropy_bwd", _losses_and_slopes, "CPU")
    torch.library.register_fake("gptfast::linear_cross_entropy_fwd", _fake_fwd, lib=library)
    torch.library.register_fake("gptfast::linear_cross_entropy_bwd", _fake_bwd, lib=library)
    globals()["_library"] = library  # keeps the registrations alive
    forbid_double_backward(OP, "linear_cross_entropy_bwd")


def _fake_fwd(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


def _fake_bwd(
    dloss: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return loss, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


if has_cpu_ops:
    _register()
