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
    C, V, L, inner, D, H = (
        config.n_embd,
        config.vocab_size,
        config.n_layer,
        config.inner_dim,
        config.head_dim,
        config.n_head,
    )
    rows = [ParameterGroup("Embedding", f"{C} x {V}", 1, C * V)]
    if config.position_embedding == "learned":
        rows.append(ParameterGroup("Position embedding", f"{C} x {config.block_size}", 1, C * config.block_size))
    rows += [ParameterGroup(name, f"{D} x {C}", H * L, C * C * L) for name in ("Key", "Query", "Value")]
    rows += [
        ParameterGroup("Output", f"{C} x {D}", H * L, C * C * L),
        ParameterGroup("Up-projection", f"{inner} x {C}", L, inner * C * L),
        ParameterGroup("Down-projection", f"{C} x {inner}", L, inner * C * L),
        ParameterGroup("Unembedding", f"{V} x {C}", 1, 0 if config.tie_weights else V * C),
    ]
    norms = 2 * L + config.final_norm
    rows.append(ParameterGroup("LayerNorm", f"{C}", norms * (1 + config.bias), norms * (1 + config.bias) * C))
    if config.bias:
        rows.append(ParameterGroup("Bias", f"{5 * C + inner} a layer", L, (5 * C + inner) * L))
    return rows
