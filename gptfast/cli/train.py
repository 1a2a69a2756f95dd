"""gptfast train: a GPT from text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from gptfast.cli._commands import Command
from gptfast.cli._options import Change, Options, takes
from gptfast.cli._run import describe, report
from gptfast.config import GPTConfig
from gptfast.data.options import DataOptions
from gptfast.training.config import TrainConfig
from gptfast.training.options import DATA, SHAPE, SHARDING, TIMEOUT, RunOptions, Weights, defaults_in_words

if TYPE_CHECKING:
    from gptfast.training.ranks import Ranks

_DEFAULTS = {name: Change(words=words) for name, words in defaults_in_words().items()}
_PREPARED = Change(more="Or a folder made by gptfast prepare, or a token file. A tenth is kept for validation.")


class TrainCommand(Command):
    """The command with `--resume` alone, which means `--resume last`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        following = [*args[1:], ""]
        value = next((b for a, b in zip(args, following, strict=True) if a == "--resume"), "")
        if value and not value.startswith("-") and value not in ("last", "auto"):
            raise typer.BadParameter(
                f"{value!r} is neither last nor auto; the folder of the run is --out", ctx, param_hint="'--resume'"
            )
        alone = [a == "--resume" and b not in ("last", "auto") for a, b in zip(args, following, strict=True)]
        return super().parse_args(ctx, ["--resume=last" if n else a for a, n in zip(args, alone, strict=True)])


@takes(
    Options(DataOptions, DATA, group="Data", changes={**_DEFAULTS, "data": _PREPARED}),
    Options(Weights, group="Model"),
    Options(GPTConfig, SHAPE, group="Model", changes=_DEFAULTS),
    Options(TrainConfig, grouped=True, changes=_DEFAULTS),
    Options(RunOptions),
)
def train(options: dict[str, Any]) -> None:
    """Train a GPT to predict the next token of a text.

    Without options it trains a character model on Shakespeare, in minutes on
    a laptop.

    The loss is the cross-entropy of the next token in nats: ln(vocabulary) for
    guessing (4.5 for 90 characters), less as the model learns. The training
    loss is that of the training text, the validation loss that of text which
    the model never sees; judge a model by the validation loss.

    OUT/last is the newest checkpoint and OUT/best the one with the lowest
    validation loss; each is a complete folder for gptfast generate and for
    transformers. Ctrl-C saves and stops; --resume continues.

    torchrun --nproc-per-node 2 -m gptfast train ... trains in two processes;
    --parallel fsdp divides the model among them, --tensor-parallel 2 its layers.
    """
    from gptfast.training.run_file import merged_options, whole_options

    only_print = options.pop("print_config", False)
    options = merged_options(options)
    if only_print:
        print(whole_options(options), end="")
        return
    from gptfast.malloc import return_memory, tune_malloc
    from gptfast.training.join import joined

    tensor = max(1, options.get("tensor_parallel", 1))  # checked where one process speaks
    sharding = options.get("reshard", SHARDING[0]) if options.get("parallel") == "fsdp" or tensor > 1 else ""
    if sharding:  # whose memory is to be small
        return_memory()
    else:
        tune_malloc()
    with joined(options.get("timeout", TIMEOUT), options.get("device", "auto"), sharding, tensor) as ranks:
        signal = _train(options, ranks)
    if signal is not None:
        raise typer.Exit(128 + signal)


def _train(options: dict[str, Any], ranks: Ranks | None) -> int | None:
    """Train; returns the signal that ended the run early, or None."""
    from gptfast.training.join import attempt
    from gptfast.training.run_file import NAME, write_options
    from gptfast.training.start import start_run

    run = start_run(options, ranks, again=ranks is not None and attempt() > 0 and ranks.has_begun)
    if ranks is not None:
        ranks.begin()
    if run.checkpoint is None and (ranks is None or ranks.is_main):
        sizes = {name: getattr(run.trainer.config, name) for name in ("batch_size", "grad_accum")}
        write_options({**options, **({**sizes, "find_batch_size": False} if run.fit else {})}, run.trainer.out / NAME)
    for line in describe(run):
        run.trainer.progress.note(line)
    if ranks is None and "parallel" in options:
        run.trainer.progress.note(
            f"         --parallel {options['parallel']} shares nothing in one process: torchrun --nproc-per-node 2 -m gptfast train ..."
        )
    result = run.trainer.train()
    for line in report(run, result):
        run.trainer.progress.note(line)
    return result.interrupted
