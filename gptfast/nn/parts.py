"""The modules that a GPT of a config has: their classes, the shapes of their tensors, their attributes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import nn

from gptfast.config import GPTConfig
from gptfast.nn.attention import CausalSelfAttention
from gptfast.nn.block import Block
from gptfast.nn.experts import ExpertMLP, Router
from gptfast.nn.heads import HeadTransform
from gptfast.nn.layer_norm import LayerNorm
from gptfast.nn.linear import Linear
from gptfast.nn.mlp import MLP
from gptfast.nn.position import SinusoidalEmbedding
from gptfast.nn.rms_norm import RMSNorm
from gptfast.nn.rotary import RotaryEmbedding, layout_of
from gptfast.nn.transformer import Transformer


@dataclass(frozen=True)
class Part:
    """The expected form of a module: its class, the shapes of its own tensors, and its attributes."""

    kind: type[nn.Module]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    root: bool = False  # a subclass is allowed


@lru_cache(maxsize=16)
def expected_parts(config: GPTConfig) -> dict[str, Part]:
    """Every module of a GPT by name."""
    C, V, P = config.n_embd, config.vocab_size, config.block_size
    norm = _norm(config, C, config.norm)
    parts = {
        "": Part(Transformer, root=True),
        "wte": Part(nn.Embedding, {"weight": (V, C)}),
        "h": Part(nn.ModuleList),
        "lm_head": _linear(V, C, bias=config.head_transform),
    }
    parts |= (
        {} if config.type_vocab_size is None else {"wse": Part(nn.Embedding, {"weight": (config.type_vocab_size, C)})}
    )
    if config.head_transform:
        parts |= {"lm_transform": Part(HeadTransform), "lm_transform.ln": norm}
        parts["lm_transform.c_fc"] = _linear(C, C, True, config.activation)
    parts |= {"pooler": _linear(C, C, True, "tanh")} if config.pooler else {}
    parts |= {"next_sentence": _linear(2, C, True)} if config.next_sentence_head else {}
    if config.position_embedding == "rotary":
        table = (P, config.rotary_dim // 2)
        parts["rotary"] = Part(RotaryEmbedding, {"cos": table, "sin": table}, {"layout": layout_of(config)})
    else:
        learned = config.position_embedding == "learned"
        parts["wpe"] = Part(nn.Embedding if learned else SinusoidalEmbedding, {"weight": (P, C)})
    parts |= {"ln_e": norm} if config.embedding_norm else {}
    parts |= {"ln_f": norm} if config.final_norm else {}
    for layer in range(config.n_layer):
        parts |= {f"h.{layer}{name}": part for name, part in _block(config, layer, norm).items()}
    return parts


def _block(config: GPTConfig, layer: int, norm: Part) -> dict[str, Part]:
    C = config.n_embd
    heads = {"n_head": config.n_head, "kv_heads": config.kv_heads, "head_dim": config.head_dim}
    attention = {**heads, "window": config.window_of(layer), "softcap": config.attn_softcap, "causal": config.causal}
    order = {"pre_norm": config.norm_position == "pre", "parallel": config.parallel_residual}
    head_norms = ("q_norm", "k_norm") if config.qk_norm else ()
    sinks = {"sinks": (config.n_head,)} if config.attention_sinks else {}
    return {
        "": Part(Block, {}, {**order, "resid_pdrop": config.resid_pdrop}),
        ".ln_1": norm,
        ".attn": Part(CausalSelfAttention, sinks, {**attention, "attn_pdrop": config.attn_pdrop}),
        ".attn.c_attn": _linear(config.qkv_dim, C, config.has_bias("attn")),
        ".attn.c_proj": _linear(C, config.attn_dim, config.has_bias("attn_out")),
        **{f".attn.{name}": _norm(config, config.head_dim, "rms_norm") for name in head_norms},
        ".ln_2": norm,
        **{f".mlp{name}": part for name, part in _mlp(config).items()},
    }


def _mlp(config: GPTConfig) -> dict[str, Part]:
    C, E, gated, bias = config.n_embd, config.n_expert, config.activation == "swiglu", config.has_bias("mlp")
    clamped = {"alpha": config.swiglu_alpha, "limit": config.swiglu_limit}
    if E is None:
        return {
            "": Part(MLP, {}, {"gated": gated, **clamped}),
            ".c_fc": _linear(config.fc_dim, C, bias, None if gated else config.activation),
            ".c_proj": _linear(C, config.inner_dim, bias),
        }
    shapes = {"gate_up_proj": (E, C, config.fc_dim), "down_proj": (E, config.inner_dim, C)}
    shapes |= {"gate_up_proj_bias": (E, config.fc_dim), "down_proj_bias": (E, C)} if bias else {}
    router = Part(Router, _linear(E, C, bias).shapes, {"activation": None})
    return {"": Part(ExpertMLP, shapes, {"k": config.n_expert_per_tok, **clamped}), ".router": router}


def _linear(out: int, of: int, bias: bool, activation: str | None = None) -> Part:
    shapes = {"weight": (out, of)} | ({"bias": (out,)} if bias else {})
    return Part(Linear, shapes, {"activation": activation})


def _norm(config: GPTConfig, C: int, kind: str) -> Part:
    shapes = {"weight": (C,)} if config.norm_affine else {}
    shapes |= {"bias": (C,)} if kind == "layer_norm" and config.has_bias("norm") else {}
    attributes = {"eps": config.layer_norm_epsilon, "normalized_shape": (C,)}
    return Part(RMSNorm if kind == "rms_norm" else LayerNorm, shapes, attributes)
