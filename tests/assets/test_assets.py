"""The data files that the package ships: whole, small, and each with its origin and licence."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

from gptfast._files import read_asset

ASSETS = {file.name: file.read_bytes() for file in (resources.files("gptfast") / "assets").iterdir()}


def test_they_are_whole_and_small():
    vocab = hashlib.sha256(read_asset("gpt2_vocab.bpe")).hexdigest()
    assert vocab == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    assert len(read_asset("shakespeare.json")) > 5_000_000
    assert sum(map(len, ASSETS.values())) < 3_000_000


def test_each_has_an_origin_and_a_licence():
    told = ASSETS["LICENSES.md"].decode()
    described = {line.removeprefix("## ").strip("`") for line in told.splitlines() if line.startswith("## ")}
    assert described == ASSETS.keys() - {"LICENSES.md"}
    assert {Path(name).suffix for name in described} == {".xz", ".json"}, "both kinds are read, see the first lines"
