"""Weight formats of the engine, and the format of each kind of matrix."""

from __future__ import annotations

from typing import Any

from torch import Tensor

FORMATS = ("float32", "bfloat16", "int8", "int6", "int4", "nf4", "q4", "mxfp4")
CACHE_DTYPES = ("float32", "float16", "bfloat16")
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # names on the command line
BITS = {  # per weight, with its share of the scale
    **{"float32": 32.0, "bfloat16": 12.0},
    **{"int8": 8.5, "int6": 6.5, "int4": 4.5, "nf4": 4.5, "q4": 4.5, "mxfp4": 4.25},
}

MATRICES: tuple[str, ...] = ("c_attn", "attn_proj", "c_fc", "mlp_proj", "head")


EXPERTS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")  # parameters with a row for each expert


def expert_of(name: str) -> tuple[str, int] | None:
    """The parameter of a GPT, with a row for each expert, and the expert that this weight of the engine belongs to; None: none."""
    parameter, _, last = name.rpartition(".")
    return (parameter, int(last)) if last.isdigit() else None


def of_expert(x: Tensor) -> Tensor:
    """The weight of the engine for an expert's row of a parameter: (inputs, outputs) as (outputs, inputs), or a bias itself. The other
    way round, the same."""
    return x.t() if x.dim() == 2 else x


def format_name(dtype: Any) -> str:
    """The name of a format, given its name, an alias or a torch.dtype.

    Raises:
        ValueError: unknown format.
    """
    name = str(dtype).removeprefix("torch.")
    name = ALIASES.get(name, name)
    if name not in FORMATS:
        raise ValueError(f"compile_for_inference: dtype is {dtype!r}; expected one of {', '.join(FORMATS)}")
    return name


def matrix_formats(name: str) -> dict[str, str]:
    """The format of each kind of matrix.

    The 4-bit formats keep the head, which is also the token embedding, in 8 or 6 bits: it is a third of GPT-2 124M, and its
    errors go directly into the logits. "mxfp4" is for the MLPs, as in gpt-oss' checkpoints, whose other matrices are in bfloat16.
    """
    formats: dict[str, str] = dict.fromkeys(MATRICES, name)
    if name == "mxfp4":
        formats |= dict.fromkeys(("c_attn", "attn_proj", "head"), "bfloat16")
    elif BITS[name] < 6:
        formats["head"] = "int6" if name == "q4" else "int8"
    return formats


def cache_dtype_of(value: Any, dtype: str) -> str:
    """dtype of keys and values. Default: fp32 with fp32 weights, fp16 with all others."""
    if value is None:
        return "float32" if dtype == "float32" else "float16"
    name = str(value).removeprefix("torch.")
    name = ALIASES.get(name, name)
    if name not in CACHE_DTYPES:
        raise ValueError(f"compile_for_inference: cache_dtype is {value!r}; expected {' or '.join(CACHE_DTYPES)}")
    return name
