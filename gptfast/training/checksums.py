"""The checksums in a checkpoint's trainer.json."""

from __future__ import annotations

import json
import os
import zlib
from typing import Any

from gptfast._files import checksum
from gptfast._json import read_json
from gptfast._snapshots import current

TRAINER = "trainer.json"
_ELSEWHERE = "resume from another checkpoint, such as RUN/best, or start a new run from its weights with gptfast train --init-from"


def own_checksum(trainer: dict[str, Any]) -> str:
    """The checksum of trainer.json's content without the checksum itself."""
    content = json.loads(json.dumps(trainer))
    content["files"].pop(TRAINER, None)
    return f"crc32:{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def verify(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Compare the files of a checkpoint with the checksums in its trainer.json, which are returned by name.

    They are {} for a checkpoint of a gptfast that wrote none, and for a folder that no training run wrote.

    Raises:
        FileNotFoundError, ValueError: a file is missing or another than the one that was written; the text names it.
    """
    if not current(folder, TRAINER).exists():
        return {}
    raw = read_json(current(folder, TRAINER))
    files = raw.get("files", {}) if isinstance(raw, dict) else {}
    if not isinstance(files, dict) or any(name != os.path.basename(name) for name in files):
        raise ValueError(f"{current(folder, TRAINER)} is damaged (files); {_ELSEWHERE}")
    for name, expected in files.items():
        path = current(folder, name)
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing; {_ELSEWHERE}")
        found = own_checksum(raw) if name == TRAINER else checksum(path)
        if found != expected:
            raise ValueError(
                f"{path} is not what was saved: its checksum is {found}, expected {expected}; {_ELSEWHERE}"
            )
    return files
