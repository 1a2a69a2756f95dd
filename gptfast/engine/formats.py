"""The formats of the engine's weights and what each of its matrices is stored in."""

from __future__ import annotations

from typing import Any

FORMATS = ("float32", "bfloat16", "int8", "int6", "int4", "nf4", "q4")
CACHE_DTYPES = ("float32", "float16", "bfloat16")
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as the command line has them
BITS = {  # of a weight, with its share of a scale
    **{"float32": 32.0, "bfloat16": 12.0},
    **{"int8": 8.5, "int6": 6.5, "int4": 4.5, "nf4": 4.5, "q4": 4.5},
}

MATRICES: tuple[str, ...] = ("c_attn", "attn_proj", "c_fc", "mlp_proj", "head")


def format_name(dtype: Any) -> str:
    """The name of a format, from it, from an alias or from a torch.dtype.

    Raises:
        ValueError: there is no such format.
    """
    name = str(dtype).removeprefix("torch.")
    name = ALIASES.get(name, name)
    if name not in FORMATS:
        raise ValueError(f"compile_for_inference: dtype is {dtype!r}; expected one of {', '.join(FORMATS)}")
    return name


def matrix_formats(name: str) -> dict[str, str]:
    """The format of each kind of matrix.

    The 4-bit formats keep the head, which is the token embedding too, in 8 bits or 6: it is a third of GPT-2 124M, and
    the logits come straight out of it.
    """
    formats: dict[str, str] = dict.fromkeys(MATRICES, name)
    if BITS[name] < 6:
        formats["head"] = "int6" if name == "q4" else "int8"
    return formats
