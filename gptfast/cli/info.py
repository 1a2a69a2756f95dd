"""gptfast info: the parameters of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from gptfast.config import GPTConfig
    from gptfast.metadata import Metadata
    from gptfast.models.parameter_table import ParameterGroup


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A preset (gpt2, gpt3-175b, ...), a checkpoint folder, nanoGPT's ckpt.pt or a Hugging Face hub id. Without "
            "it: the presets.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print the parameters of a model by kind of matrix, and their memory; or list the presets.

    The files of a folder are checked against each other, and those of a training run against their checksums.
    """
    from rich.console import Console

    from gptfast.config import PRESETS, GPTConfig
    from gptfast.metadata import Metadata
    from gptfast.models.parameter_table import parameter_table

    if model is None:
        Console().print(_presets())
        return
    config, metadata, sums = (GPTConfig.preset(model), Metadata(), {}) if model in PRESETS else _read(model)
    rows = parameter_table(config)
    console = Console()
    console.print(_shape(config), highlight=False)
    console.print(_table(model, rows, config.tie_weights))
    total = sum(row.count for row in rows)
    memory = f"{_bytes(4 * total)} in fp32, {_bytes(2 * total)} in bf16"
    console.print(f"memory of the weights: {memory}", highlight=False)
    for line in _settings(config, metadata):
        console.print(line, highlight=False, markup=False)
    if sums:
        console.print(f"files: {len(sums)}, all match their checksums", highlight=False)


def _settings(config: GPTConfig, metadata: Metadata) -> list[str]:
    """The defaults of `generate` and `serve` in the checkpoint."""
    ends, defaults = metadata.end_tokens(config.vocab_size), metadata.defaults()
    lines = [f"end tokens: {', '.join(map(str, ends))}"] if ends else []
    if defaults:
        listed = ", ".join(f"{name} {value}" for name, value in defaults.items())
        lines.append(f"defaults of generation_config.json: {listed}")
    return lines


def _read(model: str) -> tuple[GPTConfig, Metadata, dict[str, str]]:
    """The configuration of a checkpoint, its metadata, and the verified checksums of its files."""
    from gptfast._snapshots import read_whole
    from gptfast.models.locate import resolve
    from gptfast.models.stored import StoredModel, is_complete, read_settings
    from gptfast.training.checkpoint import verify

    folder = resolve(model)
    if not is_complete(folder):
        return (*read_whole(folder, lambda: read_settings(folder)), {})

    def read() -> tuple[GPTConfig, Metadata, dict[str, str]]:
        stored = StoredModel(folder)
        return stored.config, stored.metadata, verify(folder)

    return read_whole(folder, read)


def _presets() -> Table:
    from rich.table import Table

    from gptfast.config import PRESETS, GPTConfig
    from gptfast.models.parameter_table import parameter_table

    table = Table(title="presets", title_justify="left", title_style="bold")
    table.add_column("name")
    for heading in ("layers", "heads", "channels", "context", "vocabulary", "parameters"):
        table.add_column(heading, justify="right")
    for name in PRESETS:
        config = GPTConfig.preset(name)
        sizes = (config.n_layer, config.n_head, config.n_embd, config.block_size, config.vocab_size)
        table.add_row(name, *map(str, sizes), _short(sum(row.count for row in parameter_table(config))))
    return table


def _shape(config: GPTConfig) -> str:
    attention = "dense" if config.window is None else f"dense and banded ({config.window}) in turn"
    if config.attention_pattern not in ("dense", "alternating"):
        attention = f"banded ({config.window}) as {config.attention_pattern}"
    shared = f", {config.kv_heads} of keys" if config.kv_heads != config.n_head else ""
    others = {"rotary positions": config.position_embedding == "rotary", "RMSNorm": config.norm == "rms_norm"}
    others |= {"every position sees all": not config.causal}
    others |= {f"{config.n_expert_per_tok} of {config.n_expert} experts": config.n_expert is not None}
    others |= {config.activation: config.activation in ("swiglu", "relu_squared"), "QK-norm": config.qk_norm}
    more = "".join(f", {name}" for name, has in others.items() if has)
    return (
        f"{config.n_layer} layers, {config.n_head} heads of {config.head_dim}{shared}, {config.n_embd} channels, "
        f"context {config.block_size}, vocabulary {config.vocab_size}; {config.norm_position}-norm, "
        f"attention {attention}{more}"
    )


def _table(title: str, rows: list[ParameterGroup], tied: bool) -> Table:
    from rich.table import Table

    total = sum(row.count for row in rows)
    table = Table(title=title, title_justify="left", title_style="bold", show_footer=True)
    table.add_column("matrices", "Total")
    table.add_column("shape x copies", justify="right")
    table.add_column("parameters", f"{total:,}", justify="right")
    table.add_column("share", _short(total), justify="right")
    for row in rows:
        shared = tied and row.category == "Unembedding"
        share = "is the embedding" if shared else f"{100 * row.count / total:.2f}%"
        table.add_row(row.category, f"{row.shape} x {row.copies:,}", f"{row.count:,}", share)
    return table


def _short(n: int) -> str:
    return f"{n / 1e9:.1f}B" if n >= 10**9 else f"{n / 1e6:.1f}M"


def _bytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 10**9 else f"{n / 1e6:.1f} MB"
