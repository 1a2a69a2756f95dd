"""Architectures of transformers beside GPT-1 and GPT-2, BERT too, as one network: the names of their tensors, and their config.json.

A tensor of ours may be several of theirs, whose rows follow one another: c_attn is q_proj, k_proj and v_proj.
C channels, H heads, K heads of keys, D head_dim.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from torch import Tensor

from gptfast.checkpoints import bert
from gptfast.checkpoints.family_configs import (
    Fields,
    Raw,
    from_gpt_oss,
    from_llama,
    from_nanochat,
    from_neox,
    from_qwen3,
    to_gpt_oss,
    to_llama,
    to_nanochat,
    to_neox,
    to_qwen3,
)
from gptfast.config import GPTConfig

Parts = tuple[str, ...]
_QKV: Parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED: Parts = ("mlp.gate_proj", "mlp.up_proj")
_LLAMA: dict[str, Parts] = {
    "ln_1": ("input_layernorm",),
    "attn.c_attn": _QKV,
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_fc": _GATED,
    "mlp.c_proj": ("mlp.down_proj",),
}
_QWEN3 = _LLAMA | {"attn.q_norm": ("self_attn.q_norm",), "attn.k_norm": ("self_attn.k_norm",)}
_NANOCHAT = _LLAMA | {"mlp.c_fc": ("mlp.fc1",), "mlp.c_proj": ("mlp.fc2",)}
_GPT_OSS: dict[str, Parts] = {
    **{name: theirs for name, theirs in _LLAMA.items() if not name.startswith("mlp.")},
    "attn": ("self_attn",),  # its sinks
    "mlp": ("mlp.experts",),
    "mlp.router": ("mlp.router",),
}
_NEOX: dict[str, Parts] = {
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("attention.query_key_value",),
    "attn.c_proj": ("attention.dense",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_fc": ("mlp.dense_h_to_4h",),
    "mlp.c_proj": ("mlp.dense_4h_to_h",),
}


@dataclass(frozen=True)
class Family:
    """An architecture.

    architecture: transformers' class.
    read: the fields of GPTConfig in a config.json.  write: its keys for a config.
    block: their names of the modules of a block.  outside: those of the others.
    layers: what comes before the number of a layer.
    by_head: the rows of c_attn lie by heads: the query, key and value of each.
    whole: their names of tensors that are not those of their module.
    copies: names in the file of what stands there under another name too, where the head is not tied.
    """

    architecture: str
    read: Callable[[Raw, object], Fields]
    write: Callable[[GPTConfig], Raw]
    block: dict[str, Parts]
    outside: dict[str, str]
    layers: str
    by_head: bool = False
    whole: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    def parts(self, name: str) -> Parts:
        """Their names of one of our tensors."""
        module, _, kind = name.rpartition(".")
        if name in self.whole:
            return (self.whole[name],)
        match = re.fullmatch(r"h\.(\d+)\.(.+)", module)
        if match is None:
            return (f"{self.outside[module]}.{kind}",)
        return tuple(f"{self.layers}.{match[1]}.{own}.{kind}" for own in self.block[match[2]])

    def rows(self, name: str, config: GPTConfig) -> tuple[int, ...] | None:
        """How many rows each of the parts has; None: all are in one."""
        if len(self.parts(name)) == 1:
            return None
        if ".attn.c_attn." in name:
            return config.attn_dim, config.kv_heads * config.head_dim, config.kv_heads * config.head_dim
        return config.inner_dim, config.inner_dim

    def to_file(self, name: str, x: Tensor, config: GPTConfig, part: int) -> Tensor:
        """A part of a tensor, as it lies in the file."""
        rows = self.rows(name, config)
        if rows is not None:
            return x[sum(rows[:part]) : sum(rows[: part + 1])]
        return _by_heads(x, config, (3, config.n_head)) if self._by_head(name) else x

    def from_file(self, name: str, x: Tensor, config: GPTConfig) -> Tensor:
        """Our tensor of the only part in the file."""
        return _by_heads(x, config, (config.n_head, 3)) if self._by_head(name) else x

    def is_plain(self, name: str) -> bool:
        """Whether rows of ours are rows of the file's parts, in the same order."""
        return not self._by_head(name)

    def _by_head(self, name: str) -> bool:
        return self.by_head and ".attn.c_attn." in name


def _by_heads(x: Tensor, config: GPTConfig, order: tuple[int, int]) -> Tensor:
    """Rows that lie in this order of groups, each of D, in the other one."""
    return x.unflatten(0, (*order, config.head_dim)).transpose(0, 1).flatten(0, 2)


_USUAL = {"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"}
_NEOX_OUTSIDE = {"wte": "gpt_neox.embed_in", "ln_f": "gpt_neox.final_layer_norm", "lm_head": "embed_out"}
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", from_llama, to_llama, _LLAMA, _USUAL, "model.layers"),
    "qwen3": Family("Qwen3ForCausalLM", from_qwen3, to_qwen3, _QWEN3, _USUAL, "model.layers"),
    "gpt_oss": Family("GptOssForCausalLM", from_gpt_oss, to_gpt_oss, _GPT_OSS, _USUAL, "model.layers"),
    "gpt_neox": Family("GPTNeoXForCausalLM", from_neox, to_neox, _NEOX, _NEOX_OUTSIDE, "gpt_neox.layers", by_head=True),
    "nanochat": Family("NanoChatForCausalLM", from_nanochat, to_nanochat, _NANOCHAT, _USUAL, "model.layers"),
    "bert": Family(
        *("BertForPreTraining", bert.from_bert, bert.to_bert, bert.BLOCK, bert.OUTSIDE, "bert.encoder.layer"),
        whole={"lm_head.bias": bert.BIAS},
        copies={bert.DECODER_BIAS: bert.BIAS},
    ),
}
IGNORED = re.compile(
    r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$|embeddings\.position_ids$"
)  # buffers that old files have
RENAMED = {  # names of other files, beside the usual ones
    "gpt_neox": {"lm_head.weight": "embed_out.weight"},
    "bert": {bert.DECODER_BIAS: bert.BIAS},
}


def usual_name(kind: str, key: str) -> str:
    """The usual name of a tensor in a file."""
    key = bert.renamed(key) if kind == "bert" else key
    base, names = _inside(kind)
    if key.partition(".")[0] in names:  # of a model that was saved without its head, as LlamaModel
        key = f"{base}.{key}"
    return RENAMED.get(kind, {}).get(key, key)


@cache
def _inside(kind: str) -> tuple[str, frozenset[str]]:
    """Their name of the network below the head, and the first words of the names that it has inside."""
    family = FAMILIES[kind]
    base = family.layers.partition(".")[0]
    names = (name.split(".") for name in (*family.outside.values(), family.layers))
    return base, frozenset(first for of, first, *_ in (n for n in names if len(n) > 1) if of == base)


def family_of(config: GPTConfig) -> str | None:
    """The architecture that computes exactly this model, by its model_type; None: there is none."""
    return next((kind for kind in FAMILIES if difference(config, kind) is None), None)


def difference(config: GPTConfig, kind: str) -> str | None:
    """The first field of a config that differs from what the architecture computes, as "field=value"; None: none differs."""
    family = FAMILIES[kind]
    try:
        there = GPTConfig(**family.read(family.write(config), kind)).resolved()
    except ValueError as error:
        return str(error)
    return next((f"{name}={value!r}" for name, value in config.resolved().items() if there[name] != value), None)
