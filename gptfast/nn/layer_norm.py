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
        shape, given = self.normalized_shape, input.shape
        n = len(shape)
        if given[-n:] != shape:
            raise ValueError(
                f"LayerNorm: input has shape {tuple(given)}; expected its last {n} dimension(s) to be "
                f"{shape}, the normalized_shape"
            )
        weight, bias = self.weight, self.bias
        weight = input.new_ones(shape) if weight is None else weight  # elementwise_affine=False
        if n > 1:  # as one dimension
            input, residual = input.flatten(-n), None if residual is None else residual.flatten(-n)
            weight, bias = weight.flatten(), None if bias is None else bias.flatten()
        if residual is None:
            y = ops.layer_norm(input, weight, bias, self.eps, out_dtype=out_dtype)
            return y if n == 1 else y.view(given)
        options = (weight, bias, self.eps, dropout_p, seed, offset)
        y, total = ops.add_layer_norm(input, residual, *options, first_row=first_row, out_dtype=out_dtype)
        return (y, total) if n == 1 else (y.view(given), total.view(given))
