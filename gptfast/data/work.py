"""What the processes of `gptfast.data.workers` do: encode texts, and make signatures of them."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gptfast.data.near_duplicates import signature
from gptfast.tokenizer import load_tokenizer

Part = tuple[Any, str, int, str]  # mark of the document, its name, where the piece begins (characters), the piece


def set_tokenizer(state: dict[str, Any], files: dict[str, bytes]) -> None:
    """Take the tokenizer that has these files, for `encode`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        state["tokenizer"] = load_tokenizer(folder)


def encode(state: dict[str, Any], parts: list[Part]) -> list[tuple[Any, np.ndarray, int]]:
    """Mark, ids and bytes of UTF-8 of each piece. Raises ValueError with the document's name for text that has no ids."""
    tokenizer = state["tokenizer"]
    encode = getattr(tokenizer, "encode_array", None) or (lambda text: np.array(tokenizer.encode(text), np.uint32))
    found = []
    for mark, name, start, piece in parts:
        try:
            ids = encode(piece)
        except ValueError as error:
            raise ValueError(f"{name}, counted from character {start}: {error}") from error
        found.append((mark, ids, len(piece) if piece.isascii() else len(piece.encode())))
    return found


def signatures(state: dict[str, Any], parts: list[tuple[int, str]]) -> list[tuple[int, np.ndarray]]:
    """Number of the document and MinHash signature of each piece."""
    return [(n, signature(piece)) for n, piece in parts]


def serve() -> None:
    """Answer calls until the input ends."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the results
    state: dict[str, Any] = {}
    functions = {"set_tokenizer": set_tokenizer, "encode": encode, "signatures": signatures}
    while True:
        try:
            name, argument = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result: tuple[bool, Any] = True, functions[name](state, argument)
        except Exception as error:  # it is raised where the call was made
            result = False, error
        try:
            pickle.dump(result, output, protocol=5)
            output.flush()
        except BrokenPipeError:
            os._exit(0)  # nobody waits any more
