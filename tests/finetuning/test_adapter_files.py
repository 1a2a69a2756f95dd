"""Adapters in peft's format, in both directions, and files that are no adapter of this model."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptfast
from gptfast.finetuning import LoraConfig

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

GPT2 = gptfast.GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=61, dropout=0.0)
CONFIGS = {"gpt2": GPT2, "openai-gpt": GPT2.replace(norm_position="post", final_norm=False)}
IDS = torch.arange(3 * 20).view(3, 20) * 7 % 61
ALL = ["c_attn", "c_proj", "c_fc"]
CASES: dict[str, dict[str, Any]] = {
    "all matrices": {"target_modules": ALL},
    "copies": {"target_modules": ["attn.c_proj"], "modules_to_save": ["WTE", "lm_head"], "use_rslora": True},
    "biases": {
        "target_modules": r".*h\.1.*c_fc|lm_head",
        "bias": "all",
        "rank_pattern": {"c_fc": 3},
        "modules_to_save": ["ln_1"],
    },
    "anchored patterns": {
        "target_modules": ["c_attn"],
        "rank_pattern": {r"^transformer\.h\.0\.attn\.c_attn": 2},
        "alpha_pattern": {r"^transformer\.h\.1\..*": 3},
    },
    "own biases": {"target_modules": ["c_fc"], "bias": "lora_only", "layers_to_transform": [1]},
}


@pytest.fixture(scope="module", params=CONFIGS)
def base(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / request.param
    torch.manual_seed(0)
    gptfast.GPT(CONFIGS[request.param]).save_pretrained(folder)
    return folder


def theirs(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_round_trips_with_peft(case: str, base: Path, tmp_path: Path):
    options = json.loads(json.dumps(CASES[case]).replace("WTE", "wte" if base.name == "gpt2" else "tokens_embed"))
    torch.manual_seed(1)
    trained = peft.get_peft_model(theirs(base), peft.LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, **options))
    with torch.no_grad():
        for p in trained.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    trained.save_pretrained(tmp_path / "theirs")
    expected = trained(IDS).logits
    gpt = gptfast.GPT.from_pretrained(base)
    before = gpt(IDS)
    gpt.load_adapter(tmp_path / "theirs")
    assert (expected - before).abs().max() > 0.03
    torch.testing.assert_close(gpt(IDS), expected, rtol=1e-5, atol=1e-5)
    gpt.save_adapter(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "ours")
    assert torch.equal(again(IDS).logits, expected)
    gpt.merge_adapter()
    torch.testing.assert_close(gpt(IDS), expected, rtol=1e-4, atol=1e-4)
    gpt.unmerge_adapter()
    gpt.delete_adapter("default")
    assert torch.equal(gpt(IDS), before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("copy", ["transformer.wte", "transformer.lm_head"])
def test_our_names_are_written_for_peft(copy: str, base: Path, tmp_path: Path):
    gpt, patterns = gptfast.GPT.from_pretrained(base), {r"^h\.0\.attn\.c_attn": 2}
    about = {"rank_pattern": patterns, "alpha_pattern": patterns, "modules_to_save": [copy]}
    gpt.add_adapter(LoraConfig(r=4, init_lora_weights=False, **about))
    with torch.no_grad():
        gpt.get_submodule(copy.removeprefix("transformer.")).modules_to_save["default"].weight.mul_(1.1)
    assert [len(block.attn.c_attn.lora_A["default"].weight) for block in gpt.h] == [2, 4]
    gpt.save_adapter(tmp_path)
    again = peft.PeftModel.from_pretrained(theirs(base), tmp_path)
    torch.testing.assert_close(again(IDS).logits, gpt(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_peft_left_untied_stays_so(tmp_path: Path):
    """peft ties embed_tokens and lm_head by ensure_weight_tying, but not GPT-2's wte; the file tells."""
    gptfast.GPT(GPT2).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["c_fc"], modules_to_save=["wte"], ensure_weight_tying=True)
    trained = peft.get_peft_model(theirs(tmp_path / "base"), config)
    with torch.no_grad():
        trained.base_model.model.transformer.wte.modules_to_save.default.weight.add_(0.1)
    trained.save_pretrained(tmp_path / "theirs")
    gpt = gptfast.GPT.from_pretrained(tmp_path / "base")
    gpt.load_adapter(tmp_path / "theirs")
    torch.testing.assert_close(gpt(IDS), trained(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_new_tokens_survive(tmp_path: Path):
    torch.manual_seed(0)
    gptfast.GPT(GPT2).save_pretrained(tmp_path / "base")
    gpt = gptfast.GPT.from_pretrained(tmp_path / "base")
    gpt.resize_token_embeddings(64)
    assert gpt.lm_head.weight is gpt.wte.weight and gpt.wte.weight.shape == (64, 32)
    gpt.add_adapter(LoraConfig(modules_to_save=["wte"], ensure_weight_tying=True, init_lora_weights=False))
    ids = torch.where(IDS % 5 == 0, 62, IDS)
    gpt.train()(ids, ids)[1].backward()
    with torch.no_grad():
        gpt.wte.modules_to_save["default"].weight.sub_(gpt.wte.modules_to_save["default"].weight.grad)
    expected = gpt.eval()(ids)
    gpt.save_adapter(tmp_path / "a")
    other = gptfast.GPT.from_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"embeddings of 64 tokens and the model 61; call model\.resize_token_embeddings\(64\)"
    ):
        other.load_adapter(tmp_path / "a")
    other.resize_token_embeddings(64)
    other.load_adapter(tmp_path / "a")
    assert torch.equal(other(ids), expected)
    hf = theirs(tmp_path / "base")
    hf.resize_token_embeddings(64)
    torch.testing.assert_close(
        peft.PeftModel.from_pretrained(hf, tmp_path / "a")(ids).logits, expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["wte"]}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_of_new_tokens_that_are_not_trained_survive(tied: bool, options: dict[str, Any], tmp_path: Path):
    """They are random, and in no checkpoint of the base: another model that is resized gets others."""
    torch.manual_seed(0)
    gptfast.GPT(GPT2.replace(tie_weights=tied)).save_pretrained(tmp_path / "base")
    gpt = gptfast.GPT.from_pretrained(tmp_path / "base")
    gpt.resize_token_embeddings(64)
    gpt.add_adapter(LoraConfig(init_lora_weights=False, **options))
    ids = torch.where(IDS % 5 == 0, 62, IDS)
    expected = gpt(ids)
    gpt.save_adapter(tmp_path / "a")
    other = gptfast.GPT.from_pretrained(tmp_path / "base")
    other.resize_token_embeddings(64)
    other.load_adapter(tmp_path / "a")
    assert torch.equal(other(ids), expected)
    hf = theirs(tmp_path / "base")
    hf.resize_token_embeddings(64)
    again = peft.PeftModel.from_pretrained(hf, tmp_path / "a")
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_rows_that_a_checkpoint_has_are_not_stored_with_an_adapter(tmp_path: Path):
    gpt = gptfast.GPT(GPT2)
    gpt.resize_token_embeddings(64)
    gpt.save_pretrained(tmp_path / "base")
    gpt.add_adapter(LoraConfig(r=2))
    gpt.save_adapter(tmp_path / "a")
    assert all("lora_" in key for key in load_file(tmp_path / "a/adapter_model.safetensors"))


def test_peft_stores_resized_embeddings_of_its_own(tmp_path: Path):
    """Keys of the embeddings outside of modules_to_save are a copy for the adapter: the base keeps its own."""
    torch.manual_seed(0)
    gptfast.GPT(GPT2).save_pretrained(tmp_path / "base")
    trained = peft.get_peft_model(
        theirs(tmp_path / "base"), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )
    with torch.no_grad():
        trained.get_input_embeddings().weight.mul_(2)
    trained.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    gpt = gptfast.GPT.from_pretrained(tmp_path / "base")
    before = gpt(IDS)
    gpt.load_adapter(tmp_path / "a")
    torch.testing.assert_close(gpt(IDS), trained(IDS).logits, rtol=1e-5, atol=1e-5)
    gpt.disable_adapters()
    assert torch.equal(gpt(IDS), before)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    gpt = gptfast.GPT(GPT2)
    gpt.add_adapter(LoraConfig(target_modules=ALL, init_lora_weights=False))
    gpt.save_adapter(tmp_path / "a")
    return tmp_path / "a"


def change(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def cut(folder: Path) -> None:
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])


def drop(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop("base_model.model.transformer.h.1.attn.c_attn.lora_B.weight")
    save_file(tensors, folder / "adapter_model.safetensors")


def spoil(folder: Path, value: float, key: str = "c_fc.lora_A") -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if key in name)
    tensors[name].flatten()[-1] = value
    save_file(tensors, file)


DAMAGES: dict[str, tuple[Any, str]] = {
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "half written"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), r"holds no adapter_config\.json"),
    "cut": (cut, "damaged or cut short"),
    "half JSON": (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LO'), "not valid JSON"),
    "a tensor less": (drop, r"c_attn\.lora_B\.weight is missing"),
    "nan": (lambda f: spoil(f, float("nan")), r"adapter_model\.safetensors: .*c_fc\.lora_A\.weight holds nan"),
    "infinity": (lambda f: spoil(f, float("-inf"), "lora_B"), r"lora_B\.weight holds nan or infinities"),
    "another rank": (lambda f: change(f, r=3), r"lora_A\.weight is \(8, 32\).*this model has \(3, 32\)"),
    "fewer modules": (lambda f: change(f, target_modules=["c_fc"]), "is unexpected"),
    "another method": (lambda f: change(f, peft_type="IA3"), "peft_type is 'IA3'"),
    "no method": (lambda f: change(f, peft_type=["LORA"]), r"adapter_config\.json: peft_type is \['LORA'\]"),
    "a pattern": (
        lambda f: change(f, rank_pattern={"c_(": 4}),
        r"adapter_config\.json: LoraConfig: rank_pattern has 'c_\('",
    ),
    "modules": (lambda f: change(f, target_modules="("), r"adapter_config\.json: LoraConfig: target_modules has '\('"),
    "layers": (
        lambda f: change(f, layers_pattern=3, layers_to_transform=[0]),
        r"adapter_config\.json: LoraConfig: layers_pattern is 3",
    ),
    "a copy": (lambda f: change(f, modules_to_save=["("]), r"modules_to_save has '\('"),
    "dora": (lambda f: change(f, use_dora=True), "use_dora"),
    "an option to come": (lambda f: change(f, use_next_thing=True), "use_next_thing is true"),
}


def test_the_engine_refuses_what_is_not_finite(saved: Path):
    """And a packed model stays as it was."""
    torch.manual_seed(0)
    packed = gptfast.GPT(GPT2).eval().compile_for_inference("float32")
    spoil(saved, float("nan"))
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: .*c_fc\.lora_A\.weight holds nan"):
        packed.load_adapter(saved)
    assert packed.adapters == ()


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_adapters_leave_the_model_as_it_was(case: str, saved: Path):
    damage, message = DAMAGES[case]
    damage(saved)
    torch.manual_seed(0)
    gpt = gptfast.GPT(GPT2).eval()
    gpt.add_adapter(LoraConfig(init_lora_weights=False), "mine")
    before, rng = gpt(IDS), torch.get_rng_state()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        gpt.load_adapter(saved, "new")
    assert torch.equal(gpt(IDS), before) and gpt.active_adapters == ["mine"]
    assert torch.equal(torch.get_rng_state(), rng)


def test_an_adapter_of_another_base_is_refused(saved: Path):
    torch.manual_seed(5)
    other = gptfast.GPT(GPT2)
    with pytest.raises(ValueError, match="trained on another base"):
        other.load_adapter(saved)
    other.load_adapter(saved, any_base=True)
    torch.manual_seed(0)
    gptfast.GPT(GPT2).bfloat16().load_adapter(saved)  # the same base
    with pytest.raises(ValueError, match=r"does not fit this model.*\(8, 32\).*\(8, 64\)"):
        gptfast.GPT(GPT2.replace(n_embd=64)).load_adapter(saved, any_base=True)


def test_a_failed_save_leaves_the_adapter_that_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch):
    before = {f.name: f.read_bytes() for f in saved.iterdir() if f.is_file()}
    gpt = gptfast.GPT(GPT2)
    gpt.add_adapter(LoraConfig())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gptfast.models.adapters.files.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        gpt.save_adapter(saved)
    assert {f.name: f.read_bytes() for f in saved.iterdir() if f.is_file()} == before


def test_peft_configs_are_taken():
    gpt = gptfast.GPT(GPT2)
    gpt.add_adapter(peft.LoraConfig(r=3, target_modules=["c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"))
    assert gpt.h[0].mlp.c_fc.lora_A["default"].weight.shape == (3, 32)
    with pytest.raises(ValueError, match="use_dora"):
        gpt.add_adapter(peft.LoraConfig(use_dora=True), "dora")


def test_the_page_runs_from_its_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Block after block in one session, as somebody who reads it types it."""
    page = (Path(__file__).parents[2] / "docs/adapters.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(tmp_path / "made"))
    blocks, names = re.findall(r"```python\n(.*?)```", page, re.S), {}
    assert len(blocks) >= 4
    for n, code in enumerate(blocks):
        exec(compile(code, f"adapters.md, block {n}", "exec"), names)
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_size < 100_000
    assert (tmp_path / "poems/adapter_model.safetensors").stat().st_size < 2000
