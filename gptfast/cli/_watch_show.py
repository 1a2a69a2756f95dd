"""The view of `gptfast watch`: figures, a plot of the losses, alarms and a sample; as text and as JSON."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from gptfast._plots import braille_plot, sparkline
from gptfast.cli._names import as_options
from gptfast.training.progress import clock

if TYPE_CHECKING:
    from gptfast.training.watching import Watched

_ALARMS, _LABELS, _SPARK = 3, 9, 12  # lines; characters left of the plot; of a small curve
_STYLES = {
    "starting": "yellow",
    "running": "green",
    "complete": "bold green",
    "stopped": "yellow",
    "killed": "bold red",
}
_CURVES = ("cyan", "magenta")


@dataclass(frozen=True)
class Sample:
    """A text that the checkpoint of a step wrote; or why there is none, `note`."""

    step: int
    prompt: str = ""
    text: str = ""
    note: str = ""


def view(run: Watched, sample: Sample | None, width: int, height: int, utf8: bool = True) -> RenderableType:
    """The view of a run in `width` columns; the plot gets what `height` leaves, 4 to 16 lines."""
    parts: list[RenderableType] = [_head(run), *_figures(run, utf8)]
    below = [*_alarms(run), *_sample(sample)]
    taken = sum(1 + part.cell_len // width + part.plain.count("\n") for part in below)
    lines = min(16, max(4, height - len(parts) - taken - 4))
    return Group(*parts, *_plot(run, max(20, width - _LABELS - 2), lines, utf8), *below)


def _head(run: Watched) -> Text:
    return Text.assemble((f"{run.out}  ", "bold"), (as_options(run.words), _STYLES[run.state]))


def _figures(run: Watched, utf8: bool) -> list[Text]:
    step = f"step {run.step:,}" + (
        "" if run.planned is None else f" of {run.planned:,} ({run.step / max(1, run.planned):.0%})"
    )
    best, speed, share = run.best, run.newest("tokens_per_second"), run.newest("mfu")
    seconds = run.newest("seconds") or (run.checkpoint.state.seconds if run.checkpoint else None)
    val = run.newest("val_loss")
    lines = [
        [
            step,
            "" if seconds is None else f"{clock(seconds)} so far",
            "" if run.seconds_left is None else f"ETA {clock(run.seconds_left)}",
            "" if run.checkpoint is None else f"checkpoint at step {run.checkpoint.state.step:,}",
        ],
        [
            _named("loss", run.newest("loss")),
            _named("val", val) + ("" if best is None else f" (best {best[1]:.4f} at step {best[0]:,})"),
            *(_named(name, run.newest(name)) for name in _metrics(run)),
        ],
        [
            _named("learning rate", run.newest("lr"), ".3g") + _small(run, "lr", utf8),
            "" if speed is None else f"{speed:,.0f} tokens/s" + _small(run, "tokens_per_second", utf8),
            "" if share is None else f"{share:.0%} of peak",
            _named("gradient", run.newest("grad_norm"), ".3g"),
        ],
    ]
    return [Text("  ".join(part for part in line if part)) for line in lines if any(line)]


def _named(name: str, value: Any, form: str = ".4f") -> str:
    return "" if value is None else f"{name} {value:{form}}"


def _small(run: Watched, name: str, utf8: bool) -> str:
    """A small curve behind a figure."""
    values = [value for _, value in run.curve(name)]
    return f" {sparkline(values, _SPARK)}" if utf8 and len(values) > 1 else ""


def _metrics(run: Watched) -> list[str]:
    """What evaluations of a fine-tuning measure beside the loss, such as accuracy."""
    from gptfast.finetuning.tasks import METRICS

    return sorted({name for names in METRICS.values() for name in names if run.newest(name) is not None})


def _plot(run: Watched, width: int, height: int, utf8: bool) -> list[Text]:
    curves = [run.curve("task_loss") or run.curve("loss"), run.curve("val_loss")]
    if sum(map(len, curves)) < 2:
        return [Text("no curve yet: it comes with the second record of the log", "dim")]
    lines, (left, right, low, high) = braille_plot(curves, width, height, not utf8)
    drawn = [Text.assemble(("loss  ", "dim"), ("training (one batch)", _CURVES[0]), "  ", ("validation", _CURVES[1]))]
    for n, line in enumerate(lines):
        label = f"{high:.3f}" if n == 0 else f"{low:.3f}" if n == height - 1 else ""
        signs = [(sign, _CURVES[curve] if curve >= 0 else "") for sign, curve in line]
        drawn.append(Text.assemble((f"{label:>{_LABELS - 1}} ", "dim"), ("│ " if utf8 else "| ", "dim"), *signs))
    ends = f"{left:,.0f}", f"step {right:,.0f}"
    drawn.append(Text(" " * (_LABELS + 2) + ends[0] + ends[1].rjust(max(0, width - len(ends[0]))), "dim"))
    return drawn


def _alarms(run: Watched) -> list[Text]:
    found = run.alarms
    if not found:
        return []
    shown = [Text(f"  step {step:,}: {text}", "yellow") for step, text in found[-_ALARMS:]]
    return [Text(f"alarms: {len(found)}" + (", the last:" if len(found) > _ALARMS else ""), "bold yellow"), *shown]


def _sample(sample: Sample | None) -> list[Text]:
    if sample is None:
        return []
    if sample.note:
        return [Text(sample.note, "dim")]
    text = Text.assemble((_plain(sample.prompt), "bold"), _plain(sample.text))
    return [Text(f"sample of step {sample.step:,}", "dim"), text]


def _plain(text: str) -> str:
    """A text that steers no terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text.replace("\t", "    ")
    )


def as_json(run: Watched, sample: Sample | None) -> dict[str, Any]:
    """The view as a JSON object."""
    best, speed = run.best, run.seconds_a_step
    saved = None if run.checkpoint is None else run.checkpoint.state.step
    newest = {
        name: run.newest(name)
        for name in ("loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds")
    }
    return {
        "run": str(run.out),
        "state": run.state,
        "message": as_options(run.words),
        "step": run.step,
        "planned_steps": run.planned,
        "checkpoint_step": saved,
        **newest,
        "metrics": {name: run.newest(name) for name in _metrics(run)},
        "best": None if best is None else {"step": best[0], "val_loss": best[1]},
        "seconds_per_step": speed,
        "seconds_left": run.seconds_left,
        "alarms": [{"step": step, "text": text} for step, text in run.alarms],
        "sample": None if sample is None else vars(sample),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
