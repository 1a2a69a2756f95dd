"""Modules with adapters: linear layers with low-rank updates, and modules with trained copies.

A module gets its adapters in place: its class changes and its parameters stay the same objects under the same names, so that
references, hooks and optimizers hold. When its last adapter goes, it is again what it was. B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from gptfast import ops
from gptfast.nn.layer_norm import LayerNorm
from gptfast.nn.linear import Linear
from gptfast.nn.quantized import QuantizedLinear
from gptfast.nn.rms_norm import RMSNorm
from gptfast.nn.selection import AdapterState, Part, Selection
from gptfast.ops import LowRank

DROPOUTS = 2**31  # first Philox offset of the dropouts before A: above those of the forward itself
PROMPTS = "prompt_encoder"  # the module of a model that holds its soft prompts, as in peft
HOLDERS = ("lora_A", "lora_B", "modules_to_save", PROMPTS)  # modules that hold a part of each adapter by its name
MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # of a block, by their number


class LoraFactor(nn.Module):
    """A or B of one adapter in one layer: `weight`. scale, dropout_p: of the update; in A."""

    def __init__(self, weight: Tensor, scale: float = 1.0, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.scale, self.dropout_p = scale, dropout_p

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"


class LoraFactors(nn.ModuleDict):
    """The A or the B of a layer, by the name of their adapter."""

    def __getitem__(self, key: str) -> LoraFactor:
        return cast(LoraFactor, super().__getitem__(key))


class LoraLinear(Linear):
    """A `Linear` with low-rank updates: y = x W^T + b + scale dropout(x) A^T B^T, through `gptfast.ops.lora_linear`.

    lora_A, lora_B: a `LoraFactor` for each adapter, by name.  number: see `number_of`; tells its dropouts from others.
    """

    lora_A: LoraFactors
    lora_B: LoraFactors
    state: AdapterState
    number: int

    def forward(self, input: Tensor, adapters: Selection | None = None) -> Tensor:
        """(..., in_features) -> (..., out_features). adapters: of this forward; None: the active ones, without dropout."""
        selection = adapters or self.state.selection()
        updates = []
        for first, last, names in selection.spans(input[..., 0].numel()):
            updates += [self._update(name, first, last, selection.rng) for name in names if name in self.lora_A]
        return self.multiply(input, updates)

    def multiply(self, x: Tensor, updates: list[LowRank]) -> Tensor:
        """The forward of the layer with these updates."""
        if not updates:
            return ops.linear(x, self.weight, self.bias, self.activation)
        return ops.lora_linear(x, self.weight, self.bias, self.activation, updates)

    def _update(self, name: str, first: int, last: int, rng: tuple[int, int] | None) -> LowRank:
        a, b = self.lora_A[name], self.lora_B[name]
        if rng is None or a.dropout_p == 0:
            return LowRank(a.weight, b.weight, a.scale, first, last)
        return LowRank(a.weight, b.weight, a.scale, first, last, a.dropout_p, rng[0], rng[1] + self.number)

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name} r={len(self.lora_A[name].weight)}" for name in self.lora_A)
        return f"{super().extra_repr()}, {ranks}"


class QuantizedLoraLinear(LoraLinear, QuantizedLinear):
    """A `QuantizedLinear` with low-rank updates."""

    multiply = QuantizedLinear.multiply  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


class _Saved(nn.Module):
    """A module with trained copies, `modules_to_save`, by the name of their adapter."""

    modules_to_save: nn.ModuleDict
    state: AdapterState

    def forward(self, *args: Any, adapters: Selection | None = None, **options: Any) -> Any:
        """That of the module, or of the copy of the active adapter; the rows of each part by its own."""
        base = super().forward

        def run(copy: nn.Module | None, *tensors: Any) -> Any:
            return (base if copy is None else copy)(*tensors, **options)

        return self.by_rows(run, adapters or self.state.selection(), *args, drops=options.get("dropout_p", 0.0) > 0)

    def by_rows(self, run: Callable[..., Any], selection: Selection, *tensors: Any, drops: bool = False) -> Any:
        """run(copy or None for the base, *tensors), of each part's rows of the tensors, put together."""
        chosen = [(part, self._copy_of(part.names)) for part in selection.parts]
        if len({id(copy) for _, copy in chosen}) == 1:
            return run(chosen[0][1], *tensors)
        if drops:
            raise ValueError(
                f"GPT: adapter_names mixes rows with and without a {type(self).__name__[5:]} of their own in training with "
                "dropout; train them in batches of their own, or with dropout=0"
            )
        results = [run(copy, *(_rows_of(x, part) for x in tensors)) for part, copy in chosen]
        if isinstance(results[0], tuple):
            return tuple(torch.cat(column) for column in zip(*results, strict=True))
        return torch.cat(results)

    def _copy_of(self, names: tuple[str, ...]) -> nn.Module | None:
        """Of adapters that are active together at most one has a copy."""
        return next((self.modules_to_save[name] for name in names if name in self.modules_to_save), None)


class SavedLinear(_Saved, Linear):
    """A `Linear` with trained copies."""


class SavedEmbedding(_Saved, nn.Embedding):
    """An embedding with trained copies."""


class SavedLayerNorm(_Saved, LayerNorm):
    """A `LayerNorm` with trained copies."""


class SavedRMSNorm(_Saved, RMSNorm):
    """An `RMSNorm` with trained copies."""


SAVED: dict[type[nn.Module], type[_Saved]] = {
    Linear: SavedLinear,
    nn.Embedding: SavedEmbedding,
    LayerNorm: SavedLayerNorm,
    RMSNorm: SavedRMSNorm,
}
ADAPTED = (LoraLinear, _Saved)
LORA: dict[type[nn.Module], type[LoraLinear]] = {Linear: LoraLinear, QuantizedLinear: QuantizedLoraLinear}
_PLAIN: dict[Any, type[nn.Module]] = {own: plain for plain, own in (*LORA.items(), *SAVED.items())}


def adapter_modules(model: nn.Module) -> set[str]:
    """Names of the modules that adapters put into a model: low-rank factors, trained copies, soft prompts."""
    own: set[str] = set()
    for name, _ in model.named_modules(remove_duplicate=False):  # a module follows its parent
        parent, _, last = name.rpartition(".")
        holds = last in HOLDERS and (name == PROMPTS or isinstance(model.get_submodule(parent), ADAPTED))
        if holds or parent in own:
            own.add(name)
    return own


def number_of(name: str, n_layer: int) -> int | None:
    """The number of a linear layer: 4 layer + 0 to 3 in a block (`MATRICES`), 4 n_layer for the head; None: no such layer."""
    if name == "lm_head":
        return 4 * n_layer
    parts = name.split(".", 2)
    if len(parts) < 3 or parts[0] != "h" or not parts[1].isdigit() or parts[2] not in MATRICES:
        return None
    return 4 * int(parts[1]) + MATRICES.index(parts[2]) if int(parts[1]) < n_layer else None


def make_plain(module: nn.Module) -> None:
    """Give a module with adapters, which were taken out of it, its own class back."""
    for name in ("state", "number"):
        module.__dict__.pop(name, None)
    module.__class__ = _PLAIN[type(module)]  # pyright: ignore[reportAttributeAccessIssue]


def call(module: nn.Module, adapters: Selection | None, *args: Any, **options: Any) -> Any:
    """module(*args, **options) under these adapters, if it has any."""
    if adapters is not None and isinstance(module, ADAPTED):
        return module(*args, adapters=adapters, **options)
    return module(*args, **options)


def embedded(
    embed: Callable[[Tensor, Any, Tensor], Tensor], table: nn.Module, adapters: Selection | None, ids: Tensor, at: Any
) -> Tensor:
    """embed(ids, at, weight) with the weight of `table`, or for the rows of an adapter that has a copy of it, with that.

    Args:
        embed: makes (B, T, C).
        table: the token embedding.
        adapters: of this forward.
        ids: (B, T).
        at: positions, None, (T,) or (B, T).
    """
    if not isinstance(table, _Saved):
        return embed(ids, at, table.weight)  # pyright: ignore[reportArgumentType]
    selection = adapters or table.state.selection()
    return table.by_rows(
        lambda copy, ids, at: embed(ids, at, cast(nn.Embedding, copy or table).weight), selection, ids, at
    )


def _rows_of(x: Any, part: Part) -> Any:
    """The rows of a part of a batch; what is no (B, …) is the same for all."""
    return x[part.first : part.last] if isinstance(x, Tensor) and x.dim() > 1 else x
