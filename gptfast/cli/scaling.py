"""gptfast scaling: compute-optimal sizes by published laws, or laws fitted to a ladder of trainings."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import typer

from gptfast._json import to_text
from gptfast._options import option, options_of, values_of
from gptfast.cli._options import Change, Options, takes
from gptfast.cli._tables import print_whole
from gptfast.data.options import DataOptions
from gptfast.ladder.options import LadderOptions

_DATA = ("data", "tokenizer", "vocab_size", "glob", "text_field")


@dataclass(frozen=True)
class Planned:
    """What `gptfast scaling --plan` plans."""

    plan: bool = option(
        False, "Train nothing: print the parameters and tokens that published laws give for a budget of compute."
    )
    flops: float | None = option(
        None, "With `plan`: FLOPs of the whole training, 6 x parameters x tokens, such as 5.76e23."
    )


@dataclass(frozen=True)
class Output:
    """How the result is printed."""

    json: bool = option(False, "Print one JSON object instead of a table.")


@takes(
    Options(DataOptions, _DATA, group="A ladder", changes={"tokenizer": Change(default="char")}),
    Options(LadderOptions, group="A ladder"),
    Options(Planned, group="A plan"),
    Options(Output),
)
def scaling(options: dict[str, Any]) -> None:
    """Train a ladder of sizes and numbers of tokens in a budget of time, fit scaling laws to it, and predict a loss; or plan a
    training by published laws.

    The ladder fits L(N), L(D) and L(C), and L(N, D) by Kaplan et al. 2020 and Hoffmann et al. 2022, with 95% intervals, predicts
    the loss of a size that it does not have, and then trains that size. OUT/points.jsonl has each point as soon as it is
    measured, OUT/results.json everything, OUT/scaling.png the picture.

    The plan is by Chinchilla's approach 3 (Hoffmann et al. 2022) and Kaplan et al. 2020. Time is what the budget takes on this
    machine at the speed of a training step that is measured now; memory is that of weights, gradients and AdamW in fp32.

    [bold]Examples[/]

      [cyan]gptfast scaling --data shakespeare --budget 25m --out runs/scaling[/]

      [cyan]gptfast scaling --plan --flops 1e18[/]
    """
    wanted, output = Planned(**values_of(Planned, options)), Output(**values_of(Output, options))
    ladder = [name for name in options if name in {**options_of(LadderOptions), **options_of(DataOptions)}]
    if wanted.plan:
        if ladder or wanted.flops is None:
            raise ValueError("scaling: `plan` goes with `flops` and nothing of a ladder, such as --plan --flops 1e18")
        return _plan(wanted.flops, output.json)
    if wanted.flops is not None or not ladder:
        raise ValueError(
            "scaling: give `data` and `budget` to train a ladder, such as --data shakespeare --budget 25m, or `plan` and `flops`, such "
            "as --plan --flops 1e18"
        )
    _climb({name: options[name] for name in ladder}, output.json)


def _plan(flops: float, as_json: bool) -> None:
    from gptfast.evaluation.scaling import BYTES, LAWS, plan
    from gptfast.ladder.speed import flops_per_second

    found = {law: plan(flops, law) for law in LAWS}
    rate = flops_per_second()
    value = {law: row | {"seconds": flops / rate, "bytes": BYTES * row["parameters"]} for law, row in found.items()}
    if as_json:
        print(to_text(value, 2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("law", "parameters", "tokens", "tokens a parameter", "memory", box=None, pad_edge=False)
    for law, row in value.items():
        ratio = row["tokens"] / row["parameters"]
        table.add_row(
            law, f"{row['parameters']:.3g}", f"{row['tokens']:.3g}", f"{ratio:.1f}", f"{row['bytes'] / 1e9:,.2f} GB"
        )
    print_whole(console, table)
    console.print(f"on this machine, at {rate / 1e9:,.0f} GFLOP/s of a training step: {flops / rate / 86400:,.2f} days")
    console.print(
        "chinchilla: approach 3, E 1.69, A 406.4, B 410.7, alpha 0.34, beta 0.28, not the 20 tokens a parameter of its approaches 1 "
        "and 2; kaplan: equation 1.5 with alpha_N 0.076, N_c 8.8e13, alpha_D 0.095, D_c 5.4e13, without embeddings"
    )


def _climb(given: dict[str, Any], as_json: bool) -> None:
    """Train a ladder, and print what it says."""
    from gptfast._files import atomic_write
    from gptfast.evaluation.fitting import import_scipy
    from gptfast.ladder.picture import draw_ladder
    from gptfast.ladder.run import Ladder
    from gptfast.ladder.summary import summarise
    from gptfast.malloc import tune_malloc

    import_scipy()  # what the fits need, before the budget is spent
    tune_malloc()
    ladder = Ladder(given, note=lambda line: print(line, file=sys.stderr, flush=True))
    ladder.train()
    if ladder.interrupted is not None:
        print(f"interrupted; continue with: gptfast scaling --resume --out {ladder.out}", file=sys.stderr)
        raise typer.Exit(128 + ladder.interrupted)
    value = summarise(ladder)
    atomic_write(ladder.out / "results.json", (to_text(value, 2) + "\n").encode())
    draw_ladder(value, ladder.out / "scaling.png")
    if as_json:
        print(to_text(value, 2))
    else:
        _show(value, ladder.out)


def _show(value: dict[str, Any], out: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table("parameters", "tokens", "FLOPs", "loss", "seconds", box=None, pad_edge=False)
    for row in sorted(value["points"], key=lambda row: (row["parameters"], row["tokens"])):
        table.add_row(
            *(f"{row[name]:,}" for name in ("parameters", "tokens")),
            f"{row['flops']:.3g}",
            f"{row['loss']:.4f}",
            f"{row['seconds']:.1f}",
        )
    print_whole(console, table)
    fits = {**value["fits"], **{f"L(N,D) {law}": fit for law, fit in value["fits"]["L(N,D)"].items()}}
    del fits["L(N,D)"]
    for name, fit in fits.items():
        console.print(f"{name:18} {_numbers(fit) if fit else 'too few points'}", markup=False)
    console.print(f"{'prediction':18} {_prediction(value['prediction'])}", markup=False)
    console.print(f"{'learning rate':18} {value['learning_rate_rule']}", markup=False)
    for line in value["warnings"]:
        console.print(f"{'warning':18} {line}", markup=False)
    console.print(f"{'files':18} {out / 'points.jsonl'}, {out / 'results.json'}, {out / 'scaling.png'}", markup=False)


def _numbers(fit: dict[str, Any]) -> str:
    """Such as "alpha_N 0.076 [0.07, 0.08]"."""
    shown = []
    for name, number in fit.items():
        if name not in ("intervals", "warnings", "points"):
            interval = fit["intervals"].get(name)
            shown.append(f"{name} {number:.3g}" + (f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else ""))
    return "  ".join(shown)


def _prediction(found: dict[str, Any]) -> str:
    size = f"{found['parameters']:,} parameters on {found['tokens']:,} tokens: "
    interval = f" [{found['interval'][0]:.4f}, {found['interval'][1]:.4f}]" if found["interval"] else ""
    predicted = "too few points" if found["predicted"] is None else f"predicted {found['predicted']:.4f}{interval}"
    measured = "not trained" if found["measured"] is None else f"measured {found['measured']:.4f}"
    return f"{size}{predicted}, {measured}"
