"""config.json of Llama, Qwen3, GPT-NeoX and NanoChat: from transformers' keys to the fields of `GPTConfig` and back.

A reader raises ValueError, which names key and value, for what the network does not have. Defaults of missing keys are those
of transformers' configurations.
"""

from __future__ import annotations

from typing import Any

from gptfast._json import NULL, field
from gptfast._rope import RopeScaling
from gptfast.config import GPTConfig

Raw = dict[str, Any]
Fields = dict[str, Any]

_OPTION, _NUMBER, _COUNT = (bool, NULL), (float, NULL), (int, NULL)
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_pct", "rotary_emb_base")
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_OURS = ("embd_pdrop", "resid_pdrop")  # rates that transformers does not have, under our names
KEYS = {
    *(*_ROPE, *_SIZES, *_OURS, "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"),
    *(
        "rms_norm_eps",
        "layer_norm_eps",
        "hidden_act",
        "attention_bias",
        "mlp_bias",
        "attention_dropout",
        "hidden_dropout",
    ),
    *("use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "use_parallel_residual"),
    *(
        "final_logit_softcapping",
        "num_local_experts",
        "num_experts",
        "num_experts_per_tok",
        "swiglu_alpha",
        "swiglu_limit",
    ),
    "quantization_config",
}  # of all of them


def from_llama(raw: Raw, where: object) -> Fields:
    bias = bool(field(raw, "attention_bias", _OPTION, where, False))
    mlp_bias = bool(field(raw, "mlp_bias", _OPTION, where, False))
    return _gated(raw, where) | {"attn_bias": bias, "attn_out_bias": bias, "mlp_bias": mlp_bias}


def to_llama(config: GPTConfig) -> Raw:
    if config.n_embd % config.n_head:  # which LlamaConfig refuses
        raise ValueError(f"n_embd={config.n_embd} beside n_head={config.n_head}")
    return _to_gated(config) | {"attention_bias": config.has_bias("attn"), "mlp_bias": config.has_bias("mlp")}


def from_qwen3(raw: Raw, where: object) -> Fields:
    bias = bool(field(raw, "attention_bias", _OPTION, where, False))
    fields = _gated({"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32768, **raw}, where) | {
        "qk_norm": True
    }
    return fields | {"attn_bias": bias, "attn_out_bias": bias, **_bands(raw, fields["n_layer"], where)}


def to_qwen3(config: GPTConfig) -> Raw:
    banded = [config.window_of(layer) is not None for layer in range(config.n_layer)]
    kinds = ["sliding_attention" if own else "full_attention" for own in banded]
    raw = _to_gated(config) | {"attention_bias": config.has_bias("attn"), "layer_types": kinds}
    return raw | {
        "use_sliding_window": any(banded),
        "sliding_window": config.window,
        "max_window_layers": banded.index(True) if any(banded) else config.n_layer,
    }


def from_neox(raw: Raw, where: object) -> Fields:
    pct = field(raw, "rotary_pct", _NUMBER, where, None)
    theta = field(raw, "rotary_emb_base", _NUMBER, where, None)
    old = {name: x for name, x in {"partial_rotary_factor": pct, "rope_theta": theta}.items() if x is not None}
    raw = {"max_position_embeddings": 2048, "hidden_act": "gelu", "partial_rotary_factor": 0.25, **old, **raw}
    raw["head_dim"] = None  # transformers divides hidden_size, whatever this says
    drop = field(raw, "hidden_dropout", _NUMBER, where, 0.0) or 0.0
    bias = field(raw, "attention_bias", _OPTION, where, True)
    return _common(raw, where) | {
        "activation": _activation(raw, _NEOX_ACTIVATIONS, where),
        "layer_norm_epsilon": field(raw, "layer_norm_eps", float, where, 1e-5),
        "bias": True,
        "parallel_residual": bool(field(raw, "use_parallel_residual", _OPTION, where, True)),
        "attn_bias": bool(bias),
        "attn_out_bias": bool(bias),
        "embd_pdrop": drop,
        "resid_pdrop": drop,
    }


def to_neox(config: GPTConfig) -> Raw:
    if config.embd_pdrop != config.resid_pdrop:
        raise ValueError(f"embd_pdrop={config.embd_pdrop:g} beside resid_pdrop={config.resid_pdrop:g}")
    return _to_common(config) | {
        "hidden_act": _name(config.activation, _NEOX_ACTIVATIONS),
        "layer_norm_eps": config.layer_norm_epsilon,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.has_bias("attn"),
        "hidden_dropout": config.resid_pdrop,
        "rotary_pct": config.partial_rotary_factor,  # the names of older transformers
        "rotary_emb_base": config.rope_theta,
    }


def from_nanochat(raw: Raw, where: object) -> Fields:
    bias = bool(field(raw, "attention_bias", _OPTION, where, False))
    raw = {"max_position_embeddings": 2048, "hidden_act": "relu2", "vocab_size": 50304, **raw}
    return (
        _whole(_common(raw, where), where)
        | _rms(raw, where)
        | {
            "activation": _activation(raw, _NANOCHAT_ACTIVATIONS, where),
            "norm_affine": False,
            "qk_norm": True,  # before the rotation here and after it there, which is the same of a norm without weights
            "embedding_norm": True,
            "rotary_layout": "reversed",
            "logit_softcap": field(raw, "final_logit_softcapping", _NUMBER, where, 15.0),
            "attn_bias": bias,
            "attn_out_bias": bias,
        }
    )


def to_nanochat(config: GPTConfig) -> Raw:
    return (
        _to_common(config)
        | _to_rms(config)
        | {
            "hidden_act": _name(config.activation, _NANOCHAT_ACTIVATIONS),
            "num_key_value_heads": config.kv_heads,
            "attention_bias": config.has_bias("attn"),
            "final_logit_softcapping": config.logit_softcap,
        }
    )


def from_gpt_oss(raw: Raw, where: object) -> Fields:
    _check_quantization(raw, where)
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
    bias = bool(field(raw, "attention_bias", _OPTION, where, True))
    experts = "num_local_experts" if "num_local_experts" in raw else "num_experts"
    fields = _gated(raw, where)
    return fields | {
        **{"attn_bias": bias, "attn_out_bias": bias, "mlp_bias": True, "attention_sinks": True},
        **_bands(raw, fields["n_layer"], where),
        "n_expert": field(raw, experts, int, where, 128),
        "n_expert_per_tok": field(raw, "num_experts_per_tok", int, where, 4),
        "swiglu_alpha": field(raw, "swiglu_alpha", float, where, 1.702),
        "swiglu_limit": field(raw, "swiglu_limit", float, where, 7.0),
    }


def to_gpt_oss(config: GPTConfig) -> Raw:
    kinds = ["full_attention" if config.window_of(n) is None else "sliding_attention" for n in range(config.n_layer)]
    if config.n_expert is None:
        raise ValueError("n_expert=None")
    return _to_gated(config) | {
        **{"attention_bias": config.has_bias("attn"), "layer_types": kinds, "sliding_window": config.window},
        **{"num_local_experts": config.n_expert, "num_experts_per_tok": config.n_expert_per_tok},
        **{"swiglu_alpha": config.swiglu_alpha, "swiglu_limit": config.swiglu_limit},
    }


def _check_quantization(raw: Raw, where: object) -> None:
    """Codes are read where they are MXFP4."""
    method = (field(raw, "quantization_config", (dict, NULL), where, None) or {}).get("quant_method", "mxfp4")
    if method != "mxfp4":
        raise ValueError(
            f"{where}: quantization_config has quant_method {method!r}; gptfast reads mxfp4 - use transformers"
        )


_OSS_ROPE = {
    **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    **{"original_max_position_embeddings": 4096, "rope_theta": 150000.0},
}

# transformers' names of the activations, of several for one the usual one first
_NEOX_ACTIVATIONS = {
    "gelu": "gelu",
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh"),
    **{
        "relu": "relu",
        "silu": "silu",
        "swish": "silu",
        "quick_gelu": "quick_gelu",
        "tanh": "tanh",
        "relu2": "relu_squared",
    },
}
_NANOCHAT_ACTIVATIONS = {"relu2": "relu_squared", **{n: a for n, a in _NEOX_ACTIVATIONS.items() if n != "relu2"}}
_GATED_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu"}


def _gated(raw: Raw, where: object) -> Fields:
    """What Llama and its like share."""
    raw = {"max_position_embeddings": 2048, "hidden_act": "silu", **raw}
    return (
        _whole(_common(raw, where), where)
        | _rms(raw, where)
        | {"activation": _activation(raw, _GATED_ACTIVATIONS, where)}
    )


def _to_gated(config: GPTConfig) -> Raw:
    return (
        _to_common(config)
        | _to_rms(config)
        | {
            "hidden_act": _name(config.activation, _GATED_ACTIVATIONS),
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
        }
    )


def _whole(fields: Fields, where: object) -> Fields:
    """The fields, of an architecture that rotates whole heads."""
    factor = fields["partial_rotary_factor"]
    if factor != 1:
        raise ValueError(f"{where}: partial_rotary_factor is {factor:g}; expected 1, as this architecture has it")
    return fields


def _rms(raw: Raw, where: object) -> Fields:
    return {"norm": "rms_norm", "layer_norm_epsilon": field(raw, "rms_norm_eps", float, where, 1e-6)}


def _to_rms(config: GPTConfig) -> Raw:
    return {"rms_norm_eps": config.layer_norm_epsilon}


def _common(raw: Raw, where: object) -> Fields:
    missing = [key for key in _SIZES if key not in raw]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} is missing; copy the complete config.json of the checkpoint")
    C, L, H, F, V = (field(raw, key, int, where) for key in _SIZES)
    return {
        **{"n_embd": C, "n_layer": L, "n_head": H, "n_inner": F, "vocab_size": V, "bias": False},
        "n_kv_head": field(raw, "num_key_value_heads", _COUNT, where, None),
        "head_size": field(raw, "head_dim", _COUNT, where, None),
        "block_size": field(raw, "max_position_embeddings", int, where),
        "tie_weights": bool(field(raw, "tie_word_embeddings", _OPTION, where, False)),
        "attn_pdrop": field(raw, "attention_dropout", _NUMBER, where, 0.0) or 0.0,
        **{name: field(raw, name, float, where, 0.0) for name in _OURS},
        "position_embedding": "rotary",
        **_rope(raw, where),
    }


def _to_common(config: GPTConfig) -> Raw:
    scaling = RopeScaling.of(config.rope_scaling)
    rope: Raw = {"rope_type": "default"} if scaling is None else scaling.to_dict()
    rope["rope_theta"] = config.rope_theta
    if config.partial_rotary_factor != 1:
        rope["partial_rotary_factor"] = config.partial_rotary_factor
    sizes = (config.n_embd, config.n_layer, config.n_head, config.inner_dim, config.vocab_size)
    return {
        **dict(zip(_SIZES, sizes, strict=True)),
        "max_position_embeddings": config.block_size,
        "tie_word_embeddings": config.tie_weights,
        "attention_dropout": config.attn_pdrop,
        **{name: getattr(config, name) for name in _OURS if getattr(config, name)},
        "rope_parameters": rope,
    }


def _rope(raw: Raw, where: object) -> Fields:
    """Rotary positions: rope_parameters, or the older rope_theta and rope_scaling."""
    told = field(raw, "rope_parameters", (dict, NULL), where, None) or {}
    told = dict(told or field(raw, "rope_scaling", (dict, NULL), where, None) or {})
    if any(isinstance(value, dict) for value in told.values()):
        raise ValueError(f"{where}: rope_parameters differ by layer, which gptfast does not compute; use transformers")
    kind = told.pop("rope_type", None) or told.pop("type", None) or "default"
    told.pop("type", None)
    theta = told.pop("rope_theta", None) or field(raw, "rope_theta", _NUMBER, where, None) or 1e4
    factor = told.pop("partial_rotary_factor", None) or field(raw, "partial_rotary_factor", _NUMBER, where, None) or 1.0
    fields: Fields = {"rope_theta": float(theta), "partial_rotary_factor": float(factor)}
    if kind == "default":
        return fields
    given = {name: value for name, value in told.items() if value is not None}
    if kind in ("llama3", "yarn"):
        given.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
        length = raw["max_position_embeddings"] / max(given["original_max_position_embeddings"], 1)
        given.setdefault("factor", length)
    if kind == "linear":
        given.pop("original_max_position_embeddings", None)
    try:
        return fields | {"rope_scaling": RopeScaling.of({"rope_type": kind, **given})}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _bands(raw: Raw, layers: int, where: object) -> Fields:
    """Sliding layers of Qwen3: layer_types, or those from max_window_layers on."""
    window = field(raw, "sliding_window", _COUNT, where, 4096)
    if not field(raw, "use_sliding_window", _OPTION, where, False) or window is None:
        return {}
    kinds = field(raw, "layer_types", (list, NULL), where, None)
    if kinds is None:
        first = field(raw, "max_window_layers", int, where, 28)
        kinds = ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(layers - first, 0)
    names = {"full_attention": "L", "sliding_attention": "S"}
    strange = [kind for kind in kinds if kind not in names]
    if strange or len(kinds) != layers:
        got = f"{strange[0]!r}" if strange else f"{len(kinds)} layers"
        raise ValueError(f"{where}: layer_types has {got}; expected full_attention or sliding_attention for {layers}")
    pattern = "".join(names[kind] for kind in kinds)
    return {"attention_pattern": pattern, "window": window} if "S" in pattern else {}


def _activation(raw: Raw, names: dict[str, str], where: object) -> str:
    name = field(raw, "hidden_act", str, where)
    if name not in names:
        raise ValueError(f"{where}: hidden_act is {name!r}; gptfast has {', '.join(names)} here - use transformers")
    return names[name]


def _name(activation: str, names: dict[str, str]) -> str:
    found = next((name for name, own in names.items() if own == activation), None)
    if found is None:
        raise ValueError(f"activation={activation!r}")
    return found
