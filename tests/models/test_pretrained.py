"""Checkpoints: both ways with transformers, shards, what is wrong with a folder, and saves that are interrupted."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptfast import _folders
from gptfast.models import GPT, KVCache
from gptfast.models.locate import resolve
from tests.support.checkpoints import V, close_logits, hf, make, same

transformers = pytest.importorskip("transformers")

SHAPES = {
    "gpt2": {},
    "gpt2-untied": {"tie_weights": False},
    "gpt2-n_inner-gelu": {"n_inner": 40, "activation": "gelu", "layer_norm_epsilon": 1e-3},
    "gpt2-no-bias": {"bias": False},
    "gpt1": {"norm_position": "post", "final_norm": False},
    "gpt1-untied-no-bias": {"norm_position": "post", "final_norm": False, "tie_weights": False, "bias": False},
}
OWN = {
    "banded": {"attention_pattern": "alternating", "window": 3},
    "sinusoidal": {"position_embedding": "sinusoidal", "bias": False},
    "post-with-final-norm": {"norm_position": "post"},
    "gpt1-exact-gelu": {"norm_position": "post", "final_norm": False, "activation": "gelu"},
}


# ---- both ways ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_our_export_in_transformers(tmp_path: Path, shape: str):
    model = make(**SHAPES[shape])
    model.save_pretrained(tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == ("GPT2LMHeadModel" if shape.startswith("gpt2") else "OpenAIGPTLMHeadModel")
    assert not any(report.values()), report
    close_logits(model, theirs.eval())
    same(GPT.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt"])
@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_transformers_export_here(tmp_path: Path, kind: str, tie: bool, shard: str):
    theirs = hf(kind, tie)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "10KB")
    model = GPT.from_pretrained(tmp_path)
    assert not model.training
    assert (model.lm_head.weight is model.wte.weight) == tie
    assert all(p.requires_grad and p.is_contiguous() for p in model.parameters())
    close_logits(model, theirs)
    again = tmp_path / "again"
    model.save_pretrained(again)
    close_logits(model, transformers.AutoModelForCausalLM.from_pretrained(again).eval())


@pytest.mark.parametrize("shape", OWN)
def test_shapes_that_transformers_lacks_are_not_taken_for_gpt2(tmp_path: Path, shape: str):
    model = make(**OWN[shape])
    model.save_pretrained(tmp_path)
    same(GPT.from_pretrained(tmp_path), model)
    with pytest.raises(ValueError, match="gptfast"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_names_without_prefix_stored_masks_and_a_stored_tied_head(tmp_path: Path):
    """As in the published gpt2 and openai-gpt files."""
    for kind in ("gpt2", "openai-gpt"):
        theirs = hf(kind)
        theirs.save_pretrained(tmp_path)
        old = load_file(tmp_path / "model.safetensors")
        new = {name.removeprefix("transformer."): x for name, x in old.items()}
        new["h.0.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
        new["h.1.attn.masked_bias"] = torch.tensor(-1e4)
        new["lm_head.weight"] = theirs.lm_head.weight.detach().clone()
        save_file(new, tmp_path / "model.safetensors")
        close_logits(GPT.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("limit", ["3KB", 3000, "1 kb", "0.003MB"])
def test_shards(tmp_path: Path, limit: int | str):
    model = make(tie_weights=False)
    model.save_pretrained(tmp_path, max_shard_size=limit)
    files = sorted(f.name for f in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(tmp_path / file)
        assert sum(x.nbytes for x in tensors.values()) <= 3000 or len(tensors) == 1
    same(GPT.from_pretrained(tmp_path), model)
    close_logits(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval())


def test_saving_again_replaces_the_weights_and_nothing_else(tmp_path: Path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "tokenizer.json").write_text("kept")
    for limit in ("3KB", "5GB", "6KB", "3KB"):  # many shards, one file, fewer shards, more
        model = make(tie_weights=False)
        model.save_pretrained(tmp_path, max_shard_size=limit)
        same(GPT.from_pretrained(tmp_path), model)
        names = {f.name for f in tmp_path.iterdir()} - {"notes", "tokenizer.json", "config.json"}
        index = tmp_path / "model.safetensors.index.json"
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
        assert names == (shards | {index.name} if shards else {"model.safetensors"})
    assert (tmp_path / "tokenizer.json").read_text() == "kept"


def test_dtype_and_config_overrides(tmp_path: Path):
    model = make().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    same(GPT.from_pretrained(str(tmp_path)), model)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = GPT.from_pretrained(tmp_path, dtype=torch.float32, dropout=0.3, block_size=7)
    assert loaded.wpe.weight.dtype == torch.float32
    assert (loaded.config.attn_pdrop, loaded.config.block_size) == (0.3, 7)
    ids = torch.randint(V, (2, 7))
    torch.testing.assert_close(loaded(ids), model.float()(ids))


def test_loaded_weights_do_not_depend_on_the_file(tmp_path: Path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * (tmp_path / "model.safetensors").stat().st_size)
    same(loaded, model)
    KVCache(loaded.config, 1)


# ---- what is wrong with a folder ------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make(tie_weights=False).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def rewrite_config(folder: Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "removed"}))


def rewrite_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def truncate(folder: Path, keep: float) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])


def shard_then(folder: Path, damage) -> None:
    model = GPT.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="3KB")
    damage(folder)


def index_to(folder: Path, value: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))


DAMAGE = {
    "cut in the middle": (lambda f: truncate(f, 0.5), ValueError, "model.safetensors is damaged or cut short"),
    "cut in the header": (lambda f: truncate(f, 0.001), ValueError, "model.safetensors is damaged or cut short"),
    "empty": (lambda f: truncate(f, 0), ValueError, "model.safetensors is damaged or cut short"),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"PK\3\4" + bytes(5000)),
        *(ValueError, "model.safetensors is damaged or cut short.*download the file again"),
    ),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json is not valid JSON"),
    "config a list": (
        lambda f: (f / "config.json").write_text("[]"),
        ValueError,
        "config.json: the content is a list of 0; expected an object",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json"),
    "another architecture": (
        lambda f: rewrite_config(f, model_type="mamba"),
        *(ValueError, "config.json: model_type is 'mamba'; gptfast loads gpt2, openai-gpt, gptfast"),
    ),
    "unknown activation": (
        lambda f: rewrite_config(f, activation_function="mish"),
        *(
            ValueError,
            "activation_function is 'mish'; gptfast has gelu_new, .*relu, quick_gelu, tanh - use transformers",
        ),
    ),
    "scaled by layer": (
        lambda f: rewrite_config(f, scale_attn_by_inverse_layer_idx=True),
        *(ValueError, "scale_attn_by_inverse_layer_idx is True, which gptfast does not compute"),
    ),
    "key missing": (lambda f: rewrite_config(f, n_embd="removed"), ValueError, "config.json: n_embd is missing"),
    "value wrong": (
        lambda f: rewrite_config(f, n_head=3),
        ValueError,
        "config.json: GPTConfig: n_embd is 16 but n_head is 3",
    ),
    "config of a wider model": (
        lambda f: rewrite_config(f, n_embd=32),
        *(
            ValueError,
            r"config.json: n_embd is 32, but transformer.wte.weight has shape \(\d+, 16\); use the config.json",
        ),
    ),
    "config of a deeper model": (
        lambda f: rewrite_config(f, n_layer=3),
        *(ValueError, r"transformer.h.2.ln_1.weight is missing; .* and 8 more; use the config.json and the weights"),
    ),
    "config of a shallower model": (
        lambda f: rewrite_config(f, n_layer=1),
        *(ValueError, "transformer.h.1.attn.c_attn.bias is unexpected"),
    ),
    "config of a tied model": (
        lambda f: rewrite_config(f, tie_word_embeddings=True),
        *(ValueError, "lm_head.weight differs from wte.weight"),
    ),
    "tensor missing": (
        lambda f: rewrite_weights(f, {"lm_head.weight": None}),
        *(ValueError, "lm_head.weight is missing"),
    ),
    "tensor not float": (
        lambda f: rewrite_weights(f, {"transformer.ln_f.bias": torch.zeros(16, dtype=torch.int8)}),
        *(ValueError, "transformer.ln_f.bias has dtype torch.int8; expected a float dtype"),
    ),
    "bias where the config has none": (
        lambda f: rewrite_config(f, bias=False),
        *(ValueError, "bias is not zero, but the config says bias=false"),
    ),
    "a pickle that is none": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        *(ValueError, "pytorch_model.bin is damaged or cut short, or no file of torch.save"),
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        *(FileNotFoundError, "holds neither model.safetensors nor model.safetensors.index.json; copy the weights"),
    ),
    "shard missing": (
        lambda f: shard_then(f, lambda f: next(iter(f.glob("model-00002-*"))).unlink()),
        *(FileNotFoundError, r"lacks model-00002-of-\d+.safetensors of the \d+ shards"),
    ),
    "index that leads elsewhere": (
        lambda f: shard_then(f, lambda f: index_to(f, {"wte.weight": "../../secret.safetensors"})),
        *(ValueError, "weight_map does not map tensors to files beside it"),
    ),
    "index without a map": (
        lambda f: shard_then(f, lambda f: index_to(f, None)),
        *(ValueError, "index.json: weight_map is null; expected an object"),
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(saved: Path, name: str):
    damage, error, message = DAMAGE[name]
    damage(saved)
    with pytest.raises(error, match=message) as caught:
        GPT.from_pretrained(saved)
    assert str(saved) in str(caught.value), "the message does not say where"


def test_pickle_beside_safetensors_is_not_opened(saved: Path):
    (saved / "pytorch_model.bin").write_bytes(b"not a pickle")
    GPT.from_pretrained(saved)


def test_no_such_folder_and_wrong_arguments(tmp_path: Path, saved: Path):
    with pytest.raises(
        FileNotFoundError, match=r"nothing does not exist; expected a checkpoint folder with config\.json"
    ):
        GPT.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; expected a checkpoint folder with config\.json"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json is not a folder"):
        GPT.from_pretrained(saved / "config.json")
    with pytest.raises(TypeError, match="GPTConfig has no field 'n_layers'"):
        GPT.from_pretrained(saved, n_layers=2)
    for size in ("5 apples", 0, 2.5, True):
        with pytest.raises(ValueError, match=r"max_shard_size is .*expected bytes, or text such as '500MB'"):
            make().save_pretrained(tmp_path / "x", max_shard_size=size)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


# ---- hub ------------------------------------------------------------------------------------------------------------


def test_hub_id_is_fetched(saved: Path, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(name: str, revision: None, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    GPT.from_pretrained("somebody/model-1.5")
    assert resolve("gpt2") == saved
    assert list(asked) == ["somebody/model-1.5", "gpt2"]
    assert not any("bin" in pattern for pattern in asked["gpt2"])


def test_hub_without_connection_or_library(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        OSError, match=r"no folder 'some/model' here.*\(no connection\); check the name and the connection"
    ):
        GPT.from_pretrained("some/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface-hub"):
        GPT.from_pretrained("some/model")


# ---- saves that are interrupted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["5GB", "3KB"])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, limit: str):
    """A real failure of the write: files may not grow past 2000 bytes."""
    old, new = make(tie_weights=False), make(tie_weights=False, n_layer=3)
    old.save_pretrained(tmp_path, max_shard_size=limit)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(
            OSError,
            match=r"cannot write to .*; what was there is intact - raise the limit on the size of files .*ulimit -f",
        ) as caught:
            new.save_pretrained(tmp_path, max_shard_size=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert caught.value.errno == errno.EFBIG
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    same(GPT.from_pretrained(tmp_path), old)


def test_no_space_is_explained(tmp_path: Path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def nested(folder: Path) -> None:
        with _folders.staged_folder(folder) as outer:
            make().save_pretrained(outer / "model")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device; what was there is intact - free some space") as caught:
        nested(tmp_path / "outer")
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value).count("cannot write") == 1
