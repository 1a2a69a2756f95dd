"""The end token that the folder of a chat's adapter names: obeyed by generate, the engine and the server's defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gptfast import GPT
from gptfast.backend import has_cpu_ops
from gptfast.finetuning import LoraConfig, set_up_chat
from gptfast.finetuning.methods import write as write_network
from gptfast.finetuning.networks import new_network, stored_network
from gptfast.finetuning.options import MethodOptions, TaskOptions
from gptfast.finetuning.sources import open_examples
from gptfast.tokenizer import load_tokenizer
from tests.finetuning.models import bpe, gpt
from tests.support.finetuning import base, result, write
from tests.support.finetuning import finetune as run
from tests.support.train_command import _argv, gptfast  # noqa: F401  a fixture

PROMPT = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture
def places(tmp_path) -> tuple[Path, Path, int]:
    """A base without end token, an adapter, and the second token that it says, which becomes its end token."""
    gpt(50).save_pretrained(tmp_path / "base")
    model = GPT.from_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False))
    model.save_adapter(tmp_path / "adapter")
    said = model.generate(PROMPT, 8)[0, 4:].tolist()
    end = next(token for token in said if token != said[0])
    (tmp_path / "adapter" / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 49]}))
    return tmp_path / "base", tmp_path / "adapter", end


def test_generate_ends_there(places, tmp_path):
    """As long as the adapter is there; the merged checkpoint has it too."""
    at, adapter, end = places
    model = GPT.from_pretrained(at)
    assert model.generate(PROMPT, 8).shape == (1, 12)
    model.load_adapter(adapter)
    assert model.generate(PROMPT, 8)[0, -1] == end
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    assert GPT.from_pretrained(tmp_path / "merged").generate(PROMPT, 8)[0, -1] == end
    model.unmerge_adapter()
    assert model.metadata.generation is None
    model.delete_adapter("default")
    assert model.generate(PROMPT, 8).shape == (1, 12)
    assert model.metadata.end_tokens(50) == ()


def test_saving_keeps_it(places, tmp_path):
    """That of each adapter beside others, and that of a chat that was set up in Python."""
    at, adapter, end = places
    model = GPT.from_pretrained(at)
    model.load_adapter(adapter, "chat")
    model.add_adapter(LoraConfig(r=2), "other")
    for name in ("chat", "other"):
        model.save_adapter(tmp_path / name, name)
    again = GPT.from_pretrained(at)
    again.load_adapter(tmp_path / "chat")
    assert again.generate(PROMPT, 8)[0, -1] == end
    model.save_adapter(tmp_path / "chat", "other")
    assert not (tmp_path / "chat/generation_config.json").exists(), "that of the adapter before"
    model = GPT.from_pretrained(at)
    model.metadata.generation = {"eos_token_id": [end]}  # as set_up_chat does
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False))
    model.save_adapter(tmp_path / "set up")
    again = GPT.from_pretrained(at)
    again.load_adapter(tmp_path / "set up")
    assert again.metadata.end_tokens(50) == (end,)


@pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
def test_the_engine_ends_there(places):
    at, adapter, end = places
    model = GPT.from_pretrained(at)
    packed = model.compile_for_inference("float32")
    packed.load_adapter(adapter)
    assert packed.generate(PROMPT, 8)[0, -1] == end
    assert model.metadata.end_tokens(50) == ()
    model.load_adapter(adapter)
    both = model.compile_for_inference("float32")
    assert both.generate(PROMPT, 8)[0, -1] == end
    packed.delete_adapter("default")
    assert packed.generate(PROMPT, 8).shape == (1, 12)
    assert packed.metadata.end_tokens(50) == ()


def test_a_damaged_file_leaves_the_model_as_it_was(places):
    at, adapter, _ = places
    (adapter / "generation_config.json").write_text('{"eos_token_id": "stop"}')
    model = GPT.from_pretrained(at)
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id is 'stop'; expected a token id"):
        model.load_adapter(adapter)
    assert model.adapters is None


def test_a_resumed_chat_keeps_it(tmp_path):
    base(tmp_path / "base")
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 8
    more = ("--data", write(tmp_path / "chat.jsonl", chat), "--method", "lora")
    assert run(tmp_path, *more, "--max-steps", "2", task="chat") == 0
    file = tmp_path / "out" / "last" / "generation_config.json"
    before = json.loads(file.read_text())
    assert gptfast("finetune", "--resume", "--out", tmp_path / "out", "--max-steps", "4") == 0
    assert result(tmp_path)["steps"] == 4
    assert json.loads(file.read_text()) == before


def test_the_command_takes_the_tokens_of_a_chat(tmp_path, capsys):
    """Of an adapter whose template has new tokens: rows and tokenizer are those of its folder, as `use` says."""
    base(tmp_path / "base")
    chat = [{"messages": [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]}] * 8
    more = ("--data", write(tmp_path / "chat.jsonl", chat), "--method", "lora", "--max-steps", "2")
    assert run(tmp_path, *more, task="chat") == 0
    best = tmp_path / "out" / "best"
    use = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("use "))
    command = use.split()[2:-1]
    assert command == ["generate", "--model", str(tmp_path / "base"), "--adapter", str(best), "--prompt"]
    prompt = "<|im_start|>user\ncat<|im_end|>\n<|im_start|>assistant\n"
    assert gptfast(*command, prompt, "--special-tokens", "--temperature", "0", "--max-new-tokens", "9") == 0
    tokenizer = load_tokenizer(best)
    model = GPT.from_pretrained(tmp_path / "base").eval()
    model.resize_token_embeddings(tokenizer.vocab_size)
    model.load_adapter(best)
    (ids,) = model.generate([tokenizer.encode(prompt, allowed_special="all")], 9)
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


def test_adapters_with_different_tokenizers_are_told(tmp_path, capsys):
    at = base(tmp_path / "base")
    for name, tokens in (("one", ["<a>"]), ("two", ["<b>"])):
        model = GPT.from_pretrained(at)
        tokenizer = set_up_chat(model, load_tokenizer(at), end_token=tokens[0], special_tokens=tokens)
        model.add_adapter(LoraConfig(r=2, modules_to_save=["wte"], ensure_weight_tying=True))
        model.save_adapter(tmp_path / name)
        tokenizer.save(tmp_path / name)
    options = [f"--adapter={name}={tmp_path / name}" for name in ("one", "two")]
    assert gptfast("serve", "--model", at, "--port", "0", *options) == 1
    assert "the adapter 'two' has another tokenizer than 'one'; run them apart" in capsys.readouterr().err


CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on the mat"}]
BASES = {"tied head": (290, True), "head of its own": (290, False), "spare rows": (320, True)}


@pytest.mark.parametrize("kind", BASES)
def test_rows_of_a_template_are_trained_and_saved_with_lora(kind: str, tmp_path: Path):
    """Those of a head of its own too, and those that the base has to spare."""
    tokenizer, (V, tied) = bpe(), BASES[kind]
    gpt(max(V, tokenizer.vocab_size), tie_weights=tied).save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    data = str(write(tmp_path / "train.jsonl", [{"messages": CHAT}] * 10))
    task = TaskOptions(model=str(tmp_path / "base"), data=data, task="chat")
    method = MethodOptions(method="lora", target_modules="c_fc")
    network, extended, _, place = new_network(task, method, open_examples(data, None, "chat", 0, None))
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert extended.vocab_size > tokenizer.vocab_size
    with torch.no_grad():
        for p in (p for p in network.parameters() if p.requires_grad):
            p.add_(0.05 * torch.randn_like(p))
    write_network(network, tmp_path / "out")
    extended.save(tmp_path / "out")
    again, _ = stored_network(tmp_path / "out", task, method, place)
    ids = torch.arange(tokenizer.vocab_size - 4, extended.vocab_size)[None]
    assert torch.equal(again.eval()(ids), network.eval()(ids))
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
    assert "wte.modules_to_save.default.weight" in trained
