"""`gptfast evaluate --task`: accuracy by the number of solved items in the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from gptfast.cli._load import load
from gptfast.cli._tables import print_whole


@contextmanager
def counting(what: str, unit: str) -> Iterator[Callable[..., None]]:
    """A running count on standard error, on a terminal; yields a function that adds to it."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    done = TextColumn(f"{{task.completed:,.0f}} {unit}")
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), done, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what)
        yield lambda count=1: bar.advance(task, count)


def named(adapter: str | None) -> dict[str, str]:
    """The adapters of a model by name."""
    return {"default": adapter} if adapter else {}


def shown_name(result: Mapping[str, Any]) -> str:
    """The model of a result, with its format and its adapter."""
    format, adapter = result["format"], result.get("adapter")
    return result["model"] + (f":{format}" if format else "") + (f" + {adapter}" if adapter else "")


def evaluate_tasks(
    names: Sequence[tuple[str, str | None]], tokenizer: str | None, adapter: str | None, options: Any, output: Any
) -> dict[str, Any]:
    """The result of one model, or {"results": [...]} of several; `options` and `output` are those of the command."""
    from gptfast.evaluation import evaluate_task, load_task, solve_by_generation

    shots = _numbers(options.shots)
    labels = None if options.labels is None else [label.strip() for label in options.labels.split(",")]
    task = load_task(options.task, options.template, labels, options.seed)
    results = []
    for name, quantize in names:
        about = {"model": name, "format": quantize, **({"adapter": adapter} if adapter else {})}
        model, found = load(name, quantize, tokenizer, named(adapter))
        with counting(f"{shown_name(about)}, {task.name}", "items") as advance:
            chosen = {"shots": shots, "limit": options.limit, "seed": options.seed, "progress": advance}
            if options.samples is None:
                result = evaluate_task(model, found, task, normalize=options.normalize, **chosen)
            else:
                names_of = ("samples", "temperature", "max_new_tokens")
                chosen |= {name: getattr(options, name) for name in names_of} | {"pattern": options.answer_pattern}
                result = solve_by_generation(model, found, task, **chosen)
        if not options.log_samples:
            del result["samples"]
        results.append({**about, **result})
    if output.out is not None:
        from gptfast.evaluation.plot import plot_shots

        output.out.mkdir(parents=True, exist_ok=True)
        curves = {shown_name(result): result for result in results}
        plot_shots(curves, output.out / "shots.png", 1 / len(task.labels) if task.labels else None)
    return results[0] if len(results) == 1 else {"results": results}


def _numbers(text: str) -> list[int]:
    """The whole numbers of "0,1,4"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"evaluate: `shots` is {text!r}; expected whole numbers such as 0,1,4")
    return [int(part) for part in parts]


def show_tasks(value: dict[str, Any]) -> None:
    """Print a table with a row for each model and number of shots."""
    from rich.console import Console
    from rich.table import Table

    console, results = Console(), value.get("results", [value])
    table = Table("model", "shots", "accuracy", "95% interval", "dropped", box=None, pad_edge=False)
    for result in results:
        for point in result["curve"]:
            low, high = point["interval"]
            numbers = (
                str(point["shots"]),
                f"{point['accuracy']:.3f}",
                f"{low:.3f} to {high:.3f}",
                str(point["dropped_shots"]),
            )
            table.add_row(shown_name(result), *numbers)
    print_whole(console, table)
    first = results[0]
    how = (
        f"normalize {first['normalize']}"
        if "normalize" in first
        else f"{first['samples_an_item']} texts an item at temperature {first['temperature']:g}, agreement {first['agreement']:.2f}"
    )
    console.print(f"{first['task']}: {first['items']} items, {how}, seed {first['seed']}", highlight=False)
