"""The result of a run: metrics.json, the confusion matrix, and what they are compared with."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptfast._files import as_drawn, atomic_write, save_figure
from gptfast.finetuning.launch import Finetuning
from gptfast.finetuning.networks import stored_network
from gptfast.finetuning.objectives import TaskObjective, perplexity, score
from gptfast.training.result import TrainResult
from gptfast.training.sensors import peak

METRICS, CONFUSION, LOSS = "metrics.json", "confusion.png", "loss.png"


@dataclass(frozen=True)
class FinetuneResult:
    """What metrics.json holds.

    metric: what was measured on the held-out examples. value: that of the best step; None: the run was interrupted.
    baseline: the metric of always predicting the most frequent class of the training examples; for lm and chat, the value
    before training. trainable_parameters: how many were trained. truncated: examples longer than the model's context.
    left_out: those among them whose response was cut off entirely.
    task, method: of the run. examples: training, held_out. steps, best_step, seconds: of the run.
    peak_memory: largest resident size of this process, in bytes; None: not known.
    """

    metric: str
    value: float | None
    baseline: float
    trainable_parameters: int
    truncated: int
    left_out: int
    task: str
    method: str
    examples: dict[str, int]
    steps: int
    best_step: int
    seconds: float
    peak_memory: int | None


def finish(run: Finetuning, result: TrainResult) -> FinetuneResult:
    """Judge the best step on the held-out examples, and write metrics.json and confusion.png.

    Raises:
        RuntimeError: no evaluation of the run had a finite loss.  OSError: a file cannot be written.
    """
    loop, objective, trained = run.loop, run.objective, run.trained
    if result.interrupted is None and not math.isfinite(result.best_val_loss or 0.0):
        raise RuntimeError(
            f"finetune: the loss on the held-out examples is {result.best_val_loss} at step {result.best_step}; lower "
            "`learning_rate` or raise `warmup_steps`"
        )
    value: float | None = None
    if isinstance(objective, TaskObjective):
        metric, baseline = objective.metric, majority(objective)
        if result.interrupted is None:
            true, found = predictions_of_best(run)
            value = score(metric, true, found)
            if names := confused(objective, run.data.labels):
                plot_confusion(true, found, names, loop.out / CONFUSION, f"{loop.out.name}: {metric} {value:.3f}")
    else:
        metric = "perplexity"
        first = next((r["val_loss"] for r in loop.log.records if r["step"] == 0 and "val_loss" in r), float("nan"))
        baseline = perplexity(first)
        if result.interrupted is None and result.best_val_loss is not None:
            value = perplexity(result.best_val_loss)
    held = {"training": len(run.data.train), "held_out": len(run.data.held_out)}
    about = (str(run.task.task), run.method.method, held, result.steps, result.best_step, round(result.seconds, 3))
    made = FinetuneResult(metric, value, baseline, trained, run.truncated, run.left_out, *about, peak())
    if result.interrupted is None:
        atomic_write(loop.out / METRICS, (json.dumps(asdict(made), indent=2) + "\n").encode())
    return made


def predictions_of_best(run: Finetuning) -> tuple[list[Any], list[Any]]:
    """The labels or scores of the held-out examples, and those that the best checkpoint predicts: in float32, as `predict` of
    what is saved."""
    loop, objective = run.loop, run.objective
    if loop.state.best_step != loop.state.step:
        loop.optimizers.clear()
        objective.network = None  # two would not have to fit into memory
        objective.network, _ = stored_network(loop.out / "best", run.task, run.method, loop.source.get("base"))
        objective.network.to(loop.device)
    _, true, found = objective.predict(loop.eval_batch_size, nullcontext)
    return true, found


def majority(objective: TaskObjective) -> float:
    """The metric of always predicting the most frequent label of the training examples; 0 for correlations."""
    most = Counter(objective.train[1]).most_common(1)[0][0]
    return score(objective.metric, objective.held_out[1], [most] * len(objective.held_out[1]))


def confused(objective: TaskObjective, labels: Sequence[str]) -> list[str]:
    """The names of what may be taken for one another: classes; of choices their places, 1, 2, …; scores have none."""
    if objective.network is not None and objective.network.task != "choice":
        return list(labels)
    return [str(n + 1) for n in range(max(map(len, objective.held_out[0])))]


def plot_confusion(true: Sequence[int], found: Sequence[int], labels: Sequence[str], path: Path, title: str) -> None:
    """Draw how often each class was taken for each, as a PNG file.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    counts = confusion_matrix(true, found, labels=range(len(labels)))
    side = 2.5 + 0.9 * min(len(labels), 30)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.add_subplot()
    display = ConfusionMatrixDisplay(counts, display_labels=[as_drawn(label) for label in labels])
    display.plot(
        ax=axis,
        cmap="Blues",
        values_format="d",
        colorbar=False,
        xticks_rotation="vertical" if len(labels) > 6 else "horizontal",
    )
    axis.set(title=as_drawn(title), xlabel="predicted", ylabel="true")
    save_figure(figure, path)
