"""Where the parameters of a GPT are, by kind of matrix."""

from __future__ import annotations

from dataclasses import dataclass

from gptfast.config import GPTConfig


@dataclass(frozen=True)
class ParameterGroup:
    """One kind of parameter: `copies` tensors of `shape`, out of which `count` numbers are stored."""

    category: str
    shape: str
    copies: int
    count: int


def parameter_table(config: GPTConfig) -> list[ParameterGroup]:
    """The parameters of `config`, without building the model; the counts add up to
    `GPT(config).num_parameters()`.

    Query, Key and Value are the three parts of c_attn, Output is attn.c_proj; shapes are (rows, columns) of
    the matrix that multiplies a column vector. A tied head stores nothing of its own.
    """
    C, V, L, D = config.n_embd, config.vocab_size, config.n_layer, config.head_dim
    H, K, inner = config.n_head, config.kv_heads, config.inner_dim
    rows = [ParameterGroup("Embedding", f"{C} x {V}", 1, C * V)]
    if config.position_embedding == "learned":
        rows.append(ParameterGroup("Position embedding", f"{C} x {config.block_size}", 1, C * config.block_size))
    if config.type_vocab_size is not None:
        rows.append(ParameterGroup("Type embedding", f"{C} x {config.type_vocab_size}", 1, C * config.type_vocab_size))
    heads = {"Key": K, "Query": H, "Value": K}
    rows += [ParameterGroup(name, f"{D} x {C}", n * L, n * D * C * L) for name, n in heads.items()]
    rows.append(ParameterGroup("Output", f"{C} x {D}", H * L, C * H * D * L))
    E = config.n_expert or 1
    rows += [ParameterGroup("Router", f"{E} x {C}", L, E * C * L)] if config.n_expert else []
    rows += (
        [ParameterGroup("Gate", f"{inner} x {C}", E * L, E * inner * C * L)] if config.activation == "swiglu" else []
    )
    rows += [
        ParameterGroup("Up-projection", f"{inner} x {C}", E * L, E * inner * C * L),
        ParameterGroup("Down-projection", f"{C} x {inner}", E * L, E * inner * C * L),
        ParameterGroup("Unembedding", f"{V} x {C}", 1, 0 if config.tie_weights else V * C),
    ]
    name = "LayerNorm" if config.norm == "layer_norm" else "RMSNorm"
    norms = 2 * L + config.final_norm + config.embedding_norm + config.head_transform
    each = config.norm_affine + config.has_bias("norm")
    rows += [ParameterGroup(name, f"{C}", norms * each, norms * each * C)] if each else []
    if config.qk_norm and config.norm_affine:
        rows.append(ParameterGroup("QK-norm", f"{D}", 2 * L, 2 * L * D))
    if config.attention_sinks:
        rows.append(ParameterGroup("Sinks", f"{H}", L, H * L))
    rows += _heads(config)
    places = {"attn": config.qkv_dim, "attn_out": C, "mlp": E * (config.fc_dim + C) + (config.n_expert or 0)}
    biases = sum(n for place, n in places.items() if config.has_bias(place))
    return rows + ([ParameterGroup("Bias", f"{biases} a layer", L, biases * L)] if biases else [])


def _heads(config: GPTConfig) -> list[ParameterGroup]:
    """BERT's matrices behind the blocks, with their biases."""
    C, V = config.n_embd, config.vocab_size
    sizes = {
        "Head transform": (f"{C} x {C} + {C} + {V}", (C + 1) * C + V) if config.head_transform else None,
        "Pooler": (f"{C} x {C} + {C}", (C + 1) * C) if config.pooler else None,
        "Next sentence": (f"2 x {C} + 2", 2 * C + 2) if config.next_sentence_head else None,
    }
    return [ParameterGroup(name, size[0], 1, size[1]) for name, size in sizes.items() if size is not None]


def active_parameters(config: GPTConfig) -> int:
    """The parameters that a token is multiplied by: of experts those that it goes to, and not the embedding, of which it takes a row.
    The number published as "active" for gpt-oss."""
    total = sum(row.count for row in parameter_table(config)) - (
        0 if config.tie_weights else config.n_embd * config.vocab_size
    )
    if config.n_expert is None or config.n_expert_per_tok is None:
        return total
    expert = config.fc_dim * config.n_embd + config.inner_dim * config.n_embd
    expert += config.fc_dim + config.n_embd if config.has_bias("mlp") else 0
    return total - (config.n_expert - config.n_expert_per_tok) * expert * config.n_layer
