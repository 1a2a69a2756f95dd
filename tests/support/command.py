"""The command line in a test: a small model in a folder, and what a command prints."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from gptfast import GPT, GPTConfig
from gptfast.cli import main

BLOCK = 40
LETTERS = "abcdefghijklmnopqrstuvwxyz ,.:\nROMEO"


def save_model(path, tokenizer, block_size=BLOCK):
    torch.manual_seed(1)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": block_size}
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6.0 if p.dim() == 2 else 1.0)
    model.save_pretrained(path)
    tokenizer.save(path)
    return model


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line; returns (exit code, stdout, stderr)."""

    def run(*args, stdin: bytes = b""):
        monkeypatch.setattr(sys, "argv", ["gptfast", "generate", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run
