"""LM head, log-softmax and loss, chunk by chunk: the (N, V) logits never exist as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast.backend import is_many, resolve
from gptfast.ops import reference
from gptfast.ops._checks import check_float, check_int, check_same_device
from gptfast.ops._logit_chunks import losses_and_gradients, losses_of, room_for
from gptfast.ops._registry import caller, define_python_op, differentiable, forbid_double_backward, register_derivative
from gptfast.ops._tensors import autocast, rows_of
from gptfast.ops.cross_entropy import check_loss, check_targets, reduce_loss

OP = "linear_cross_entropy"


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
    logits once more. A factor that needs no gradient costs none. The gradient of weight is summed over the chunks in
    fp32. Under autocast the products are taken in the autocast dtype, as by `F.linear`, but the gradient of a float32
    weight keeps its fp32 sum.

    Args:
        hidden: (..., C), float32, bfloat16, float16 or float64.
        weight: (V, C), of hidden's dtype, or of any under autocast.
        targets: (...), int64, in [0, V) or ignore_index.
        ignore_index, reduction, label_smoothing: as in `cross_entropy`.
        backend: see `gptfast.backend`.
    Returns:
        float32 (float64 for float64 inputs): a scalar, or (...) for "none".
    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.  IndexError: a target outside the vocabulary.
    """
    rows = _rows(OP, hidden, weight, targets)
    check_loss(OP, targets, hidden.shape[:-1], reduction, label_smoothing)
    check_int(OP, "ignore_index", ignore_index)
    check_targets(OP, targets, weight.shape[0], ignore_index)
    flat = targets.reshape(-1).long()
    runs_on = resolve(OP, backend, rows)
    if runs_on == "eager":
        loss = reference.linear_cross_entropy(
            rows, weight, flat, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
        )
        return reduce_loss(loss, targets, ignore_index, reduction)
    arguments = (runs_on, rows, weight, flat, ignore_index, float(label_smoothing))
    if reduction == "none":
        return _row_losses("cpu", *arguments).view(targets.shape)
    if torch.is_grad_enabled():
        total = _total_loss(*arguments)
    else:  # needs_input_grad of a Function is true of parameters even here, and it would compute their gradients
        total = _total(torch.ops.gptfast.linear_cross_entropy_fwd(*arguments))
    return total if reduction == "sum" else _mean(total, (flat != ignore_index).sum())


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, backend: str | None = None) -> Tensor:
    """log softmax(hidden @ weight^T)[target] per row, for scoring, ranking and preference losses.

    Differentiable, as `linear_cross_entropy(..., reduction="none")`; without gradients it costs one product.

    Args:
        hidden: (..., C).  weight: (V, C).  targets: (...), int64 in [0, V).
        backend: see `gptfast.backend`.
    Returns:
        (...) float32 (float64 for float64 inputs).
    Raises:
        As `linear_cross_entropy`.
    """
    _rows("linear_logprobs", hidden, weight, targets)
    check_loss("linear_logprobs", targets, hidden.shape[:-1], "none", 0.0)
    check_targets("linear_logprobs", targets, weight.shape[0], None)
    nothing = -(2**63)  # an ignore_index that no target has
    return -linear_cross_entropy(hidden, weight, targets, ignore_index=nothing, reduction="none", backend=backend)


def _rows(op: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Check the three tensors; return hidden as (N, C) in the dtype of the products."""
    check_float(op, hidden=hidden, weight=weight)
    check_same_device(op, hidden=hidden, weight=weight, targets=targets if isinstance(targets, Tensor) else None)
    if weight.dim() != 2 or weight.shape[0] == 0 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; "
            "expected hidden (..., C) and weight (V, C) with V >= 1"
        )
    kind = hidden.device.type
    casts = kind != "meta" and torch.is_autocast_enabled(kind) and torch.float64 not in (hidden.dtype, weight.dtype)
    if not casts and hidden.dtype != weight.dtype:
        raise TypeError(f"{op}: hidden is {hidden.dtype} but weight is {weight.dtype}; cast one, or use torch.autocast")
    return rows_of(autocast(hidden)[0])


def _total(losses: Tensor) -> Tensor:
    return losses.double().sum().float()


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """total / count; nan with gradient 0 if all targets are ignored, as in `F.cross_entropy`."""
    return torch.where(count > 0, total / count.clamp_min(1), torch.nan)


def _gradients(backend: str, dloss: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return losses_and_gradients(backend, dloss, *others)[1:]


def _total_and_gradients(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = (backend, hidden, weight, targets, ignore_index, label_smoothing)
    if not (want_hidden or want_weight):
        return _total(losses_of(*loss)), *room_for(hidden, weight, False, False)
    losses, dhidden, dweight = losses_and_gradients(backend, None, *loss[1:], want_hidden, want_weight)
    return _total(losses), dhidden, dweight


def _scaled(dtotal: Tensor, hidden: Tensor, weight: Tensor, dhidden: Tensor, dweight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients times dtotal."""
    factor = _factor(dtotal)
    return (dhidden * factor).to(hidden.dtype), (dweight * factor).to(weight.dtype)


def _factor(dtotal: Tensor) -> Tensor | float:
    """dtotal as a factor that keeps half-precision products unrounded: a Python number on the CPU; on a GPU, to avoid a
    sync, a float32 tensor of one dimension."""
    return dtotal.item() if dtotal.device.type == "cpu" else dtotal.view(1)


def _save_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted = inputs[-2:]
    ctx.save_for_backward(*inputs[1:3], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward_total(ctx: Any, call: Any, dtotal: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = call(f"{OP}_scale", dtotal, *ctx.saved_tensors)
    return None, *(g if wanted else None for g, wanted in zip(grads, ctx.wanted, strict=True)), *(None,) * 5


def _total_loss(backend: str, hidden: Tensor, weight: Tensor, targets: Tensor, *options: Any) -> Tensor:
    """Sum of the losses of the rows. Its gradients are unscaled until backward: divided by N they would underflow in fp16."""
    if torch.compiler.is_compiling():
        wanted = hidden.requires_grad, weight.requires_grad
        return torch.ops.gptfast.linear_cross_entropy_total(backend, hidden, weight, targets, *options, *wanted)[0]
    return TotalLossFunction.apply(backend, hidden, weight, targets, *options)


class TotalLossFunction(torch.autograd.Function):
    """Sum of the losses of the rows, with gradients that the first backward scales in place: a copy of dweight would double
    the memory. A second backward through the same graph computes them again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.inputs, ctx.wanted = (inputs[0], *inputs[4:]), ctx.needs_input_grad[1:3]
        total, *ctx.grads = _call(f"{OP}_total", *inputs, *ctx.wanted)
        ctx.save_for_backward(*inputs[1:4])
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        (backend, *options), (hidden, weight, targets) = ctx.inputs, ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            grads = _call(f"{OP}_total", backend, hidden, weight, targets, *options, *ctx.wanted)[1:]
        if is_many(dtotal):  # each backward pass has a factor of its own
            grads = [(g * dtotal).to(x.dtype) for g, x in zip(grads, (hidden, weight), strict=True)]
        elif torch.is_grad_enabled():
            grads = _call(f"{OP}_scale", dtotal, hidden, weight, *grads)
        else:
            factor = _factor(dtotal)
            grads = [g.mul_(factor).to(x.dtype) for g, x in zip(grads, (hidden, weight), strict=True)]
        return None, *(g if wanted else None for g, wanted in zip(grads, ctx.wanted, strict=True)), None, None, None


_call = caller("gptfast")


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.backend, hidden, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, targets)


def _backward_rows(ctx: Any, call: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    """Each row has an upstream gradient of its own, so the logits are computed again."""
    wanted = ctx.needs_input_grad[1:3]
    hidden, weight, _ = ctx.saved_tensors
    grads = call(f"{OP}_bwd", ctx.backend, dloss, *ctx.saved_tensors, *ctx.options, *wanted)
    dhidden, dweight = (
        g.to(x.dtype) if want else None for g, x, want in zip(grads, (hidden, weight), wanted, strict=True)
    )
    return None, dhidden, dweight, None, None, None


def _fake_fwd(
    backend: str, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


def _fake_bwd(
    backend: str,
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    return room_for(hidden, weight, want_hidden, want_weight)


def _fake_total(backend: str, hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty((), dtype=torch.float32), *room_for(hidden, weight, *others[-2:])


def _fake_scale(
    dtotal: Tensor, hidden: Tensor, weight: Tensor, dhidden: Tensor, dweight: Tensor
) -> tuple[Tensor, Tensor]:
    return dhidden.new_empty(dhidden.shape), weight.new_empty(dweight.shape)


define_python_op(f"{OP}_fwd", losses_of, _fake_fwd)
define_python_op(f"{OP}_bwd", _gradients, _fake_bwd)
define_python_op(f"{OP}_total", _total_and_gradients, _fake_total)
define_python_op(f"{OP}_scale", _scaled, _fake_scale)
_row_losses = differentiable(f"{OP}_fwd", _save_rows, _backward_rows)
register_derivative(f"{OP}_total", _save_total, _backward_total)
forbid_double_backward(OP, f"{OP}_bwd")
forbid_double_backward(OP, f"{OP}_scale")
