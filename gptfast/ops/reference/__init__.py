"""Every op in eager PyTorch: oracle of the tests, baseline of the benchmarks, and the fallback without a kernel.

Same arguments as the public functions, any floating dtype including fp64, differentiable by autograd.
Half-precision inputs are computed in fp32 and rounded once at the end; fp32 and fp64 are computed as they are.
Named dimensions: B batch, T queries, S keys, H heads, D head_dim, C channels, V vocabulary.
"""

from gptfast.ops.reference.attention import attention, causal_attention, visible_keys
from gptfast.ops.reference.experts import grouped_linear, moe
from gptfast.ops.reference.losses import cross_entropy, linear_cross_entropy
from gptfast.ops.reference.products import dequantize_nf4, linear, quantized_linear
from gptfast.ops.reference.rows import (
    ACTIVATIONS,
    add_layer_norm,
    add_rms_norm,
    dropout,
    embedding,
    gelu,
    layer_norm,
    relu_squared,
    rms_norm,
    rotary,
    swiglu,
)
from gptfast.ops.reference.sampling import kept_tokens, sample, sample_rows

__all__ = [
    "ACTIVATIONS",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "causal_attention",
    "cross_entropy",
    "dequantize_nf4",
    "dropout",
    "embedding",
    "gelu",
    "grouped_linear",
    "kept_tokens",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "moe",
    "quantized_linear",
    "relu_squared",
    "rms_norm",
    "rotary",
    "sample",
    "sample_rows",
    "swiglu",
    "visible_keys",
]
