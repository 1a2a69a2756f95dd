"""Loading a checkpoint into 8 or 4 bits: each matrix is quantised as it is read, so that one at a time is held in floats."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gptfast._checks import check_choice
from gptfast.checkpoints.weight_files import StoredTensor
from gptfast.nn.linear import Linear
from gptfast.nn.quantized import GROUPS, QuantizedLinear, quantized
from gptfast.nn.transformer import Transformer

SAMPLE = 1024  # numbers of a matrix that tell bases apart


def check_format(quantize: str | None, double_quant: bool) -> None:
    """Raise ValueError for what `Packing` does not take."""
    if quantize is not None:
        check_choice("from_pretrained", "quantize", quantize, tuple(GROUPS))
    if double_quant and quantize != "nf4":
        raise ValueError(f"from_pretrained: double_quant is for quantize='nf4', got quantize={quantize!r}")


class Packing:
    """The matrices of a model's blocks, in codes. Embeddings, the head, norms and biases stay in floats.

    Args:
        model: on the meta device.
        format: "nf4", "int4", "int8" or "mxfp4".
        double: quantise the scales of NF4 too.
    Raises:
        ValueError: NF4 of a width that is no multiple of its block.
    """

    def __init__(self, model: Transformer, format: str, double: bool) -> None:
        if model.config.n_expert is not None:
            raise ValueError(
                f"from_pretrained: quantize={format!r} does not pack the experts of a model with n_expert="
                f"{model.config.n_expert}; load it in bfloat16"
            )
        self.format, self.double = format, double
        self._linear = {f"h.{name}.weight": m for name, m in model.h.named_modules() if type(m) is Linear}
        for name, module in self._linear.items():
            if format == "nf4" and module.in_features % GROUPS[format]:
                raise ValueError(
                    f"from_pretrained: {name} has {module.in_features} inputs; nf4 takes multiples of {GROUPS[format]} - "
                    "say `quantize` int4, int8 or mxfp4"
                )
        self._packed: dict[str, dict[str, Tensor]] = {}
        self._samples: dict[str, bytes] = {}

    def take(self, name: str, stored: StoredTensor, transposed: bool, dtype: torch.dtype | None) -> bool:
        """Quantise the weight of this name, if it is one of the matrices; whether it was."""
        if name not in self._linear:
            return False
        weight = stored.read().t() if transposed else stored.read()
        weight = weight if dtype is None else weight.to(dtype)
        try:
            self._packed[name] = quantized(weight.contiguous(), self.format, self.double)
        except ValueError as error:
            if weight.isfinite().all():
                raise
            raise ValueError(f"from_pretrained: {name} holds nan or infinities; the model is damaged") from error
        self._samples[name] = sample(weight)
        return True

    def put_into(self, model: Transformer) -> None:
        """Replace the matrices of the model by their codes."""
        mark = mark_of(
            self._samples[f"h.{name}"] for name, _ in model.h.named_parameters() if f"h.{name}" in self._samples
        )
        for name, packed in self._packed.items():
            module = model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(module, Linear)
            QuantizedLinear.replace(module, self.format, packed)
        model.quantized_mark = mark


def sample(weight: Tensor) -> bytes:
    """Numbers of a matrix, rounded to bfloat16, so that the dtype in which it is loaded does not matter."""
    at = torch.arange(0, weight.numel(), max(1, weight.numel() // SAMPLE), device=weight.device)
    few = weight.detach()[at // weight.shape[1], at % weight.shape[1]].to("cpu", torch.bfloat16)
    return few.contiguous().view(torch.uint8).numpy().tobytes()


def mark_of(samples: Iterable[bytes]) -> str:
    crc = 0
    for few in samples:
        crc = zlib.crc32(few, crc)
    return f"bf16:{crc:08x}"


def format_of(model: nn.Module) -> str | None:
    """The format of a model's quantised layers, or None if it has none."""
    return next((m.format for m in model.modules() if isinstance(m, QuantizedLinear)), None)
