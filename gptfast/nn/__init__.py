"""Drop-in modules on top of `gptfast.ops`: torch's own names and signatures where torch has the module."""

from gptfast.nn.attention import CausalSelfAttention
from gptfast.nn.block import Block
from gptfast.nn.cross_entropy import CrossEntropyLoss, LinearCrossEntropyLoss
from gptfast.nn.dropout import Dropout, seed_dropout
from gptfast.nn.gelu import GELU
from gptfast.nn.layer_norm import LayerNorm
from gptfast.nn.linear import Linear
from gptfast.nn.mlp import MLP
from gptfast.nn.rms_norm import RMSNorm
from gptfast.nn.transformer import Transformer

__all__ = [
    "GELU",
    "MLP",
    "Block",
    "CausalSelfAttention",
    "CrossEntropyLoss",
    "Dropout",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "RMSNorm",
    "Transformer",
    "seed_dropout",
]
