"""Loading checkpoints in the Hugging Face layout: config.json and safetensors. Nothing is ever unpickled."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptfast._files import read_json
from gptfast._folders import finish_staged
from gptfast.models import hf_layout
from gptfast.models.config import GPTConfig
from gptfast.models.export import CONFIG, INDEX, SINGLE
from gptfast.nn.position import SinusoidalEmbedding

if TYPE_CHECKING:
    from gptfast.models.gpt import GPT

_HUB_FILES = [
    *(CONFIG, "model*.safetensors", INDEX),
    *("vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json"),
]


def load(cls: type[GPT], path: str | os.PathLike[str], dtype: torch.dtype | None, overrides: dict[str, Any]) -> GPT:
    """A model in evaluation mode, from a checkpoint folder or a Hugging Face hub id (call .train() to train
    it).

    Args:
        cls: GPT or a subclass.
        path: folder with config.json and safetensors of a gpt2 or openai-gpt model, ours or transformers'; or
            a hub id such as "openai-community/gpt2" (needs huggingface-hub).
        dtype: of the weights; None: as stored.
        overrides: fields of GPTConfig to change, such as dropout=0.0; a smaller block_size cuts the position
            embedding.
    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: damaged or truncated file, another architecture, tensors that are missing, too many or
            ill-shaped.
        ImportError, OSError: a hub id without huggingface-hub, or without a connection.
    """
    folder = resolve(path)
    stored = read_config(folder)
    config = stored.replace(**overrides)
    with torch.device("meta"):
        model = cls(config)
    model.load_state_dict(_read_weights(folder, model, stored.block_size, dtype), assign=True)
    model.tie_weights()
    if config.position_embedding == "sinusoidal":
        model.wpe = SinusoidalEmbedding(config.block_size, config.n_embd).to(model.wte.weight.dtype)
    return model.eval()


def read_config(folder: Path) -> GPTConfig:
    """The configuration of a checkpoint folder; raises as `load`."""
    file = folder / CONFIG
    values = hf_layout.from_hf(read_json(file), file)
    try:
        return GPTConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def resolve(path: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint: `path` itself, or where huggingface-hub keeps the model of that id."""
    folder = Path(path)
    if folder.is_dir():
        finish_staged(folder)
        return folder
    if folder.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", str(path)):
        raise FileNotFoundError(f"{path} is not a folder; expected a checkpoint folder with {CONFIG} and {SINGLE}")
    return _download(str(path))


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"there is no folder {hub_id!r} here, and to load it from the Hugging Face hub "
            "huggingface-hub is needed: pip install huggingface-hub"
        ) from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except OSError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OSError(
            f"there is no folder {hub_id!r} here, and it could not be fetched from the Hugging Face hub "
            f"({reason}); check the name and the connection, or copy the checkpoint here and give its folder"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        FileNotFoundError: none, or a shard that the index names is missing.  ValueError: damaged index.
    """
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if (folder / INDEX).exists():
        return _shards(folder)
    pickled = sorted(f.name for f in folder.glob("*.bin"))
    remedy = (
        f"{pickled[0]} is a pickle, which can run any program and is never loaded; convert it where you "
        f"trust it: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(...)"
        if pickled
        else "copy the weights of the checkpoint there"
    )
    raise FileNotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}; {remedy}")


def _shards(folder: Path) -> list[Path]:
    raw = read_json(folder / INDEX)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or any(not isinstance(n, str) or n != os.path.basename(n) for n in names):
        raise ValueError(f"{folder / INDEX}: weight_map does not map tensors to files beside it; copy the index again")
    names = sorted(set(names))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)} of the {len(names)} shards in {INDEX}; copy the rest"
        )
    return [folder / name for name in names]


def _read_weights(folder: Path, model: GPT, rows: int, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """state_dict of `model` (on the meta device) from the files of `folder`, all of it checked.

    `rows` is the block_size of the file; a model with a shorter one takes the first positions.
    """
    config = model.config
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if config.position_embedding == "learned" and config.block_size < rows:
        shapes["wpe.weight"] = (rows, config.n_embd)
    state: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, stored in _stored_tensors(folder):
        name = hf_layout.from_file(key)
        if name is None:
            continue
        problem = _problem(name, stored, shapes, config)
        if problem:
            problems.append(f"{key} {problem}")
        elif name in shapes:
            x = stored.t() if hf_layout.is_conv1d(name) else stored
            x = x[: config.block_size] if name == "wpe.weight" else x
            state[name] = torch.empty(x.shape, dtype=dtype or x.dtype).copy_(x)
    problems = problems or _tie(state, config) or _missing(state, shapes, config)
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"{folder}: the weights do not fit {CONFIG}: {'; '.join(problems[:4])}{more}; use the {CONFIG} "
            "and the weights of one checkpoint"
        )
    return state


def _tie(state: dict[str, Tensor], config: GPTConfig) -> list[str]:
    """Let the head be the embedding, if the config ties them; a file that stores both must agree."""
    if not config.tie_weights or "wte.weight" not in state:
        return []
    head = state.setdefault("lm_head.weight", state["wte.weight"])
    if torch.equal(head, state["wte.weight"]):
        return []
    return ["lm_head.weight differs from wte.weight, to which the config ties it (load with tie_weights=False?)"]


def _missing(state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], config: GPTConfig) -> list[str]:
    kind = hf_layout.model_type(config)
    return [f"{hf_layout.to_file(name, kind)} is missing" for name in shapes if name not in state]


def _problem(name: str, stored: Tensor, shapes: dict[str, tuple[int, ...]], config: GPTConfig) -> str | None:
    """What is wrong with a stored tensor, or None."""
    if not stored.is_floating_point():
        return f"has dtype {stored.dtype}; expected a float dtype"
    if name not in shapes:
        if config.bias or not name.endswith("bias"):
            return "is unexpected"
        return "is not zero, but the config says bias=false" if stored.any() else None
    expected = shapes[name][::-1] if hf_layout.is_conv1d(name) else shapes[name]
    if tuple(stored.shape) != expected:
        return f"has shape {tuple(stored.shape)}; expected {expected}"
    return None


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a dict
                    yield key, tensors.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or cut short ({error}); copy or download the file again") from error
