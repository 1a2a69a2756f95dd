"""The norms of a GPT: LayerNorm or RMSNorm, as its config says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptfast.nn.layer_norm import LayerNorm
from gptfast.nn.rms_norm import RMSNorm

if TYPE_CHECKING:
    from gptfast.config import GPTConfig

Norm = LayerNorm | RMSNorm


def norm_of(config: GPTConfig) -> Norm:
    """A norm over the channels of the model."""
    C, eps, affine = config.n_embd, config.layer_norm_epsilon, config.norm_affine
    if config.norm == "rms_norm":
        return RMSNorm(C, eps=eps, elementwise_affine=affine)
    return LayerNorm(C, eps=eps, elementwise_affine=affine, bias=config.has_bias("norm"))


def head_norm_of(config: GPTConfig) -> RMSNorm | None:
    """The norm of each head's queries or keys; None: there is none."""
    if not config.qk_norm:
        return None
    return RMSNorm(config.head_dim, eps=config.layer_norm_epsilon, elementwise_affine=config.norm_affine)
