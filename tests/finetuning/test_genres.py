"""Every method of fine-tuning beats the most frequent class on plays that it has not seen, at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptfast import demo_finetune
from gptfast.data.corpus import GENRES
from tests.support.train_command import _argv, gptfast  # noqa: F401  a fixture

pytestmark = pytest.mark.slow

# Points of accuracy over the majority that each must have.
POINTS = {"full": 0.10, "lora": 0.10, "qlora": 0.10, "prompt": 0.05}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A model of half of Shakespeare, and passages of other works."""
    folder = tmp_path_factory.mktemp("genres")
    demo_finetune.write_files(folder)
    assert gptfast(*demo_finetune.pretraining(folder)) == 0
    return folder


@pytest.mark.parametrize("method", list(demo_finetune.RATES))
def test_every_method_beats_the_majority(pretrained, method):
    """With the commands of the demonstration and one seed; rate and step are chosen on other plays than those of the accuracy.

    The rate is the one that validation has chosen. Measured with seeds 0, 1 and 2: docs/finetuning.md.
    """
    rate = demo_finetune.RATES[method][0]
    assert gptfast(*demo_finetune.finetuning(pretrained, method, rate, 0)) == 0
    folder = demo_finetune.folder_of(pretrained, method, rate, 0)
    assert demo_finetune.figures(folder)["examples"]["held_out"] == demo_finetune.PARTS["valid"]
    most = demo_finetune.majority(pretrained)
    assert most == pytest.approx(0.34)
    assert demo_finetune.judged(folder, pretrained / "test.jsonl", method) >= most + POINTS[method]


def test_no_work_is_on_two_sides(tmp_path):
    """Works of the validation and the unseen ones are in no text that is learnt from, and in none of each other's."""
    demo_finetune.write_files(tmp_path, dict.fromkeys(demo_finetune.PARTS, 10**6))
    learnt = "".join(f.read_text() for f in (tmp_path / "half").iterdir()) + (tmp_path / "train.jsonl").read_text()
    valid, test = ((tmp_path / f"{name}.jsonl").read_text() for name in ("valid", "test"))
    names = {f.stem for f in (tmp_path / "half").iterdir()}
    sides = [{n for held in of.values() for n in held} for of in (demo_finetune.VALIDATION, demo_finetune.HELD_OUT)]
    assert not (names & sides[0] or names & sides[1] or sides[0] & sides[1])
    of = {
        "Now is the winter of our discontent": learnt,
        "Shall I compare thee to a summer's day": learnt,
        "Once more unto the breach": test,
        "Is this a dagger which I see before me": test,
        "All the world's a stage": test,
        "But soft! what light through yonder window breaks": valid,
        "Bell, book, and candle shall not drive me back": valid,
    }
    for words, place in of.items():
        assert [words in text for text in (learnt, valid, test)] == [text is place for text in (learnt, valid, test)]
    for part in ("train", "valid", "test"):
        assert {json.loads(line)["label"] for line in (tmp_path / f"{part}.jsonl").open()} == set(GENRES)


def test_the_rate_is_the_best_on_validation(tmp_path):
    """And the table has the accuracy of every seed on the unseen passages, which choose nothing."""
    for rate, value in zip(demo_finetune.RATES["lora"], (0.5, 0.4), strict=True):
        folder = demo_finetune.folder_of(tmp_path, "lora", rate, 0)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"value": value}))
    assert demo_finetune.best_rate(tmp_path, "lora") == demo_finetune.RATES["lora"][0]
