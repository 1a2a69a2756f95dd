"""The messages of `gptfast train` about a run: at its start, when it is resumed, and at its end."""

from __future__ import annotations

import math
from shlex import quote
from typing import TYPE_CHECKING

from gptfast._folders import holds_more
from gptfast.cli._names import as_options

if TYPE_CHECKING:
    from gptfast.data import PreparedData
    from gptfast.training.config import TrainConfig
    from gptfast.training.result import TrainResult
    from gptfast.training.run import Run
    from gptfast.training.trainer import Trainer


def describe(run: Run) -> list[str]:
    """Lines about the model, the data, the machine and the plan of a run."""
    import torch

    from gptfast._busy import usable_cores
    from gptfast.backend import cpu_isa
    from gptfast.machine import cpu_name

    trainer, data, config = run.trainer, run.data, run.trainer.model.config
    train = trainer.config
    shape = f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels, block size {config.block_size}"
    kernels = f"{cpu_isa()} kernels" if cpu_isa() else "eager PyTorch"
    threads, cores = torch.get_num_threads(), usable_cores()
    crowd = f" on {cores} cores" if threads > cores else ""
    place = f"{cpu_name()}, {threads} threads{crowd}, {kernels}"
    if trainer.device.type == "cuda":
        place = f"{torch.cuda.get_device_name(trainer.device)}, eager PyTorch"
    if trainer.ranks is not None and trainer.ranks.size > 1:
        place += f", {trainer.ranks.size} processes"
        if trainer.ranks.tensor > 1:
            place += f", {trainer.ranks.tensor} to a layer"
    products = f"{train.dtype} products" + (f" ({trainer.dtype_reason})" if trainer.dtype_reason else "")
    limits = [f"{train.max_steps:,} steps"] if train.max_steps else []
    limits += [f"{train.max_minutes:g} min"] if train.max_minutes else []
    limit = "by its data sheet" if trainer.device.type == "cuda" and _has_data_sheet(trainer) else "measured just now"
    lines = [
        f"model    {trainer.model.num_parameters() / 1e6:.2f}M parameters: {shape}",
        *([f"         {as_options(run.note)}"] if run.note else []),
        f"data     {len(data.train):,} tokens to train on, {len(data.val):,} for validation; "
        f"{data.tokenizer.kind} tokenizer, {data.tokenizer.vocab_size:,} tokens",
        *(f"         {note}" for note in (*_sources(run), *data.notes)),
        f"machine  {place}",
        f"         {products}; at most {trainer.peak_flops / 1e9:,.0f} GFLOP/s, {limit}: the 100% of peak",
        *([f"batch    {as_options(run.fit)}"] if run.fit else []),
        f"plan     {' or '.join(limits)}, {train.rows_per_step * trainer.block_size:,} tokens a step",
        *_warmup_lines(train, trainer.block_size),
    ]
    return lines + _resume_lines(run)


def _warmup_lines(train: TrainConfig, block_size: int) -> list[str]:
    """Lines where the learning rate, or the batch, has no room to grow."""
    from gptfast.training.schedule import learning_rate

    lines, warmup = [], train.warmup_steps or 0
    if train.max_steps is not None and warmup > train.max_steps:
        reached = learning_rate(train.max_steps - 1, train, train.max_steps)
        lines.append(
            f"the learning rate ends at {reached:.3g} on its way to {train.learning_rate:.3g}: --warmup-steps is {warmup:,}"
        )
    elif train.lr_decay_steps is not None and train.lr_decay_steps <= warmup:
        lines.append(
            f"the learning rate drops to {train.lowest_rate:.3g} at once after {warmup + 1:,} steps: --lr-decay-steps is "
            f"{train.lr_decay_steps:,}, and --warmup-steps {warmup:,}"
        )
    one = train.batch_size * block_size
    if train.batch_warmup_tokens and one > train.batch_warmup_from:
        growth = "and a step is one" if train.grad_accum == 1 else "which is the first step"
        lines.append(
            f"--batch-warmup-from is {train.batch_warmup_from:,} tokens, but a pass has {one:,}, {growth}: see --batch-size"
        )
    return [f"         {line}" for line in lines]


def _has_data_sheet(trainer: Trainer) -> bool:
    import torch

    from gptfast.machine import published_peak

    return published_peak(torch.cuda.get_device_name(trainer.device), trainer.dtype) is not None


def _sources(run: Run) -> list[str]:
    """A line for each source of a mixture: its part of the rows, its tokens, and how often they are read."""
    from gptfast.data import Mixture

    train, mixture = run.trainer.config, run.data.train
    if not isinstance(mixture, Mixture):
        return []
    rows = None if train.max_steps is None else train.max_steps * train.rows_per_step
    epochs = (
        [""] * len(mixture.files)
        if rows is None
        else [f", {n:.3g} epochs in all" for n in mixture.epochs(rows, run.trainer.block_size)]
    )
    return [
        f"{share:.1%} {name}: {len(file):,} tokens{often}"
        for name, file, share, often in zip(mixture.names, mixture.files, mixture.shares, epochs, strict=True)
    ]


def _resume_lines(run: Run) -> list[str]:
    if run.checkpoint is None:
        return []
    old, new = run.checkpoint.config, run.trainer.config
    lines = [f"warning  {text}" for text in run.damage]
    lines += [f"resume   from step {run.checkpoint.state.step} in {run.checkpoint.folder}"]
    before, now = (c.lr_decay_steps or c.max_steps or "(by time)" for c in (old, new))
    if before != now:
        lines.append(
            f"         the learning rate now falls until step {now} instead of {before}: "
            "not the same as a run started like that"
        )
    if changed := run.changed_arithmetic():
        lines.append(
            f"         {as_options(' and '.join(changed))} changed: no longer bit for bit the run without an interruption"
        )
    return lines + _rate_lines(run) + _batch_lines(old, new, run.trainer.block_size)


def _rate_lines(run: Run) -> list[str]:
    """A line where the learning rate jumps, with the option that prevents it."""
    from gptfast.training.schedule import learning_rate

    if run.checkpoint is None:
        return []
    old, state = run.checkpoint.config, run.checkpoint.state
    planned = state.planned_steps or math.inf
    was, expected = (learning_rate(step, old, planned) for step in (max(0, state.step - 1), state.step))
    now = learning_rate(state.step, run.trainer.config, run.trainer.state.planned_steps or math.inf)
    if abs(now - expected) <= 0.01 * max(now, expected):
        return []
    end = old.lr_decay_steps or state.planned_steps
    advice = ""
    if end and old.learning_rate == run.trainer.config.learning_rate:
        advice = f"; --lr-decay-steps {end} keeps it at {expected:.3g}"
    return [f"         the learning rate was {was:.3g} and is now {now:.3g}{advice}"]


def _batch_lines(old: TrainConfig, new: TrainConfig, block_size: int) -> list[str]:
    if (old.batch_size, old.grad_accum) == (new.batch_size, new.grad_accum):
        return []
    return [
        f"         a step now sees {new.rows_per_step * block_size:,} tokens instead of {old.rows_per_step * block_size:,}: the "
        "text continues where it was, but the",
        "         results are not those of a run started like that; the learning rate stays (see --learning-rate)",
    ]


def report(run: Run, result: TrainResult) -> list[str]:
    """Lines about the result of a run, its files, and what to do next."""
    from gptfast._busy import busy_line
    from gptfast.training.plot import EXPERTS
    from gptfast.training.progress import clock

    trainer, config = run.trainer, run.trainer.config
    out = trainer.out
    busy = busy_line(result.waiting)
    if result.interrupted is not None:
        return _interruption(run, result.steps) + ([busy] if busy else [])
    unit = "character" if run.data.tokenizer.kind == "char" else "token"
    unit = "nats" if config.objective == "mlm" else f"nats per {unit}"
    count = trainer.objective.evaluated_tokens(trainer.eval_batch_size, config)
    speed = f", {result.tokens_per_second:,.0f} tokens/s at the end" if result.tokens_per_second else ""
    return [
        f"best validation loss {result.best_val_loss:.4f} {unit} at step {result.best_step} "
        f"(over {count:,} held-out tokens)",
        *_accuracies(run),
        f"{result.steps} steps in {clock(result.seconds)}{speed}",
        f"checkpoints  {out / 'best'}  (lowest validation loss)",
        f"             {out / 'last'}  (to continue with: --resume)",
        f"loss curve   {out / 'loss.png'}, figures in {out / 'log.jsonl'}",
        *([f"experts      {out / EXPERTS}: their loads"] if trainer.model.config.n_expert else []),
        f"{'fill masks' if config.objective == 'mlm' else 'generate':12} {_generate(run, 'best')}",
        *([busy] if busy else []),
    ]


def _accuracies(run: Run) -> list[str]:
    """A line about the last evaluation of masked tokens and next sentences."""
    found = next((record for record in reversed(run.trainer.log.records) if "val_mlm_accuracy" in record), None)
    if found is None:
        return []
    pairs = (
        f"; next sentences {found['val_nsp_loss']:.4f} nats, {found['val_nsp_accuracy']:.1%} right"
        if "val_nsp_loss" in found
        else ""
    )
    return [
        f"at step {found['step']}: masked tokens {found['val_mlm_loss']:.4f} nats, {found['val_mlm_accuracy']:.1%} right{pairs}"
    ]


def _interruption(run: Run, step: int) -> list[str]:
    """Lines about a run that was ended early."""
    out, config = run.trainer.out, run.trainer.config
    if not holds_more(out / "last"):
        return ["interrupted before the first step; nothing was saved"]
    lines = [f"interrupted at step {step}; saved. Continue with: gptfast train --resume --out {quote(str(out))}"]
    if (out / "best").exists():
        return [*lines, f"{'fill masks' if config.objective == 'mlm' else 'generate'}: {_generate(run, 'best')}"]
    return [
        *lines,
        f"there is no {out / 'best'} yet: it comes with the first evaluation, at step {run.trainer.config.eval_every}",
        f"{'fill masks' if config.objective == 'mlm' else 'generate'} with the newest weights: {_generate(run, 'last')}",
    ]


def _generate(run: Run, name: str) -> str:
    """A command that can be run as printed."""
    if run.trainer.config.objective == "mlm":
        return f"gptfast fill-mask --model {quote(str(run.trainer.out / name))} --text {quote(_masked_prompt(run))}"
    prompt = example_prompt(run.data, run.trainer.model.config.block_size // 2)
    given = f"--prompt {quote(prompt)}" if prompt else "--prompt-file FILE"
    return f"gptfast generate --model {quote(str(run.trainer.out / name))} {given}"


def _masked_prompt(run: Run) -> str:
    """A few words of the validation text, the last of them masked."""
    words = example_prompt(run.data, 8).split() or ["the"]
    return " ".join([*words[:-1], "[MASK]"])


def example_prompt(data: PreparedData, longest: int) -> str:
    """The first words of the validation text in at most `longest` tokens; "" if it does not begin with words."""
    tokenizer = data.tokenizer
    ids = [token for token in data.val.tokens[:80].tolist() if token != tokenizer.eos_id and tokenizer.has_token(token)]
    lines = (line.strip().lstrip("-") for line in tokenizer.decode(ids).splitlines())
    prompt = " ".join(next(filter(None, lines), "").split()[:3])[:24].strip()
    try:
        while prompt and len(tokenizer.encode(prompt)) > longest:
            prompt = prompt[:-1].strip()
    except ValueError:  # a character that is not in the vocabulary
        return ""
    return prompt if prompt.isprintable() and "\ufffd" not in prompt else ""
