"""How a GPT is called in Hugging Face checkpoints: the keys of config.json and the names of the tensors."""

from __future__ import annotations

import re
from typing import Any

from gptfast._json import NULL, field
from gptfast.checkpoints.families import FAMILIES, family_of
from gptfast.checkpoints.family_fields import KEYS
from gptfast.config import NEWER, GPTConfig

CONFIG = "config.json"
ARCHITECTURES = {
    **{"gpt2": "GPT2LMHeadModel", "openai-gpt": "OpenAIGPTLMHeadModel", "gptfast": "GPT"},
    **{kind: family.architecture for kind, family in FAMILIES.items()},
}

_SAME = (
    "n_layer",
    "n_head",
    "n_embd",
    "vocab_size",
    "embd_pdrop",
    "attn_pdrop",
    "resid_pdrop",
    "layer_norm_epsilon",
)
_RENAMED = {"block_size": "n_positions", "tie_weights": "tie_word_embeddings"}
_OWN = ("norm_position", "final_norm", "attention_pattern", "window", "position_embedding")
_REQUIRED = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
_SIZE, _OPTION, _RATE, _NAME = int, (bool, NULL), (float, NULL), (str, NULL)
_KINDS = {
    **{name: _SIZE for name in _REQUIRED},
    **{name: _RATE for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop", "layer_norm_epsilon")},
    **{
        name: _NAME
        for name in ("norm_position", "attention_pattern", "position_embedding", "activation_function", "afn")
    },
    **{name: _OPTION for name in ("tie_word_embeddings", "bias", "final_norm")},
    **{name: (int, NULL) for name in ("n_inner", "window")},
}  # GPTConfig reports a null where none is allowed
# transformers' names of the activations, of several for one the usual one first
_ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate"), "gelu_tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    **{"relu2": "relu_squared", "swiglu": "swiglu"},  # the second is no GPT-2's
    **{name: name for name in ("relu", "quick_gelu", "tanh")},
}
_GPT1_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}  # its gelu is the tanh form
_ACTIVATION_KEYS = {"activation_function": _ACTIVATIONS, "afn": _GPT1_ACTIVATIONS}
_MUST_BE = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def model_type(config: GPTConfig) -> str:
    """The transformers architecture that computes exactly this model, or "gptfast" where there is none.

    transformers does not know banded layers, sinusoids, or other places of the norms in a GPT-2. Such a checkpoint has
    GPT-2's tensors, but its model_type makes transformers stop rather than compute something else.
    """
    if config.position_embedding == "rotary" or not config.causal:
        return family_of(config) or "gptfast"
    plain = config.attention_pattern == "dense" and config.position_embedding == "learned"
    plain = plain and config.beyond_gpt3() is None
    if plain and config.norm_position == "pre" and config.final_norm:
        return "gpt2"
    as_gpt1 = config.activation in _GPT1_ACTIVATIONS.values() and config.inner_dim == 4 * config.n_embd
    if plain and config.norm_position == "post" and not config.final_norm and as_gpt1:
        return "openai-gpt"
    return "gptfast"


def to_hf(config: GPTConfig, dtype: str, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of config.json.

    Args:
        config: of the model.
        dtype: of its weights.
        extra: keys of the file that the model came from, see `extra_keys`.
    """
    kind, extra = model_type(config), dict(extra or {})
    raw: dict[str, Any] = {"model_type": kind, "architectures": [ARCHITECTURES[kind]], "dtype": dtype}
    if kind in FAMILIES:  # without an end token transformers would take a number of its own
        return raw | FAMILIES[kind].write(config) | {"bos_token_id": None, "eos_token_id": None} | extra
    raw |= {name: getattr(config, name) for name in _SAME}
    raw |= {theirs: getattr(config, ours) for ours, theirs in _RENAMED.items()}
    named = {key: extra.pop(key, None) for key in _ACTIVATION_KEYS}
    key = "afn" if kind == "openai-gpt" else "activation_function"
    raw[key] = _activation_name(key, config.activation, named[key])
    if kind != "openai-gpt":
        raw["n_inner"] = config.n_inner
        end_of_text = 50256 if config.vocab_size == 50257 else None  # GPT-2's vocabulary
        raw |= {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    if kind == "gptfast":
        raw |= {name: getattr(config, name) for name in _OWN}
        raw |= {name: value for name, value in config.stored().items() if name in NEWER}
    if not config.bias:
        raw["bias"] = False
    # an older name of n_positions, beside it; llama.cpp's converter reads no other
    if kind == "gpt2" or "n_ctx" in extra:
        extra["n_ctx"] = config.block_size
    return raw | extra


def extra_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """The keys of config.json that are not those of a `GPTConfig`, and an activation by another name than the usual."""
    own = {*_SAME, *_RENAMED.values(), *_OWN, "bias", "n_inner", "activation_function", "afn"}
    own |= {"model_type", "architectures", "dtype", "torch_dtype"}
    own |= KEYS if raw.get("model_type") in FAMILIES else {*NEWER} if raw.get("model_type") == "gptfast" else set()
    extra = {key: value for key, value in raw.items() if key not in own}
    for key, names in _ACTIVATION_KEYS.items():
        if raw.get(key) in names and raw[key] != _activation_name(key, names[raw[key]]):
            extra[key] = raw[key]
    return extra


def from_hf(raw: Any, where: object) -> dict[str, Any]:
    """The fields of GPTConfig in the content of config.json.

    Args:
        raw: the parsed file.
        where: the file, for messages.
    Raises:
        ValueError: another architecture, an option that gptfast does not have, or a key that is missing.
    """
    kind = field(raw, "model_type", (str, NULL), where, None)
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{where}: model_type is {kind!r}; gptfast loads {', '.join(ARCHITECTURES)} - use transformers for others"
        )
    _check_quantization(raw, kind, where)
    if kind in FAMILIES:
        return FAMILIES[kind].read(raw, where)
    missing = [key for key in _REQUIRED if key not in raw]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} is missing; copy the complete config.json of the checkpoint")
    for key, kinds in _KINDS.items():
        field(raw, key, kinds, where, None)
    for key, value in _MUST_BE.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{where}: {key} is {raw[key]}, which gptfast does not compute; use transformers")
    names = {**{name: name for name in (*_SAME, "bias")}, **_RENAMED}
    values = {ours: raw[theirs] for ours, theirs in names.items() if theirs in raw}
    if kind == "gptfast":
        values |= {name: raw[name] for name in (*_OWN, *NEWER) if name in raw}
    if kind == "openai-gpt":
        return values | {
            "norm_position": "post",
            "final_norm": False,
            "activation": _activation(raw, "afn", "gelu", where),
        }
    activation = _activation(raw, "activation_function", "gelu_new", where)
    return values | {"activation": activation, "n_inner": raw.get("n_inner")}


def _check_quantization(raw: dict[str, Any], kind: str, where: object) -> None:
    """Codes are read where they are MXFP4, which gpt-oss' experts are published in."""
    told = field(raw, "quantization_config", (dict, NULL), where, None)
    method = None if told is None else told.get("quant_method")
    if told and not (kind == "gpt_oss" and method in ("mxfp4", None)):
        raise ValueError(
            f"{where}: quantization_config has quant_method {method!r}; gptfast reads float weights, and mxfp4 of gpt_oss - use "
            "transformers, or the checkpoint that this one was made of"
        )


def _activation(raw: dict[str, Any], key: str, usual: str, where: object) -> str:
    name, names = raw.get(key, usual), _ACTIVATION_KEYS[key]
    if name not in names:
        raise ValueError(f"{where}: {key} is {name!r}; gptfast has {', '.join(names)} - use transformers")
    return names[name]


def _activation_name(key: str, activation: str, stored: Any = None) -> str:
    """Of transformers' names for an activation the one that was stored, else the usual one."""
    names = _ACTIVATION_KEYS[key]
    return next(name for name in (stored, *names) if names.get(name) == activation)


def is_conv1d(name: str) -> bool:
    """Is this a matrix that transformers stores as (in, out), in its Conv1D?  Ours is (out, in)."""
    return re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name) is not None


def to_file(name: str, kind: str) -> str:
    """The tensor's name in the file; where it is several there: the first one's."""
    if kind in FAMILIES:
        return FAMILIES[kind].parts(name)[0]
    if name == "lm_head.weight":
        return name
    if kind == "openai-gpt":
        name = re.sub(r"^wte\.", "tokens_embed.", re.sub(r"^wpe\.", "positions_embed.", name))
    return f"transformer.{name}"


def from_file(name: str) -> str | None:
    """Our name of a tensor in a file, "transformer." before it or not; None for stored attention masks."""
    name = name.removeprefix("transformer.")
    if re.search(r"\.attn\.(masked_)?bias$", name):
        return None
    return re.sub(r"^tokens_embed\.", "wte.", re.sub(r"^positions_embed\.", "wpe.", name))
