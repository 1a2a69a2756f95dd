"""From options to a run of fine-tuning that is ready: a new one, or one that is resumed.

Options are a mapping of those that were given, by the names of the fields of `gptfast.finetuning.options` and `TrainConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from gptfast._files import absolute
from gptfast._locks import FileLock
from gptfast._options import values_of
from gptfast.finetuning import methods
from gptfast.finetuning.instructions import Conversations
from gptfast.finetuning.networks import new_network, stored_labels, stored_network
from gptfast.finetuning.objectives import Rows, TaskObjective, TextObjective
from gptfast.finetuning.options import TRAINING, MethodOptions, RunOptions, TaskOptions, check_effects, training_config
from gptfast.finetuning.sources import Data, open_examples
from gptfast.finetuning.task_model import TaskModel
from gptfast.finetuning.tasks import METRICS
from gptfast.finetuning.texts import text_rows
from gptfast.training.checkpoint import Checkpoint
from gptfast.training.config import TrainConfig
from gptfast.training.kept import newest_intact
from gptfast.training.loop import Loop
from gptfast.training.resuming import MAY_CHANGE, refuse_changes
from gptfast.training.routing import Routing
from gptfast.training.run_folder import check_room, locked_run

Options = Mapping[str, Any]

_MAY_CHANGE = MAY_CHANGE | {"epochs", "show_batch", "compare"}


@dataclass
class Finetuning:
    """A run that is ready.

    loop: trains it. task, method: its options. data: its examples. truncated: how many of these were too long. left_out: how
    many of the truncated ones have no response left. checkpoint: the one that it goes on from, or None. notes: sentences for
    the user.
    """

    loop: Loop
    task: TaskOptions
    method: MethodOptions
    data: Data
    truncated: int
    left_out: int
    checkpoint: Checkpoint | None
    notes: list[str]

    @property
    def objective(self) -> Any:
        return self.loop.objective

    @property
    def trained(self) -> int:
        return methods.count_parameters(self.objective.network)[1]


def new_run(options: Options, progress: bool = True) -> Finetuning:
    """A run from the beginning.

    Raises:
        OSError, TypeError, ValueError, ImportError: an option or the data is wrong.
        FileExistsError: there is a run in `out`.  BlockingIOError: another process trains there.
    """
    task = TaskOptions(**values_of(TaskOptions, options))
    method = MethodOptions(**values_of(MethodOptions, options))
    place = RunOptions(**values_of(RunOptions, options))
    for name in ("model", "data", "task"):
        if getattr(task, name) is None:
            raise ValueError(f"finetune: `{name}` is missing; say it, or continue a run with `resume`")
    check_effects(options, task, method)
    config = training_config(method.method, options, 1)  # checks the options before anything is read
    check_room(place.out, place.overwrite)
    place.set_threads()
    stored = stored_labels(task, method)
    seed = int(options.get("seed", 0))
    data = open_examples(str(task.data), task.eval_data, str(task.task), seed, stored)
    with locked_run(place.out) as lock:
        steps = math.ceil(place.epochs * len(data.train) / config.rows_per_step)
        config = training_config(method.method, options, steps)
        torch.manual_seed(config.seed)
        network, tokenizer, notes, base = new_network(task, method, data)
        source = {"finetune": _stored(task, method), "marks": data.marks(), "base": base}
        return _run(network, tokenizer, task, method, data, config, place, lock, notes, progress, source=source)


def resumed_run(options: Options, progress: bool = True) -> Finetuning:
    """The run in the folder `out`, from its newest intact checkpoint on; one that is complete makes no step.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: an option that cannot change, other data, another base, or every checkpoint is damaged.
        OSError, TypeError, ImportError, BlockingIOError: as `new_run`.
    """
    place = RunOptions(**values_of(RunOptions, options))
    checkpoint, damaged = newest_intact(place.out)
    stored = checkpoint.source.get("finetune")
    if not isinstance(stored, dict):
        raise ValueError(
            f"finetune: {place.out} is a run of gptfast train; resume it with that, or choose another `out`"
        )
    with locked_run(place.out) as lock:
        place.set_threads(checkpoint.threads)
        known = {**vars(checkpoint.config), **stored}
        refuse_changes("finetune", options, known, _MAY_CHANGE, f"the run in {place.out}", "start a new run")
        task = TaskOptions(**values_of(TaskOptions, stored))
        method = MethodOptions(**values_of(MethodOptions, stored))
        check_effects(options, task, method)
        labels = stored_labels(task, method)
        data = open_examples(str(task.data), task.eval_data, str(task.task), checkpoint.config.seed, labels)
        if data.marks() != checkpoint.source.get("marks"):
            raise ValueError(
                f"finetune: the examples of {task.data} are not those that {checkpoint.folder} was trained on; resume with "
                "the same ones, or start a new run"
            )
        given = {name: value for name, value in options.items() if name in TRAINING and name in _MAY_CHANGE}
        config = checkpoint.config.replace(**given)
        if "epochs" in options and "max_steps" not in options:
            config = config.replace(max_steps=math.ceil(place.epochs * len(data.train) / config.rows_per_step))
        network, tokenizer = stored_network(checkpoint.folder, task, method, checkpoint.source.get("base"))
        about = (place, lock, damaged, progress)
        return _run(network, tokenizer, task, method, data, config, *about, source=checkpoint.source, resume=checkpoint)


def _run(
    network: Any,
    tokenizer: Any,
    task: TaskOptions,
    method: MethodOptions,
    data: Data,
    config: TrainConfig,
    place: RunOptions,
    lock: FileLock,
    notes: list[str],
    progress: bool,
    **others: Any,
) -> Finetuning:
    truncated = left_out = 0
    gpt = network.gpt if isinstance(network, TaskModel) else network
    # a soft prompt's vectors are routed too, and are no tokens whose load could be told
    routing = None if gpt.virtual_tokens() else Routing.of(gpt, config, what="finetune")
    objective: Any
    if isinstance(network, TaskModel):
        parts: list[Rows] = []
        for part in (data.train, data.held_out):
            groups, targets = network.rows(part.records, where=part.where)
            parts.append((groups, targets or []))
        truncated = network.truncated
        metric = task.metric or METRICS[network.task][0]
        if metric not in METRICS[network.task]:
            raise ValueError(
                f"finetune: metric is {metric!r}, which {network.task} does not have; expected {', '.join(METRICS[network.task])}"
            )
        causal = gpt.config.causal
        if task.lm_coef and not causal:
            raise ValueError(f"finetune: `lm_coef` is {task.lm_coef:g}, but a BERT has no such loss; leave it out")
        lm_coef = (0.5 if causal else 0.0) if task.lm_coef is None else task.lm_coef
        objective = TaskObjective(network, parts[0], parts[1], metric, lm_coef, methods.write, routing)
    else:
        limit, rows = network.config.block_size - network.virtual_tokens(), []
        for part in (data.train, data.held_out):
            if task.task == "chat":
                found = Conversations(part.records, tokenizer, limit, part.where)
                truncated, left_out = truncated + found.truncated, left_out + found.left_out
                rows.append(found.rows)
            else:
                found_rows, cut = text_rows(part, tokenizer, limit)
                rows.append(found_rows)
                if cut:
                    notes.append(f"{cut} texts of {part.path} are longer than {limit} tokens and are cut into rows")
        objective = TextObjective(network, rows[0], rows[1], tokenizer, methods.write, routing)
    loop = Loop(
        objective,
        config,
        place.out,
        overwrite=place.overwrite and "resume" not in others,
        progress=progress,
        lock=lock,
        evaluate_first=True,
        finished_too=True,
        **others,
    )
    return Finetuning(loop, task, method, data, truncated, left_out, others.get("resume"), notes)


def _stored(task: TaskOptions, method: MethodOptions) -> dict[str, Any]:
    """The options of a run, as its checkpoints keep them."""
    values = {f.name: getattr(owner, f.name) for owner in (task, method) for f in fields(owner)}
    values["quantize"] = method.held_in
    return {k: absolute(v) if k in ("model", "data", "eval_data", "tokenizer") else v for k, v in values.items()}
