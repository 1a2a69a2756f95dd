"""Every method of fine-tuning beats the most frequent class on plays that it has not seen, at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptfast import demo_finetune
from tests.support.train_command import _argv, gptfast  # noqa: F401  a fixture

pytestmark = pytest.mark.slow

# Points of accuracy over the majority that each must have.
POINTS = {"full": 0.10, "lora": 0.10}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A model of half of Shakespeare, and passages of other works."""
    folder = tmp_path_factory.mktemp("genres")
    demo_finetune.write_files(folder)
    assert gptfast(*demo_finetune.commands(folder)[0]) == 0
    return folder


@pytest.mark.parametrize("method", list(demo_finetune.RATES))
def test_every_method_beats_the_majority(pretrained, method):
    """With the commands of the demonstration.

    Measured: full 0.490, LoRA 0.465; LoRA on another base with the seeds 1 and 2: 0.512, 0.512. The majority has 0.335.
    """
    command = next(c for c in demo_finetune.commands(pretrained) if "--method" in c and method in c)
    assert gptfast(*command) == 0
    found = json.loads((pretrained / method / "metrics.json").read_text())
    assert found["baseline"] == pytest.approx(0.335)
    assert found["value"] >= found["baseline"] + POINTS[method]


def test_no_work_is_on_both_sides(tmp_path):
    """Held-out works are in no text that is learnt from."""
    demo_finetune.write_files(tmp_path, train=10**6, test=10**6)
    learnt = "".join(f.read_text() for f in (tmp_path / "half").iterdir()) + (tmp_path / "train.jsonl").read_text()
    names = {f.stem for f in (tmp_path / "half").iterdir()}
    assert not names & {name for held in demo_finetune.HELD_OUT.values() for name in held}
    for words in ("Now is the winter of our discontent", "Shall I compare thee to a summer's day"):
        assert words in learnt
    for words in ("Once more unto the breach", "Is this a dagger which I see before me", "All the world's a stage"):
        assert words not in learnt
        assert words in (tmp_path / "test.jsonl").read_text()
