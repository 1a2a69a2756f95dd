"""Adapters in the engine: their low-rank factors and soft prompts in fp32, beside the packed base."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # pyright: ignore[reportPrivateImportUsage] (documented)

from gptfast.engine.adapter_files import Update, read_adapter
from gptfast.metadata import Metadata, end_tokens_in
from gptfast.nn.adapted import LoraLinear
from gptfast.nn.rotary import layout_of
from gptfast.nn.selection import BASE, check_adapter, check_one_prompt, known_adapters
from gptfast.nn.soft_prompt import prompts_of

if TYPE_CHECKING:
    from gptfast.config import GPTConfig
    from gptfast.nn.transformer import Transformer

# Fields of a config that the engine computes with, or that decide nothing in evaluation mode: another one that is not as in
# a GPT-2 is refused.
COMPUTED = {
    *("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "embd_pdrop", "attn_pdrop", "resid_pdrop", "n_inner"),
    *("norm_position", "final_norm", "activation", "attention_pattern", "window", "position_embedding", "tie_weights"),
    *("bias", "layer_norm_epsilon", "n_kv_head", "head_size", "norm", "norm_affine", "qk_norm", "embedding_norm"),
    *("parallel_residual", "rope_theta", "partial_rotary_factor", "rotary_layout", "rope_scaling", "attn_bias"),
    *("attn_out_bias", "mlp_bias", "norm_bias", "attention_sinks", "attn_softcap", "logit_softcap", "n_expert"),
    *("n_expert_per_tok", "swiglu_alpha", "swiglu_limit"),
}
PATTERNS = {"dense": "L", "alternating": "LS"}  # in letters, see `GPTConfig.attention_pattern`


@dataclass(frozen=True)
class PackedAdapters:
    """The adapters of a compiled model.

    packed: by name a `gptfast._C.Adapter`, or of a soft prompt its vectors (n, C).
    active: names of the adapters of a row that names none; their updates are added up.
    enabled: False: no row has one, whichever it names.
    """

    packed: Mapping[str, Any] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    enabled: bool = True

    @property
    def nbytes(self) -> int:
        return sum(own.nbytes if isinstance(own, Tensor) else own.bytes for own in self.packed.values())

    def of(self, op: str, name: str | None) -> tuple[list[Any], Tensor | None]:
        """The updates and the soft prompt of a row that names this adapter, or none. Raises ValueError for an unknown one."""
        if name is not None:
            check_adapter(op, tuple(self.packed), name)
        own = [self.packed[n] for n in self._names(name)]
        prompts = [x for x in own if isinstance(x, Tensor)]
        return [x for x in own if not isinstance(x, Tensor)], prompts[0] if prompts else None

    def virtual_tokens(self, name: str | None) -> int:
        """Number of virtual tokens of a row that names this adapter; 0 for an unknown name."""
        own = [self.packed[n] for n in self._names(name) if n in self.packed]
        return sum(len(x) for x in own if isinstance(x, Tensor))

    def _names(self, name: str | None) -> tuple[str, ...]:
        if not self.enabled or name == BASE:
            return ()
        return self.active if name is None else (name,)

    def activated(self, names: str | Sequence[str]) -> PackedAdapters:
        active = known_adapters("set_adapter", tuple(self.packed), names)
        check_one_prompt("set_adapter", [name for name in active if isinstance(self.packed[name], Tensor)])
        return replace(self, active=active, enabled=True)

    def with_one(self, name: str, adapter: Any) -> PackedAdapters:
        """These adapters and one more, which becomes the active one."""
        return PackedAdapters({**self.packed, name: adapter}, (name,))

    def without(self, names: str | Sequence[str]) -> PackedAdapters:
        gone = known_adapters("delete_adapter", tuple(self.packed), names)
        left = {name: adapter for name, adapter in self.packed.items() if name not in gone}
        active = tuple(name for name in self.active if name in left) or tuple(left)[:1]
        return PackedAdapters(left, active, self.enabled)


class AdapterMethods:
    """The adapters of a compiled model, by the names of `GPT`'s methods."""

    config: GPTConfig
    dtype: str
    base_mark: str
    metadata: Metadata
    _adapters: PackedAdapters

    def virtual_tokens(self, adapter: str | None = None) -> int:
        """Number of virtual tokens before those of a row. adapter: of the row; None: the active ones."""
        return self._adapters.virtual_tokens(adapter)

    def load_adapter(self, path: str | os.PathLike[str], name: str = "default", *, any_base: bool = False) -> None:
        """Add the adapter in a folder and make it the active one, as `GPT.load_adapter` does.

        Raises:
            OSError, ValueError: as `GPT.load_adapter`; also an adapter with modules_to_save, trained biases, or the head of a
                task, of which `GPT.load_adapter` warns: what generates has no use of it.
        """
        if name in self._adapters.packed or name == BASE or not isinstance(name, str) or not name:
            raise ValueError(f"load_adapter: name is {name!r}; expected one that no adapter has, and not {BASE!r}")
        own, ends = read_adapter(path, self.config, self.base_mark, any_base), end_tokens_in(path)
        if isinstance(own, Tensor):
            packed = vectors_of("load_adapter", name, own)
        else:
            packed = pack("load_adapter", name, own, shape_of(self.config), self.dtype)
        self._adapters = self._adapters.with_one(name, packed)
        if ends:
            self.metadata = self.metadata.with_adapter(name, ends)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that rows may have."""
        return tuple(self._adapters.packed)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters of rows that name none."""
        return list(self._adapters.active) if self._adapters.enabled else []

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Make adapters the active ones, whose updates are added up. Runners that exist keep theirs, as with all these methods.

        Raises:
            ValueError: unknown name.
        """
        self._adapters = self._adapters.activated(names)

    def enable_adapters(self) -> None:
        """Use the active adapters again."""
        self._adapters = replace(self._adapters, enabled=True)

    def disable_adapters(self) -> None:
        """Run all rows on the base alone, whichever adapters they name, until `enable_adapters` or `set_adapter`."""
        self._adapters = replace(self._adapters, enabled=False)

    def delete_adapter(self, names: str | Sequence[str]) -> None:
        """Remove adapters. Running sequences keep theirs.

        Raises:
            ValueError: unknown name.
        """
        self._adapters = self._adapters.without(names)
        for name in (names,) if isinstance(names, str) else names:
            self.metadata = self.metadata.with_adapter(name, ())


def unsupported(config: GPTConfig) -> str | None:
    """The first field of a config that the engine does not support, as "field=value"; None: it can run the model."""
    unknown = (field.name for field in fields(config) if field.name not in COMPUTED)
    return next(iter(config.others(tuple(unknown))), None)


def shape_of(config: GPTConfig) -> dict[str, Any]:
    """The values of a config that the engine needs. Raises ValueError for a network that it does not compute."""
    told = unsupported(config)
    if told is not None:
        raise ValueError(
            f"compile_for_inference: the native engine does not compute a model with {told}; use GPT.generate, which runs it in "
            "torch"
        )
    added = config.position_embedding == "sinusoidal"
    rotary = config.position_embedding == "rotary"
    names = ("n_layer", "n_head", "n_embd", "head_dim", "inner_dim", "vocab_size", "block_size", "final_norm")
    names += ("embedding_norm", "qk_norm", "activation")
    return {
        **{name: getattr(config, name) for name in names},
        **{f"{place}_bias": config.has_bias(place) for place in ("attn", "attn_out", "mlp", "norm")},
        "n_kv_head": config.kv_heads,
        "rotary_dim": config.rotary_dim if rotary else 0,
        "interleaved": rotary and layout_of(config) == "interleaved",
        "window": min(config.window or 0, config.block_size),
        "pattern": PATTERNS.get(config.attention_pattern, config.attention_pattern),
        "pre_norm": config.norm_position == "pre",
        "parallel": config.parallel_residual,
        "rms_norm": config.norm == "rms_norm",
        "norm_weight": config.norm_affine,
        "sinks": config.attention_sinks,
        "tied": config.tie_weights,
        "eps": config.layer_norm_epsilon,
        "embed_scale": math.sqrt(config.n_embd) if added else 1.0,
        "attn_softcap": config.attn_softcap or 0.0,
        "logit_softcap": config.logit_softcap or 0.0,
        "n_expert": config.n_expert or 0,
        "n_expert_per_tok": config.n_expert_per_tok or 0,
        "gated": config.activation == "swiglu",
        "gate_interleaved": config.n_expert is not None,
        "gate_alpha": 1.0 if config.swiglu_alpha is None else config.swiglu_alpha,
        "gate_shift": 0.0 if config.swiglu_alpha is None else 1.0,
        "gate_limit": math.inf if config.swiglu_limit is None else config.swiglu_limit,
    }


def updates_of(model: Transformer) -> dict[str, list[Update]]:
    """The updates of each adapter of a model that are not merged."""
    names = () if model.adapters is None else model.adapters.names
    found: dict[str, list[Update]] = {name: [] for name in names}
    modules = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for module in modules:
        for name in module.lora_A:
            a, b = module.lora_A[name], module.lora_B[name]
            found[name].append(Update(module.number, a.scale, a.weight.detach(), b.weight.detach()))
    return found if modules else {}


def packed_adapters(model: Transformer, shape: dict[str, Any], dtype: str) -> PackedAdapters:
    """The adapters of a model, packed for a base of this format; its active ones are active."""
    op, state, updates, prompts = "compile_for_inference", model.adapters, updates_of(model), prompts_of(model)
    if state is None or not (updates or prompts):
        return PackedAdapters()
    packed: dict[str, Any] = {}
    for name in state.names:
        if name in prompts:
            packed[name] = vectors_of(op, name, prompts[name].embedding.weight)
        else:
            packed[name] = pack(op, name, updates.get(name, []), shape, dtype)
    return PackedAdapters(packed, state.active, state.enabled)


def vectors_of(op: str, name: str, vectors: Tensor) -> Tensor:
    """A copy of the vectors of a soft prompt, in fp32. Raises ValueError where they are not finite."""
    copy = vectors.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not copy.isfinite().all():
        raise ValueError(f"{op}: the adapter {name!r} holds nan or infinities; it is damaged")
    return copy


def pack(op: str, name: str, updates: Sequence[Update], shape: dict[str, Any], dtype: str) -> Any:
    """A `gptfast._C.Adapter`: in bf16 beside a base of 8 bits and fewer, which its rounding disappears beside, else in fp32.

    Raises:
        ValueError: factors that are not finite, or do not fit the shape of the model.
    """
    from gptfast import _C

    sources, kept = [], []
    for update in updates:
        factors = [x.to("cpu", torch.float32).contiguous() for x in (update.a, update.b)]
        if not all(x.isfinite().all() for x in factors):
            raise ValueError(f"{op}: the adapter {name!r} holds nan or infinities; it is damaged")
        kept += factors
        sources.append((update.number, update.scale, *map(to_dlpack, factors)))
    return _C.Adapter(shape, dtype not in ("float32", "bfloat16"), sources)
