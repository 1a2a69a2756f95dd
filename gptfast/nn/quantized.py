"""Linear layer whose frozen weight is held in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gptfast import ops
from gptfast._nf4 import NESTED_BLOCK, dequantize_groups, nf4_absmax
from gptfast.nn.linear import Linear
from gptfast.ops import LowRank
from gptfast.ops.quantized_lora_linear import quantized_lora_linear

GROUPS = {"nf4": 64, "int4": 32, "int8": 32, "mxfp4": 32}  # values that share a scale, by format


class QuantizedLinear(Linear):
    """A `Linear` whose weight is held in codes: for training adapters around it, and to compute in little memory.

    There is no parameter `weight`: the codes are frozen. Buffers: codes and scales of `gptfast.ops.quantized_linear`; under
    double quantisation, of NF4 only, scales are the 8-bit codes of bitsandbytes' layout, with nested_absmax and offset.
    They keep their dtypes under `.to(dtype)`, `.half()` and so on.

    Made in place of a `Linear` by `GPT.from_pretrained(quantize=...)`; bias and activation are those of the `Linear`.
    """

    codes: Tensor
    scales: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    format: str

    @classmethod
    def replace(cls, module: Linear, format: str, packed: dict[str, Tensor]) -> None:
        """Make `module` a layer of this class, with these buffers in place of its weight."""
        del module._parameters["weight"]
        module.__class__ = cls
        module.__dict__["format"] = format
        for name in ("codes", "scales", "nested_absmax", "offset"):
            module.register_buffer(name, packed.get(name))

    @property
    def group_size(self) -> int:
        return GROUPS[self.format]

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return self.multiply(input)

    def multiply(self, x: Tensor, updates: Sequence[LowRank] = ()) -> Tensor:
        """The forward with low-rank updates."""
        held = self._buffers  # a look-up by name of the module takes half a microsecond each
        return quantized_lora_linear(
            x,
            cast(Tensor, held["codes"]),
            cast(Tensor, held["scales"]),
            self.bias,
            self.activation,
            updates,
            format=self.format,
            group_size=GROUPS[self.format],
            nested_absmax=held["nested_absmax"],
            offset=held["offset"],
        )

    def rows(self) -> tuple[Tensor, Tensor]:
        """Codes, and scales as numbers."""
        scales = nf4_absmax(self.scales, self.nested_absmax, self.offset).view(self.out_features, -1)
        return self.codes, scales

    def dequantized(self) -> Tensor:
        """The weight (out_features, in_features) that the codes stand for, float32."""
        return self.reader()(0, self.out_features)

    def reader(self) -> Callable[[int, int], Tensor]:
        """A function of first and last that gives these rows of the weight that the codes stand for, float32."""
        codes, scales = self.rows()

        def read(first: int, last: int) -> Tensor:
            few = dequantize_groups(codes[first:last], scales[first:last], self.format, self.group_size)
            return few[:, : self.in_features]

        return read

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        kept = {name: x for name, x in self._buffers.items() if x is not None}
        super()._apply(fn, recurse)
        for name, x in kept.items():
            moved = cast(Tensor, self._buffers[name])
            if moved.dtype != x.dtype:
                self._buffers[name] = x.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.format}"


def quantized(weight: Tensor, format: str, double: bool = False) -> dict[str, Tensor]:
    """The buffers of a `QuantizedLinear` that holds a weight (out_features, in_features)."""
    N = weight.shape[0]
    if format == "mxfp4":
        return dict(zip(("codes", "scales"), ops.quantize_mxfp4(weight), strict=True))
    if format != "nf4":
        codes, scales = ops.quantize_groups(weight, format, group_size=GROUPS[format], scale_dtype=torch.float32)
        return {"codes": codes, "scales": scales}
    nf4 = ops.quantize_nf4(weight, block_size=GROUPS[format], double=double)
    packed = {"codes": nf4.codes.view(N, -1), "scales": nf4.absmax.view(N, -1)}
    if nf4.nested_absmax is not None and nf4.offset is not None:
        packed |= {"nested_absmax": nf4.nested_absmax, "offset": nf4.offset}
    return packed


def dequantized(format: str, packed: dict[str, Tensor | None]) -> Tensor:
    """The weight of the buffers of a `QuantizedLinear`, its inputs filled up to whole groups."""
    codes, scales = cast(Tensor, packed["codes"]), cast(Tensor, packed["scales"])
    rows = nf4_absmax(scales, packed.get("nested_absmax"), packed.get("offset")).view(codes.shape[0], -1)
    return dequantize_groups(codes, rows, format, GROUPS[format])


def empty(N: int, K: int, format: str, double: bool, device: Any = "meta") -> dict[str, Tensor]:
    """Room for the buffers of a layer of N outputs and K inputs."""
    groups = -(-K // GROUPS[format])
    width, kind = groups * GROUPS[format], torch.int8 if format == "int8" else torch.uint8
    bytes_ = double or format == "mxfp4"
    packed = {"codes": torch.empty(N, width if format == "int8" else width // 2, dtype=kind, device=device)}
    packed["scales"] = torch.empty(N, groups, dtype=torch.uint8 if bytes_ else torch.float32, device=device)
    if double:
        packed["nested_absmax"] = torch.empty(-(-N * groups // NESTED_BLOCK), dtype=torch.float32, device=device)
        packed["offset"] = torch.empty((), dtype=torch.float32, device=device)
    return packed
