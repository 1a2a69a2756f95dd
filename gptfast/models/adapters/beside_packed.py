"""Reading the folder of an adapter for a compiled model, whose base has no modules."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from gptfast._snapshots import current, read_whole
from gptfast.config import GPTConfig
from gptfast.engine.adapters import Update, size_of
from gptfast.models.adapters.config import LoraConfig
from gptfast.models.adapters.files import CONFIG, MARK, WEIGHTS, _opened, _our_key
from gptfast.models.adapters.prompt_config import PromptTuningConfig
from gptfast.models.adapters.prompts import KEY, check_file, check_fits

KINDS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def read_adapter(path: str | os.PathLike[str], config: GPTConfig, mark: str, any_base: bool) -> list[Update] | Tensor:
    """The updates, or the vectors of a soft prompt, in a folder of `GPT.save_adapter` or of peft; see `CompiledGPT.load_adapter`.

    Args:
        path: the folder.
        config: of the base.
        mark: of the base, as in `files.base_mark`; "": unknown.
        any_base: whether to take an adapter of another base.
    """
    folder = Path(path)
    if not current(folder, CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}; expected the folder of an adapter")
    lora, weights, told = read_whole(folder, lambda: _opened(folder))
    theirs = told.get(MARK)
    if theirs and mark and theirs != mark and not any_base:
        raise ValueError(
            f"{folder}: the adapter was trained on another base: {theirs} is not this model's {mark}; load its own base, or "
            "say any_base=True"
        )
    if isinstance(lora, PromptTuningConfig):
        tensors = {_our_key(key): x for key, x in weights.tensors()}
        check_fits(config, lora)
        check_file(config, lora, tensors, folder)
        return tensors[KEY]
    factors: dict[str, dict[str, Tensor]] = {}
    for key, x in weights.tensors():
        module, _, kind = _our_key(key).removesuffix(".weight").rpartition(".")
        if kind not in ("lora_A", "lora_B"):
            raise ValueError(
                f"{folder} holds {key}: of modules_to_save and biases a packed base has one for all; load the adapter into a "
                "GPT, merge it and compile that"
            )
        factors.setdefault(module, {})[kind] = x
    if not factors:
        raise ValueError(f"{folder}: {WEIGHTS} holds no updates; the adapter is damaged")
    return [_update(folder, config, module, found, lora) for module, found in factors.items()]


def _update(folder: Path, config: GPTConfig, module: str, found: dict[str, Tensor], lora: LoraConfig) -> Update:
    number = _number(config, module)
    a, b = found.get("lora_A"), found.get("lora_B")
    if number is None or a is None or b is None:
        what = "no matrix of this model" if number is None else "without one of its two factors"
        raise ValueError(f"{folder}: the adapter does not fit this model: {module} is {what}")
    N, K = size_of(config, number)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != K or b.shape[0] != N or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{folder}: the adapter does not fit this model: A and B of {module} are {tuple(a.shape)} and {tuple(b.shape)}; "
            f"expected (r, {K}) and ({N}, r)"
        )
    return Update(number, lora.scale_of(module), a, b)


def _number(config: GPTConfig, module: str) -> int | None:
    """Of a matrix, as in `Update`."""
    if module == "lm_head":
        return 4 * config.n_layer
    parts = module.split(".", 2)
    if len(parts) < 3 or parts[0] != "h" or not parts[1].isdigit() or parts[2] not in KINDS:
        return None
    return 4 * int(parts[1]) + KINDS.index(parts[2]) if int(parts[1]) < config.n_layer else None
