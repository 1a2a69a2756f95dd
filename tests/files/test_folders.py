"""Saves that a reader sees whole or not at all: kills, readers and other savers at any moment, untrusted folders."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptfast import GPT, GPTConfig, _snapshots
from gptfast._folders import LOCK, STAGE, staged_folder
from gptfast._snapshots import COMMITTED, EVERYTHING, STALE, current_files, read_whole
from gptfast.tokenizer import CharTokenizer, load_tokenizer
from gptfast.training import read_checkpoint

SHAPE = GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=11, block_size=4, tie_weights=False)
OLD = {"config.json": "old", "model.safetensors": "old"}
NEW = {name: "new" for name in ("config.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors")}
NEW["model.safetensors.index.json"] = "new"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    """The folder as a reader sees it."""
    return read_whole(folder, lambda: {f.name: f.read_text() for f in current_files(folder)})


def tree(folder: Path) -> dict[str, tuple]:
    """Everything about what lies in a folder that a change would change."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        s = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[str(path)] = (s.st_ino, s.st_mode, s.st_mtime_ns, s.st_ctime_ns, content)
    return found


# ---- kills ----------------------------------------------------------------------------------------------------------


def kill_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process at the given one of the calls that change the folder."""
    left = [steps]

    def counted(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for name in ("rename", "replace", "fsync", "pwrite", "mkdir", "rmdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr(Path, "rmdir", counted(Path.rmdir))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))


def in_child(work: Callable[[], object]) -> int:
    """Do something in a child process; its exit code, 0 if it came to the end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:  # an error must not let the child go on as a second pytest
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def save(folder: Path, files: dict[str, str]) -> None:
    with staged_folder(folder, replaces=EVERYTHING) as stage:
        write(stage, files)


def test_a_kill_at_any_moment_leaves_all_old_or_all_new_and_readers_change_nothing(tmp_path: Path, monkeypatch):
    """Old: one file; new: two shards and an index. The child process is ended at every step in turn."""
    outcomes, status = [], None
    for step in range(100):
        folder = tmp_path / str(step)
        folder.mkdir()
        write(folder, OLD | {"notes.txt": "the user's"})
        with monkeypatch.context() as patch:
            status = in_child(lambda f=folder, n=step, p=patch: (kill_after(n, p), save(f, NEW)))
        before = tree(folder)
        found = read(folder)
        assert found in (OLD, NEW), f"step {step}: {found}"
        assert tree(folder) == before, f"step {step}: the reader changed the folder"
        outcomes.append(found == NEW)
        save(folder, {"model.safetensors": "newer"})  # and the next save works
        assert read(folder) == {"model.safetensors": "newer"}
        assert sorted(f.name for f in folder.iterdir()) == ["model.safetensors", "notes.txt"]
        if status == 0:
            break
    assert status == 0
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) > 5, "the kill never came before the commit"
    assert outcomes.count(True) > 5, "the kill never came after the commit"


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with (
        pytest.raises(FileExistsError, match=r"cannot write to .*notes.txt: .*is a file, not a folder; name another"),
        staged_folder(tmp_path / "notes.txt"),
    ):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_save_inside_another_is_part_of_it(tmp_path: Path):
    with pytest.raises(RuntimeError, match="full"), staged_folder(tmp_path) as stage:  # noqa: PT012
        CharTokenizer.train("abc").save(stage)
        raise RuntimeError("full")
    assert list(tmp_path.iterdir()) == []
    with staged_folder(tmp_path) as stage:
        CharTokenizer.train("abc").save(stage)
        assert list(tmp_path.glob("*.json")) == []
    assert load_tokenizer(tmp_path).encode("abc") == [0, 1, 2]


def test_a_failure_leaves_no_new_folder(tmp_path: Path):
    with pytest.raises(ValueError, match="no adapter"):
        GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=8)).save_adapter(tmp_path / "a")
    with pytest.raises(RuntimeError, match="full"), staged_folder(tmp_path / "b") as stage:  # noqa: PT012
        (stage / "config.json").write_text("{}")
        raise RuntimeError("full")
    assert list(tmp_path.iterdir()) == []


# ---- two processes --------------------------------------------------------------------------------------------------


def constant(value: float, n_layer: int = 1) -> GPT:
    """A model all of whose parameters are `value`, and its depth with it: mixtures show."""
    model = GPT(SHAPE.replace(n_layer=n_layer))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def whole(model: GPT) -> bool:
    values = {float(x) for p in model.state_dict().values() for x in (p.min(), p.max())}
    return len(values) == 1 and model.config.n_layer == 1 + int(values.pop()) % 2


def saver(folder: Path, seconds: float, limits: tuple[int | str, ...]) -> Callable[[], None]:
    models = [constant(0.0, 1), constant(1.0, 2), constant(2.0, 1)]

    def work() -> None:
        end, n = time.monotonic() + seconds, 0
        while time.monotonic() < end or n < 100:
            models[n % 3].save_pretrained(folder, max_shard_size=limits[n % len(limits)])
            n += 1

    return work


def start(work: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def is_running(child: int, codes: list[int]) -> bool:
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        codes.append(os.waitstatus_to_exitcode(status))
    return not pid


@pytest.mark.parametrize("limits", [("5GB",), (1200,), ("5GB", 1200, 700)], ids=["one-file", "shards", "in-turn"])
def test_a_reader_beside_a_saver_sees_whole_models(tmp_path: Path, limits):
    folder = tmp_path / "last"
    constant(0.0).save_pretrained(folder, max_shard_size=limits[0])
    (folder / "notes.txt").write_text("the user's")
    assert whole(GPT.from_pretrained(folder))  # the first one imports what is needed for it
    child, codes, reads, seen = start(saver(folder, 2.0, limits)), [], 0, set()
    while is_running(child, codes):
        model = GPT.from_pretrained(folder)
        assert whole(model)
        seen.add(model.wte.weight[0, 0].item())
        reads += 1
    assert codes == [0], "the saver failed"
    assert reads > 20 and len(seen) == 3
    assert (folder / "notes.txt").read_text() == "the user's"
    assert not [f for f in folder.iterdir() if f.name in (STAGE, COMMITTED, LOCK)]


def test_a_save_between_two_looks_of_a_reader(tmp_path: Path, monkeypatch):
    """The file that a reader was about to open moves away, and .saved holds the same names again before it has looked."""
    saved, is_over, calls = tmp_path / COMMITTED, _snapshots._Moment.is_over, []

    def commit(text: str) -> None:
        saved.mkdir()
        (saved / "config.json").write_text(text)
        (saved / STALE).write_text("[]")

    def read() -> str:
        path = _snapshots.current(tmp_path, "config.json")
        if not calls.append(path) and len(calls) == 1:
            path.rename(tmp_path / "config.json")
            (saved / STALE).unlink()
            saved.rmdir()
        return path.read_text()

    def late(moment: _snapshots._Moment) -> bool:
        found = is_over(moment)
        if not saved.exists():
            commit("second")
        return found

    commit("first")
    monkeypatch.setattr(_snapshots._Moment, "is_over", late)
    assert read_whole(tmp_path, read) == "first" and len(calls) == 2


def test_savers_into_one_folder_take_turns(tmp_path: Path):
    children = [start(saver(tmp_path, 1.0, (1200, "5GB"))) for _ in range(2)]
    codes: list[int] = []
    while children:
        children = [child for child in children if is_running(child, codes)]
        if (tmp_path / "config.json").exists():
            assert whole(GPT.from_pretrained(tmp_path))
    assert codes == [0, 0]


def test_what_a_reader_has_opened_stays_what_it_was(tmp_path: Path):
    """The slow part of reading comes after the moment that counts: a fast saver does not starve readers."""
    from gptfast.models.pretrained import build
    from gptfast.models.stored import StoredModel

    constant(1.0, 2).save_pretrained(tmp_path, max_shard_size=700)
    stored = StoredModel(tmp_path)
    constant(2.0, 1).save_pretrained(tmp_path)
    model = build(GPT, stored, None, {})
    assert whole(model) and model.config.n_layer == 2


# ---- folders from strangers -----------------------------------------------------------------------------------------


def journal(folder: Path, stale: str) -> None:
    (folder / COMMITTED).mkdir()
    (folder / COMMITTED / STALE).write_text(stale)


def planted(folder: Path, home: Path) -> dict[str, Callable[[], object]]:
    """Ways to make `folder` point at the files in `home`."""
    outside = [
        str(home / "thesis.txt"),
        "../home/thesis.txt",
        "../home",
        "notes.txt",
        "",
        ".",
        "..",
        "a/b",
        "model.safetensors\n",
    ]

    def with_link() -> None:
        journal(folder, "[]")
        (folder / COMMITTED / "config.json").symlink_to(home / "thesis.txt")
        (folder / COMMITTED / "notes.txt").write_text("not the user's")

    def with_folder() -> None:
        journal(folder, "[]")
        (folder / COMMITTED / "model.safetensors").mkdir()
        (folder / COMMITTED / "model.safetensors" / "x").write_text("x")

    plants = {
        f"path {n} in a journal": (lambda name=name: journal(folder, json.dumps([name])))
        for n, name in enumerate(outside)
    }
    for text in (
        "",
        "{",
        "[1]",
        "3",
        "null",
        "{}",
        "[[]]",
        "[" * 100_000,
        "\0",
        '["config.json", "../home/thesis.txt"]',
    ):
        plants[f"journal of {text[:9]!r}"] = lambda t=text: journal(folder, t)
    for name in (COMMITTED, STAGE, LOCK):
        plants[f"{name} a link"] = lambda n=name: (folder / n).symlink_to(home)
        plants[f"{name} a link to a file"] = lambda n=name: (folder / n).symlink_to(home / "thesis.txt")
    plants[f"{STALE} a link"] = lambda: (
        (folder / COMMITTED).mkdir(),
        (folder / COMMITTED / STALE).symlink_to(home / "thesis.txt"),
    )
    for name in (COMMITTED, STAGE):
        plants[f"{name} a file"] = lambda n=name: (folder / n).write_text("x")
        plants[f"{name} with papers"] = lambda n=name: (
            (folder / n).mkdir(),
            (folder / n / "paper.txt").write_text("x"),
        )
    plants["a link in it"] = with_link
    plants["a folder in it"] = with_folder
    return plants


@pytest.mark.parametrize("name", planted(Path("f"), Path("h")))
@pytest.mark.filterwarnings("ignore:.*is not what a save leaves there")
def test_an_untrusted_folder_does_no_harm(tmp_path: Path, name: str):
    """Reading changes nothing at all; saving changes nothing but what it replaces. Both work, again and again."""
    folder, home = tmp_path / "ck", tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    constant(1.0, 2).save_pretrained(folder)
    (folder / "notes.txt").write_text("the user's")
    planted(folder, home)[name]()
    before, private = tree(tmp_path), tree(home)
    for _ in range(2):
        assert whole(GPT.from_pretrained(folder))
        with pytest.raises(FileNotFoundError, match=r"no tokenizer in|no training run"):
            load_tokenizer(folder)
        with pytest.raises(FileNotFoundError, match="no training run"):
            read_checkpoint(folder)
    assert tree(tmp_path) == before
    for value in (1.0, 2.0):
        constant(value, 1 + int(value) % 2).save_pretrained(folder)
        found = GPT.from_pretrained(folder)
        assert whole(found) and found.wte.weight[0, 0].item() == value
    assert tree(home) == private
    assert (folder / "notes.txt").read_text() == "the user's"
    papers = [f for f in folder.rglob("paper.txt") if not f.is_symlink()]
    assert len(papers) == ("papers" in name)
