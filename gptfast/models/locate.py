"""Where a checkpoint is: a folder, nanoGPT's ckpt.pt, or a model of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gptfast._files import absolute
from gptfast._json import read_json
from gptfast._snapshots import current, read_whole
from gptfast.checkpoints.hf_layout import CONFIG
from gptfast.checkpoints.weight_files import INDEX, OLD_INDEX, SINGLE, has_safetensors
from gptfast.metadata import GENERATION
from gptfast.models import nanogpt

ADAPTER = "adapter_config.json"
_REVISION = "the name of a branch or a tag, or the id of a commit"
_HUB_FILES = [
    *(CONFIG, GENERATION, "model*.safetensors", INDEX),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer*.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
]
_EXPECTED = f"expected a checkpoint folder with {CONFIG} and {SINGLE}, or nanoGPT's {nanogpt.FILE_NAME}"
_OLD_HUB_FILES = ["pytorch_model*.bin", OLD_INDEX]  # where there are no others
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@(\S+))?")


def hub_name(path: str | os.PathLike[str], revision: str | None = None) -> tuple[str, str | None]:
    """A place as files name it: a path that exists, from the root, and None; or a hub id and the revision that it is read at.

    Args:
        path, revision: of `resolve`.
    Raises:
        TypeError, ValueError: a revision that is no name, beside a path that exists, or beside another one after an @.
    """
    if revision is not None and not isinstance(revision, str):
        raise TypeError(f"from_pretrained: revision is a {type(revision).__name__}; expected {_REVISION}")
    if revision is not None and not revision.strip():
        raise ValueError(f"from_pretrained: revision is {revision!r}; expected {_REVISION}")
    if Path(path).exists():
        if revision is not None:
            raise ValueError(
                f"from_pretrained: revision is {revision!r}, but {path} is on this machine, where it has one state; leave "
                "revision out, or give the id of a model of the Hugging Face hub"
            )
        return str(absolute(path)), None
    match = _HUB_ID.fullmatch(str(path))
    if match is None or match[2] is None:
        return str(path), revision
    if revision not in (None, match[2]):
        raise ValueError(f"from_pretrained: revision is {revision!r}, but {path} names {match[2]!r}; give one of them")
    return match[1], match[2]


def resolve(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Where a checkpoint is: `path` itself, or where huggingface-hub keeps the model of that id.

    Args:
        path: a folder or file; or a hub id, also with a revision: NAME@REVISION.
        revision: of a model of the hub; None: the newest.
    """
    place, revision = hub_name(path, revision)
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
    if folder.exists() or not _HUB_ID.fullmatch(place):
        what = "is not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; {_EXPECTED}")
    return _download(place, revision)


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
    except (OSError, ValueError) as error:  # the second of names that huggingface-hub does not allow
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        told, names = ("", "the name") if revision is None else (f" at revision {revision!r}", "the name, the revision")
        raise OSError(
            f"there is no folder {hub_id!r} here, and it could not be fetched from the Hugging Face hub{told} "
            f"({reason}); check {names} and the connection, or copy the checkpoint here and give its folder"
        ) from error
