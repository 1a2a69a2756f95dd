"""Where a checkpoint is: a folder, nanoGPT's ckpt.pt, or a model of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gptfast._json import read_json
from gptfast._snapshots import current, read_whole
from gptfast.checkpoints.hf_layout import CONFIG
from gptfast.checkpoints.weight_files import INDEX, OLD_INDEX, SINGLE, has_safetensors
from gptfast.metadata import GENERATION
from gptfast.models import nanogpt

ADAPTER = "adapter_config.json"
_HUB_FILES = [
    *(CONFIG, GENERATION, "model*.safetensors", INDEX),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer*.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
]
_EXPECTED = f"expected a checkpoint folder with {CONFIG} and {SINGLE}, or nanoGPT's {nanogpt.FILE_NAME}"
_OLD_HUB_FILES = ["pytorch_model*.bin", OLD_INDEX]  # where there are no others


def resolve(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Where a checkpoint is: `path` itself, or where huggingface-hub keeps the model of that id. revision: of that model; None:
    the newest."""
    folder = Path(path)
    if folder.is_dir():
        own = _has_model(folder)
        if not own and current(folder, ADAPTER).is_file():
            base = read_json(current(folder, ADAPTER)).get("base_model_name_or_path")
            raise FileNotFoundError(
                f"{path} holds an adapter and no model; load it on its base with GPT.from_pretrained({base or 'BASE'!r})"
                f".load_adapter({str(path)!r}), or for a task with gptfast.finetuning.TaskModel.from_pretrained({str(path)!r})"
            )
        if not own and (found := _checkpoints(folder)):
            raise FileNotFoundError(f"{path} is the folder of a training run; name one of its checkpoints: {found}")
        if not own:
            read_whole(folder, lambda: _expect_model(folder, path))
        return folder
    if folder.is_file() and folder.suffix in nanogpt.SUFFIXES:
        return folder
    if not folder.exists() and folder.name == "best" and (found := _checkpoints(folder.parent)):
        raise FileNotFoundError(f"{path} does not exist, as the run has not been evaluated yet; there is {found}")
    if folder.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", str(path)):
        what = "is not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; {_EXPECTED}")
    return _download(str(path), revision)


def _has_model(folder: Path) -> bool:
    return current(folder, CONFIG).exists() or nanogpt.find(folder) is not None


def _expect_model(folder: Path, path: str | os.PathLike[str]) -> None:
    if not _has_model(folder):  # nor is another process saving one there: then `read_whole` looks again
        raise FileNotFoundError(f"{path} has no {CONFIG}; {_EXPECTED}")


def _checkpoints(run: Path) -> str:
    """The checkpoints in the folder of a training run, in words."""
    what = {"best": "the lowest validation loss", "last": "the newest"}
    return " or ".join(f"{run / name} ({of})" for name, of in what.items() if current(run / name, CONFIG).exists())


def _download(hub_id: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"there is no folder {hub_id!r} here, and to load it from the Hugging Face hub "
            "huggingface-hub is needed: pip install huggingface-hub"
        ) from error
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES))
        if has_safetensors(folder):
            return folder
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*_HUB_FILES, *_OLD_HUB_FILES]))
    except OSError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OSError(
            f"there is no folder {hub_id!r} here, and it could not be fetched from the Hugging Face hub "
            f"({reason}); check the name and the connection, or copy the checkpoint here and give its folder"
        ) from error
