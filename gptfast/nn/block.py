"""One transformer block: pre-norm (GPT-2, GPT-3), post-norm (GPT-1, BERT), or with both branches beside each other (GPT-NeoX)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptfast import ops
from gptfast.nn.adapted import LoraLinear, SavedLinear, call
from gptfast.nn.attention import CausalSelfAttention
from gptfast.nn.block_node import as_one_node
from gptfast.nn.decode_block import decode_step
from gptfast.nn.dropout import DropoutCounter
from gptfast.nn.experts import ExpertMLP
from gptfast.nn.linear import Linear
from gptfast.nn.mlp import MLP
from gptfast.nn.norm import Norm, norm_of
from gptfast.nn.quantized import QuantizedLinear
from gptfast.nn.selection import Selection
from gptfast.ops._tensors import autocast_dtype

if TYPE_CHECKING:
    from gptfast.config import GPTConfig
    from gptfast.nn.kv_cache import KVCache
    from gptfast.nn.rotary import Rotation


class Block(torch.nn.Module):
    """Attention and MLP with their residual additions, dropouts and LayerNorms.

    pre:       x = x + dropout(attn(ln_1(x)));  x = x + dropout(mlp(ln_2(x)))
    post:      x = ln_1(x + dropout(attn(x)));  x = ln_2(x + dropout(mlp(x)))
    parallel:  x = x + dropout(attn(ln_1(x))) + dropout(mlp(ln_2(x)))

    ln_1 and ln_2 are LayerNorms or RMSNorms. Every "dropout, add, normalise" is one pass (`gptfast.ops.add_layer_norm`). In a stack of pre-norm blocks
    the last addition of a block belongs to the first LayerNorm of the next: call the blocks with `residual=` and each
    hands its branch on, not yet added.

    Args:
        config: a GPTConfig.
        layer: index of the layer (see `CausalSelfAttention`).
    """

    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__()
        self.pre_norm, self.parallel = config.norm_position == "pre", config.parallel_residual
        self.resid_pdrop = config.resid_pdrop
        self.ln_1 = norm_of(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = norm_of(config)
        self.mlp = MLP(config) if config.n_expert is None else ExpertMLP(config)
        self.counter = DropoutCounter()

    def forward(
        self,
        x: Tensor | None,
        residual: Tensor | None = None,
        *,
        rng: tuple[int, ...] | None = None,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
        adapters: Selection | None = None,
        rotation: Rotation | None = None,
        seq_lens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor | None, Tensor]:
        """The whole block, or with `residual` its fused form.

        Args:
            x: (B, T, C); with `residual`: the branch that the block before handed on, or None.
            residual: None, or the stream that the branch is to be added to, (B, T, C).
            rng: (seed, offset) of the attention dropout, or (seed, offset, first_row), where first_row is the number of x's
                first row in the whole batch. The dropouts after attention and MLP have offset + 1 and + 2, that of the
                branch handed in offset - 1. None: the next four of the module's own counter (`gptfast.ops.streams`).
            cache, cu_seqlens, adapters, rotation, seq_lens: see `CausalSelfAttention`.
        Returns:
            (B, T, C); with `residual`: (branch, residual), where branch is None for post-norm blocks.
        """
        if rng is None:
            seed, first = self.counter.take(4) if self.training and self._drops() else (0, 0)
            rng = seed, first + 1
        stream, branch = (x, None) if residual is None else (residual, x)
        if stream is None:
            raise TypeError("Block: x is None without a residual; expected (B, T, C)")
        plain = self.pre_norm and not self.parallel and residual is not None and cu_seqlens is None
        if plain and adapters is None and seq_lens is None:
            if cache is not None:
                after = decode_step(self, branch, stream, cache, rotation)
                if after is not None:
                    return None, after
            elif rotation is None:
                found = as_one_node(self, branch, stream, rng)
                if found is not None:
                    return found
        options: dict[str, Any] = {"rng": rng, "cache": cache, "cu_seqlens": cu_seqlens}
        options |= {} if adapters is None else {"adapters": adapters}
        options |= {} if rotation is None else {"rotation": rotation}
        options |= {} if seq_lens is None else {"seq_lens": seq_lens}
        run = self._parallel if self.parallel else self._pre_norm if self.pre_norm else self._post_norm
        branch, stream = run(branch, stream, rng, adapters, options)
        return add_branch(branch, stream, self._dropout(rng, 2)) if residual is None else (branch, stream)

    def _first_norm(
        self, branch: Tensor | None, residual: Tensor, rng: tuple[int, ...], adapters: Selection | None
    ) -> tuple[Tensor, Tensor]:
        """(ln_1(sum), sum) of the residual and the branch that the block before handed on."""
        out = written_for(first_layer(self.attn, CausalSelfAttention, "c_attn"), self.ln_1, residual)
        if branch is None:
            return call(self.ln_1, adapters, residual, **out), residual
        return call(self.ln_1, adapters, branch, residual, **self._dropout(rng, -1), **out)

    def _pre_norm(
        self,
        branch: Tensor | None,
        residual: Tensor,
        rng: tuple[int, ...],
        adapters: Selection | None,
        options: dict[str, Any],
    ) -> tuple[Tensor | None, Tensor]:
        """options: of the attention."""
        under = {} if adapters is None else {"adapters": adapters}
        y, residual = self._first_norm(branch, residual, rng, adapters)
        y = self.attn(y, **options)
        out = written_for(first_layer(self.mlp, MLP, "c_fc"), self.ln_2, residual)
        y, residual = call(self.ln_2, adapters, y, residual, **self._dropout(rng, 1), **out)
        return self.mlp(y, **under), residual

    def _parallel(
        self,
        branch: Tensor | None,
        residual: Tensor,
        rng: tuple[int, ...],
        adapters: Selection | None,
        options: dict[str, Any],
    ) -> tuple[Tensor | None, Tensor]:
        under = {} if adapters is None else {"adapters": adapters}
        y, residual = self._first_norm(branch, residual, rng, adapters)
        out = written_for(first_layer(self.mlp, MLP, "c_fc"), self.ln_2, residual)
        attended = self.attn(y, **options)
        y = self.mlp(call(self.ln_2, adapters, residual, **out), **under)
        return y, add_branch(attended, residual, self._dropout(rng, 1))

    def _post_norm(
        self,
        branch: Tensor | None,
        residual: Tensor,
        rng: tuple[int, ...],
        adapters: Selection | None,
        options: dict[str, Any],
    ) -> tuple[Tensor | None, Tensor]:
        under = {} if adapters is None else {"adapters": adapters}
        residual = add_branch(branch, residual, self._dropout(rng, -1))
        y = self.attn(residual, **options)
        x, _ = call(self.ln_1, adapters, y, residual, **self._dropout(rng, 1))
        x, _ = call(self.ln_2, adapters, self.mlp(x, **under), x, **self._dropout(rng, 2))
        return None, x

    def _drops(self) -> bool:
        return self.resid_pdrop > 0 or self.attn.attn_pdrop > 0

    def _dropout(self, rng: tuple[int, ...], index: int) -> dict[str, Any]:
        if not self.training or self.resid_pdrop == 0:
            return {}
        seed, offset, *row = rng
        options = {"dropout_p": self.resid_pdrop, "seed": seed, "offset": offset + index}
        return options | {"first_row": row[0]} if row else options


# of the layers that round a float32 input before anything else
_ROUNDING = tuple(kind.forward for kind in (Linear, LoraLinear, QuantizedLinear, SavedLinear))


def first_layer(module: torch.nn.Module, kind: type[torch.nn.Module], name: str) -> torch.nn.Module | None:
    """The layer `name` of a module whose forward is that of `kind`, so that nothing else takes its input; else None."""
    return getattr(module, name) if type(module).forward is kind.forward else None


def written_for(reader: torch.nn.Module | None, norm: torch.nn.Module, stream: Tensor) -> dict[str, Any]:
    """Options of the norm of a stream, (B, T, C), whose result `reader` alone takes. Under autocast a `Linear` rounds a
    float32 input to the autocast dtype: the LayerNorm or RMSNorm then writes that dtype, with the same bits and without
    float32 in memory. The result is empty where the norm's dtype must stay: another class may do more with its input, as one
    that sums its gradient over ranks.
    """
    dtype = autocast_dtype(stream)
    if dtype is None or stream.dtype != torch.float32 or not isinstance(norm, Norm):
        return {}
    rounds = reader is not None and type(reader).forward in _ROUNDING
    return {"out_dtype": dtype} if rounds else {}


def add_branch(branch: Tensor | None, residual: Tensor, dropout: dict[str, Any]) -> Tensor:
    """dropout(branch) + residual, where no LayerNorm follows."""
    if branch is None:
        return residual
    if dropout:
        options = {name: value for name, value in dropout.items() if name != "dropout_p"}
        branch = ops.dropout(branch, dropout["dropout_p"], **options)
    return branch + residual
