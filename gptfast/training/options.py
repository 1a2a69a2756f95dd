"""The options of `gptfast train` beyond those of the model, the data and `TrainConfig`, and the defaults of a new run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfast._busy import usable_cores
from gptfast._options import Real, Whole, check_fields, default_of, default_text, format_value, option, options_of
from gptfast.config import GPTConfig
from gptfast.data.options import DataOptions
from gptfast.training.boards import BOARDS
from gptfast.training.config import TrainConfig

DATA = ("data", "glob", "text_field", "tokenizer", "vocab_size", "unk")  # the fields of DataOptions that are options
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "dropout")  # the fields of GPTConfig that are options
RUN = "The run"  # heading of the options of a run
TIMEOUT = 120.0
ROPE_SCALINGS = ("yarn", "linear")  # of `extend_context`, see `gptfast.models.longer`
_MANY = 256  # threads; 10,000 on two cores made 5 steps of 1 s with 64 threads take 91 s
SHARDING = ("forward", "pass", "step")  # see `gptfast.training.sharding`

DEFAULTS: dict[str, dict[str, Any]] = {  # by the option that chooses the initial weights; "": random weights
    "": {
        "tokenizer": "char",
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 256,
        "block_size": 128,
        "dropout": 0.0,
        "learning_rate": 2e-3,
    },
    # GPT-3's rate for 125M (Brown et al., arXiv 2005.14165, table 2.1)
    "preset": {"tokenizer": "gpt2", "batch_size": 8, "learning_rate": 6e-4},
    "init_from": {"dropout": 0.1, "batch_size": 8, "learning_rate": 1e-4},
}
MASKED: dict[str, dict[str, Any]] = {  # what is different with objective mlm
    "": {"tokenizer": "wordpiece", "learning_rate": 1e-3},
    "preset": {"tokenizer": "wordpiece", "learning_rate": 1e-4},  # BERT's rate
    "init_from": {},
}


def defaults_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a new run with these options."""
    start = start_of(options)
    return DEFAULTS[start] | (MASKED[start] if options.get("objective") == "mlm" else {})


@dataclass(frozen=True)
class Weights:
    """What a new run begins with: its weights, and the hyper-parameters of a published one."""

    preset: str | None = option(
        None,
        "The shape of a published model, with random weights: gpt1, gpt2, gpt2-medium, gpt3-125m, bert-base, ... (gptfast info lists "
        "them). The options below change it.",
    )
    init_from: str | None = option(
        None,
        "Start from the weights of a checkpoint FOLDER, nanoGPT's ckpt.pt or a hub id (also NAME@REVISION) instead of random ones.",
    )
    extend_context: int | None = option(
        None,
        "With `init_from`: the new context in tokens, longer than the checkpoint's. Learned positions are interpolated, rotary ones "
        "scaled, and training rows have this length; some hundred steps suffice.",
        allowed=Whole(2),
    )
    rope_scaling: str | None = option(
        None,
        "With `extend_context`, how rotary positions are scaled. yarn: by parts, so that near tokens keep their distances; linear: "
        "all alike (position interpolation).",
        words="the model's own, else yarn",
        allowed=ROPE_SCALINGS,
    )
    recipe: str | None = option(
        None,
        "The published hyper-parameters of gpt1, gpt2, gpt2-medium, ..., gpt3-125m, ..., gpt3-175b: learning rate, warm-up, tokens "
        "a step, Adam, dropout; and the shape, without `preset`. Options beside it go before it. `print_config` shows "
        "all of it, with its source and what was never published.",
    )


@dataclass(frozen=True)
class PlaceOptions:
    """Where a run is kept, and on how many threads it runs: options of every kind of training."""

    threads: int | None = option(None, "CPU threads.", words="all cores", allowed=Whole(1), group=RUN)
    out: Path = option(Path("runs/gpt"), "Folder for checkpoints, log and plot.", group=RUN)
    overwrite: bool = option(False, "Replace the run in OUT.", group=RUN)

    def set_threads(self, usual: int | None = None) -> None:
        """Give torch the threads of the run; usual: where the options do not say, None: as many as it has.

        Raises:
            ValueError: so many that they only wait for one another.
        """
        import torch  # not to show --help

        cores = usable_cores()
        if self.threads is not None and self.threads > max(_MANY, cores):
            raise ValueError(
                f"`threads` is {self.threads:,}, but this machine has {cores:,} cores, for which more threads wait; leave it out, or "
                f"give at most {max(_MANY, cores):,}"
            )
        threads = usual if self.threads is None else self.threads
        if threads is not None:
            torch.set_num_threads(threads)


@dataclass(frozen=True)
class RunOptions(PlaceOptions):
    """How a run of `gptfast train` is started.

    Raises:
        TypeError, ValueError: a value of the wrong type, or that is not allowed.
    """

    resume: str | None = option(
        None,
        "Continue the run in OUT, bit for bit; auto: begin one where OUT has no checkpoint. Alone it means last.",
        allowed=("last", "auto"),
        group=RUN,
    )
    parallel: str | None = option(
        None,
        "How the processes that torchrun starts share the work. Each takes a part of the rows of every batch; `batch_size` is that "
        "of all together. ddp: each has the whole model. fsdp: each keeps a part of every parameter, of its gradient and of "
        "the optimizer's state, and they gather those of a module where it runs.",
        words="ddp with torchrun, else one process",
        allowed=("ddp", "fsdp"),
        group=RUN,
    )
    reshard: str = option(
        "forward",
        "With fsdp, when gathered parameters are freed. forward: after the forward and after the backward of a module; "
        "gradients are summed once a step. pass: the same, and gradients are summed in each of `grad_accum` passes, which takes "
        "the least memory. step: once a step, which sends the least.",
        allowed=SHARDING,
        group=RUN,
    )
    tensor_parallel: int = option(
        1,
        "How many processes in a row divide every attention, by heads, and every MLP: they see the same rows, and each has a part "
        "of the activations too. Goes with fsdp, which divides the parameters further among all that remain.",
        allowed=Whole(1),
        group=RUN,
    )
    timeout: float = option(
        TIMEOUT,
        "Seconds after which a process of torchrun that does not come, or does not answer, is an error.",
        allowed=Real(above=0),
        group=RUN,
    )
    config: Path | None = option(
        None,
        "A TOML file of options: keys as the options' names (n_layer for `n_layer`). Options beside it go before it.",
        group=RUN,
    )
    print_config: bool = option(False, "Print every option of the run as TOML, and start nothing.", group=RUN)
    async_save: bool = option(
        False,
        "Write checkpoints in a thread while training goes on, from a copy of weights and optimizer in memory (12 bytes a "
        "parameter; with fsdp, of each process's part).",
        group=RUN,
    )
    tensorboard: bool = option(False, "Write event files for TensorBoard to OUT/tensorboard too.", group=RUN)
    log_to: str | None = option(
        None,
        "Send the numbers of the log to this program too, by its own package and settings: tensorboard (as the option of that "
        "name), wandb or trackio.",
        words="no other",
        allowed=BOARDS,
        group=RUN,
    )
    find_batch_size: bool = option(
        False,
        "Before the first step try larger and larger passes and take the largest that fits into memory, with as many passes a "
        "step as keep `batch_size` * `grad_accum`.",
        group=RUN,
    )

    def __post_init__(self) -> None:
        check_fields("train", self)
        if self.tensor_parallel > 1 and self.parallel == "ddp":
            raise ValueError(
                f"train: `tensor_parallel` is {self.tensor_parallel} but `parallel` is ddp, where each process has the whole "
                "model; use `parallel` fsdp, or leave `tensor_parallel` out"
            )


def start_of(options: Mapping[str, Any]) -> str:
    """The key of `DEFAULTS` for the options that were given.

    Raises:
        ValueError: both a preset and a checkpoint; or a longer context of none.
    """
    extending = next((name for name in ("extend_context", "rope_scaling") if name in options), None)
    if extending is not None and not {"init_from", "extend_context"} <= {*options}:
        needed = "init_from" if "init_from" not in options else "extend_context"
        raise ValueError(f"train: `{extending}` goes with `{needed}`; give it too, or leave `{extending}` out")
    if extending is not None and "block_size" in options:
        raise ValueError("train: `extend_context` is the new `block_size`; leave `block_size` out")
    if "preset" in options and "init_from" in options:
        raise ValueError(
            "train: `preset` and `init_from` were both given; a checkpoint has its shape already - leave `preset` out"
        )
    return next((name for name in ("init_from", "preset") if name in options), "")


def check_effect(options: Mapping[str, Any]) -> None:
    """Refuse `reshard` where nothing is divided. Its default, which a file of options lists, passes; what a TrainConfig needs, that
    checks itself.

    Raises:
        ValueError: it has no effect.
    """
    default = default_of(RunOptions, "reshard")
    divides = (
        options.get("parallel") == "fsdp" or options.get("tensor_parallel", 1) > 1
    )  # tensor parallel ranks shard too
    if not divides and options.get("reshard", default) != default:
        raise ValueError(
            f"train: `reshard` is {options['reshard']}, but has no effect without `parallel` fsdp; give it too, or leave "
            "`reshard` out"
        )


def defaults_in_words() -> dict[str, str]:
    """The defaults that depend on the initial weights, in words, for --help."""
    names = dict.fromkeys(name for values in DEFAULTS.values() for name in values)
    return {name: _in_words(name) for name in names}


def _in_words(name: str) -> str:
    """Such as "32; 8 with `preset` or `init_from`"."""
    owner = next(cls for cls in (GPTConfig, DataOptions, TrainConfig) if name in cls.__dataclass_fields__)
    first = DEFAULTS[""].get(name)
    first = default_text(options_of(owner)[name], default_of(owner, name)) if first is None else format_value(first)
    others: dict[str, list[str]] = {}
    for start in ("preset", "init_from"):
        kept = first if owner is TrainConfig else "the model's own"
        value = DEFAULTS[start].get(name)
        text = kept if value is None else format_value(value)
        if text != first:
            others.setdefault(text, []).append(f"`{start}`")
    return "; ".join([first, *(f"{text} with {' or '.join(starts)}" for text, starts in others.items())])
