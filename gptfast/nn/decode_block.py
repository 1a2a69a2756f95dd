"""A decoding step of a pre-norm block in five kernels: two products with their norms, attention, two products with their sums.

Module by module it is eight, and at a few rows a kernel on a GPU takes as long as its start and its first loads, whatever it
does. Adapters, quantised layers, experts, hooks and other classes run module by module.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gptfast.nn.block_node import plain_modules
from gptfast.nn.layer_norm import LayerNorm
from gptfast.ops import RowNorm, few_backend, linear_few, takes_few
from gptfast.ops._linear_few import ACTIVATIONS

if TYPE_CHECKING:
    from gptfast.nn.kv_cache import KVCache
    from gptfast.nn.rotary import Rotation


def decode_step(
    block: Any, branch: Tensor | None, stream: Tensor, cache: KVCache, rotation: Rotation | None
) -> Tensor | None:
    """The stream, (B, 1, C), after a pre-norm block whose keys are cached; None where it is to run module by module.

    Args:
        block: a `Block` in evaluation.
        branch: what the block before handed on, (B, 1, C), or None.
        stream: (B, 1, C).
        cache, rotation: see `CausalSelfAttention`.
    """
    if block.training or stream.shape[1] != 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    runs_on = few_backend(stream)
    modules = None if runs_on is None else plain_modules(block)
    if runs_on is None or modules is None:
        return None
    ln_1, c_attn, attn_out, ln_2, c_fc, mlp_out = modules
    activations = c_attn.activation, attn_out.activation, mlp_out.activation
    if activations != (None, None, None) or c_fc.activation not in ACTIVATIONS or not _fit(modules, stream):
        return None
    normed = ((c_attn, True), (attn_out, False), (c_fc, True), (mlp_out, False))
    if not all(takes_few(len(stream), layer.in_features, norm) for layer, norm in normed):
        return None
    x = (stream if branch is None else branch + stream).flatten(0, 1)
    qkv = linear_few(runs_on, x, c_attn.weight, c_attn.bias, norm=_row_norm(ln_1, x.dtype))
    y = block.attn.attend_cached(qkv.unsqueeze(1), cache, rotation).flatten(0, 1)
    # From here on the kernel before is one of this step; before c_attn it may be the one that wrote the weights.
    later = partial(linear_few, runs_on, weights_ready=True)
    x = later(y, attn_out.weight, attn_out.bias, residual=x)
    y = later(x, c_fc.weight, c_fc.bias, norm=_row_norm(ln_2, x.dtype), activation=c_fc.activation)
    y = block.mlp.gate(y)
    return later(y, mlp_out.weight, mlp_out.bias, residual=x).unsqueeze(1)


def _fit(modules: tuple[Any, ...], stream: Tensor) -> bool:
    """Whether all parameters are plain, of the stream's dtype, on its device, and matrices lie row by row."""
    parameters = [p for module in modules for p in (module.weight, getattr(module, "bias", None)) if p is not None]
    return all(
        type(p) is nn.Parameter and p.dtype == stream.dtype and p.device == stream.device and p.is_contiguous()
        for p in parameters
    )


def _row_norm(norm: Any, dtype: torch.dtype) -> RowNorm:
    kind = "layer_norm" if type(norm) is LayerNorm else "rms_norm"
    eps = torch.finfo(dtype).eps if norm.eps is None else norm.eps
    return RowNorm(kind, norm.weight, getattr(norm, "bias", None), eps)
