"""BERT's checkpoints: config.json, the names of the tensors, and what the tensors say about the heads.

transformers' BertForPreTraining, BertForMaskedLM, BertModel and BertForSequenceClassification have one model_type. Which heads
a checkpoint has its tensors tell: a published one may have more than its `architectures` says.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from gptfast._json import NULL, field
from gptfast.checkpoints.family_fields import NEOX_ACTIVATIONS, OPTION, Fields, Raw, activation, activation_name
from gptfast.config import GPTConfig

BLOCK: dict[str, tuple[str, ...]] = {
    "attn.c_attn": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attn.c_proj": ("attention.output.dense",),
    "ln_1": ("attention.output.LayerNorm",),
    "mlp.c_fc": ("intermediate.dense",),
    "mlp.c_proj": ("output.dense",),
    "ln_2": ("output.LayerNorm",),
}
OUTSIDE = {
    "wte": "bert.embeddings.word_embeddings",
    "wpe": "bert.embeddings.position_embeddings",
    "wse": "bert.embeddings.token_type_embeddings",
    "ln_e": "bert.embeddings.LayerNorm",
    "pooler": "bert.pooler.dense",
    "lm_transform.c_fc": "cls.predictions.transform.dense",
    "lm_transform.ln": "cls.predictions.transform.LayerNorm",
    "lm_head": "cls.predictions.decoder",
    "next_sentence": "cls.seq_relationship",
}
BIAS, DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"  # two names of one
CLASSIFIER = "classifier."  # the head of BertForSequenceClassification
_SIZES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "vocab_size": "vocab_size",
}
_ALWAYS = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
_HEADS = {  # by class: transform, pooler, next sentence
    "BertForPreTraining": (True, True, True),
    "BertForMaskedLM": (True, False, False),
    "BertModel": (False, True, False),
}
_FIELDS = ("head_transform", "pooler", "next_sentence_head")


def from_bert(raw: Raw, where: object) -> Fields:
    """The fields of GPTConfig in a config.json. Raises ValueError, which names key and value, for what gptfast does not compute."""
    missing = [key for key in _SIZES if key not in raw]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} is missing; copy the complete config.json of the checkpoint")
    for key, value in _ALWAYS.items():
        if raw.get(key) not in (value, None):
            raise ValueError(f"{where}: {key} is {raw[key]!r}, which gptfast does not compute; use transformers")
    raw = {"hidden_act": "gelu", **raw}
    drop = field(raw, "hidden_dropout_prob", float, where, 0.1)
    classes = field(raw, "architectures", (list, NULL), where, None) or []
    heads = _HEADS.get(classes[0] if classes else "", _HEADS["BertForMaskedLM"])
    return {
        **{ours: field(raw, theirs, int, where) for theirs, ours in _SIZES.items()},
        **dict(zip(_FIELDS, heads, strict=True)),
        **{"causal": False, "norm_position": "post", "final_norm": False, "embedding_norm": True},
        "block_size": field(raw, "max_position_embeddings", int, where, 512),
        "type_vocab_size": field(raw, "type_vocab_size", int, where, 2),
        "layer_norm_epsilon": field(raw, "layer_norm_eps", float, where, 1e-12),
        "activation": activation(raw, NEOX_ACTIVATIONS, where),
        "tie_weights": bool(field(raw, "tie_word_embeddings", OPTION, where, True)),
        **{"embd_pdrop": drop, "resid_pdrop": drop},
        "attn_pdrop": field(raw, "attention_probs_dropout_prob", float, where, 0.1),
    }


def to_bert(config: GPTConfig) -> Raw:
    """The keys of config.json. Raises ValueError, which names the field, for a network that is no BERT."""
    if config.embd_pdrop != config.resid_pdrop:
        raise ValueError(f"embd_pdrop={config.embd_pdrop:g} beside resid_pdrop={config.resid_pdrop:g}")
    if config.type_vocab_size is None:
        raise ValueError("type_vocab_size=None")
    own = tuple(getattr(config, name) for name in _FIELDS)
    # as many heads as there are: transformers reports those that its class has besides
    named = next((name for name, heads in _HEADS.items() if heads == own), None)
    fallback = "BertForPreTraining" if config.head_transform else "BertModel"
    return {
        "architectures": [named or fallback],
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        **{"intermediate_size": config.inner_dim, "max_position_embeddings": config.block_size},
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.layer_norm_epsilon,
        "hidden_act": activation_name(config.activation, NEOX_ACTIVATIONS),
        "tie_word_embeddings": config.tie_weights,
        "hidden_dropout_prob": config.resid_pdrop,
        "attention_probs_dropout_prob": config.attn_pdrop,
    }


def with_heads(config: GPTConfig, keys: Collection[str]) -> GPTConfig:
    """The config with the heads that a checkpoint has tensors of. keys: their names, as `renamed` returns them."""
    names = ("lm_transform.c_fc", "pooler", "next_sentence")
    found = {name: f"{OUTSIDE[part]}.weight" in keys for name, part in zip(_FIELDS, names, strict=True)}
    if not found["head_transform"]:  # without a head the embedding stands for one
        found["tie_weights"] = True
    return config.replace(**found)


def renamed(key: str) -> str:
    """The name of a tensor in newer files: LayerNorms had gamma and beta."""
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key))
