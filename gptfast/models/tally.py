"""Where the parameters of a GPT are, by kind of matrix."""

from __future__ import annotations

from dataclasses import dataclass

from gptfast.models.config import GPTConfig


@dataclass(frozen=True)
class Row:
    """One kind of parameter: `copies` tensors of `shape`, out of which `count` numbers are stored."""

    category: str
    shape: str
    copies: int
    count: int


def tally(config: GPTConfig) -> list[Row]:
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
    rows = [Row("Embedding", f"{C} x {V}", 1, C * V)]
    if config.position_embedding == "learned":
        rows.append(Row("Position embedding", f"{C} x {config.block_size}", 1, C * config.block_size))
    rows += [Row(name, f"{D} x {C}", H * L, C * C * L) for name in ("Key", "Query", "Value")]
    rows += [
        Row("Output", f"{C} x {D}", H * L, C * C * L),
        Row("Up-projection", f"{inner} x {C}", L, inner * C * L),
        Row("Down-projection", f"{C} x {inner}", L, inner * C * L),
        Row("Unembedding", f"{V} x {C}", 1, 0 if config.tie_weights else V * C),
    ]
    norms = 2 * L + config.final_norm
    rows.append(Row("LayerNorm", f"{C}", norms * (1 + config.bias), norms * (1 + config.bias) * C))
    if config.bias:
        rows.append(Row("Bias", f"{5 * C + inner} a layer", L, (5 * C + inner) * L))
    return rows
