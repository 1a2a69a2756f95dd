"""Cross-entropy of logits, and of a linear layer whose logits are never all held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast import ops
from gptfast.nn.linear import Linear


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Drop-in for `torch.nn.CrossEntropyLoss` with class indices, through `gptfast.ops.cross_entropy`.

    The loss is fp32 for half-precision logits. Not supported, with an error that says so: class weights and
    class probabilities as targets.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        _refuse("CrossEntropyLoss", "weight", weight)
        super().__init__(None, size_average, ignore_index, reduce, reduction, label_smoothing)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: logits (C,), (N, C) or (N, C, d1, d2, ...).
            target: class indices, () or (N,) or (N, d1, d2, ...), in [0, C) or ignore_index.
        Returns:
            Scalar, or target's shape with reduction="none".
        """
        check_indices("CrossEntropyLoss", target)
        classes = 0 if input.dim() == 1 else 1
        expected = input.shape[:classes] + input.shape[classes + 1 :]
        if input.dim() == 0 or target.shape != expected:
            raise ValueError(
                f"CrossEntropyLoss: input has shape {tuple(input.shape)} and target {tuple(target.shape)}; "
                "expected (N, C, ...) with (N, ...)"
            )
        logits = input.movedim(classes, -1).reshape(-1, input.shape[classes])  # N C
        loss = ops.cross_entropy(
            logits,
            target.reshape(-1),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
        return loss.view(target.shape) if self.reduction == "none" else loss


class LinearCrossEntropyLoss(torch.nn.Module):
    """Cross-entropy of `input @ weight.T` by chunks of rows, through `gptfast.ops.linear_cross_entropy`.

    Signature and state_dict (`linear.weight`) are those of `torch.nn.LinearCrossEntropyLoss` (torch >= 2.13).
    Not supported, with an error that says so: out_features, bias, class weights, class probabilities.

    Args:
        in_features: C, size of a hidden state.  num_classes: V.
        reduction: "mean" over the targets that are not ignored, "sum" or "none".
        ignore_index: this target does not count; None: -100.
        label_smoothing: in [0, 1].
        options: accepted and unused: torch's choice of chunks; here they are chosen by the op.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("weight", weight),
            ("out_features", out_features or None),
            ("bias", bias or None),
        ):
            _refuse("LinearCrossEntropyLoss", name, value)
        self.linear = Linear(in_features, num_classes, bias=False, device=device, dtype=dtype)
        self.reduction = reduction
        self.ignore_index = -100 if ignore_index is None else ignore_index
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: (..., in_features).
            target: (...) class indices in [0, num_classes) or ignore_index.
        Returns:
            Scalar, or target's shape with reduction="none".
        """
        check_indices("LinearCrossEntropyLoss", target)
        if target.shape != input.shape[:-1]:
            raise ValueError(
                f"LinearCrossEntropyLoss: input has shape {tuple(input.shape)} and target "
                f"{tuple(target.shape)}; expected (..., in_features) with (...)"
            )
        loss = ops.linear_cross_entropy(
            input.reshape(-1, input.shape[-1]),
            self.linear.weight,
            target.reshape(-1),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
        return loss.view(target.shape) if self.reduction == "none" else loss

    def extra_repr(self) -> str:
        ignored = f"ignore_index={self.ignore_index}"
        return f"reduction={self.reduction}, {ignored}, label_smoothing={self.label_smoothing}"


def check_indices(name: str, target: Tensor) -> None:
    if target.dtype != torch.int64:
        raise TypeError(
            f"{name}: target has dtype {target.dtype}; expected class indices, int64 - for class "
            "probabilities use torch.nn.CrossEntropyLoss"
        )


def _refuse(module: str, name: str, value: Any) -> None:
    if value is not None:
        raise ValueError(
            f"{module}: {name} is {value!r}, which the fused loss does not support; use torch.nn.CrossEntropyLoss"
        )
