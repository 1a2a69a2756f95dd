"""`revision` of `from_pretrained`: which state of a model of the Hugging Face hub is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptfast import BERT, GPT, GPTConfig
from gptfast.engine import CompiledGPT
from gptfast.finetuning import LoraConfig, TaskModel
from gptfast.finetuning.methods import attach
from gptfast.finetuning.options import MethodOptions
from gptfast.models.bert import load_model
from gptfast.models.locate import resolve
from tests.support.checkpoints import make

huggingface_hub = pytest.importorskip("huggingface_hub")
SMALL_BERT = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_inner": 32, "vocab_size": 20, "block_size": 8}
LORA = {"target_modules": ["c_attn"]}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """What the hub is asked for; it has a GPT, and a BERT by that name."""
    make().save_pretrained(tmp_path / "gpt")
    BERT(GPTConfig.preset("bert-base", **SMALL_BERT)).save_pretrained(tmp_path / "bert")
    calls: list[tuple[str, str | None]] = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision))
        return str(tmp_path / ("bert" if "bert" in name else "gpt"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


LOADERS: dict[str, tuple[Callable[..., Any], str]] = {
    "GPT": (GPT.from_pretrained, "some/model"),
    "BERT": (BERT.from_pretrained, "some/bert"),
    "load_model": (load_model, "some/bert"),
    "CompiledGPT": (CompiledGPT.from_pretrained, "some/model"),
    "TaskModel": (lambda path, **given: TaskModel.from_pretrained(path, task="similarity", **given), "some/model"),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_it_is_passed_on_however_it_is_said(loader: str, asked: list[tuple[str, str | None]]):
    load, name = LOADERS[loader]
    load(name)
    load(name, revision="v1")
    load(f"{name}@refs/pr/3")
    load(f"{name}@v1", revision="v1")
    assert asked == [(name, None), (name, "v1"), (name, "refs/pr/3"), (name, "v1")]


@pytest.mark.parametrize("loader", LOADERS)
def test_a_folder_has_none(loader: str, asked: list[tuple[str, str | None]], tmp_path: Path):
    load, name = LOADERS[loader]
    folder = tmp_path / ("bert" if "bert" in name else "gpt")
    with pytest.raises(ValueError, match=r"revision is 'v1', but .* is on this machine.*leave revision out"):
        load(folder, revision="v1")
    with pytest.raises(ValueError, match=r"revision is 'v1', but some/x@v2 names 'v2'; give one of them"):
        load("some/x@v2", revision="v1")
    with pytest.raises(ValueError, match="revision is ''; expected the name of a branch or a tag"):
        load(name, revision="")
    with pytest.raises(TypeError, match="revision is a int; expected the name of a branch or a tag"):
        load(name, revision=3)
    assert asked == []


def test_a_folder_of_such_a_name_is_a_folder(
    asked: list[tuple[str, str | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt").rename("run@2")
    assert str(resolve("run@2")) == "run@2"
    assert asked == []


def test_what_the_hub_does_not_have_or_allow_is_told(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("404: no such revision")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(OSError, match=r"hub at revision 'v9' \(404: .*check the name, the revision and the connection"):
        GPT.from_pretrained("some/model", revision="v9")
    monkeypatch.undo()
    with pytest.raises(OSError, match=r"no folder 'some--model' here.*\(Cannot have --.*check the name"):
        GPT.from_pretrained("some--model")


def written(gpt: GPT, folder: Path) -> tuple[str | None, str | None]:
    gpt.save_adapter(folder)
    raw = json.loads((folder / "adapter_config.json").read_text())
    return raw["base_model_name_or_path"], raw["revision"]


@pytest.mark.parametrize("said", [("some/model@v1", None), ("some/model", "v1")])
def test_an_adapter_names_it(said: tuple[str, str | None], asked: list[tuple[str, str | None]], tmp_path: Path):
    """peft reads the two fields; it knows no name with an @."""
    gpt = GPT.from_pretrained(said[0], revision=said[1])
    gpt.add_adapter(LoraConfig(**LORA))
    assert written(gpt, tmp_path / "a") == ("some/model", "v1")
    gpt.add_adapter(LoraConfig(base_model_name_or_path="another/model", **LORA), "other")
    gpt.set_adapter("other")
    gpt.save_adapter(tmp_path / "b", "other")
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["revision"] is None
    gpt.merge_adapter("default")
    gpt.save_pretrained(tmp_path / "merged")
    gpt.unmerge_adapter()
    assert written(gpt, tmp_path / "c") == ("some/model", "v1")


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_fine_tuning_names_it(method: str, asked: list[tuple[str, str | None]], tmp_path: Path):
    gpt = GPT.from_pretrained("some/model@v1")
    attach(gpt, MethodOptions(method=method, num_virtual_tokens=2), "some/model@v1", False)
    assert written(gpt, tmp_path / "a") == ("some/model", "v1")


def test_a_checkpoint_that_is_written_has_none(asked: list[tuple[str, str | None]], tmp_path: Path):
    gpt = GPT.from_pretrained("some/model", revision="v1")
    gpt.save_pretrained(tmp_path / "own")
    gpt.add_adapter(LoraConfig(**LORA))
    assert written(gpt, tmp_path / "a") == (str((tmp_path / "own").resolve()), None)


def test_an_adapter_of_a_task_on_another_revision_of_its_base(asked: list[tuple[str, str | None]], tmp_path: Path):
    model = TaskModel.from_pretrained("some/model@v1", task="similarity", special_tokens={"sep": 1, "pad": 0})
    model.gpt.add_adapter(LoraConfig(**LORA))
    model.save_adapter(tmp_path / "a")
    asked.clear()
    again = TaskModel.from_pretrained(tmp_path / "a")
    TaskModel.from_pretrained(tmp_path / "a", revision="v2")
    TaskModel.from_pretrained(tmp_path / "a", base="other/model", revision="v3")
    assert asked == [("some/model", "v1"), ("some/model", "v2"), ("other/model", "v3")]
    assert (again.gpt.name_or_path, again.gpt.revision) == ("some/model", "v1")
    with pytest.raises(ValueError, match=r"revision is 'v1', but .* is on this machine"):
        TaskModel.from_pretrained(tmp_path / "a", base=tmp_path / "gpt", revision="v1")
