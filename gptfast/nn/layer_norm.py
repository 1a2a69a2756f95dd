"""LayerNorm, alone or fused with the residual addition and dropout before it."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast import ops


class LayerNorm(torch.nn.LayerNorm):
    """Drop-in for `torch.nn.LayerNorm`: same arguments, same state_dict, through `gptfast.ops.layer_norm`.

    With `residual` it is one pass of dropout, residual addition and LayerNorm (`gptfast.ops.add_layer_norm`).
    """

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        dropout_p: float = 0.0,
        seed: int | None = None,
        offset: int = 0,
        first_row: int = 0,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """LN(input), or, with a residual: (LN(sum), sum) where sum = dropout(input) + residual.

        Args:
            input: (..., *normalized_shape).
            residual: None or shaped like `input`.
            dropout_p, seed, offset, first_row: dropout of `input` before the addition; see `gptfast.ops.add_layer_norm`.
            out_dtype: of LN(…); None: that of the input or of the sum, under autocast too.
        Raises:
            ValueError: the last dimensions are not normalized_shape.
        """
        n = len(self.normalized_shape)
        if tuple(input.shape[-n:]) != self.normalized_shape:
            raise ValueError(
                f"LayerNorm: input has shape {tuple(input.shape)}; expected its last {n} dimension(s) to be "
                f"{self.normalized_shape}, the normalized_shape"
            )
        weight = self._weight(input)
        bias = None if self.bias is None else self.bias.flatten()
        if residual is None:
            y = ops.layer_norm(_rows(input, n), weight, bias, self.eps, out_dtype=out_dtype)
            return y.view(input.shape)
        options = (weight, bias, self.eps, dropout_p, seed, offset)
        rows = (_rows(input, n), _rows(residual, n))
        y, total = ops.add_layer_norm(*rows, *options, first_row=first_row, out_dtype=out_dtype)
        return y.view(input.shape), total.view(input.shape)

    def _weight(self, input: Tensor) -> Tensor:
        if self.weight is None:  # elementwise_affine=False
            return input.new_ones(input.shape[-len(self.normalized_shape) :]).flatten()
        return self.weight.flatten()


def _rows(x: Tensor, n: int) -> Tensor:
    """The last n dimensions as one."""
    return x if n == 1 else x.flatten(-n)
