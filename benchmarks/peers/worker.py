"""What every worker of the benchmark shares: the prompts, and commands on standard input answered in JSON.

    decode ROWS TOKENS    seconds of so many greedy steps of ROWS sequences, after prompts of 16 tokens
    prefill TOKENS        seconds until the logits behind a prompt are there
    beams COUNT TOKENS    seconds for so many tokens by a search over COUNT beams, where there is one
    logits TOKENS         the first five logits behind a prompt
    read                  seconds of a loop that only reads the packed weights, and their bytes; ours alone

`llama_decode.cpp` understands the same. Imports nothing but the standard library, so that it runs in every environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

PROMPT = 16  # tokens before the decoding that is timed
VOCABULARY = 50257
KNOWN = 5  # logits that are compared
COMMANDS = ("decode", "prefill", "beams", "logits", "read")


def prompt(row: int, length: int = PROMPT) -> list[int]:
    return [(37 * i + 1009 * row) % VOCABULARY for i in range(length)]


def seconds(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def answer(runner: Any, line: str) -> dict[str, Any]:
    command, *words = line.split()
    method = getattr(runner, command, None) if command in COMMANDS else None
    if method is None:
        return {"error": f"unknown command {command}"}
    found = method(*map(int, words))
    return found if isinstance(found, dict) else {"logits" if command == "logits" else "seconds": found}


def serve(load: Callable[[], Any]) -> None:
    """Load a model, say so (`about`), then answer until the input ends. The answers have standard output for themselves: what
    libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runner = load()
    print(json.dumps(runner.about), file=answers, flush=True)
    for line in sys.stdin:
        if line.split() == ["quit"]:
            break
        print(json.dumps(answer(runner, line)), file=answers, flush=True)
