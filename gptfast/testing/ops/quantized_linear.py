"""quantized_linear: inputs, least work, cases, and torch's own function."""

from __future__ import annotations

import torch

from gptfast import ops
from gptfast.testing.case import Case, Inputs, Spec, randn


def make(c: Case, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    N, C, M = (c.dims[k] for k in "NCM")
    weight, format, size = torch.randn(M, C, generator=g) * C**-0.5, c.options["format"], c.options["group_size"]
    if format == "nf4":
        codes, scales = ops.quantize_nf4(weight, block_size=size).rows(M)
    elif format == "mxfp4":
        codes, scales = ops.quantize_mxfp4(weight)
    else:
        scale_dtype = torch.float32 if c.dims.get("fp32_scales") else torch.float16
        codes, scales = ops.quantize_groups(weight, format, group_size=size, scale_dtype=scale_dtype)
    bias = torch.randn(M, generator=g).to(dtype) if c.dims.get("bias", 1) else None
    return randn(c, dtype, g, N, C), codes, scales, bias


def case(N: int, C: int, M: int, format: str, group_size: int, layout: str = "contiguous", **dims: int) -> Case:
    return Case(
        "quantized_linear", {"N": N, "C": C, "M": M, **dims}, {"format": format, "group_size": group_size}, layout
    )


SPEC = Spec(
    cases=[
        case(1, 1, 1, "int8", 32),
        case(1, 768, 40, "int4", 32),  # decoding: the groups are split among programs
        case(5, 512, 33, "nf4", 64, bias=0),
        case(16, 1100, 17, "int8", 128, "strided"),
        case(17, 100, 65, "int4", 32, "strided", bias=0, fp32_scales=1),
        case(67, 256, 70, "nf4", 128),
        case(97, 33, 130, "int8", 64, fp32_scales=1),
        case(1, 768, 40, "mxfp4", 32),
        case(7, 100, 33, "mxfp4", 32, bias=0),
        case(67, 160, 70, "mxfp4", 32, "strided"),
        case(0, 64, 4, "int4", 64),
        case(3, 64, 0, "int8", 32),
    ],
    make=make,
    non_differentiable=(2,),
    floors={
        # 0.26, 0.30 in Triton's interpreter: weights are rounded to the dtype that is multiplied. Not measured with bf16.
        torch.float16: (0.5, 0.5),
        torch.bfloat16: (0.5, 0.5),
    },
)
