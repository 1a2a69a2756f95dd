"""finetune: fine-tuning from Python, as the command does it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gptfast._options import options_of
from gptfast._other_names import likely
from gptfast.finetuning.launch import new_run, resumed_run
from gptfast.finetuning.options import TRAINING, MethodOptions, RunOptions, TaskOptions
from gptfast.finetuning.results import FinetuneResult, finish


def finetune(
    model: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    task: str | None = None,
    method: str = "full",
    out: str | os.PathLike[str] = "runs/finetune",
    *,
    progress: bool = False,
    **options: Any,
) -> FinetuneResult:
    """Fine-tune a model on a file of examples; writes OUT/best, OUT/last, metrics.json, loss.png, log.jsonl, and
    confusion.png for classes and choices.

    Args:
        model: a checkpoint folder or hub id. With resume=True model, data and task may be left out.
        data: a file of examples; see `read_examples`.
        task: "classification", "entailment", "similarity", "choice", "lm" or "chat".
        method: "full", "lora", "qlora" or "prompt".
        out: OUT.
        progress: show progress.
        options: eval_data, epochs, max_steps, batch_size, learning_rate, seed, resume, …: the fields of `TaskOptions`,
            `MethodOptions` and `RunOptions` in `gptfast.finetuning.options`, and those of `TrainConfig` that `gptfast
            finetune --help` lists.
    Raises:
        OSError, TypeError, ValueError, ImportError: an option, the model or the data is wrong; what was there stays.
        FileExistsError: `out` has a run.  BlockingIOError: another process trains there.
    """
    known = [name for cls in (TaskOptions, MethodOptions, RunOptions) for name in options_of(cls)] + list(TRAINING)
    for name in options:
        if name not in known:
            near = likely(name, known)
            raise TypeError(
                f"finetune: there is no option {name!r}"
                + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")
            )
    for name in ("compare", "show_batch"):
        if options.get(name):
            raise TypeError(f"finetune: {name!r} is of the command line, which prints its answer; leave it out")
    given = {"model": model, "data": data, "task": task, **options}
    given = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in given.items() if v is not None}
    resume = bool(options.get("resume"))
    if not (resume and method == "full"):
        given["method"] = method
    run = (resumed_run if resume else new_run)({**given, "out": Path(out)}, progress)
    return finish(run, run.loop.train())
