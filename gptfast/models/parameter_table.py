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
    heads = {"Key": K, "Query": H, "Value": K}
    rows += [ParameterGroup(name, f"{D} x {C}", n * L, n * D * C * L) for name, n in heads.items()]
    rows.append(ParameterGroup("Output", f"{C} x {D}", H * L, C * H * D * L))
    rows += [ParameterGroup("Gate", f"{inner} x {C}", L, inner * C * L)] if config.activation == "swiglu" else []
    rows += [
        ParameterGroup("Up-projection", f"{inner} x {C}", L, inner * C * L),
        ParameterGroup("Down-projection", f"{C} x {inner}", L, inner * C * L),
        ParameterGroup("Unembedding", f"{V} x {C}", 1, 0 if config.tie_weights else V * C),
    ]
    name = "LayerNorm" if config.norm == "layer_norm" else "RMSNorm"
    norms, each = 2 * L + config.final_norm + config.embedding_norm, config.norm_affine + config.has_bias("norm")
    rows += [ParameterGroup(name, f"{C}", norms * each, norms * each * C)] if each else []
    if config.qk_norm and config.norm_affine:
        rows.append(ParameterGroup("QK-norm", f"{D}", 2 * L, 2 * L * D))
    if config.attention_sinks:
        rows.append(ParameterGroup("Sinks", f"{H}", L, H * L))
    places = {"attn": config.qkv_dim, "attn_out": C, "mlp": config.fc_dim + C}
    biases = sum(n for place, n in places.items() if config.has_bias(place))
    return rows + ([ParameterGroup("Bias", f"{biases} a layer", L, biases * L)] if biases else [])
