"""Fused operations of GPT models as plain functions; `gptfast.ops.reference` holds each of them in eager PyTorch."""

from gptfast import triton as _triton
from gptfast.ops import _flops
from gptfast.ops._append import append_and_attend as append_and_attend  # for gptfast.generation, not for users
from gptfast.ops._linear_few import RowNorm as RowNorm
from gptfast.ops._linear_few import few_backend as few_backend
from gptfast.ops._linear_few import linear_few as linear_few  # for gptfast.nn, not for users
from gptfast.ops._linear_few import takes_few as takes_few
from gptfast.ops._low_rank import LowRank as LowRank
from gptfast.ops._registry import register_properties as _register_properties
from gptfast.ops._row_options import row_options
from gptfast.ops.add_layer_norm import add_layer_norm
from gptfast.ops.add_rms_norm import add_rms_norm
from gptfast.ops.causal_attention import causal_attention
from gptfast.ops.cross_entropy import cross_entropy
from gptfast.ops.dequantize_nf4 import dequantize_nf4, quantize_nf4
from gptfast.ops.dropout import dropout, dropout_mask
from gptfast.ops.embedding import embedding
from gptfast.ops.gelu import gelu
from gptfast.ops.grouped_linear import grouped_linear
from gptfast.ops.layer_norm import layer_norm
from gptfast.ops.linear import linear
from gptfast.ops.linear_cross_entropy import linear_cross_entropy, linear_logprobs
from gptfast.ops.lora_linear import lora_linear as lora_linear  # for gptfast.nn, not for users
from gptfast.ops.moe import load_balance_loss, moe, route
from gptfast.ops.mxfp4 import dequantize_mxfp4, quantize_mxfp4
from gptfast.ops.padding import real_keys
from gptfast.ops.quantized_linear import quantize_groups, quantized_linear
from gptfast.ops.relu_squared import relu_squared
from gptfast.ops.rms_norm import rms_norm
from gptfast.ops.rotary import rotary
from gptfast.ops.rotary_tables import rotary_tables
from gptfast.ops.sample import sample, sample_rows
from gptfast.ops.swiglu import swiglu

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "causal_attention",
    "cross_entropy",
    "dequantize_mxfp4",
    "dequantize_nf4",
    "dropout",
    "dropout_mask",
    "embedding",
    "gelu",
    "grouped_linear",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_logprobs",
    "load_balance_loss",
    "moe",
    "quantize_groups",
    "quantize_mxfp4",
    "quantize_nf4",
    "quantized_linear",
    "real_keys",
    "relu_squared",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "route",
    "row_options",
    "sample",
    "sample_rows",
    "swiglu",
]

_triton.register()
_register_properties(_triton.NAMESPACE)  # now that the properties of every operator are known
for _namespace in ("gptfast", _triton.NAMESPACE):
    _flops.register(_namespace)
