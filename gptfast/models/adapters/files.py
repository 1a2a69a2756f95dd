"""Adapters of a model from and to folders in peft's format, see `gptfast.checkpoints.adapter_files`."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gptfast._folders import staged_folder
from gptfast._snapshots import ADAPTER, current
from gptfast.checkpoints import hf_layout
from gptfast.checkpoints.adapter_config import AdapterConfig, LoraConfig, by_pattern, to_peft
from gptfast.checkpoints.adapter_files import (
    CONFIG,
    MARK,
    PREFIX,
    PROMPT,
    QUANTIZED,
    WEIGHTS,
    check_prompt,
    open_adapter,
    our_key,
)
from gptfast.checkpoints.prompt_config import HEADS, PromptTuningConfig
from gptfast.metadata import GENERATION, metadata_of
from gptfast.models.adapters import attached, prompts
from gptfast.models.adapters.targets import adapter_kind, as_peft_has_them, file_name
from gptfast.models.export import write_json, write_tensors
from gptfast.models.quantized import mark_of, sample
from gptfast.nn.adapted import adapter_modules
from gptfast.nn.difference import is_tied
from gptfast.nn.selection import known_adapters
from gptfast.nn.soft_prompt import prompts_of
from gptfast.nn.transformer import Transformer

TABLES = ("wte", "lm_head")


def base_mark(model: Transformer) -> str:
    """Tells the base of an adapter from others: a checksum of numbers of its blocks' matrices, rounded to bfloat16, so that
    the dtype in which it is loaded does not matter, nor whether it is quantised."""
    if model.quantized_mark:
        return model.quantized_mark
    named = ((n, x) for n, x in model.h.named_parameters() if x.dim() == 2 and not x.is_meta)
    own = adapter_modules(model.h)
    return mark_of(sample(x) for n, x in named if n.rpartition(".")[0] not in own)


def save(
    model: Transformer, folder: str | os.PathLike[str], name: str, elsewhere: Collection[int] = frozenset()
) -> None:
    """Write an adapter; see `GPT.save_adapter`. elsewhere: tokens whose rows another file holds."""
    attached.check_not_merged(model, "save_adapter")
    state = attached.adapters_of(model, "save_adapter")
    (name,) = known_adapters("save_adapter", state.names, name)
    config = state.configs[name]
    tensors = {key: _to_file(key, p.detach()).to("cpu", copy=True).contiguous() for key, p in _stored(model, name)}
    base = _base_of(model, config)
    if isinstance(config, PromptTuningConfig):
        raw = to_peft(config, **base, **prompts.filled_in(model, config))
    else:
        raw = to_peft(config, **base, **_fields(model, config, attached.adapted_paths(model, name)))
    if getattr(model, "new_rows", frozenset()) - frozenset(elsewhere):
        tensors |= _new_rows(model, name)
    beside = current(Path(folder), hf_layout.CONFIG).is_file()  # a model: a generation_config.json there is its own
    with staged_folder(folder, replaces=ADAPTER if beside else rf"{ADAPTER}|{re.escape(GENERATION)}") as stage:
        write_json(stage / CONFIG, raw)
        if not beside and (generation := metadata_of(model).of_adapter(name).to_write()) is not None:
            write_json(stage / GENERATION, generation)
        held = state.quantized.get(name)
        write_tensors(stage / WEIGHTS, tensors, {MARK: state.base} | ({QUANTIZED: held} if held else {}))


def _base_of(model: Any, config: AdapterConfig) -> dict[str, str | None]:
    """Where the base is, as the configuration says it, else as the model knows it."""
    own = getattr(model, "name_or_path", None)
    place, revision = config.base_model_name_or_path or own, config.revision
    if revision is None and place == own:
        revision = getattr(model, "revision", None)
    return {"base_model_name_or_path": place, "revision": revision}


def _fields(model: Transformer, config: LoraConfig, paths: list[str]) -> dict[str, Any]:
    """The fields of a configuration as transformers calls the modules."""
    conv1d = any(hf_layout.is_conv1d(path + ".weight") for path in paths)
    return {
        "target_modules": as_peft_has_them(model, config, paths),
        "fan_in_fan_out": conv1d and adapter_kind(model) != "gptfast",
        "modules_to_save": [_in_file(model, m) for m in config.modules_to_save or []] or None,
        "rank_pattern": _patterns(model, config.rank_pattern, config.r, {p: config.rank_of(p) for p in paths}),
        "alpha_pattern": _patterns(
            model, config.alpha_pattern, config.lora_alpha, {p: config.alpha_of(p) for p in paths}
        ),
    }


def _patterns(model: Transformer, given: Mapping[str, Any], default: float, meant: dict[str, Any]) -> dict[str, Any]:
    """Patterns for the file: as given, where they mean the same under transformers' names, else every name. meant: by path."""
    named = {file_name(model, path): value for path, value in meant.items()}
    same = all(by_pattern(given, [name], default) == value for name, value in named.items())
    return dict(given) if same else named


def head_prefix(model: Transformer, name: str) -> str:
    """What peft has before the name of a head in the file of an adapter: it puts a soft prompt around the model itself."""
    return PREFIX.removesuffix("model.") if name in prompts_of(model) else PREFIX


def load(model: Transformer, folder: str | os.PathLike[str], name: str, any_base: bool) -> dict[str, Tensor]:
    """Read an adapter into a model; see `GPT.load_adapter`. A failure leaves the model as it was.

    Returns:
        The tensors of a task's head, which a GPT does not have: "score.weight" or those of DoubleHeadsModel.
    """
    attached.check_not_merged(model, "load_adapter")
    folder = Path(folder)
    file = open_adapter(folder)
    config, told = file.config, file.told
    config.inference_mode = False  # every file says True; peft asks `is_trainable` instead, and ours are trained
    mine = model.adapters.base if isinstance(model.adapters, attached.Adapters) else base_mark(model)
    if not any_base:
        file.check_base(mine)
    stored = file.tensors()
    heads = {key: stored.pop(key) for key in list(stored) if key.startswith(tuple(f"{head}." for head in HEADS))}
    tensors = _of_adapter(model, stored, folder)
    tables: list[str] = []
    if isinstance(config, PromptTuningConfig):
        check_prompt(model.config.n_embd, config, tensors, folder)
        tables = _tables(model, tensors)
    else:
        config.modules_to_save = [m for m in config.modules_to_save or [] if m.rpartition(".")[2] not in HEADS] or None
        config.modules_to_save = _copies(model, config, tensors)
    before = None if model.adapters is None else (model.adapters.active, model.adapters.enabled)
    with torch.random.fork_rng(devices=[]):
        attached.add(model, config, name, mine, blank=True, tables=tables)
    if told.get(QUANTIZED):
        attached.adapters_of(model, "load_adapter").quantized[name] = told[QUANTIZED]
    try:
        _fill(model, name, tensors, folder)
    except ValueError:
        attached.delete(model, name)
        if before is not None and model.adapters is not None:
            attached.activate(model, before[0])
            model.adapters.enabled = before[1]
        raise
    return heads


def _of_adapter(model: Transformer, tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The tensors without those of the base that peft stores beside them: what modules_to_save covers, and the weight of an
    embedding or head that has updates, which must be this model's."""
    left: dict[str, Tensor] = {}
    for key, x in tensors.items():
        path, _, of_base = key.rpartition(".base_layer.")
        if of_base == "weight":
            mine = model.get_parameter(f"{path}.weight") if path in ("wte", "lm_head") else None
            if mine is None or mine.shape != x.shape or not torch.equal(mine.detach().cpu(), x.to(mine.dtype)):
                raise ValueError(
                    f"{folder}: the adapter was trained on another {path}.weight than this model's; load its base"
                )
        elif ".original_module." not in key and key.replace(".modules_to_save.", ".") not in tensors.keys() - {key}:
            left[key] = x
    return left


def _copies(model: Transformer, config: LoraConfig, tensors: dict[str, Tensor]) -> list[str] | None:
    """`modules_to_save` under our names; embeddings that peft stores because they were resized count as copies too."""
    names = {"tokens_embed": "wte", "wte": "wte", "lm_head": "lm_head"}
    named = [names.get(entry.removeprefix("transformer."), entry) for entry in config.modules_to_save or []]
    extra = [n for n in _stored_tables(model, tensors) if n not in named]
    if config.ensure_weight_tying and "lm_head.weight" not in tensors:
        config.ensure_weight_tying = (
            False  # peft knows embed_tokens and lm_head, and leaves GPT-2's head untied beside wte
        )
    if not (config.ensure_weight_tying and "wte" in named and is_tied(model)):
        named += extra
    return named or None


def _tables(model: Transformer, tensors: dict[str, Tensor]) -> list[str]:
    """The embedding and the head in the file of a soft prompt. Where they are the model's own, they are taken out of `tensors`."""
    found = _stored_tables(model, tensors)
    for path in found:
        mine, x = model.get_parameter(f"{path}.weight").detach(), tensors[f"{path}.weight"]
        if mine.is_meta or mine.shape != x.shape or not torch.equal(mine.cpu(), x.to(mine.dtype)):
            return found
    for path in found:
        del tensors[f"{path}.weight"]
    return []


def _stored_tables(model: Transformer, tensors: dict[str, Tensor]) -> list[str]:
    """Which of the embedding and the head a file has. Raises ValueError for another number of tokens than the model's."""
    found = [n for n in TABLES if f"{n}.weight" in tensors]
    for count in {tensors[f"{n}.weight"].shape[0] for n in found} - {model.config.vocab_size}:
        raise ValueError(
            f"load_adapter: the adapter has embeddings of {count} tokens and the model {model.config.vocab_size}; call "
            f"model.resize_token_embeddings({count}) first"
        )
    return found


def _in_file(model: Transformer, name: str) -> str:
    """An entry of `modules_to_save` as transformers calls the module."""
    own = name.removeprefix("transformer.")
    return file_name(model, own).removeprefix("transformer.") if own in ("wte", "lm_head") else name


def _stored(model: Transformer, name: str) -> Iterator[tuple[str, Tensor]]:
    """The parameters of an adapter by their keys in the file."""
    if name in prompts_of(model):
        yield PROMPT, prompts_of(model)[name].embedding.weight
        copies = {
            cast(Tensor, copy.weight): n for n in reversed(TABLES) if (copy := _copy_of(model, n, name)) is not None
        }
        for copy, path in copies.items():  # of a tied head and its embedding that of the embedding
            yield f"{head_prefix(model, name)}{file_name(model, path)}.weight", copy
        return
    targeted = attached.adapted_paths(model, name)
    for key, parameter in attached.parameters_of(model, name):
        path, own = key, key.rpartition(".")[2]
        for kind in ("lora_A", "lora_B", "modules_to_save"):
            if f".{kind}.{name}." in key:
                path = key.partition(f".{kind}.{name}.")[0]
                own = own if kind == "modules_to_save" else f"{kind}.{own}"
                break
        else:
            path = key.removesuffix(".bias")
            own = "base_layer.bias" if path in targeted else "bias"
        yield f"{PREFIX}{file_name(model, path)}.{own}", parameter


def _copy_of(model: Transformer, path: str, name: str) -> nn.Module | None:
    """The copy of a module that an adapter has, or None."""
    copies = model.get_submodule(path)._modules.get("modules_to_save")
    return copies[name] if isinstance(copies, nn.ModuleDict) and name in copies else None


def _new_rows(model: Transformer, name: str) -> dict[str, Tensor]:
    """The embedding and the head of a base with rows for new tokens, where the adapter has no copy of them; as peft stores
    them, from which loading makes some."""
    targeted, prompt = attached.adapted_paths(model, name), name in prompts_of(model)
    found = {}
    for path in TABLES:
        if _copy_of(model, path, name) is None and not (prompt and path == "lm_head" and is_tied(model)):
            key = (
                f"{head_prefix(model, name)}{file_name(model, path)}{'.base_layer' if path in targeted else ''}.weight"
            )
            found[key] = model.get_parameter(f"{path}.weight").detach().to("cpu", copy=True).contiguous()
    return found


def _to_file(key: str, x: Tensor) -> Tensor:
    return x.t() if hf_layout.is_conv1d(key) else x  # of modules_to_save: A and B lie as in a Linear


def _fill(model: Transformer, name: str, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy the tensors of a file into an adapter, all of them checked first."""
    wanted = {our_key(key): (key, parameter) for key, parameter in _stored(model, name)}
    problems = [f"{key} is unexpected" for key in tensors if key not in wanted]
    pairs: list[tuple[Tensor, Tensor]] = []
    for ours, (key, parameter) in wanted.items():
        if ours not in tensors:
            if ours != "lm_head.weight":  # a tied head may be stored once
                problems.append(f"{key} is missing")
            continue
        x = _to_file(key, tensors[ours])
        if x.shape != parameter.shape or not x.is_floating_point():
            problems.append(f"{key} is {tuple(x.shape)}, {x.dtype}, and this model has {tuple(parameter.shape)}")
        pairs.append((parameter, x))
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{folder}: the adapter does not fit this model: {'; '.join(problems[:3])}{more}; load the base that it was trained on"
        )
    with torch.no_grad():
        for parameter, x in pairs:
            parameter.copy_(x)
