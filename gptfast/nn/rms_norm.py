"""RMSNorm, alone or fused with the residual addition and dropout before it."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast import ops


class RMSNorm(torch.nn.RMSNorm):
    """Drop-in for `torch.nn.RMSNorm`: same arguments, same state_dict, through `gptfast.ops.rms_norm`.

    With `residual` it is one pass of dropout, residual addition and RMSNorm (`gptfast.ops.add_rms_norm`). The normalized
    shape is the last dimension.
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
        """RMSNorm(input), or, with a residual: (RMSNorm(sum), sum) where sum = dropout(input) + residual.

        Args:
            input: (..., C).
            residual: None or shaped like `input`.
            dropout_p, seed, offset, first_row: dropout of `input` before the addition; see `gptfast.ops.add_rms_norm`.
            out_dtype: of RMSNorm(…); None: that of the input or of the sum, under autocast too.
        Raises:
            ValueError: the last dimension is not normalized_shape, or that has several.
        """
        if len(self.normalized_shape) != 1 or input.shape[-1:] != self.normalized_shape:
            raise ValueError(
                f"RMSNorm: input has shape {tuple(input.shape)} and normalized_shape is {tuple(self.normalized_shape)}; "
                "expected one dimension, the last of the input"
            )
        eps = torch.finfo(input.dtype).eps if self.eps is None else self.eps  # as torch has it
        if residual is None:
            return ops.rms_norm(input, self.weight, eps, out_dtype=out_dtype)
        options = (self.weight, eps, dropout_p, seed, offset)
        return ops.add_rms_norm(input, residual, *options, first_row=first_row, out_dtype=out_dtype)
