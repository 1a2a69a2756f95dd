"""From the options of `gptfast train` to a Trainer: a new run, or one that is resumed.

Options are a mapping of those that were given, by the names of the fields that describe them: `DataOptions`, `GPTConfig`,
`TrainConfig`, and those of `gptfast.training.options`. Messages put the names of options into `backquotes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from gptfast._files import absolute
from gptfast._locks import FileLock
from gptfast._options import default_of, options_of, values_of
from gptfast._presets import BERT as BERT_SHAPE
from gptfast._rope import RopeScaling
from gptfast.config import GPTConfig
from gptfast.data import PreparedData
from gptfast.data.options import DataOptions
from gptfast.models import BERT, GPT, load_model
from gptfast.training.checkpoint import Checkpoint, check_source, read_checkpoint
from gptfast.training.checks import check_ranks
from gptfast.training.config import TrainConfig
from gptfast.training.find_batch import fitted
from gptfast.training.fingerprint import fingerprint
from gptfast.training.kept import newest_intact
from gptfast.training.options import SHAPE, RunOptions, check_effect, defaults_of
from gptfast.training.ranks import Ranks
from gptfast.training.resuming import MAY_CHANGE, refuse_changes
from gptfast.training.run import Run
from gptfast.training.run_data import open_run_data, reopened
from gptfast.training.run_folder import check_room, locked_run
from gptfast.training.tokenizer_choice import check_ids, tokenizer_of
from gptfast.training.trainer import Trainer
from gptfast.training.values import Values, initial, stored

Options = Mapping[str, Any]

_TRAIN = tuple(options_of(TrainConfig))
_MAY_CHANGE = MAY_CHANGE | {
    *("max_minutes", "lr_decay_steps", "eval_batches", "keep_last", "on_spike"),
    *("data", "tensorboard", "parallel", "timeout"),
    *("reshard", "async_save", "tensor_parallel"),
    *("log_to", "find_batch_size", "compile"),
}


def new_run(options: Options, ranks: Ranks | None = None) -> Run:
    """A run from the beginning.

    Args:
        options: those that were given.
        ranks: the processes of the run; None: this one alone.
    Raises:
        OSError, TypeError, ValueError, ImportError: an option or the data is wrong.
        BlockingIOError: another process trains in the folder.
    """
    options = {"data": default_of(DataOptions, "data"), **options}
    check_effect(options)
    place = RunOptions(**values_of(RunOptions, options))
    if ranks is not None:
        check_ranks(_train_config({**defaults_of(options), **options}), ranks)  # before anything is written
    if ranks is not None and not ranks.is_main:
        return _new_run(options, place, None, ranks)
    with locked_run(place.out) as lock:
        check_room(place.out, place.overwrite)  # before the tokens in OUT/data are replaced
        return _new_run(options, place, lock, ranks)


def resumed_run(options: Options, ranks: Ranks | None = None, finished_too: bool = False) -> Run:
    """The run in the folder `out`, from its last checkpoint on.

    Args:
        options: those that were given.
        ranks, finished_too: as in `Trainer`.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: an option that cannot change when a run is resumed, or other data.
        OSError, TypeError, ImportError, BlockingIOError: as `new_run`.
    """
    place = RunOptions(**values_of(RunOptions, options))
    if not place.out.is_dir():
        read_checkpoint(place.out / "last")  # raises FileNotFoundError
    if ranks is not None and not ranks.is_main:
        return _resumed_run(options, place, None, ranks, finished_too)
    with locked_run(place.out) as lock:
        return _resumed_run(options, place, lock, ranks, finished_too)


def _new_run(options: Options, place: RunOptions, lock: FileLock | None, ranks: Ranks | None) -> Run:
    defaults = defaults_of(options)
    config = _train_config({**defaults, **options})
    _check_direction(options, config)
    place.set_threads()
    model = _load(options["init_from"], ranks)[0] if "init_from" in options else None
    tokenizer = tokenizer_of(options, model)
    data = open_run_data(options, place.out, tokenizer, _speaks(ranks))
    if model is not None:
        check_ids(options, data)
    positions = None if model is None else model.config.block_size
    if model is None:
        model, values = _untrained(options, defaults, data, config.seed, ranks)
    else:
        model, values = _reshaped(model, options, defaults, ranks)
    size, note = model.config.block_size, ""
    if positions is not None and size < positions:
        note = f"`block_size` {size}: the first of the {positions} positions of {options['init_from']}"
    elif "extend_context" in options:
        note = f"its context of {positions} tokens is extended to {size}: {_how(model.config)}"
    kept = {name: value for name, value in options.items() if name not in _MAY_CHANGE}
    source = {
        "data": absolute(options["data"]),
        "options": {**kept, "tokenizer": tokenizer},
        "marks": fingerprint(data),
    }
    more = {"source": source, "overwrite": place.overwrite, "lock": lock, "ranks": ranks, "values": values}
    run = _run(model, data, config, place, **more)
    return replace(run, note=note)


def _speaks(ranks: Ranks | None) -> bool:
    return ranks is None or ranks.is_main


def _check_direction(options: Options, config: TrainConfig) -> None:
    """Refuse an objective and a preset that do not go together, before the data is prepared."""
    if "preset" not in options:
        return
    causal = GPTConfig.preset(options["preset"]).causal
    if causal == (config.objective == "mlm"):
        why = "sees no later tokens" if causal else "sees the token that it is to predict"
        raise ValueError(
            f"train: `objective` is {config.objective}, but every position of `preset` {options['preset']} {why}; use "
            f"`objective` {'lm' if causal else 'mlm'}, or another preset"
        )


def _resumed_run(
    options: Options, place: RunOptions, lock: FileLock | None, ranks: Ranks | None, finished_too: bool
) -> Run:
    checkpoint, damage = newest_intact(place.out)
    last = checkpoint.folder
    source = check_source(checkpoint)
    place.set_threads(checkpoint.threads)
    model, values = _load(last, ranks)
    _refuse_changes(options, place, checkpoint, model)
    config = checkpoint.config.replace(**{k: v for k, v in options.items() if k in _TRAIN and k in _MAY_CHANGE})
    data, note = reopened(options, checkpoint, place.out, _speaks(ranks))
    more = {"source": source, "resume": checkpoint, "lock": lock, "ranks": ranks, "finished_too": finished_too}
    return replace(_run(model, data, config, place, values=values, **more), note=note, damage=tuple(damage))


def _load(path: Any, ranks: Ranks | None, **changes: Any) -> tuple[GPT | BERT, Values | None]:
    """The model of a checkpoint with its weights; where these are divided, one without, and what reads them."""
    if ranks is not None and ranks.sharding:
        return stored(path, **changes)
    return load_model(path, dtype=torch.float32, **changes), None


def _run(model: GPT | BERT, data: PreparedData, config: TrainConfig, place: RunOptions, **others: Any) -> Run:
    fit = ""
    if place.find_batch_size:
        if not isinstance(model, GPT):
            raise ValueError("train: `find_batch_size` is for `objective` lm; choose `batch_size` yourself")
        config, fit = fitted(model, config, others.get("ranks"))
    trainer = Trainer(
        model,
        data.train,
        data.val,
        config,
        place.out,
        tokenizer=data.tokenizer,
        tensorboard=place.tensorboard,
        async_save=place.async_save,
        log_to=place.log_to,
        **others,
    )
    return Run(trainer, data, others.get("resume"), fit=fit)


def _train_config(options: Options) -> TrainConfig:
    chosen = {name: value for name, value in options.items() if name in _TRAIN and name != "block_size"}
    if "max_minutes" in chosen:
        chosen.setdefault("max_steps", None)
    return TrainConfig(**chosen)


def _untrained(
    options: Options, defaults: dict[str, Any], data: PreparedData, seed: int, ranks: Ranks | None
) -> tuple[GPT | BERT, Values | None]:
    shape = {name: options[name] for name in SHAPE if name in options}
    vocab_size, eos = data.tokenizer.vocab_size, data.tokenizer.eos_id
    if "preset" in options:
        config = GPTConfig.preset(options["preset"], **shape, vocab_size=vocab_size)
    else:
        sizes = {name: value for name, value in {**defaults, **shape}.items() if name in SHAPE}
        network = BERT_SHAPE if options.get("objective") == "mlm" else {}
        config = GPTConfig(**sizes, **network, vocab_size=vocab_size)
    torch.manual_seed(seed)
    divided = ranks is not None and bool(ranks.sharding)
    kind = GPT if config.causal else BERT
    model, draw = initial(config, seed) if divided and config.causal else (kind(config), None)
    if config.causal:
        model.metadata.config = {} if eos is None else {"bos_token_id": eos, "eos_token_id": eos}
    return model, draw


def _reshaped(
    model: GPT | BERT, options: Options, defaults: dict[str, Any], ranks: Ranks | None
) -> tuple[GPT | BERT, Values | None]:
    """A loaded model with another dropout, a smaller block_size or a longer context; its other sizes stay.

    Raises:
        ValueError: another size was given, or more positions than the model has learnt.
    """
    for name in ("n_layer", "n_head", "n_embd"):
        stored = getattr(model.config, name)
        if options.get(name, stored) != stored:
            raise ValueError(
                f"train: `{name}` is {options[name]} but {options['init_from']} has {stored}, which it keeps; leave it out"
            )
    size, longest = options.get("block_size", 0), model.config.block_size
    if size > longest and model.config.position_embedding == "learned":
        raise ValueError(
            f"train: `block_size` is {size} but {options['init_from']} has learnt {longest} positions; leave it out, give "
            f"at most {longest}, or interpolate them with `extend_context` {size}"
        )
    changes = {"dropout": options.get("dropout", defaults["dropout"])}
    changes |= {name: options[name] for name in ("extend_context", "rope_scaling") if name in options}
    if "block_size" in options:
        changes["block_size"] = options["block_size"]
    return _load(options["init_from"], ranks, **changes)


def _how(config: GPTConfig) -> str:
    scaling = RopeScaling.of(config.rope_scaling)
    if scaling is None:
        return "learned positions are interpolated"
    return f"rotary positions are scaled by {scaling.factor:g} ({scaling.rope_type})"


def _refuse_changes(options: Options, place: RunOptions, checkpoint: Checkpoint, model: GPT | BERT) -> None:
    stored = {**vars(checkpoint.config), **vars(model.config), "dropout": model.config.resid_pdrop}
    stored |= checkpoint.source["options"]
    remedy = f"start a new run with `init_from` {checkpoint.folder}"
    refuse_changes("train", options, stored, _MAY_CHANGE, f"the run in {place.out}", remedy)
