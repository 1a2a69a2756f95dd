"""benchmarks/bench_finetune.py: what it says of the ratios that are aimed at."""

from __future__ import annotations

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="needs the source tree")


def test_a_missed_aim_is_named(monkeypatch: pytest.MonkeyPatch):
    """Those of time are bounds from above, those over another's and of speeds from below; what was not measured is left out."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from bench_finetune import judged

    product = {"part": "product", "kind": "nf4", "K": 64, "N": 128}
    rows = [
        {"part": "step", "kind": "lora", "of_frozen": 1.05, "of_full": 0.8},
        {"part": "step", "kind": "peft lora", "of_frozen": 2.0, "of_full": 2.0},
        {**product, "rows": 1, "over_bitsandbytes": 2.0, "of_linear": 9.0},
        {"part": "decode", "kind": "q4", "of_bare": 0.89, "mixed_of_bare": 0.5},
    ]
    *lines, last = judged(rows)
    assert [line.split()[-1] for line in lines] == ["met", "MISSED", "met", "MISSED"]
    assert lines[2].split() == ["product", "64x128", "of", "1:", "over_bitsandbytes", "2.000", "aim", ">=", "2", "met"]
    assert last == "2 of 4 aims met; missed: step lora: of_full; decode q4: of_bare"
