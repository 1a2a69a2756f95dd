"""The messages of `gptfast finetune`, and its comparison of methods."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import typer

from gptfast._folders import holds_more
from gptfast.cli._names import option_name
from gptfast.cli._tables import print_whole

if TYPE_CHECKING:
    from gptfast.finetuning.launch import Finetuning
    from gptfast.finetuning.results import FinetuneResult
    from gptfast.training.result import TrainResult

COMPARISON = "compare.json"
_SHOWN = 4  # rows of --show-batch
_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes


def describe(run: Finetuning) -> list[str]:
    """Lines about the model, the data and the plan of a run."""
    import torch

    from gptfast.finetuning import TaskModel
    from gptfast.finetuning.methods import count_parameters

    network, data, train = run.objective.network, run.data, run.loop.config
    gpt = network.gpt if isinstance(network, TaskModel) else network
    total, trained = count_parameters(network)
    config, counts = gpt.config, data.counts()
    cut = [f"{run.truncated} examples are longer than {config.block_size} tokens and are cut at the end"] * (
        run.truncated > 0
    )
    cut += [f"{run.left_out} of these have no response left and are left out"] * (run.left_out > 0)
    return [
        f"model    {run.task.model}: {total / 1e6:.2f}M parameters, {config.n_layer} layers, {config.n_embd} channels, block "
        f"size {config.block_size}",
        f"method   {run.method.method}: {trained:,} trained parameters ({trained / total:.2%}){_held_in(run)}",
        f"data     {len(data.train):,} examples to learn from, {len(data.held_out):,} to judge by",
        *([f"         {', '.join(f'{label} {n:,}' for label, n in counts.items())}"] if 1 < len(counts) <= 20 else []),
        *(f"         {line}" for line in (*data.notes(), *cut, *run.notes)),
        f"plan     {train.max_steps:,} steps of {train.rows_per_step} examples, {train.dtype} products, "
        f"{torch.get_num_threads()} threads",
        *([f"resume   from step {run.checkpoint.state.step} in {run.checkpoint.folder}"] if run.checkpoint else []),
    ]


def _held_in(run: Finetuning) -> str:
    held = run.method.loading()
    if "quantize" not in held:
        return ""
    return f", the base in {held['quantize']}{' with double quantisation' * held['double_quant']}"


def report(run: Finetuning, result: TrainResult, found: FinetuneResult) -> list[str]:
    """Lines about the result of a run, its files, and what to do next."""
    from gptfast.finetuning.results import CONFUSION
    from gptfast.training.plot import EXPERTS
    from gptfast.training.progress import clock

    out = run.loop.out
    if result.interrupted is not None:
        if not holds_more(out / "last"):
            return ["interrupted before the first step; nothing was saved"]
        return [
            f"interrupted at step {result.steps}; saved. Continue with: gptfast finetune --resume --out {quote(str(out))}"
        ]
    is_task = bool(run.objective.metric)
    against = "the most frequent answer" if is_task else "the model before"
    early = "" if result.steps >= (run.loop.config.max_steps or 0) else ", ended early by --patience"
    return [
        f"{found.metric} {found.value:.3f} on {len(run.data.held_out):,} held-out examples at step {found.best_step}; {against}: "
        f"{found.baseline:.3f}",
        f"{found.steps} steps in {clock(found.seconds)}{early}",
        f"result       {out / 'best'}  ({'an adapter of ' + str(run.task.model) if run.method.method != 'full' else 'a whole model'})",
        f"             {out / 'last'}  (to continue with: --resume)",
        f"figures      {out / 'metrics.json'}, {out / 'loss.png'}"
        + (f", {out / CONFUSION}" if (out / CONFUSION).exists() else "")
        + (f", {out / EXPERTS}" if (out / EXPERTS).exists() else ""),
        f"use          {_use(run)}",
    ]


def _use(run: Finetuning) -> str:
    best = str(run.loop.out / "best")
    if run.objective.metric:
        return f"gptfast.finetuning.TaskModel.from_pretrained({best!r}).predict([…])"
    if run.method.method == "full":
        return f"gptfast generate --model {quote(best)} --prompt …"
    return f"gptfast generate --model {quote(str(run.task.model))} --adapter {quote(best)} --prompt …"


def show_batch(run: Finetuning) -> None:
    """Print the first rows: what is learnt in green; for tasks the delimiters in colour, and what is to be said."""
    from rich.console import Console
    from rich.text import Text

    from gptfast.tokenizer import token_text

    console = Console(highlight=False, soft_wrap=True)
    tokenizer = run.objective.network.tokenizer if run.objective.metric else run.objective.tokenizer
    marks = ("[", "]") if console.color_system is None else ("", "")
    what = "special tokens" if run.objective.metric else "learnt"
    console.print(
        Text.assemble(
            "rows; ", (f"{marks[0]}{what}{marks[1]}", "bold green"), f" {'in brackets' if marks[0] else 'in colour'}"
        )
    )
    for ids, learnt, target in _rows(run):
        text, before = Text(), False
        for token, is_learnt in zip(ids, learnt, strict=True):
            if marks[0] and bool(is_learnt) is not before:
                text.append(marks[0] if is_learnt else marks[1])
            text.append(str(token_text(tokenizer, token)), style="bold green" if is_learnt else "dim")
            before = bool(is_learnt)
        text.append(marks[1] if marks[0] and before else "")
        console.print(text + Text(f"  → {target}" if target else "", style="bold cyan"))
    console.print()


def _rows(run: Finetuning) -> list[tuple[list[int], list[int], str]]:
    """The first rows of the first step: ids, 1 where they are marked, and the target."""
    from gptfast.finetuning.objectives import TaskObjective, examples_of_rows

    objective, config = run.objective, run.loop.config
    chosen = examples_of_rows(run.loop.state.rows or 0, _SHOWN, len(objective.train_rows), config.seed)
    if not isinstance(objective, TaskObjective):
        return [(*objective.train[i], "") for i in chosen]
    special, labels = set(objective.network.special_tokens.values()), run.data.labels
    groups, targets = objective.train
    shown = []
    for i in chosen:
        target = labels[targets[i]] if labels else str(targets[i])
        shown += [(row, [int(t in special) for t in row], target if n == 0 else "") for n, row in enumerate(groups[i])]
    return shown


def compare(options: dict[str, Any]) -> None:
    """Run every method in a process of its own, each with the options that it has; print a table and write OUT/compare.json,
    without those that fail.

    Ctrl-C ends the method that runs, which saves, and starts no other. With `resume` each method goes on where it was.

    Raises:
        RuntimeError: a method failed.
    """
    from gptfast._files import atomic_write
    from gptfast.finetuning.options import METHODS, RunOptions, of_method

    out = Path(options.get("out", RunOptions.out))
    if "method" in options:
        raise ValueError("finetune: `method` and `compare` were both given; leave one out")
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    for method in METHODS:
        print(f"---- {method} " + "-" * 60, flush=True)
        left = ("compare", "out", *(() if holds_more(out / method / "last") else ("resume",)))
        given = {k: v for k, v in of_method(method, options).items() if k not in left}
        code = _run([*("-m", "gptfast", "finetune"), *arguments({**given, "method": method, "out": out / method})])
        if code in _INTERRUPTED:
            print("interrupted; to continue: the same command with --resume", file=sys.stderr)
            raise typer.Exit(code)
        if code:
            failed.append(f"{method} ended with code {code}")
        else:
            results.append(json.loads((out / method / "metrics.json").read_text(encoding="utf-8")))
    if results:
        atomic_write(out / COMPARISON, (json.dumps(results, indent=2) + "\n").encode())
        print_table(results)
    if failed:
        raise RuntimeError(f"finetune: `method` {', '.join(failed)}; its message is above")


def _run(arguments: list[str]) -> int:
    """Run Python; its exit code. Ctrl-C reaches it too, and it is waited for."""
    process = subprocess.Popen([sys.executable, *arguments])
    while True:
        with suppress(KeyboardInterrupt):
            return process.wait()


def arguments(options: dict[str, Any]) -> list[str]:
    """Options as the command line has them."""
    found: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            found.append(option_name(name) if value else "--no-" + option_name(name)[2:])
        else:
            found += [option_name(name), str(value)]
    return found


def print_table(results: list[dict[str, Any]]) -> None:
    """Print the results of methods, with the baseline as a row of its own."""
    from rich.console import Console
    from rich.table import Table

    from gptfast.training.progress import clock

    metric = results[0]["metric"].replace("_", " ")
    table = Table("method", box=None)
    for name in (metric, "trained parameters", "peak memory", "time"):
        table.add_column(name, justify="right")
    said = "most frequent" if metric != "perplexity" else "before"
    table.add_row(said, f"{results[0]['baseline']:.3f}", "", "", "")
    for r in results:
        memory = "" if r["peak_memory"] is None else f"{r['peak_memory'] / 2**20:,.0f} MiB"
        table.add_row(r["method"], f"{r['value']:.3f}", f"{r['trainable_parameters']:,}", memory, clock(r["seconds"]))
    print_whole(Console(highlight=False), table)
