"""Checkpoints that are written while training goes on, slow ranks, and parts of an optimizer's state."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptfast.models.export import write_tensors
from gptfast.training import saver as saver_module
from gptfast.training import updates
from gptfast.training.checkpoint import read_checkpoint
from gptfast.training.parts import optimizer_parts, read_parts
from gptfast.training.saver import Saver
from gptfast.training.slow import AGAIN, RATIO, STEPS, SlowRanks
from tests.support.training import QUICK, make_trainer


def test_a_run_that_saves_in_the_background_has_the_same_files(tmp_path: Path):
    make_trainer(tmp_path / "a").train()
    make_trainer(tmp_path / "b", async_save=True).train()
    for name in ("last", "best"):
        for file in ("model.safetensors", "optimizer.safetensors"):
            a, b = (load_file(tmp_path / run / name / file) for run in "ab")
            assert a.keys() == b.keys()
            assert all(a[key].equal(b[key]) for key in a)
        assert read_checkpoint(tmp_path / "b" / name).state.step == read_checkpoint(tmp_path / "a" / name).state.step


def test_steps_go_on_while_a_checkpoint_is_written_and_do_not_change_it(tmp_path: Path, monkeypatch):
    trainer = make_trainer(tmp_path / "run", async_save=True)
    whole, may_end, seen = updates.write_checkpoint, threading.Event(), []

    def slow(folder, about, *others):
        if about["state"]["step"] == 3:
            assert may_end.wait(20)
            seen.append(trainer.state.step)
        whole(folder, about, *others)
        if about["state"]["step"] == 3:
            seen.append(load_file(folder / "model.safetensors"))

    monkeypatch.setattr(updates, "write_checkpoint", slow)
    step = trainer._step

    def stepping():
        step()
        if trainer.state.step == 5:
            may_end.set()

    monkeypatch.setattr(trainer, "_step", stepping)
    trainer.train()
    assert seen[0] in (5, 6)  # the writer may wake up a step late; the next checkpoint waits for this one
    expected = make_trainer(tmp_path / "short", QUICK.replace(max_steps=3, lr_decay_steps=12))
    expected.train()
    found = load_file(tmp_path / "short" / "last" / "model.safetensors")
    assert all(found[name].equal(x) for name, x in seen[1].items())


def test_an_error_in_the_background_ends_training_and_the_checkpoint_before_is_intact(tmp_path: Path, monkeypatch):
    trainer = make_trainer(tmp_path / "run", async_save=True)
    whole = updates.write_checkpoint

    def full(folder, about, *others):
        if about["state"]["step"] == 6:
            raise OSError(28, "cannot write: No space left on device")
        whole(folder, about, *others)

    monkeypatch.setattr(updates, "write_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert trainer.state.step < 12
    assert read_checkpoint(tmp_path / "run" / "last").state.step == 3


def test_a_saver_raises_at_the_next_save_or_at_the_end():
    saver = Saver(background=True)

    def fail() -> None:
        raise OSError("full")

    saver.save(fail)
    with pytest.raises(OSError, match="full"):
        saver.finish()
    saver.finish()
    saver.save(fail)
    with pytest.raises(OSError, match="full"):
        saver.save(lambda: None)


def test_copies_lie_where_those_of_the_save_before_lay_and_are_made_when_it_is_written():
    saver, written = Saver(background=True), []
    kinds = (torch.float32, torch.bfloat16, torch.int64)
    tensors = [torch.arange(7 * n).view(7, n).to(kind) for n in (0, 1, 5, 1 << 16) for kind in kinds]
    tensors += [torch.tensor(3.0), torch.arange(12.0).view(3, 4).t(), torch.arange(20.0).view(4, 5)[:, :2]]
    places = []
    for size in (100 << 20, 0, 0):
        copies = saver.begin(size)
        assert copies is not None
        assert len(written) == len(places)  # the save before is whole
        found = [copies.take(x) for x in tensors]
        for x, copy in zip(tensors, found, strict=True):
            assert copy.equal(x) and copy.dtype == x.dtype
            assert copy.stride() == (x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()).stride()
            assert copy.data_ptr() != x.data_ptr() or not x.numel()
        places.append([copy.data_ptr() for copy in found])
        begins = sorted((copy.data_ptr(), copy.nbytes) for copy in found if copy.numel())
        assert all(at + size <= then for (at, size), (then, _) in pairwise(begins))
        saver.save(lambda: (time.sleep(0.05), written.append(True)))
    saver.finish()
    assert places[0] == places[1] == places[2]
    assert Saver(background=False).begin() is None


def test_a_rank_that_is_slower_for_some_steps_is_told_and_again_after_many():
    slow = SlowRanks()
    times = [1.0, 1.1, RATIO * 1.1 + 0.1, 1.1]
    told = [n for n in range(1, AGAIN + STEPS + 1) if slow.look(times)]
    assert told == [STEPS, AGAIN + STEPS]
    assert not slow.look([1.0, 1.0])
    slow = SlowRanks()
    assert [slow.look([1.0, 1.6]) for _ in range(STEPS)][-1] == {"slow_rank": 1, "times_median": 1.6}
    assert not any(slow.look([1.0, 1.6] if n % 2 else [1.6, 1.0]) for n in range(20))
    assert not any(SlowRanks().look([1.0]) for _ in range(STEPS))


def test_parts_are_read_by_any_number_of_processes_and_a_missing_one_is_named(tmp_path: Path):
    rows = torch.arange(10.0).view(5, 2)
    for number, (first, end) in enumerate(((0, 3), (3, 5)), 1):
        tensors = {"exp_avg/a": rows[first:end].clone()} | ({"step/a": torch.tensor(7.0)} if number == 1 else {})
        offsets = {name: {"saved_offsets": [first, 0] if x.dim() else []} for name, x in tensors.items()}
        about = {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
        write_tensors(tmp_path / f"optimizer-{number:05d}-of-00002.safetensors", tensors, about)
    files = optimizer_parts(tmp_path)
    wanted = {"exp_avg/a": torch.zeros(5, 2), "step/a": torch.zeros(()), "exp_avg/b": torch.zeros(1)}
    found = read_parts(files, wanted)
    assert found.keys() == {"exp_avg/a", "step/a"}
    assert found["exp_avg/a"].equal(rows)
    assert float(found["step/a"]) == 7
    assert read_parts(files, {"exp_avg/a": torch.zeros(4, 2)}) == {}
    files[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"optimizer-00001-of-00002\.safetensors is missing"):
        optimizer_parts(tmp_path)


def test_a_file_has_the_same_bytes_in_whatever_order_its_metadata_is_read(tmp_path: Path):
    for name, about in (("a", {"x": "1", "y": "2"}), ("b", {"y": "2", "x": "1"})):
        write_tensors(tmp_path / name, {"t": torch.ones(2)}, about)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_save_in_the_background_begins_a_step_later_and_takes_its_time_until_somebody_waits_for_it(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(saver_module, "_REST", 1e9)
    saver, begun = Saver(background=True), threading.Event()

    def job():
        begun.set()
        write_tensors(tmp_path / "file", {"x": torch.ones(1 << 21)})

    saver.save(job)
    saver.before_step()
    assert not begun.wait(0.2)  # the step that waited for the copies
    saver.before_step()
    assert begun.wait(20)
    saver._thread.join(0.5)
    assert saver._thread.is_alive()  # it rests after the first block
    end = threading.Thread(target=saver.finish, daemon=True)
    end.start()
    end.join(20)
    assert not end.is_alive() and load_file(tmp_path / "file")["x"].sum() == 1 << 21
