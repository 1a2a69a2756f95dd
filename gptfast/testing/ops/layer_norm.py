"""layer_norm: inputs, least work, cases, and torch's own function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.testing.case import Spec, norm_inputs, pointwise, rows


def peer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias)


SPEC = Spec(
    cases=[
        rows("layer_norm", 1, 1),
        rows("layer_norm", 3, 15),
        rows("layer_norm", 7, 33, "strided", eps=1e-3),
        rows("layer_norm", 130, 70, bias=0),
        rows("layer_norm", 5, 1023, fp32_weights=1),
        rows("layer_norm", 65, 768),
        rows("layer_norm", 67, 40, out_dtype=torch.bfloat16),
        rows("layer_norm", 9, 133, "strided", out_dtype=torch.float16),
        rows("layer_norm", 5, 64, out_dtype=torch.float32),
        rows("layer_norm", 0, 8),
        rows("layer_norm", 4096, 768, bench=True),
    ],
    make=norm_inputs,
    cost=pointwise(2),
    peer=("F.layer_norm", peer),
)
