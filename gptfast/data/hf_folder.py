"""Folders that `save_to_disk` of Hugging Face's `datasets` wrote: a Dataset, or a DatasetDict with its splits.

    DATASET/state.json, dataset_info.json, data-00000-of-00001.arrow, ...
    DICT/dataset_dict.json, DICT/train/state.json, ...

The files of a dataset are those that its state.json lists, in that order.
"""

from __future__ import annotations

from pathlib import Path

from gptfast._json import field, read_json

_STATE, _INFO, _DICT = "state.json", "dataset_info.json", "dataset_dict.json"
VALIDATION = ("validation", "valid", "val", "dev", "eval", "test")  # names of splits that are for validation


def is_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (folder / _DICT).is_file() or ((folder / _STATE).is_file() and (folder / _INFO).is_file())


def dataset_files(folder: Path) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """The Arrow files of a folder, and notes for the user.

    Returns:
        By part, "train", "val" or "" where the split is not given: the files by their names in the folder. Of several splits
        `train` is for training and the first of validation, valid, val, dev, eval and test for validation; others are
        left out, with a note.
    Raises:
        FileNotFoundError: a file or folder that the dataset should have is missing.
        ValueError: damaged JSON, or splits among which none is `train`.
    """
    if not (folder / _DICT).is_file():
        return {"": _files(folder)}, []
    path = folder / _DICT
    splits = field(read_json(path), "splits", list, path)
    if not splits or not all(isinstance(name, str) and Path(name).name == name for name in splits):
        raise ValueError(f"{path}: expected the names of the splits under 'splits'; save the dataset again")
    if len(splits) == 1:
        return {"": _files(folder / splits[0], splits[0])}, []
    if "train" not in splits:
        raise ValueError(
            f"{folder} has the splits {', '.join(splits)}, and none is named train; give the folder of one, such as {folder / splits[0]}"
        )
    held = next((name for name in VALIDATION if name in splits), None)
    parts = {"train": _files(folder / "train", "train")}
    if held is None:
        parts = {"": parts["train"]}
    else:
        parts["val"] = _files(folder / held, held)
    left = [name for name in splits if name not in ("train", held)]
    return parts, [f"splits left out: {', '.join(left)}"] if left else []


def field_names(folder: Path) -> list[str]:
    """The names of the fields, for messages; [] where the folder does not say."""
    for path in (folder / _INFO, *sorted(folder.glob(f"*/{_INFO}"))):
        try:
            features = read_json(path).get("features")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(features, dict):
            return list(features)
    return []


def _files(folder: Path, name: str = "") -> dict[str, Path]:
    path = folder / _STATE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {_STATE}; a folder of `save_to_disk` is incomplete - save the dataset again"
        )
    entries = field(read_json(path), "_data_files", list, path)
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    if not all(isinstance(file, str) and Path(file).name == file for file in names):
        raise ValueError(f"{path}: expected file names under '_data_files'; save the dataset again")
    files = {f"{name}/{file}" if name else str(file): folder / str(file) for file in names}
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, but {path} lists it; save the dataset again")
    return files
