"""The options of `gptfast finetune` and of `finetune`, beside those of `TrainConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gptfast._options import Real, Whole, check_fields, describe_fields, format_value, option
from gptfast.finetuning.tasks import METRICS, TASKS
from gptfast.training.config import AUX_LOSS_COEF, TrainConfig
from gptfast.training.options import ROPE_SCALINGS, RUN, PlaceOptions

METHODS = ("full", "lora", "qlora", "prompt")
_ALL_METRICS = tuple(dict.fromkeys(name for names in METRICS.values() for name in names))
_TASK, _METHOD, _DATA = "The task", "The method", "Data"

# Fields of TrainConfig that are options.
TRAINING = (
    *("max_steps", "batch_size", "grad_accum", "learning_rate", "min_lr", "warmup_steps", "weight_decay", "grad_clip"),
    *("router_aux_loss_coef", "eval_every", "checkpoint_every", "patience", "log_every", "seed", "dtype", "device"),
    "recompute",
)
# Defaults of TrainConfig's fields by method, where they are not its own. Full: GPT-1's fine-tuning had 6.25e-5 and a decay
# of 0.01 (Radford et al. 2018, section 4.1). LoRA: that of GPT-2 (Hu et al., arXiv 2106.09685, table 11) for AdamW beside
# a new head. Prompt: Lester et al., arXiv 2104.08691, have 0.3 for Adafactor.
_COMMON: dict[str, Any] = {"batch_size": 16, "log_every": 10, "beta2": 0.999}
DEFAULTS: dict[str, dict[str, Any]] = {
    "full": {**_COMMON, "learning_rate": 1e-4, "weight_decay": 0.01},
    "lora": {**_COMMON, "learning_rate": 1e-3, "weight_decay": 0.0},
    "qlora": {**_COMMON, "learning_rate": 1e-3, "weight_decay": 0.0},
    "prompt": {**_COMMON, "learning_rate": 3e-2, "weight_decay": 0.0},
}
# What some options need: another option, with one of these values. Without it they would have no effect, and are refused.
_LORA, _WITH_HEAD = ("lora", "qlora"), tuple(METRICS)
NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "target_modules"), ("method", _LORA)),
    **dict.fromkeys(("quantize", "double_quant"), ("method", ("qlora", "prompt"))),
    "num_virtual_tokens": ("method", ("prompt",)),
    "router_aux_loss_coef": ("method", ("full", "lora")),  # qlora packs no experts; a soft prompt has tokens of its own
    **dict.fromkeys(("extend_context", "rope_scaling"), ("method", ("full",))),
    **dict.fromkeys(("metric", "lm_coef"), ("task", _WITH_HEAD)),
    "class_weights": ("task", ("classification", "entailment")),
}


@describe_fields
@dataclass(frozen=True)
class TaskOptions:
    """What is learnt, from which examples.

    Raises:
        TypeError, ValueError: a value of the wrong type, or that is not allowed.
    """

    model: str | None = option(
        None,
        "What to start from: a checkpoint FOLDER such as runs/bard/best, nanoGPT's ckpt.pt, or a hub id such as gpt2 or gpt2@REVISION. A "
        "checkpoint of the same task keeps its head.",
        words="needed, but with `resume`",
        group=_TASK,
    )
    data: str | None = option(
        None,
        "FILE of examples to learn from: a JSON object on each line, CSV or TSV, also packed (.gz, .xz, .zst), or Parquet. Its fields "
        "are those of the task; see above.",
        words="needed, but with `resume`",
        group=_DATA,
    )
    eval_data: str | None = option(
        None,
        "FILE of examples to judge by, which are not learnt from.",
        words="a tenth of `data`, drawn by `seed`",
        group=_DATA,
    )
    task: str | None = option(
        None, "What the examples teach.", words="needed, but with `resume`", allowed=TASKS, group=_TASK
    )
    tokenizer: str | None = option(
        None,
        "How to cut text into tokens: gpt2, or the FOLDER of a tokenizer.",
        words="the model's own",
        group=_DATA,
    )
    metric: str | None = option(
        None,
        "What decides which step is the best one.",
        words="accuracy; pearson for similarity; the loss for lm and chat",
        allowed=_ALL_METRICS,
        group=_TASK,
    )
    lm_coef: float | None = option(
        None,
        "Weight of the language-modelling loss beside that of the task (GPT-1 has 0.5). 0: none, as for a BERT.",
        words="0.5, for a BERT 0",
        allowed=Real(least=0),
        group=_TASK,
    )
    class_weights: str | None = option(
        None,
        "Weights of the classes in the loss, such as comedy=1,poetry=4; or balanced: classes with few examples weigh more.",
        words="1 each",
        group=_TASK,
    )

    def __post_init__(self) -> None:
        check_fields("finetune", self)
        _check_texts(self)


@describe_fields
@dataclass(frozen=True)
class MethodOptions:
    """How the model is changed.

    Raises:
        TypeError, ValueError: a value of the wrong type, or that is not allowed.
    """

    method: str = option(
        "full",
        "full: every weight is trained, and OUT holds a whole model. lora: small matrices beside the frozen ones "
        "(LoRA), and OUT holds these alone. qlora: as lora, on a base in 4 bits. prompt: some trained vectors before the "
        "text (a soft prompt), and nothing else.",
        allowed=METHODS,
        group=_METHOD,
    )
    lora_r: int = option(
        8, "Rank of LoRA's matrices: the larger, the more can be learnt.", allowed=Whole(1), group=_METHOD
    )
    lora_alpha: float = option(
        16.0, "LoRA's update is scaled by this over `lora_r`.", allowed=Real(above=0), group=_METHOD
    )
    lora_dropout: float = option(
        0.0,
        "Probability of dropping an input of LoRA's matrices in training.",
        allowed=Real(least=0, below=1),
        group=_METHOD,
    )
    target_modules: str = option(
        "all-linear",
        "Which layers get LoRA's matrices: names or endings such as c_attn,mlp.c_fc, a regular expression, or all-linear.",
        group=_METHOD,
    )
    quantize: str | None = option(
        None,
        "What `method` qlora, or prompt, holds the base's matrices in. nf4: bitsandbytes' 4 bits, for widths that are "
        "multiples of 64; int4, int8 and mxfp4 (gpt-oss' 4 bits): for any.",
        words="qlora nf4; prompt: as they are",
        allowed=("nf4", "int4", "int8", "mxfp4"),
        group=_METHOD,
    )
    double_quant: bool = option(
        True,
        "With `quantize` nf4: hold its scales in 8 bits too, as QLoRA does: 4.13 bits a weight, without it 4.5.",
        group=_METHOD,
    )
    dropout: float | None = option(
        None,
        "Dropout of the model while it is fine-tuned.",
        words="the model's own",
        allowed=Real(least=0, below=1),
        group=_METHOD,
    )
    extend_context: int | None = option(
        None,
        "The tokens that the model is to take, more than it takes now: learned positions are interpolated, rotary ones scaled. With "
        "`method` full alone, which keeps them.",
        words="the model's own",
        allowed=Whole(2),
        group=_METHOD,
    )
    rope_scaling: str | None = option(
        None,
        "With `extend_context`, how rotary positions are scaled: yarn, by parts; linear, all alike (position interpolation).",
        words="the model's own, else yarn",
        allowed=ROPE_SCALINGS,
        group=_METHOD,
    )
    num_virtual_tokens: int = option(
        20,
        "Length of the soft prompt of `method` prompt; texts have that much less room.",
        allowed=Whole(1),
        group=_METHOD,
    )

    def __post_init__(self) -> None:
        check_fields("finetune", self)
        _check_texts(self)
        if self.rope_scaling is not None and self.extend_context is None:
            raise ValueError(
                "finetune: `rope_scaling` goes with `extend_context`; give it too, or leave `rope_scaling` out"
            )

    @property
    def held_in(self) -> str | None:
        """The format of the base's matrices; None: as they are."""
        return {"qlora": self.quantize or "nf4", "prompt": self.quantize}.get(self.method)

    def loading(self) -> dict[str, Any]:
        """How the model is loaded: arguments of `from_pretrained` beside its dtype."""
        changes: dict[str, Any] = {} if self.dropout is None else {"dropout": self.dropout}
        for name in ("extend_context", "rope_scaling"):
            changes |= {} if getattr(self, name) is None else {name: getattr(self, name)}
        if self.held_in is not None:
            changes |= {"quantize": self.held_in, "double_quant": self.double_quant and self.held_in == "nf4"}
        return changes


@describe_fields
@dataclass(frozen=True)
class RunOptions(PlaceOptions):
    """Where a run is kept, and how long it is.

    Raises:
        TypeError, ValueError: a value of the wrong type, or that is not allowed.
    """

    out: Path = option(Path("runs/finetune"), "Folder for the result, checkpoints, log and plots.", group=RUN)
    epochs: float = option(
        3.0, "How often each example is seen; `max_steps` overrides it.", allowed=Real(above=0), group=RUN
    )
    resume: bool = option(False, "Continue the run in OUT, bit for bit, as if it had not been interrupted.", group=RUN)
    show_batch: bool = option(False, "Print the first rows before training, with what is learnt in colour.", group=RUN)
    compare: bool = option(
        False,
        "Run every method in a process of its own, in OUT/METHOD, and print a table: metric, trained parameters, peak "
        "memory, time.",
        group=RUN,
    )

    def __post_init__(self) -> None:
        check_fields("finetune", self)


def _check_texts(options: TaskOptions | MethodOptions) -> None:
    """Raise TypeError for what is no text, as from Python a model, or a list of modules."""
    for f in fields(options):
        value = getattr(options, f.name)
        if f.type in ("str", "str | None") and not isinstance(value, (str, type(None))):
            raise TypeError(f"finetune: {f.name} is a {type(value).__name__}; expected a text, as the command has it")


def of_method(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those that the method does not have."""
    alone = method == "prompt" and "quantize" not in options  # scales of a base that is not quantised
    given = {k: v for k, v in options.items() if NEEDS.get(k, ("", ()))[0] != "method" or method in NEEDS[k][1]}
    return {k: v for k, v in given.items() if not (alone and k == "double_quant")}


def check_effects(options: Mapping[str, Any], task: TaskOptions, method: MethodOptions) -> None:
    """Raise ValueError for an option that was given and has no effect with the task or the method of the run."""
    chosen = {"task": task.task, "method": method.method}
    for name in options:
        other, values = NEEDS.get(name, ("", ()))
        if other and chosen[other] not in values:
            packs = ", or take `method` qlora, which is lora on a quantised base" * (name == "quantize")
            raise ValueError(
                f"finetune: `{name}` has no effect with `{other}` {chosen[other]}; it is for {', '.join(values)} - leave it out{packs}"
            )
    if options.get("double_quant") and method.held_in != "nf4":
        raise ValueError(
            f"finetune: `double_quant` is for `quantize` nf4, got {method.held_in or 'none'}; say `quantize` nf4, or leave it out"
        )


def training_config(method: str, options: Mapping[str, Any], steps: int) -> TrainConfig:
    """The TrainConfig of a new run; what was not given has the method's default."""
    given = {name: value for name, value in options.items() if name in TRAINING}
    max_steps = given.pop("max_steps", steps)
    return TrainConfig(
        **{
            **DEFAULTS[method],
            "eval_every": max(1, -(-max_steps // 10)),
            **given,
            "max_steps": max_steps,
            "eval_batches": 0,
        }
    )


def defaults_in_words() -> dict[str, str]:
    """The defaults that depend on the method, in words, for --help."""
    rates = ", ".join(f"{method} {format_value(values['learning_rate'])}" for method, values in DEFAULTS.items())
    return {
        "max_steps": "as many as `epochs` need",
        "batch_size": format_value(_COMMON["batch_size"]),
        "learning_rate": rates,
        "weight_decay": "full 0.01, else 0",
        "router_aux_loss_coef": f"{AUX_LOSS_COEF:g} where routers are trained: a model with experts, `method` full; else 0",
        "eval_every": "a tenth of the steps",
        "warmup_steps": "a tenth of the steps, at most 100",
    }
