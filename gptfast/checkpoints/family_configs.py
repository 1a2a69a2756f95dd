"""config.json of Llama, Qwen3, GPT-NeoX, NanoChat and gpt-oss: from transformers' keys to the fields of `GPTConfig` and back.

A reader raises ValueError, which names key and value, for what the network does not have. Defaults of missing keys are those
of transformers' configurations.
"""

from __future__ import annotations

from gptfast._json import field
from gptfast.checkpoints.family_fields import (
    NANOCHAT_ACTIVATIONS,
    NEOX_ACTIVATIONS,
    NUMBER,
    OPTION,
    Fields,
    Raw,
    activation,
    activation_name,
    bands,
    common,
    gated,
    rms,
    to_common,
    to_gated,
    to_rms,
    whole,
)
from gptfast.config import GPTConfig


def from_llama(raw: Raw, where: object) -> Fields:
    bias = bool(field(raw, "attention_bias", OPTION, where, False))
    mlp_bias = bool(field(raw, "mlp_bias", OPTION, where, False))
    return gated(raw, where) | {"attn_bias": bias, "attn_out_bias": bias, "mlp_bias": mlp_bias}


def to_llama(config: GPTConfig) -> Raw:
    if config.n_embd % config.n_head:  # which LlamaConfig refuses
        raise ValueError(f"n_embd={config.n_embd} beside n_head={config.n_head}")
    return to_gated(config) | {"attention_bias": config.has_bias("attn"), "mlp_bias": config.has_bias("mlp")}


def from_qwen3(raw: Raw, where: object) -> Fields:
    bias = bool(field(raw, "attention_bias", OPTION, where, False))
    fields = gated({"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32768, **raw}, where) | {
        "qk_norm": True
    }
    return fields | {"attn_bias": bias, "attn_out_bias": bias, **bands(raw, fields["n_layer"], where)}


def to_qwen3(config: GPTConfig) -> Raw:
    banded = [config.window_of(layer) is not None for layer in range(config.n_layer)]
    kinds = ["sliding_attention" if own else "full_attention" for own in banded]
    raw = to_gated(config) | {"attention_bias": config.has_bias("attn"), "layer_types": kinds}
    return raw | {
        "use_sliding_window": any(banded),
        "sliding_window": config.window,
        "max_window_layers": banded.index(True) if any(banded) else config.n_layer,
    }


def from_neox(raw: Raw, where: object) -> Fields:
    pct = field(raw, "rotary_pct", NUMBER, where, None)
    theta = field(raw, "rotary_emb_base", NUMBER, where, None)
    old = {name: x for name, x in {"partial_rotary_factor": pct, "rope_theta": theta}.items() if x is not None}
    raw = {"max_position_embeddings": 2048, "hidden_act": "gelu", "partial_rotary_factor": 0.25, **old, **raw}
    raw["head_dim"] = None  # transformers divides hidden_size, whatever this says
    drop = field(raw, "hidden_dropout", NUMBER, where, 0.0) or 0.0
    bias = field(raw, "attention_bias", OPTION, where, True)
    return common(raw, where) | {
        "activation": activation(raw, NEOX_ACTIVATIONS, where),
        "layer_norm_epsilon": field(raw, "layer_norm_eps", float, where, 1e-5),
        "bias": True,
        "parallel_residual": bool(field(raw, "use_parallel_residual", OPTION, where, True)),
        "attn_bias": bool(bias),
        "attn_out_bias": bool(bias),
        "embd_pdrop": drop,
        "resid_pdrop": drop,
    }


def to_neox(config: GPTConfig) -> Raw:
    if config.embd_pdrop != config.resid_pdrop:
        raise ValueError(f"embd_pdrop={config.embd_pdrop:g} beside resid_pdrop={config.resid_pdrop:g}")
    return to_common(config) | {
        "hidden_act": activation_name(config.activation, NEOX_ACTIVATIONS),
        "layer_norm_eps": config.layer_norm_epsilon,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.has_bias("attn"),
        "hidden_dropout": config.resid_pdrop,
        "rotary_pct": config.partial_rotary_factor,  # the names of older transformers
        "rotary_emb_base": config.rope_theta,
    }


def from_nanochat(raw: Raw, where: object) -> Fields:
    bias = bool(field(raw, "attention_bias", OPTION, where, False))
    raw = {"max_position_embeddings": 2048, "hidden_act": "relu2", "vocab_size": 50304, **raw}
    return (
        whole(common(raw, where), where)
        | rms(raw, where)
        | {
            "activation": activation(raw, NANOCHAT_ACTIVATIONS, where),
            "norm_affine": False,
            "qk_norm": True,  # before the rotation here and after it there, which is the same of a norm without weights
            "embedding_norm": True,
            "rotary_layout": "reversed",
            "logit_softcap": field(raw, "final_logit_softcapping", NUMBER, where, 15.0),
            "attn_bias": bias,
            "attn_out_bias": bias,
        }
    )


def to_nanochat(config: GPTConfig) -> Raw:
    return (
        to_common(config)
        | to_rms(config)
        | {
            "hidden_act": activation_name(config.activation, NANOCHAT_ACTIVATIONS),
            "num_key_value_heads": config.kv_heads,
            "attention_bias": config.has_bias("attn"),
            "final_logit_softcapping": config.logit_softcap,
        }
    )


def from_gpt_oss(raw: Raw, where: object) -> Fields:
    usual = {"num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072, "hidden_act": "silu"}
    usual |= {"rms_norm_eps": 1e-5, "rope_theta": 150000.0, "sliding_window": 128, "use_sliding_window": True}
    layers = field(raw, "num_hidden_layers", int, where, 0)
    kinds = ["full_attention" if n % 2 else "sliding_attention" for n in range(layers)]
    known = {key: value for key, value in raw.items() if value is not None or key == "sliding_window"}
    raw = {
        **usual,
        "layer_types": kinds,
        **({} if "rope_scaling" in known else {"rope_parameters": _OSS_ROPE}),
        **known,
    }
    bias = bool(field(raw, "attention_bias", OPTION, where, True))
    experts = "num_local_experts" if "num_local_experts" in raw else "num_experts"
    fields = gated(raw, where)
    return fields | {
        **{"attn_bias": bias, "attn_out_bias": bias, "mlp_bias": True, "attention_sinks": True},
        **bands(raw, fields["n_layer"], where),
        "n_expert": field(raw, experts, int, where, 128),
        "n_expert_per_tok": field(raw, "num_experts_per_tok", int, where, 4),
        "swiglu_alpha": field(raw, "swiglu_alpha", float, where, 1.702),
        "swiglu_limit": field(raw, "swiglu_limit", float, where, 7.0),
    }


def to_gpt_oss(config: GPTConfig) -> Raw:
    kinds = ["full_attention" if config.window_of(n) is None else "sliding_attention" for n in range(config.n_layer)]
    if config.n_expert is None:
        raise ValueError("n_expert=None")
    return to_gated(config) | {
        **{"attention_bias": config.has_bias("attn"), "layer_types": kinds, "sliding_window": config.window},
        **{"num_local_experts": config.n_expert, "num_experts_per_tok": config.n_expert_per_tok},
        **{"swiglu_alpha": config.swiglu_alpha, "swiglu_limit": config.swiglu_limit},
    }


_OSS_ROPE = {
    **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    **{"original_max_position_embeddings": 4096, "rope_theta": 150000.0},
}
