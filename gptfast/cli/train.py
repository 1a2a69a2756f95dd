"""gptfast train: a GPT from text."""

from __future__ import annotations

from typing import Any

import typer

from gptfast.cli._options import Change, Options, takes
from gptfast.cli._run import describe, report
from gptfast.config import GPTConfig
from gptfast.data.options import DataOptions
from gptfast.training.config import TrainConfig
from gptfast.training.options import SHAPE, RunOptions, Weights, defaults_in_words

_DATA = ("data", "glob", "text_field", "tokenizer", "vocab_size", "unk")
_DEFAULTS = {name: Change(words=words) for name, words in defaults_in_words().items()}
_PREPARED = Change(more="Or a folder made by gptfast prepare, or a token file. A tenth is kept for validation.")


@takes(
    Options(DataOptions, _DATA, group="Data", changes={**_DEFAULTS, "data": _PREPARED}),
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
    """
    from gptfast.malloc import tune_malloc
    from gptfast.training import launch

    tune_malloc()
    run = launch.resumed_run(options) if options.get("resume") else launch.new_run(options)
    for line in describe(run):
        run.trainer.progress.note(line)
    result = run.trainer.train()
    for line in report(run, result):
        run.trainer.progress.note(line)
    if result.interrupted is not None:
        raise typer.Exit(128 + result.interrupted)
