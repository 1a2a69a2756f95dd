"""Reading the folder of an adapter for a compiled model, whose base has no modules."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from gptfast.checkpoints.adapter_config import LoraConfig
from gptfast.checkpoints.adapter_files import PROMPT, WEIGHTS, check_prompt, open_adapter, our_key
from gptfast.checkpoints.prompt_config import HEADS, PromptTuningConfig, check_fits
from gptfast.config import GPTConfig
from gptfast.nn.adapted import number_of


class Update(NamedTuple):
    """A low-rank update of a matrix: scale B A. number: of the matrix, see `number_of`."""

    number: int
    scale: float
    a: Tensor
    b: Tensor


def read_adapter(path: str | os.PathLike[str], config: GPTConfig, mark: str, any_base: bool) -> list[Update] | Tensor:
    """The updates, or the vectors of a soft prompt, in a folder of `GPT.save_adapter` or of peft; see `CompiledGPT.load_adapter`.

    Args:
        path: the folder.
        config: of the base.
        mark: of the base, as in `gptfast.models.adapters.files.base_mark`; "": unknown.
        any_base: whether to take an adapter of another base.
    """
    folder = Path(path)
    file = open_adapter(folder)
    if not any_base:
        file.check_base(mark)
    lora = file.config
    for key in file.weights.shapes:
        if our_key(key).startswith(tuple(f"{head}." for head in HEADS)):
            raise ValueError(
                f"{folder} holds {key}, the head of a task, which a packed base does not have; "
                "gptfast.finetuning.TaskModel.from_pretrained reads the adapter with it"
            )
    if isinstance(lora, PromptTuningConfig):
        tensors = file.tensors()
        check_fits(config, lora)
        check_prompt(config.n_embd, lora, tensors, folder)
        for key in tensors.keys() & {"wte.weight", "lm_head.weight"}:
            raise ValueError(
                f"{folder} holds {key}, with rows for new tokens, which a packed base does not have; load the adapter into a GPT, "
                "which runs it in torch"
            )
        for key in tensors:
            if key != PROMPT:
                raise ValueError(f"{folder}: the adapter does not fit this model: {key} is unexpected")
        return tensors[PROMPT]
    factors: dict[str, dict[str, Tensor]] = {}
    for key, x in file.stored():
        module, _, kind = our_key(key).removesuffix(".weight").rpartition(".")
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
    number = number_of(module, config.n_layer)
    if number is not None and config.n_expert is not None and number < 4 * config.n_layer and number % 4 > 1:
        number = None  # experts have no such matrices
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


def size_of(config: GPTConfig, number: int) -> tuple[int, int]:
    """(N, K) of the matrix of a number, see `number_of`."""
    C = config.n_embd
    if number == 4 * config.n_layer:
        return config.vocab_size, C
    return ((config.qkv_dim, C), (C, config.attn_dim), (config.fc_dim, C), (C, config.inner_dim))[number % 4]
