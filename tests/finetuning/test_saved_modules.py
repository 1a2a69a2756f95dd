"""Adapters with modules_to_save beside one another: which go together, and what is refused with the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gptfast
from gptfast.finetuning import LoraConfig, TaskModel, set_up_chat
from gptfast.tokenizer import BPETokenizer

CONFIG = gptfast.GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=61, dropout=0.0)
IDS = torch.arange(3 * 20).view(3, 20) * 7 % 61


def model(config: gptfast.GPTConfig = CONFIG, **adapters: Any) -> gptfast.GPT:
    """A GPT with these adapters, whose copies differ from the base."""
    torch.manual_seed(0)
    return with_adapters(gptfast.GPT(config).eval(), **adapters)


def with_adapters(gpt: gptfast.GPT, **adapters: Any) -> gptfast.GPT:
    for name, options in adapters.items():
        gpt.add_adapter(LoraConfig(**{"r": 2, "init_lora_weights": False, **options}), name)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if ".modules_to_save." in name:
                parameter.mul_(1.5)
    return gpt


def assert_refuses(gpt: gptfast.GPT, call: Callable[[], Any], message: str) -> None:
    """And everything is as it was: names, what is active, what is trained, and the logits."""

    def state() -> tuple[Any, ...]:
        names = () if gpt.adapters is None else (tuple(gpt.adapters.names), gpt.active_adapters)
        return names, [(n, p.requires_grad) for n, p in gpt.named_parameters()], gpt(IDS).tolist()

    before = state()
    with pytest.raises(ValueError, match=message):
        call()
    assert state() == before


HEAD = {"modules_to_save": ["lm_head"]}


@pytest.mark.parametrize("method", ["set_adapter", "merge_adapter"])
def test_two_copies_of_a_module_cannot_be_added_up(method):
    gpt = model(a=HEAD, b=HEAD, c={"target_modules": ["c_fc"]})
    message = rf"{method}: 'a', 'b' each have a copy of lm_head \(modules_to_save\), and copies cannot be added up"
    assert_refuses(gpt, lambda: getattr(gpt, method)(["a", "c", "b"]), message)
    gpt.set_adapter(["a", "c"])  # a copy and an update
    together = gpt(IDS)
    gpt.merge_adapter()
    torch.testing.assert_close(gpt(IDS), together, rtol=1e-5, atol=1e-5)


REFUSED = {
    "an update of a copy": ({"target_modules": ["c_fc", "lm_head"]}, r"names lm_head, of which 'a' has a trained copy"),
    "a copy of an update": (
        {"target_modules": ["c_fc"], "modules_to_save": ["c_attn"]},
        r"names h\.0\.attn\.c_attn \(Lora",
    ),
    "positions": ({"modules_to_save": ["wpe"]}, "modules_to_save names wpe"),
    "no one module": ({"modules_to_save": ["mlp"]}, r"modules_to_save names h\.0\.mlp \(MLP"),
    "the head of a task": ({"modules_to_save": ["score"]}, "modules_to_save has 'score', and no module"),
    "what is targeted": ({"modules_to_save": ["c_attn"]}, "leave no module"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case):
    options, message = REFUSED[case]
    gpt = model(a=HEAD)
    assert_refuses(gpt, lambda: gpt.add_adapter(LoraConfig(**options), "b"), message)


def test_a_quantised_matrix_has_no_copy(tmp_path):
    model().save_pretrained(tmp_path)
    gpt = gptfast.GPT.from_pretrained(tmp_path, quantize="nf4").eval()
    config = LoraConfig(target_modules=["c_attn"], modules_to_save=["c_fc"])
    message = r"modules_to_save names h\.0\.mlp\.c_fc \(QuantizedLinear\); expected .* in floats"
    assert_refuses(gpt, lambda: gpt.add_adapter(config), message)
    with_adapters(gpt, a=HEAD)  # the head is held in floats
    gpt(IDS, IDS)[1].backward()
    assert gpt.lm_head.modules_to_save["a"].weight.grad.any()


def test_rows_with_copies_of_their_own_train_without_dropout_only():
    """Masks are drawn by the place of a row in the batch, so that a norm with dropout would draw others for parts of it."""
    adapters: dict[str, Any] = {"a": {"modules_to_save": ["ln_2"]}, "b": {}}
    names = ["a", "b", "__base__"]
    gpt = model(CONFIG.replace(resid_pdrop=0.1), **adapters).train()
    with pytest.raises(ValueError, match=r"adapter_names mixes rows with and without a LayerNorm .* or with dropout=0"):
        gpt(IDS, adapter_names=names)
    gpt.set_requires_grad("a")
    gpt(IDS, IDS, adapter_names=["a", "a", "a"])[1].backward()
    assert gpt.h[0].ln_2.modules_to_save["a"].weight.grad.any()
    mixed = model(**adapters).train()(IDS, adapter_names=names)
    torch.testing.assert_close(mixed, gpt.eval()(IDS, adapter_names=names))


def test_a_name_twice_counts_once():
    gpt = model(a={})
    once = gpt(IDS)
    gpt.set_adapter(["a", "a"])
    assert torch.equal(gpt(IDS), once) and gpt.active_adapters == ["a"]
    gpt.delete_adapter(["a", "a"])
    assert gpt.adapters is None


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "options",
    [HEAD, {"modules_to_save": ["wte"], "ensure_weight_tying": True}, {"target_modules": ["c_attn", "lm_head"]}],
)
def test_new_tokens_need_rows_in_the_copies_and_updates_too(options, merged):
    """A vocabulary that grew under them had no rows for its new tokens in them, nor after unmerging."""
    gpt = model(CONFIG.replace(vocab_size=300), a=options)
    if merged:
        gpt.merge_adapter()
    message = "new tokens: the model has adapters with a copy or an update of (wte|lm_head)"
    assert_refuses(gpt, lambda: TaskModel(gpt, "classification", ["no", "yes"]), message)
    assert_refuses(gpt, lambda: set_up_chat(gpt, BPETokenizer.train("to be or not", 258)), "new tokens")
    assert TaskModel(gpt, "classification", ["no", "yes"], special_tokens={"bos": 1, "eos": 2, "pad": 3}).gpt is gpt


def test_new_tokens_beside_updates_of_the_blocks():
    gpt = model(a={"target_modules": ["c_attn"]})
    before = gpt(IDS)
    TaskModel(gpt, "classification", ["no", "yes"])
    torch.testing.assert_close(gpt(IDS)[..., :61], before)
    gpt.merge_adapter()
    gpt.unmerge_adapter()
    torch.testing.assert_close(gpt(IDS)[..., :61], before)
