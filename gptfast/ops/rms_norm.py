"""RMSNorm in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast.backend import resolve
from gptfast.ops import reference
from gptfast.ops.layer_norm import check_norm, result_dtype


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, as `F.rms_norm` (Zhang and Sennrich, arXiv 1910.07467).

    Sums are fp32. The result is rounded once, after the weight, as `F.rms_norm`, gpt-oss and nanochat have it. The modules
    of Llama, Qwen and Mistral in transformers round x / sqrt(...) to x's dtype first: equal in float32; in 16 bits theirs
    differs by up to two units in the last place. The gradient of weight is summed in fp32 in a fixed order and rounded once.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64.
        weight: (C,), any float dtype, or None for ones.
        eps: added to the mean square, >= 0. 1e-6 as in Llama; `F.rms_norm` takes the eps of the dtype.
        out_dtype: of the result, as in `layer_norm`; None: x's dtype.
        backend: see `gptfast.backend`.
    Returns:
        Tensor of x's shape, in out_dtype.
    Raises:
        TypeError, ValueError: wrong dtype, shape, device, eps or out_dtype.
    """
    op = "rms_norm"
    check_norm(op, x, eps, **weights_of(weight))
    y_dtype = result_dtype(op, out_dtype, x.dtype)
    resolve(op, backend, x, weight)
    return reference.rms_norm(x, weight, float(eps), out_dtype=y_dtype)


def weights_of(weight: Tensor | None) -> dict[str, Tensor | None]:
    """The vectors that `check_norm` checks: none, where there is no weight."""
    return {} if weight is None else {"weight": weight}
