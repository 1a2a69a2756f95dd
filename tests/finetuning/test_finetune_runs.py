"""What a run of gptfast finetune counts, keeps and draws: weights of classes, the best step after a kill, figures of old runs."""

from __future__ import annotations

import errno
import math
import os
import warnings
from contextlib import nullcontext

import pytest
import torch

from gptfast.finetuning import TaskModel, metrics
from gptfast.finetuning.objectives import TaskObjective
from gptfast.finetuning.results import plot_confusion
from gptfast.finetuning.sources import class_weights, open_examples
from gptfast.training import updates
from gptfast.training.checkpoint import read_trainer
from gptfast.training.objective import Evaluation
from gptfast.training.run_folder import locked_run, make_room
from tests.finetuning.models import bpe, gpt
from tests.support.finetuning import finetune as run
from tests.support.finetuning import records, result, write
from tests.support.train_command import _argv, gptfast  # noqa: F401  a fixture


class Killed(BaseException):
    """What nothing catches, as of a kill."""


@pytest.mark.parametrize("weights", [None, [1.0, 9.0], [0.0, 1.0]])
def test_passes_of_a_step_add_up_to_one_of_all_rows(weights):
    """Batches in which the classes are not alike count by the weights of their examples."""
    torch.manual_seed(0)
    model = TaskModel(gpt(300), "classification", ["a", "b"], bpe(), weights).eval()
    rows = model.rows([{"text": "abcde"[n % 5 :], "label": "ab"[n in (1, 6, 7)]} for n in range(8)])
    objective = TaskObjective(model, rows, rows, "accuracy", 0.5, lambda *_: None)

    def gradients(size: int) -> tuple[dict, list[torch.Tensor]]:
        model.zero_grad()
        groups, targets = rows
        parts = [model.collate(groups[n : n + size], targets[n : n + size]) for n in range(0, 8, size)]
        losses = objective.add_gradients(parts, nullcontext, torch.device("cpu"))
        return losses, [p.grad.clone() for p in model.parameters()]

    (whole, expected), (parts, found) = gradients(8), gradients(2)
    assert parts == pytest.approx(whole, rel=1e-5)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert objective.predict(2, nullcontext)[0] == pytest.approx(objective.predict(8, nullcontext)[0], rel=1e-5)


def test_a_kill_between_last_and_its_copy_loses_no_best_step(tmp_path, capsys, monkeypatch):
    def killed(*_: object) -> None:
        raise Killed

    data, out = write(tmp_path / "same.jsonl", records("classification", 8, 0)), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(updates, "copy_checkpoint", killed)
        with pytest.raises(Killed):
            run(tmp_path, "--data", data, "--eval-data", data)
    assert "8 of those to judge by are learnt from too" in capsys.readouterr().out
    assert read_trainer(out / "last").state.best_step == 2
    assert not (out / "best").exists()
    assert gptfast("finetune", "--resume", "--out", out, "--max-steps", "2") == 0
    assert read_trainer(out / "best").state.step == 2 == result(tmp_path)["best_step"]
    TaskModel.from_pretrained(out / "best")
    (out / "last" / "optimizer.safetensors").unlink()  # which RUN/best has too
    capsys.readouterr()
    assert gptfast("finetune", "--resume", "--out", out, "--max-steps", "3") == 0
    said = capsys.readouterr().out
    assert "damaged checkpoint: " in said
    assert f"resume   from step 2 in {out / 'best'}" in said.replace("\n", "")
    assert result(tmp_path)["steps"] == 3


def test_figures_of_a_replaced_run_are_not_those_of_the_new_one(tmp_path):
    names = ("confusion.png", "loss.png", "metrics.json", "experts.png", "mine.txt")
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "trainer.json").touch()
    for name in names:
        (tmp_path / name).touch()
    make_room(tmp_path, True)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"cannot write .*training\.lock: No space left .* check the disk"):
        locked_run(tmp_path / "new").__enter__()
    assert not (tmp_path / "new").exists()


def test_names_are_drawn_as_they_are(tmp_path):
    """A dollar sign begins no formula, and characters that the font lacks are told once, with what to do."""
    path = tmp_path / "confusion.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_confusion([0, 1], [0, 0], ["$\\frac$", "$a_$"], path, "runs/$x_$")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.warns(
        UserWarning, match=r"confusion\.png has boxes for characters that .* font lacks; name a"
    ) as found:
        plot_confusion([0, 1], [0, 0], ["猫", "戦争"], path, "cats")
    assert len(found) == 1


def test_examples_that_cannot_judge_are_told(tmp_path):
    rows = [{"text": f"text {n}", "label": "ab"[n % 2], "id": n} for n in range(8)]
    train = str(write(tmp_path / "train.jsonl", rows))
    others = [{"text": "text 1", "label": "b", "id": 99}, {"text": "else", "label": "c"}]
    held = str(write(tmp_path / "held.jsonl", others))
    learnt, unseen = open_examples(train, held, "classification", 0, ["a", "b", "c"]).notes()
    assert learnt.startswith("1 of those to judge by are learnt from too")
    assert unseen.startswith("c: among those to judge by, but not among those to learn from")
    write(tmp_path / "held.jsonl", [{"text": "else", "label": "a"}])
    assert open_examples(train, held, "classification", 0, None).notes() == []
    for task in ("entailment", "similarity", "choice", "lm", "chat"):
        path = str(write(tmp_path / f"{task}.jsonl", records(task, 6, 0)))
        assert open_examples(path, path, task, 0, None).notes()[0].startswith("6 of those to judge by"), task


def test_weights_that_cannot_be_meant(tmp_path):
    data = str(write(tmp_path / "a.jsonl", records("classification", 8, 0)))
    with pytest.raises(ValueError, match=r"class_weights has two weights for 'war'; give one"):
        class_weights("war=2,pet=1,war=3", open_examples(data, data, "classification", 0, None))
    with pytest.raises(ValueError, match=r"one finite number >= 0 for each of \['a', 'b'\], not all 0"):
        TaskModel(gpt(300), "classification", ["a", "b"], bpe(), {"a": 0, "b": 0})


def test_scores_that_judge_nothing_are_told(tmp_path):
    rows = [{"text1": "a", "text2": str(n), "score": n} for n in range(4)]
    train, held = str(write(tmp_path / "a.jsonl", rows)), tmp_path / "b.jsonl"
    for same in ([3], [3, 3.0]):
        write(held, [{"text1": "c", "text2": "d", "score": score} for score in same])
        (note,) = open_examples(train, str(held), "similarity", 0, None).notes()
        assert "all scores to judge by are 3" in note


def test_what_is_not_finite_is_never_the_best():
    """Predictions of nan are all the first class, which may be right more often than those of any step."""
    assert Evaluation(1.0, 0.25).rank > Evaluation(math.nan, 0.5).rank == Evaluation(math.inf).rank
    assert Evaluation(1.0, 0.25).rank > Evaluation(0.5, math.nan).rank
    assert Evaluation(0.5, 0.25).rank > Evaluation(1.0, 0.25).rank > Evaluation(0.1, 0.2).rank


def test_a_run_without_a_finite_evaluation_has_no_result(tmp_path, capsys):
    assert run(tmp_path, "--learning-rate", "1e30", "--min-lr", "1e30", "--warmup-steps", "0", "--max-steps", "1") == 1
    assert "the loss on the held-out examples is nan at step 1; lower --learning-rate" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_matthews_of_one_class_has_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.matthews(["a"], ["a"]) == 0 == metrics.matthews([1, 1], [1, 1])
