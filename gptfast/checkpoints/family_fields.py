"""What the config.json files of `family_configs` share: sizes, rotary positions, bands, activations.

A reader raises ValueError, which names key and value, for what the network does not have.
"""

from __future__ import annotations

from typing import Any

from gptfast._json import NULL, field
from gptfast._rope import TYPES, RopeScaling
from gptfast.config import GPTConfig

Raw = dict[str, Any]
Fields = dict[str, Any]

OPTION, NUMBER, COUNT = (bool, NULL), (float, NULL), (int, NULL)
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
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size"),
}  # of all of them

# transformers' names of the activations, of several for one the usual one first
NEOX_ACTIVATIONS = {
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
NANOCHAT_ACTIVATIONS = {"relu2": "relu_squared", **{n: a for n, a in NEOX_ACTIVATIONS.items() if n != "relu2"}}
GATED_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu"}


def gated(raw: Raw, where: object) -> Fields:
    """What Llama and its like share."""
    raw = {"max_position_embeddings": 2048, "hidden_act": "silu", **raw}
    return (
        whole(common(raw, where), where) | rms(raw, where) | {"activation": activation(raw, GATED_ACTIVATIONS, where)}
    )


def to_gated(config: GPTConfig) -> Raw:
    return (
        to_common(config)
        | to_rms(config)
        | {
            "hidden_act": activation_name(config.activation, GATED_ACTIVATIONS),
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
        }
    )


def whole(fields: Fields, where: object) -> Fields:
    """The fields, of an architecture that rotates whole heads."""
    factor = fields["partial_rotary_factor"]
    if factor != 1:
        raise ValueError(f"{where}: partial_rotary_factor is {factor:g}; expected 1, as this architecture has it")
    return fields


def rms(raw: Raw, where: object) -> Fields:
    return {"norm": "rms_norm", "layer_norm_epsilon": field(raw, "rms_norm_eps", float, where, 1e-6)}


def to_rms(config: GPTConfig) -> Raw:
    return {"rms_norm_eps": config.layer_norm_epsilon}


def common(raw: Raw, where: object) -> Fields:
    missing = [key for key in _SIZES if key not in raw]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} is missing; copy the complete config.json of the checkpoint")
    C, L, H, F, V = (field(raw, key, int, where) for key in _SIZES)
    return {
        **{"n_embd": C, "n_layer": L, "n_head": H, "n_inner": F, "vocab_size": V, "bias": False},
        "n_kv_head": field(raw, "num_key_value_heads", COUNT, where, None),
        "head_size": field(raw, "head_dim", COUNT, where, None),
        "block_size": field(raw, "max_position_embeddings", int, where),
        "tie_weights": bool(field(raw, "tie_word_embeddings", OPTION, where, False)),
        "attn_pdrop": field(raw, "attention_dropout", NUMBER, where, 0.0) or 0.0,
        **{name: field(raw, name, float, where, 0.0) for name in _OURS},
        "position_embedding": "rotary",
        **_rope(raw, where),
    }


def to_common(config: GPTConfig) -> Raw:
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
    """Rotary positions: rope_parameters, or the older rope_theta and rope_scaling, which counts where a file has both."""
    dicts = [(name, field(raw, name, (dict, NULL), where, None)) for name in ("rope_scaling", "rope_parameters")]
    name, told = next(((name, dict(found)) for name, found in dicts if found), ("rope_parameters", {}))
    if any(isinstance(value, dict) for value in told.values()):
        raise ValueError(f"{where}: rope_parameters differ by layer, which gptfast does not compute; use transformers")
    kind = told.pop("rope_type", None) or told.pop("type", None) or "default"
    told.pop("type", None)
    fields: Fields = {}
    for key, usual in (("rope_theta", 1e4), ("partial_rotary_factor", 1.0)):
        given = field(told, key, NUMBER, where, None, inside=name)
        given = field(raw, key, NUMBER, where, None) if given is None else given
        fields[key] = float(usual if given is None else given)
        told.pop(key, None)
    if kind == "default":
        return fields
    if kind not in TYPES:
        raise ValueError(
            f"{where}: {name} has rope_type {kind!r}; gptfast has default, {', '.join(TYPES)} - use transformers"
        )
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


def bands(raw: Raw, layers: int, where: object) -> Fields:
    """Sliding layers of Qwen3: layer_types, or those from max_window_layers on."""
    window = field(raw, "sliding_window", COUNT, where, 4096)
    kinds = field(raw, "layer_types", (list, NULL), where, None)
    if not field(raw, "use_sliding_window", OPTION, where, False) or window is None:
        if "sliding_attention" in (kinds or []):
            raise ValueError(
                f"{where}: layer_types has 'sliding_attention' without a sliding_window; set that to a number"
            )
        return {}
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


def activation(raw: Raw, names: dict[str, str], where: object) -> str:
    name = field(raw, "hidden_act", str, where)
    if name not in names:
        raise ValueError(f"{where}: hidden_act is {name!r}; gptfast has {', '.join(names)} here - use transformers")
    return names[name]


def activation_name(activation: str, names: dict[str, str]) -> str:
    found = next((name for name, own in names.items() if own == activation), None)
    if found is None:
        raise ValueError(f"activation={activation!r}")
    return found
