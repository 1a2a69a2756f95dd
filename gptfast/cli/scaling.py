"""gptfast scaling: compute-optimal sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gptfast._options import option, values_of
from gptfast.cli._options import Options, takes


@dataclass(frozen=True)
class Plan:
    """What `gptfast scaling` plans."""

    plan: bool = option(False, "Print the parameters and tokens that published laws give for a budget of compute.")
    flops: float | None = option(
        None, "The budget: FLOPs of the whole training, 6 x parameters x tokens, such as 5.76e23."
    )
    json: bool = option(False, "Print one JSON object instead of a table.")


@takes(Options(Plan))
def scaling(options: dict[str, Any]) -> None:
    """Plan a training: the size and the number of tokens that give the least loss for a budget of compute.

    The laws are Chinchilla's approach 3 (Hoffmann et al. 2022) and Kaplan et al. 2020. Time is what the budget takes on this
    machine at the speed of a training step that is measured now; memory is that of weights, gradients and AdamW in fp32.

    [bold]Example[/]

      [cyan]gptfast scaling --plan --flops 1e18[/]
    """
    wanted = Plan(**values_of(Plan, options))
    if not wanted.plan or wanted.flops is None:
        raise ValueError("scaling: give `plan` and `flops`, such as --plan --flops 1e18")
    from gptfast.evaluation.scaling import BYTES, LAWS, plan, speed

    found = {law: plan(wanted.flops, law) for law in LAWS}
    rate = speed()
    value = {
        law: row | {"seconds": wanted.flops / rate, "bytes": BYTES * row["parameters"]} for law, row in found.items()
    }
    if wanted.json:
        print(json.dumps(value, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("law", "parameters", "tokens", "tokens a parameter", "memory", box=None, pad_edge=False)
    for law, row in value.items():
        ratio = row["tokens"] / row["parameters"]
        table.add_row(
            law, f"{row['parameters']:.3g}", f"{row['tokens']:.3g}", f"{ratio:.1f}", f"{row['bytes'] / 1e9:,.2f} GB"
        )
    console.print(table)
    days = wanted.flops / rate / 86400
    console.print(
        f"on this machine, at {rate / 1e9:,.0f} GFLOP/s of a training step: {days:,.2f} days", highlight=False
    )
    console.print(
        "chinchilla: approach 3, E 1.69, A 406.4, B 410.7, alpha 0.34, beta 0.28, not the 20 tokens a parameter of its approaches 1 "
        "and 2; kaplan: equation 1.5 with alpha_N 0.076, N_c 8.8e13, alpha_D 0.095, D_c 5.4e13, without embeddings",
        highlight=False,
    )
